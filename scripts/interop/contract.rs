//! The contract: what layercache needs of a store, each point tried with the program itself, or
//! with the library where the program has no command or option for it yet.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use futures::TryStreamExt as _;
use layercache::cli::args;
use layercache::commands::{self, Context as Frame};
use layercache::config::Task;
use layercache::interrupt::Interrupt;
use layercache::progress::Progress;
use layercache::store::Store;
use layercache::transfer::limits::Limits;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::child;
use crate::recorder::{Exchange, Recorder};
use crate::signed;

pub const BUCKET: &str = "cache";

/// Everything that clients and servers have been seen to encode differently.
const UNUSUAL_PREFIX: &str = "a b+c%25d/ü&=(x)!*'~@$:?#[]/";
const UNUSUAL: &str = "prefix=a b+c%25d/ü&=(x)!*'~@$:?#[]/,name=main:1 ü+%2F";

/// Until LastModified, which has whole seconds, can have moved.
const A_SECOND: Duration = Duration::from_millis(1100);

/// A blob was refreshed by uploading it again, as the copy did not do it.
const SENT_AGAIN: &str = "sent again";

/// A promise, and how it is tried.
pub struct Point {
    pub name: &'static str,
    /// What there is to add to "ok"; empty if nothing.
    pub check: fn(&Peer) -> Result<&'static str>,
}

/// In the order in which they run: later ones use what earlier ones stored.
pub const POINTS: &[Point] = &[
    point("export", export),
    point("import", import),
    point("nothing sent twice", nothing_sent_twice),
    point("parts of 5.25 MiB", small_parts),
    point("parts of 64 MiB", large_parts),
    point("ranged reads", ranged_reads),
    point("refresh", refresh),
    point("refresh, multipart object", refresh_multipart),
    point("refresh in parts", refresh_in_parts),
    point("1,100 blobs", many_blobs),
    point("listing", listing),
    point("unfinished uploads", unfinished_uploads),
    point("delete", delete),
    point("delete in a batch", delete_batch),
    point("unusual keys", unusual_keys),
    point("refresh, unusual keys", refresh_unusual_keys),
    point("listing, unusual keys", list_unusual_keys),
    point("keys with //", double_slash),
    point("no cache yet", no_cache),
    point("no bucket", no_bucket),
    point("unknown key", unknown_key),
    point("wrong secret", wrong_secret),
];

const fn point(name: &'static str, check: fn(&Peer) -> Result<&'static str>) -> Point {
    Point { name, check }
}

/// The caches that are sent.
pub struct Layouts {
    /// Written by BuildKit.
    pub real: PathBuf,
    /// One layer of 40 MiB.
    pub big: PathBuf,
    /// One layer of 130 MiB.
    pub huge: PathBuf,
    /// 1,100 layers of 1 KiB.
    pub many: PathBuf,
}

/// A server under test, as the program sees it.
pub struct Peer<'a> {
    pub program: &'a Path,
    pub layouts: &'a Layouts,
    pub runtime: &'a Runtime,
    pub recorder: &'a Recorder,
    pub key: String,
    pub secret: String,
    /// For this server's imports and logs.
    pub scratch: PathBuf,
}

fn export(peer: &Peer) -> Result<&'static str> {
    let layout = &peer.layouts.real;
    peer.export(layout, "prefix=real/")?;
    let store = peer.store("prefix=real/")?;
    for (digest, size) in layers(layout)? {
        let found = peer
            .runtime
            .block_on(store.head(&format!("real/blobs/{digest}")));
        let found = found?.with_context(|| format!("{digest} is not there"))?;
        ensure!(
            found.size == size,
            "{digest} has {} bytes, not {size}",
            found.size
        );
    }
    Ok("")
}

fn import(peer: &Peer) -> Result<&'static str> {
    peer.import_equals(&peer.layouts.real, "prefix=real/")
}

fn nothing_sent_twice(peer: &Peer) -> Result<&'static str> {
    peer.recorder.recent();
    peer.export(&peer.layouts.real, "prefix=real/")?;
    let sent = blobs_sent(&peer.recorder.recent());
    ensure!(sent == 0, "{sent} blobs were sent again");
    Ok("")
}

fn small_parts(peer: &Peer) -> Result<&'static str> {
    peer.recorder.recent();
    peer.export(&peer.layouts.big, "prefix=big/")?;
    parts_had(&peer.recorder.recent(), 5_505_024)?;
    peer.import_equals(&peer.layouts.big, "prefix=big/")
}

