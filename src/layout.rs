//! A local OCI image layout: read whole or in part, and written so that readers never see anything
//! unfinished. Knows nothing of S3.
//!
//! Layouts come from other programs and other people: names are looked up without following symlinks
//! (`dir`), entries that cannot be understood are skipped (`index`), the lock is BuildKit's (`lock`),
//! and whatever is written is staged and synced first (`staging`).

mod damaged;
mod dir;
mod index;
mod lock;
mod prune;
mod reachable;
mod read;
mod space;
mod staging;
mod tag;
#[cfg(test)]
mod tests;
mod write;

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use self::dir::{Dir, READ};
use self::index::IndexJson;
use self::lock::{INDEX_LOCK, IndexLock};
pub use self::prune::{Dangling, Orphan, PrunePlan, Pruned};
pub use self::staging::Staged;
use self::staging::{Held, STAGING};
pub use self::tag::{Tagged, check_tag, tag_of};
pub use self::write::Published;
use crate::cache::DOCUMENT_LIMIT;
use crate::cache::digest::{Digest, Hasher};
use crate::cache::oci::{DOCKER_LIST, DOCKER_MANIFEST, Descriptor, IMAGE_INDEX, IMAGE_MANIFEST};
use crate::config::Selection;
use crate::quote::quoted;

const INDEX: &str = "index.json";
const OCI_LAYOUT: &str = "oci-layout";
const BLOBS: &str = "blobs";
const SHA256: &str = "sha256";

/// The contents of `oci-layout`, byte for byte as BuildKit writes it.
const OCI_LAYOUT_JSON: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// Bytes; real ones have 30.
const OCI_LAYOUT_LIMIT: u64 = 64 << 10;

/// What an unfinished layout may contain, whether we or BuildKit's content store began it.
const UNFINISHED: [&str; 6] = [BLOBS, "ingest", STAGING, INDEX, INDEX_LOCK, OCI_LAYOUT];

/// An entry of `index.json`: its tag or full name, if it has one, and its descriptor or why it cannot be
/// used.
pub type NamedEntry = (Option<String>, Result<Descriptor, String>);

/// A layout's directory. Opening it neither locks nor changes anything.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
    lock_wait: Duration,
}

impl Layout {
    /// Opens an existing layout for reading. `lock_wait` is how long another process may hold its locks.
    ///
    /// # Errors
    /// There is no `oci-layout` of version 1.x, or no `index.json`.
    pub fn open(root: &Path, lock_wait: Duration) -> Result<Self> {
        let layout = Layout {
            root: root.to_owned(),
            lock_wait,
        };
        let dir = layout.open_root()?;
        if !check_version(&dir)? {
            bail!(
                "{} is not an OCI layout: it has no file {OCI_LAYOUT}",
                root.display()
            );
        }
        if dir.open_file(INDEX, READ)?.is_none() {
            bail!(
                "{} is an OCI layout without {INDEX}: nothing was ever put into it",
                root.display()
            );
        }
        layout.blobs(&dir)?;
        Ok(layout)
    }

    /// Opens a layout to import into. Writes nothing yet.
    ///
    /// # Errors
    /// The directory exists, is not a layout, and holds more than an interrupted import
    /// leaves; or its index is damaged.
    pub fn open_for_import(root: &Path, lock_wait: Duration) -> Result<Self> {
        let layout = Layout {
            root: root.to_owned(),
            lock_wait,
        };
        if let Err(error) = root.metadata()
            && error.kind() == ErrorKind::NotFound
        {
            if root.is_symlink() {
                bail!("{} is a symlink to nothing", root.display());
            }
            return Ok(layout);
        }
        let dir = layout.open_root()?;
        let foreign = |name: &String| !UNFINISHED.contains(&name.as_str());
        if !check_version(&dir)? && dir.list()?.iter().any(foreign) {
            bail!(
                "{} is not empty and not an OCI layout (no file {OCI_LAYOUT}): name another directory",
                root.display()
            );
        }
        layout.blobs(&dir)?;
        dir.subdir(STAGING)?;
        // A damaged index must show before anything is downloaded. BuildKit writes it in place, so look
        // again under the lock.
        if read_index(&dir).is_err() {
            let _lock = IndexLock::shared(&dir, lock_wait)?;
            read_index(&dir)?;
        }
        Ok(layout)
    }

