//! A server under test, and what is done with it: by the program, run as a user would, or by the library.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use layercache::cli::args::{self, Asked};
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

/// Until LastModified, which has whole seconds, can have moved.
pub const A_SECOND: Duration = Duration::from_millis(1100);

/// A blob was refreshed by uploading it again, as the copy did not do it.
pub const SENT_AGAIN: &str = "sent again";

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

impl Peer<'_> {
    /// `extra`: what is to be added, or override the name.
    pub fn spec(&self, extra: &str) -> String {
        let comma = if extra.is_empty() { "" } else { "," };
        format!(
            "type=s3,region=us-east-1,bucket={BUCKET},endpoint_url=http://{},use_path_style=true,\
             access_key_id={},secret_access_key={}{comma}{extra}",
            self.recorder.address, self.key, self.secret
        )
    }

    pub fn create_bucket(&self) -> Result<(u16, String)> {
        let credentials = (self.key.as_str(), self.secret.as_str());
        signed::put(self.recorder.address, credentials, &format!("/{BUCKET}"))
    }

    pub fn export(&self, layout: &Path, extra: &str) -> Result<()> {
        let output = self.output("export", extra, layout)?;
        ensure!(output.succeeded, "{}", output.last_line());
        Ok(())
    }

    /// Exports with the library, at other sizes than the program's.
    pub fn export_within(&self, limits: Limits, layout: &Path, extra: &str) -> Result<()> {
        let task = self.task(layout, &format!("{extra},mode=max"))?;
        let frame = Frame {
            connect: &|config, progress| {
                Box::pin(layercache::s3::connect(config, progress.clone()))
            },
            limits,
            interrupt: &Interrupt::never(),
            progress: &Progress::silent(),
            person: &commands::Nobody,
            finished: &drop,
        };
        let outcome = self.runtime.block_on(commands::perform(&task, &frame));
        match outcome.errors.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    pub fn task(&self, layout: &Path, extra: &str) -> Result<Task> {
        let spec = self.spec(extra);
        let typed = ["layercache", "export", "--cache-to", &spec].map(Into::into);
        let typed = typed.into_iter().chain([layout.as_os_str().to_owned()]);
        let Asked::Work(typed) = args::parse(typed)? else {
            unreachable!("an export is work on a cache");
        };
        let (task, _) = args::resolve(typed, &|_| None)?;
        Ok(task)
    }

    pub fn store(&self, extra: &str) -> Result<Arc<dyn Store>> {
        let Task::Export(task) = self.task(&self.layouts.real, extra)? else {
            bail!("not an export");
        };
        let config = &task.targets[0].s3;
        self.runtime
            .block_on(layercache::s3::connect(config, Progress::silent()))
    }

    /// All keys that begin with `prefix`, page by page.
    pub fn list(&self, prefix: &str) -> Result<Vec<String>> {
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

    /// Deletes objects, which must then be gone.
    pub fn deletes(&self, keys: &[String]) -> Result<&'static str> {
        let store = self.store("")?;
        for deleted in self.runtime.block_on(store.delete(keys))? {
            deleted?;
        }
        for key in keys {
            let found = self.runtime.block_on(store.head(key))?;
            ensure!(found.is_none(), "{key} is still there");
        }
        Ok("")
    }

    /// Imports into a new directory, which must then hold just what `layout` holds.
    pub fn import_equals(&self, layout: &Path, extra: &str) -> Result<&'static str> {
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
    pub fn refreshes(&self, layout: &Path, prefix: &str, limits: Limits) -> Result<&'static str> {
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

    pub fn modified(&self, layout: &Path, prefix: &str) -> Result<Vec<SystemTime>> {
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
    pub fn fail(&self, spec: &str, words: &[&str]) -> Result<&'static str> {
        for (verb, layout) in [("export", &self.layouts.real), ("import", &self.fresh()?)] {
            let output = self.output_of(verb, spec, layout)?;
            ensure!(!output.succeeded, "the {verb} succeeded");
            let error = output.last_line();
            let says = words.iter().any(|word| error.contains(word));
            ensure!(says, "the {verb} does not say why: {error}");
        }
        Ok("")
    }

    pub fn output(&self, verb: &str, extra: &str, layout: &Path) -> Result<Output> {
        let mode = if verb == "export" { ",mode=max" } else { "" };
        self.output_of(verb, &format!("{}{mode}", self.spec(extra)), layout)
    }

    pub fn output_of(&self, verb: &str, spec: &str, layout: &Path) -> Result<Output> {
        let flag = if verb == "export" {
            "--cache-to"
        } else {
            "--cache-from"
        };
        let arguments = [verb, "--progress", "plain", flag, spec].map(OsStr::new);
        self.run(&[&arguments[..], &[layout.as_os_str()]].concat())
    }

    /// Runs a command that must succeed.
    pub fn succeeds(&self, arguments: &[&str]) -> Result<()> {
        let arguments: Vec<_> = arguments.iter().map(OsStr::new).collect();
        let output = self.run(&arguments)?;
        ensure!(output.succeeded, "{}", output.last_line());
        Ok(())
    }

    /// Runs the program, without anything of the user's settings.
    fn run(&self, arguments: &[&OsStr]) -> Result<Output> {
        let log = self.scratch.join("log");
        let mut command = Command::new(self.program);
        command
            .env_clear()
            .env("HOME", &self.scratch)
            .args(arguments);
        let succeeded = child::run(command, &log);
        Ok(Output {
            text: fs::read_to_string(&log)?,
            succeeded: succeeded.is_ok(),
        })
    }

    pub fn fresh(&self) -> Result<PathBuf> {
        let dir = self.scratch.join("imported");
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        Ok(dir)
    }
}

pub struct Output {
    /// All of stderr.
    pub text: String,
    pub succeeded: bool,
}

impl Output {
    /// The error, if there is one.
    pub fn last_line(&self) -> &str {
        let mut lines = self.text.lines().rev().filter(|line| !line.is_empty());
        lines.next().unwrap_or("no message")
    }
}

/// Digests and sizes of the layers that a layout's only manifest names.
pub fn layers(layout: &Path) -> Result<Vec<(String, u64)>> {
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

pub fn blobs_sent(exchanges: &[Exchange]) -> usize {
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