fn large_parts(peer: &Peer) -> Result<&'static str> {
    const PART: u64 = 64 << 20;
    let limits = Limits {
        part: PART,
        ..Limits::default()
    };
    peer.recorder.recent();
    peer.export_within(limits, &peer.layouts.huge, "prefix=huge/")?;
    parts_had(&peer.recorder.recent(), PART)?;
    peer.import_equals(&peer.layouts.huge, "prefix=huge/")
}

fn ranged_reads(peer: &Peer) -> Result<&'static str> {
    let store = peer.store("prefix=real/")?;
    let read = |range| async {
        let response = store.get("real/manifests/buildkit", range, None).await?;
        let body = response.context("it is not there")?.body;
        let chunks: Vec<bytes::Bytes> = body.try_collect().await?;
        anyhow::Ok(chunks.concat())
    };
    let whole = peer.runtime.block_on(read(None))?;
    let part = peer.runtime.block_on(read(Some(20..40)))?;
    ensure!(
        part == whole[20..40],
        "20 bytes were asked for, {} others came",
        part.len()
    );
    peer.recorder.recent();
    peer.import_equals(&peer.layouts.big, "prefix=big/")?;
    let exchanges = peer.recorder.recent();
    let ranges = exchanges.iter().filter(|exchange| {
        let response = &exchange.response;
        exchange.operation() == "get-object" && response.header("content-range").is_some()
    });
    ensure!(ranges.count() > 1, "the import did not read in ranges");
    Ok("")
}

fn refresh(peer: &Peer) -> Result<&'static str> {
    peer.refreshes(&peer.layouts.real, "real/", Limits::default())
}

fn refresh_multipart(peer: &Peer) -> Result<&'static str> {
    peer.refreshes(&peer.layouts.big, "big/", Limits::default())
}

fn refresh_in_parts(peer: &Peer) -> Result<&'static str> {
    let limits = Limits {
        copy: 16 << 20,
        copy_part: 16 << 20,
        ..Limits::default()
    };
    peer.refreshes(&peer.layouts.big, "big/", limits)
}

fn many_blobs(peer: &Peer) -> Result<&'static str> {
    let layout = &peer.layouts.many;
    peer.export(layout, "prefix=many/,upload_parallelism=16")?;
    peer.recorder.recent();
    peer.export(layout, "prefix=many/")?;
    let sent = blobs_sent(&peer.recorder.recent());
    ensure!(sent == 0, "{sent} blobs were sent again");
    peer.import_equals(layout, "prefix=many/")
}

fn listing(peer: &Peer) -> Result<&'static str> {
    let listed = peer.list("many/blobs/")?;
    let digests = layers(&peer.layouts.many)?.into_iter();
    let keys = digests.map(|(digest, _)| format!("many/blobs/{digest}"));
    let missing = keys.filter(|key| !listed.contains(key)).count();
    ensure!(
        missing == 0,
        "{missing} keys were not listed, of {}",
        listed.len()
    );
    ensure!(listed.is_sorted(), "keys were not listed in order");
    Ok("")
}

fn unfinished_uploads(peer: &Peer) -> Result<&'static str> {
    const KEY: &str = "unfinished/blobs/a:b";
    let store = peer.store("prefix=unfinished/")?;
    peer.runtime.block_on(async {
        let id = store.create_upload(KEY, None).await?;
        let part = Arc::new(Zeros(5 << 20));
        let etag = store.upload_part(KEY, &id, 1, part).await?;
        let parts = store.list_parts(KEY, &id).await?;
        let [part] = &parts[..] else {
            bail!("{} parts are listed, not 1", parts.len());
        };
        ensure!(
            (part.number, part.size) == (1, 5 << 20),
            "part {} of {} bytes is listed",
            part.number,
            part.size
        );
        let same = |etag: &str| etag.trim_matches('"').to_owned();
        ensure!(
            same(&part.etag) == same(&etag),
            "the part's ETag is {etag}, listed as {}",
            part.etag
        );
        let listed = store.list_uploads("unfinished/").await?;
        ensure!(
            listed
                .iter()
                .any(|upload| upload.id == id && upload.key == KEY),
            "the upload is not listed"
        );
        store.abort_upload(KEY, &id).await?;
        let listed = store.list_uploads("unfinished/").await?;
        ensure!(listed.is_empty(), "the aborted upload is still listed");
        Ok("")
    })
}