    /// The entry of `index.json` that `selection` means. A digest may also be that of a manifest which no
    /// entry names. The manifest's blob is there; its bytes are not verified yet.
    ///
    /// # Errors
    /// There is no such entry; the error lists those that are there.
    pub fn select(&self, selection: &Selection) -> Result<Descriptor> {
        let root = self.open_root()?;
        let index = {
            let _lock = IndexLock::shared(&root, self.lock_wait)?;
            read_index(&root)?
        };
        let path = root.path_of(INDEX);
        let Some(index) = index else {
            bail!("{} is absent or empty", path.display());
        };
        let selected = index
            .select(selection)
            .with_context(|| format!("cannot choose from {}", path.display()))?;
        match (selected, selection) {
            (Some((entry, label)), _) => {
                let blob = match self.blobs(&root)? {
                    Some(blobs) => blobs.stat(&entry.digest.hex())?,
                    None => None,
                };
                if blob.is_none() {
                    bail!(
                        "{} names {} for {label}, but the blob is not in the layout",
                        path.display(),
                        entry.digest
                    );
                }
                Ok(entry)
            }
            (None, Selection::Digest(digest)) => {
                self.unnamed_manifest(&root, digest)?.with_context(|| {
                    format!(
                        "{digest} is neither in {} nor a blob of the layout; of the index: {}",
                        path.display(),
                        index.listing()
                    )
                })
            }
            (None, _) => bail!("{} has no such entry", path.display()),
        }
    }

