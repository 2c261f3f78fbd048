//! Synthetic caches, as BuildKit's `--cache-to type=local,mode=max` writes them: an image manifest
//! whose config is the cache config. The layers are incompressible, and the same in every run.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use layercache::cache::digest::{Digest, Hasher};
use serde_json::{Map, Value, json};

pub struct Layout {
    pub dir: PathBuf,
    pub layers: usize,
    /// Bytes of all layers.
    pub bytes: u64,
    /// The modification time of every blob (Unix seconds). Whole seconds in the past: a client that
    /// compares times at another precision would otherwise send files again.
    pub mtime: u64,
}

/// xoshiro256++: fast, and random enough to be incompressible.
pub struct Random([u64; 4]);

impl Random {
    pub fn new(seed: u64) -> Self {
        let mut state = seed;
        // Seeded with splitmix64, as the generator's authors recommend.
        Random(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = state;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^ (word >> 31)
        }))
    }

    fn next(&mut self) -> u64 {
        let state = &mut self.0;
        let word = state[0]
            .wrapping_add(state[3])
            .rotate_left(23)
            .wrapping_add(state[0]);
        let shifted = state[1] << 17;
        state[2] ^= state[0];
        state[3] ^= state[1];
        state[1] ^= state[2];
        state[0] ^= state[3];
        state[2] ^= shifted;
        state[3] = state[3].rotate_left(45);
        word
    }

    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// The number of layers in a branch, each the parent of the next.
const CHAIN: usize = 10;
const CREATED_AT: &str = "2026-01-02T03:04:05.678901234Z";

/// Writes a layout with `layers` layers of `size` bytes each to `dir`, all blobs modified at `mtime`.
pub fn write(dir: &Path, layers: usize, size: u64, mtime: u64) -> Result<()> {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let mut buffer = vec![0; 1 << 20];
    let mut digests = Vec::with_capacity(layers);
    for number in 0..layers {
        let mut random = Random::new(number as u64 ^ size.rotate_left(32));
        let draft = blobs.join("draft");
        let mut file = File::create(&draft).with_context(|| format!("writing {draft:?}"))?;
        let mut hasher = Hasher::default();
        let mut left = size;
        while left > 0 {
            let take = left.min(buffer.len() as u64) as usize;
            random.fill(&mut buffer[..take]);
            hasher.update(&buffer[..take]);
            file.write_all(&buffer[..take])?;
            left -= take as u64;
        }
        let digest = hasher.digest();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(mtime))?;
        fs::rename(&draft, blobs.join(digest.hex()))?;
        digests.push(digest);
    }
    digests.sort();

    let mut descriptors = Vec::with_capacity(layers);
    let (mut nodes, mut records) = (Vec::with_capacity(layers), Vec::with_capacity(layers));
    for (at, digest) in digests.iter().enumerate() {
        descriptors.push(json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": digest, "size": size,
            // An uncompressed layer is its own diffID.
            "annotations": {"buildkit/createdat": CREATED_AT, "containerd.io/uncompressed": digest},
        }));
        let mut node = Map::new();
        node.insert("blob".into(), json!(digest));
        match at.checked_sub(1) {
            Some(0) if !at.is_multiple_of(CHAIN) => {} // Go leaves a parent of 0 out.
            Some(parent) if !at.is_multiple_of(CHAIN) => {
                node.insert("parent".into(), json!(parent));
            }
            _ => {
                node.insert("parent".into(), json!(-1));
            }
        }
        nodes.push(Value::Object(node));
        let mut record = Map::new();
        let result = json!([{"layer": at, "createdAt": CREATED_AT}]);
        record.insert("layers".into(), result);
        let key = Digest::of(format!("record {at}").as_bytes());
        record.insert("digest".into(), json!(key));
        if !at.is_multiple_of(CHAIN) {
            record.insert("inputs".into(), json!([[{"link": at - 1}]]));
        }
        records.push(Value::Object(record));
    }
    let document = |value: Value| -> Result<(Digest, usize)> {
        let bytes = serde_json::to_vec(&value)?;
        let digest = Digest::of(&bytes);
        let path = blobs.join(digest.hex());
        fs::write(&path, &bytes)?;
        let file = File::options().write(true).open(&path)?;
        file.set_modified(UNIX_EPOCH + Duration::from_secs(mtime))?;
        Ok((digest, bytes.len()))
    };
    let (config, length) = document(json!({"layers": nodes, "records": records}))?;
    let (manifest, manifest_length) = document(json!({
        "schemaVersion": 2,
        "mediaType": layercache::cache::oci::IMAGE_MANIFEST,
        "config": {"mediaType": layercache::cache::oci::CACHE_CONFIG, "digest": config, "size": length},
        "layers": descriptors,
    }))?;
    fs::write(
        dir.join("index.json"),
        serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": layercache::cache::oci::IMAGE_INDEX,
            "manifests": [{
                "mediaType": layercache::cache::oci::IMAGE_MANIFEST,
                "digest": manifest, "size": manifest_length,
                "annotations": {layercache::cache::oci::REF_NAME: "latest"},
            }],
        }))?,
    )?;
    let version = br#"{"imageLayoutVersion":"1.0.0"}"#;
    fs::write(dir.join("oci-layout"), version)?;
    Ok(())
}

impl Layout {
    /// Writes a layout in another process: the peak memory that the system reports for a child is at
    /// least what its parent had when it forked, so the runner has to stay small.
    pub fn make(dir: PathBuf, layers: usize, size: u64, scratch: &Path) -> Result<Self> {
        let mtime = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() - 60;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("layout").arg(&dir).args([
            layers.to_string(),
            size.to_string(),
            mtime.to_string(),
        ]);
        crate::child::run(command, &scratch.join("log"))?;
        Ok(Layout {
            dir,
            layers,
            bytes: layers as u64 * size,
            mtime,
        })
    }

    pub fn blobs(&self) -> PathBuf {
        self.dir.join("blobs/sha256")
    }

    /// Copies the blobs with their modification times, as an earlier download of a peer would.
    pub fn copy_blobs(&self, to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(self.blobs())? {
            let entry = entry?;
            let copy = to.join(entry.file_name());
            fs::copy(entry.path(), &copy)?;
            File::options()
                .write(true)
                .open(&copy)?
                .set_modified(entry.metadata()?.modified()?)?;
        }
        Ok(())
    }

    /// Fails unless all layers are below `dir`, by number and bytes. It does not hash what a peer
    /// fetched.
    pub fn check_arrived(&self, dir: &Path) -> Result<()> {
        fn count(dir: &Path, files: &mut usize, bytes: &mut u64) -> Result<()> {
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    count(&entry.path(), files, bytes)?;
                } else if entry.file_name().len() == 64 {
                    *files += 1;
                    *bytes += entry.metadata()?.len();
                }
            }
            Ok(())
        }
        let (mut files, mut bytes) = (0, 0);
        if dir.exists() {
            count(dir, &mut files, &mut bytes)?;
        }
        self.check(files, bytes)
    }

    /// Fails if `blobs` and `bytes` are too few to be this cache.
    pub fn check(&self, blobs: usize, bytes: u64) -> Result<()> {
        anyhow::ensure!(
            blobs >= self.layers && bytes >= self.bytes,
            "{blobs} blobs of {bytes} bytes arrived, of {} layers of {} bytes",
            self.layers,
            self.bytes
        );
        Ok(())
    }
}