fn delete(peer: &Peer) -> Result<&'static str> {
    let layout = &peer.layouts.real;
    let (digest, _) = layers(layout)?.swap_remove(0);
    let (status, body) = peer.send(
        "DELETE",
        &format!("/{BUCKET}/real/blobs/{}", digest.replace(':', "%3A")),
        "",
    )?;
    ensure!(matches!(status, 200 | 204), "{status}: {body}");
    let store = peer.store("prefix=real/")?;
    let key = format!("real/blobs/{digest}");
    let found = peer.runtime.block_on(store.head(&key))?;
    ensure!(found.is_none(), "the object is still there");
    peer.recorder.recent();
    peer.export(layout, "prefix=real/")?;
    let sent = blobs_sent(&peer.recorder.recent());
    ensure!(
        sent == 1,
        "the next export sent {sent} blobs, not the one that was deleted"
    );
    Ok("")
}

fn delete_batch(peer: &Peer) -> Result<&'static str> {
    let layout = &peer.layouts.many;
    let keys: Vec<String> = layers(layout)?
        .into_iter()
        .take(3)
        .map(|(digest, _)| format!("many/blobs/{digest}"))
        .collect();
    let objects: String = keys
        .iter()
        .map(|key| format!("<Object><Key>{key}</Key></Object>"))
        .collect();
    let body = format!(
        "<Delete xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Quiet>true</Quiet>{objects}</Delete>"
    );
    let (status, answer) = peer.send("POST", &format!("/{BUCKET}?delete="), &body)?;
    ensure!(
        status == 200 && !answer.contains("<Error>"),
        "{status}: {answer}"
    );
    let store = peer.store("prefix=many/")?;
    for key in keys {
        let found = peer.runtime.block_on(store.head(&key))?;
        ensure!(found.is_none(), "{key} is still there");
    }
    Ok("")
}

fn unusual_keys(peer: &Peer) -> Result<&'static str> {
    peer.export(&peer.layouts.real, UNUSUAL)?;
    peer.import_equals(&peer.layouts.real, UNUSUAL)
}

fn refresh_unusual_keys(peer: &Peer) -> Result<&'static str> {
    std::thread::sleep(A_SECOND);
    peer.recorder.recent();
    peer.export(&peer.layouts.real, &format!("{UNUSUAL},touch_refresh=0s"))?;
    let sent = blobs_sent(&peer.recorder.recent());
    peer.import_equals(&peer.layouts.real, UNUSUAL)?;
    Ok(if sent > 0 { SENT_AGAIN } else { "" })
}

fn list_unusual_keys(peer: &Peer) -> Result<&'static str> {
    let listed = peer.list(UNUSUAL_PREFIX)?;
    for (digest, _) in layers(&peer.layouts.real)? {
        let key = format!("{UNUSUAL_PREFIX}blobs/{digest}");
        ensure!(
            listed.contains(&key),
            "{key} was not listed, but {listed:?}"
        );
    }
    Ok("")
}

fn double_slash(peer: &Peer) -> Result<&'static str> {
    peer.export(&peer.layouts.real, "prefix=a//b/")?;
    peer.import_equals(&peer.layouts.real, "prefix=a//b/")
}

fn no_cache(peer: &Peer) -> Result<&'static str> {
    let output = peer.output("import", "prefix=real/,name=absent", &peer.fresh()?)?;
    ensure!(
        output.succeeded,
        "the import failed: {}",
        output.last_line()
    );
    ensure!(
        output.text.contains(" yet: nothing imported"),
        "it did not say that there is no cache yet: {}",
        output.last_line()
    );
    Ok("")
}

fn no_bucket(peer: &Peer) -> Result<&'static str> {
    let spec = peer.spec("").replace(BUCKET, "absent");
    peer.fail(&spec, &["bucket"])
}

fn unknown_key(peer: &Peer) -> Result<&'static str> {
    let spec = peer.spec("prefix=denied/").replace(
        &format!("access_key_id={}", peer.key),
        "access_key_id=AKIAUNKNOWNEXAMPLE",
    );
    peer.fail(&spec, &["key"])
}

fn wrong_secret(peer: &Peer) -> Result<&'static str> {
    let spec = peer.spec("prefix=denied/").replace(
        &format!("secret_access_key={}", peer.secret),
        "secret_access_key=wrong",
    );
    peer.fail(&spec, &["secret", "keys"])
}