    /// The entries of `index.json`, in their order.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn entries(&self) -> Result<Vec<NamedEntry>> {
        let root = self.open_root()?;
        let _lock = IndexLock::shared(&root, self.lock_wait)?;
        Ok(read_index(&root)?.map_or_else(Vec::new, |index| index.named()))
    }

    /// A descriptor derived from the manifest itself.
    fn unnamed_manifest(&self, root: &Dir, digest: &Digest) -> Result<Option<Descriptor>> {
        #[derive(Deserialize)]
        struct Typed {
            #[serde(rename = "mediaType")]
            media_type: String,
        }
        let Some(blobs) = self.blobs(root)? else {
            return Ok(None);
        };
        let Some(size) = blobs.file_size(&digest.hex())? else {
            return Ok(None);
        };
        let mut descriptor = Descriptor::new("", *digest, size);
        let bytes = self.read_document(&descriptor)?;
        descriptor.media_type = serde_json::from_slice::<Typed>(&bytes)
            .ok()
            .map(|typed| typed.media_type)
            .filter(|found| {
                [IMAGE_MANIFEST, IMAGE_INDEX, DOCKER_MANIFEST, DOCKER_LIST]
                    .contains(&found.as_str())
            })
            .with_context(|| {
                format!("blob {digest} is not a manifest: it has no mediaType that says so")
            })?;
        Ok(Some(descriptor))
    }

    /// Reads a whole small blob, verifying its size and digest.
    ///
    /// # Errors
    /// It is absent, damaged, or larger than [`DOCUMENT_LIMIT`].
    pub fn read_document(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let Descriptor { digest, size, .. } = descriptor;
        if *size > DOCUMENT_LIMIT {
            bail!(
                "document {digest} has {size} bytes, more than the {DOCUMENT_LIMIT} that are read"
            );
        }
        let file = self.open_blob(digest, *size)?;
        let bytes = read_whole(file, *size)
            .with_context(|| format!("cannot read blob {digest} of {}", self.root.display()))?;
        let found = Digest::of(&bytes);
        if found != *digest {
            bail!(
                "blob {digest} of {} is damaged: its bytes hash to {found}",
                self.root.display()
            );
        }
        Ok(bytes)
    }

    /// Opens a blob for reading. Its bytes are not verified yet.
    ///
    /// # Errors
    /// It is not a regular file of `size` bytes.
    pub fn open_blob(&self, digest: &Digest, size: u64) -> Result<File> {
        let root = self.open_root()?;
        let file = match self.blobs(&root)? {
            Some(blobs) => blobs.open_file(&digest.hex(), READ)?,
            None => None,
        };
        let Some(file) = file else {
            bail!(
                "blob {digest} is not in {}: the layout is incomplete (was it pruned, or copied in part?)",
                self.root.display()
            );
        };
        let length = file
            .metadata()
            .with_context(|| format!("cannot look at blob {digest} of {}", self.root.display()))?
            .len();
        if length != size {
            bail!(
                "{} is damaged: it has {length} bytes where its descriptor says {size}",
                self.blob_path(digest).display()
            );
        }
        Ok(file)
    }

    /// Where a blob is or would be, for messages.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join(BLOBS).join(SHA256).join(digest.hex())
    }

    /// Whether the blob is there: a file under its name, which files get only once verified, with this
    /// size in bytes. A file of another size is damaged, and counts as absent.
    pub fn has_blob(&self, digest: &Digest, size: u64) -> bool {
        self.blob_size(digest)
            .is_ok_and(|found| found == Some(size))
    }

    /// Bytes of the file under the blob's name. `None`: there is none.
    ///
    /// # Errors
    /// The file system's.
    pub fn blob_size(&self, digest: &Digest) -> Result<Option<u64>> {
        let Some(root) = self.existing_root()? else {
            return Ok(None);
        };
        match self.blobs(&root)? {
            Some(blobs) => blobs.file_size(&digest.hex()),
            None => Ok(None),
        }
    }

    /// Whether the blob is there with this size in bytes, and its bytes hash to its digest. Calls `read`
    /// with the number of bytes of each step.
    ///
    /// # Errors
    /// It is there but cannot be read.
    pub fn verify_blob(&self, digest: &Digest, size: u64, read: impl FnMut(u64)) -> Result<bool> {
        if self.blob_size(digest)? != Some(size) {
            return Ok(false);
        }
        let file = self.open_blob(digest, size)?;
        #[cfg(target_os = "linux")]
        // Only a hint; it does not matter if the file system ignores it.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
        let mut hasher = Hasher::default();
        hasher
            .consume(file, read)
            .with_context(|| format!("cannot read blob {digest} of {}", self.root.display()))?;
        Ok(hasher.digest() == *digest)
    }

    /// Creates the directories in which blobs are staged and kept.
    ///
    /// # Errors
    /// They cannot be written to, or files cannot be renamed from one to the other.
    pub fn prepare(&self) -> Result<()> {
        let missing: Vec<&Path> = self
            .root
            .ancestors()
            .take_while(|path| !path.as_os_str().is_empty() && !path.exists())
            .collect();
        std::fs::create_dir_all(&self.root)
            .with_context(|| format!("cannot create directory {}", self.root.display()))?;
        for path in missing {
            let parent = match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            // If we cannot open the parent, we did not create it.
            if let Ok(parent) = Dir::open(parent) {
                parent.sync()?;
            }
        }
        let root = self.open_root()?;
        root.require_writable()?;
        let (blobs, made) = self.make_blobs(&root)?;
        blobs.require_writable()?;
        let (staging, _) = root.make_subdir(STAGING)?;
        staging.require_writable()?;
        if !staging.is_on_mount_of(&blobs)? {
            bail!(dir::other_mount(&self.root.join(BLOBS)));
        }
        if made { root.sync() } else { Ok(()) }
    }

    /// Writes a small blob, synced as the others, unless it is there already.
    ///
    /// # Errors
    /// `bytes` do not hash to `digest`, or cannot be written.
    pub fn write_document(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        let found = Digest::of(bytes);
        if found != *digest {
            bail!("the document for {digest} hashes to {found}: not written");
        }
        let size = u64::try_from(bytes.len()).context("a document's size")?;
        // Small enough to verify, so a damaged one is replaced.
        if self.verify_blob(digest, size, |_| {})? {
            return Ok(());
        }
        let root = self.open_root()?;
        let mut held = Held::take(self, &root, &digest.hex(), || {})?;
        if self.verify_blob(digest, size, |_| {})? {
            return held.discard();
        }
        let (blobs, _) = self.make_blobs(&root)?;
        held.fill(bytes, None)?;
        held.rename(&blobs, &digest.hex())
    }

    /// The layout's directory, if it exists.
    fn existing_root(&self) -> Result<Option<Dir>> {
        match Dir::open(&self.root) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            root => root.map(Some).map_err(|error| self.cannot_open(error)),
        }
    }

    fn open_root(&self) -> Result<Dir> {
        Dir::open(&self.root).map_err(|error| self.cannot_open(error))
    }

    fn cannot_open(&self, error: std::io::Error) -> anyhow::Error {
        let root = self.root.display();
        match error.kind() {
            ErrorKind::NotFound => anyhow!("no OCI layout at {root}: no such directory"),
            ErrorKind::NotADirectory => anyhow!(
                "{root} is not a directory, as an OCI layout is (an archive must be unpacked first)"
            ),
            _ => anyhow::Error::new(error).context(format!("cannot open layout {root}")),
        }
    }

    /// Replaces `index.json` atomically, keeping its permissions. False if the lock was lost: nothing is
    /// changed then.
    fn replace_index(&self, root: &Dir, lock: &IndexLock, index: &IndexJson) -> Result<bool> {
        let mode = root
            .stat(INDEX)?
            .map(|stat| rustix::fs::Mode::from_raw_mode(stat.st_mode));
        let mut held = Held::take(self, root, INDEX, || {})?;
        held.fill(&index.to_json()?, mode)?;
        if !lock.holds()? {
            held.discard()?;
            return Ok(false);
        }
        held.rename(root, INDEX)?;
        Ok(true)
    }

    /// The directory of the blobs, if it exists.
    fn blobs(&self, root: &Dir) -> Result<Option<Dir>> {
        match root.subdir(BLOBS)? {
            Some(blobs) => blobs.subdir(SHA256),
            None => Ok(None),
        }
    }

    /// The directory of the blobs, created if absent; and whether it was created.
    fn make_blobs(&self, root: &Dir) -> Result<(Dir, bool)> {
        let (blobs, new) = root.make_subdir(BLOBS)?;
        let (sha256, new_too) = blobs.make_subdir(SHA256)?;
        if new_too {
            blobs.sync()?;
        }
        Ok((sha256, new || new_too))
    }
}