impl Peer<'_> {
    /// `extra`: what is to be added, or override the name.
    fn spec(&self, extra: &str) -> String {
        let comma = if extra.is_empty() { "" } else { "," };
        format!(
            "type=s3,region=us-east-1,bucket={BUCKET},endpoint_url=http://{},use_path_style=true,\
             access_key_id={},secret_access_key={}{comma}{extra}",
            self.recorder.address, self.key, self.secret
        )
    }

    pub fn send(&self, method: &str, target: &str, body: &str) -> Result<(u16, String)> {
        let credentials = (self.key.as_str(), self.secret.as_str());
        signed::send(self.recorder.address, credentials, method, target, body)
    }

    fn export(&self, layout: &Path, extra: &str) -> Result<()> {
        let output = self.output("export", extra, layout)?;
        ensure!(output.succeeded, "{}", output.last_line());
        Ok(())
    }

    /// Exports with the library, at other sizes than the program's.
    fn export_within(&self, limits: Limits, layout: &Path, extra: &str) -> Result<()> {
        let task = self.task(layout, &format!("{extra},mode=max"))?;
        let frame = Frame {
            connect: &|config, progress| {
                Box::pin(layercache::s3::connect(config, progress.clone()))
            },
            limits,
            interrupt: &Interrupt::never(),
            progress: &Progress::silent(),
        };
        let outcome = self.runtime.block_on(commands::perform(&task, &frame));
        match outcome.errors.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn task(&self, layout: &Path, extra: &str) -> Result<Task> {
        let spec = self.spec(extra);
        let typed = ["layercache", "export", "--cache-to", &spec].map(Into::into);
        let typed = typed.into_iter().chain([layout.as_os_str().to_owned()]);
        let (task, _) = args::resolve(args::parse(typed)?, &|_| None)?;
        Ok(task)
    }

    fn store(&self, extra: &str) -> Result<Arc<dyn Store>> {
        let Task::Export(task) = self.task(&self.layouts.real, extra)? else {
            bail!("not an export");
        };
        let config = &task.targets[0].s3;
        self.runtime
            .block_on(layercache::s3::connect(config, Progress::silent()))
    }

    /// All keys that begin with `prefix`, page by page.
    fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let store = self.store("")?;
        let (mut listed, mut next) = (Vec::new(), None);
        loop {
            let page = self.runtime.block_on(store.list(prefix, next.as_deref()))?;
            listed.extend(page.objects.into_iter().map(|(key, _)| key));
            next = page.next;
            if next.is_none() {
                return Ok(listed);
            }
        }
    }

    /// Imports into a new directory, which must then hold just what `layout` holds.
    fn import_equals(&self, layout: &Path, extra: &str) -> Result<&'static str> {
        let copy = self.fresh()?;
        let output = self.output("import", extra, &copy)?;
        ensure!(output.succeeded, "{}", output.last_line());
        let (expected, got) = (files(layout)?, files(&copy)?);
        for name in &expected {
            ensure!(got.contains(name), "{} was not imported", name.display());
            let same = fs::read(layout.join(name))? == fs::read(copy.join(name))?;
            ensure!(same, "{} came back changed", name.display());
        }
        if let Some(name) = got.difference(&expected).next() {
            bail!("{} was imported as well", name.display());
        }
        fs::remove_dir_all(&copy)?;
        Ok("")
    }

    /// Exports `layout` again with all its blobs due for a refresh: afterwards each is newer, and
    /// the same.
    fn refreshes(&self, layout: &Path, prefix: &str, limits: Limits) -> Result<&'static str> {
        let before = self.modified(layout, prefix)?;
        std::thread::sleep(A_SECOND);
        let extra = format!("prefix={prefix},touch_refresh=0s");
        self.recorder.recent();
        if limits.copy == Limits::default().copy {
            self.export(layout, &extra)?;
        } else {
            self.export_within(limits, layout, &extra)?;
        }
        let sent = blobs_sent(&self.recorder.recent());
        self.import_equals(layout, &format!("prefix={prefix}"))?;
        let after = self.modified(layout, prefix)?;
        let moved = before
            .iter()
            .zip(&after)
            .all(|(before, after)| before < after);
        ensure!(moved, "LastModified did not move");
        Ok(if sent > 0 { SENT_AGAIN } else { "" })
    }

    fn modified(&self, layout: &Path, prefix: &str) -> Result<Vec<SystemTime>> {
        let store = self.store(&format!("prefix={prefix}"))?;
        let mut times = Vec::new();
        for (digest, _) in layers(layout)? {
            let key = format!("{prefix}blobs/{digest}");
            let found = self.runtime.block_on(store.head(&key))?;
            let found = found.with_context(|| format!("{key} is not there"))?;
            times.push(found.last_modified.context("no LastModified")?);
        }
        Ok(times)
    }

    /// An export to `spec` and an import from it must fail, with errors that hold one of `words`.
    fn fail(&self, spec: &str, words: &[&str]) -> Result<&'static str> {
        for (verb, layout) in [("export", &self.layouts.real), ("import", &self.fresh()?)] {
            let output = self.output_of(verb, spec, layout)?;
            ensure!(!output.succeeded, "the {verb} succeeded");
            let error = output.last_line();
            let says = words.iter().any(|word| error.contains(word));
            ensure!(says, "the {verb} does not say why: {error}");
        }
        Ok("")
    }

    fn output(&self, verb: &str, extra: &str, layout: &Path) -> Result<Output> {
        let mode = if verb == "export" { ",mode=max" } else { "" };
        self.output_of(verb, &format!("{}{mode}", self.spec(extra)), layout)
    }

    /// Runs the program, without anything of the user's settings.
    fn output_of(&self, verb: &str, spec: &str, layout: &Path) -> Result<Output> {
        let log = self.scratch.join("log");
        let flag = if verb == "export" {
            "--cache-to"
        } else {
            "--cache-from"
        };
        let mut command = Command::new(self.program);
        command
            .env_clear()
            .env("HOME", &self.scratch)
            .args([verb, "--progress", "plain", flag, spec])
            .arg(layout);
        let succeeded = child::run(command, &log);
        Ok(Output {
            text: fs::read_to_string(&log)?,
            succeeded: succeeded.is_ok(),
        })
    }

    fn fresh(&self) -> Result<PathBuf> {
        let dir = self.scratch.join("imported");
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        Ok(dir)
    }
}

struct Output {
    /// All of stderr.
    text: String,
    succeeded: bool,
}

impl Output {
    /// The error, if there is one.
    fn last_line(&self) -> &str {
        let mut lines = self.text.lines().rev().filter(|line| !line.is_empty());
        lines.next().unwrap_or("no message")
    }
}

fn blobs_sent(exchanges: &[Exchange]) -> usize {
    let starts = ["put-object", "create-multipart-upload"];
    let sent = exchanges.iter().filter(|exchange| {
        // A refresh in parts creates an upload, too, whose parts are copied.
        let copied = || {
            exchanges.iter().any(|other| {
                let same = other.target().split('?').next() == exchange.target().split('?').next();
                let part = other.operation() == "upload-part-copy";
                same && part && other.text().contains("<CopyPartResult")
            })
        };
        starts.contains(&exchange.operation()) && exchange.target().contains("blobs/") && !copied()
    });
    sent.count()
}

/// That an object was sent in several parts of `size`, the last of which may be smaller.
fn parts_had(exchanges: &[Exchange], size: u64) -> Result<()> {
    let mut sizes: Vec<u64> = exchanges
        .iter()
        .filter(|exchange| exchange.operation() == "upload-part")
        .filter_map(|exchange| exchange.request.header("content-length")?.parse().ok())
        .collect();
    sizes.sort();
    ensure!(
        sizes.len() > 1 && sizes[1..].iter().all(|part| *part == size),
        "parts of {sizes:?} bytes were sent"
    );
    Ok(())
}

/// Digests and sizes of the layers that a layout's only manifest names.
fn layers(layout: &Path) -> Result<Vec<(String, u64)>> {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let manifest = digest(&index["manifests"][0])?.replace(':', "/");
    let manifest = fs::read(layout.join("blobs").join(manifest))?;
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let layers = manifest["layers"].as_array().context("no layers")?;
    let layers = layers.iter().map(|layer| {
        let size = layer["size"].as_u64().context("a layer without a size")?;
        Ok((digest(layer)?, size))
    });
    layers.collect()
}

fn digest(descriptor: &Value) -> Result<String> {
    let digest = descriptor["digest"].as_str();
    Ok(digest.context("a descriptor without a digest")?.to_owned())
}

/// Paths below `layout` of the files that make it up.
fn files(layout: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::from([PathBuf::from("index.json"), PathBuf::from("oci-layout")]);
    for entry in fs::read_dir(layout.join("blobs/sha256"))? {
        found.insert(Path::new("blobs/sha256").join(entry?.file_name()));
    }
    Ok(found)
}

/// A body of so many zero bytes.
struct Zeros(u64);

impl layercache::store::UploadBody for Zeros {
    fn len(&self) -> u64 {
        self.0
    }

    fn is_empty(&self) -> bool {
        self.0 == 0
    }

    fn sha256(&self) -> Option<layercache::cache::digest::Digest> {
        None
    }

    fn open(&self) -> layercache::store::ByteStream {
        let chunk = bytes::Bytes::from(vec![0; self.0 as usize]);
        Box::pin(futures::stream::iter([Ok(chunk)]))
    }
}