/// Whether there is an `oci-layout`; an error if it is of an unknown version.
fn check_version(root: &Dir) -> Result<bool> {
    #[derive(Deserialize)]
    struct Version {
        #[serde(rename = "imageLayoutVersion")]
        version: String,
    }
    let Some(file) = root.open_file(OCI_LAYOUT, READ)? else {
        return Ok(false);
    };
    let path = root.path_of(OCI_LAYOUT);
    let bytes = read_at_most(file, OCI_LAYOUT_LIMIT)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let Version { version } = serde_json::from_slice(&bytes)
        .with_context(|| format!("{} says no imageLayoutVersion", path.display()))?;
    if !version.starts_with("1.") {
        bail!(
            "{} has imageLayoutVersion {}; only 1.x is known",
            path.display(),
            quoted(&version)
        );
    }
    Ok(true)
}

/// `index.json`, if it is there. An empty one counts as absent: that is how BuildKit creates it.
fn read_index(root: &Dir) -> Result<Option<IndexJson>> {
    let Some(file) = root.open_file(INDEX, READ)? else {
        return Ok(None);
    };
    let path = root.path_of(INDEX);
    let bytes = read_at_most(file, DOCUMENT_LIMIT)
        .with_context(|| format!("cannot read {}", path.display()))?;
    if bytes.is_empty() {
        return Ok(None);
    }
    let index =
        IndexJson::parse(&bytes).with_context(|| format!("cannot parse {}", path.display()))?;
    Ok(Some(index))
}

fn read_at_most(file: File, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len())? > limit {
        bail!("it has more than {limit} bytes");
    }
    Ok(bytes)
}

/// Reads a file that had `size` bytes when it was opened, and must still have them.
fn read_whole(file: File, size: u64) -> Result<Vec<u8>> {
    let bytes = read_at_most(file, size)?;
    if u64::try_from(bytes.len())? != size {
        bail!("it has become shorter while it was read");
    }
    Ok(bytes)
}
