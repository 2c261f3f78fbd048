//! What verifying costs a peer: the files of a cache hashed with the fastest SHA-256 on this machine,
//! on all cores.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use futures::stream::{StreamExt as _, TryStreamExt as _};
use layercache::cache::digest::Hasher;
use layercache::transfer::hashing::{FileFeed, Hashing};

use crate::child::{self, Cost};
use crate::table::median;

/// The runs of one program that hashes.
pub struct Hashed {
    pub program: &'static str,
    runs: Vec<Cost>,
}

impl Hashed {
    pub fn wall(&self) -> f64 {
        median(self.runs.iter().map(|cost| cost.wall).collect())
    }

    pub fn cpu(&self) -> f64 {
        median(self.runs.iter().map(|cost| cost.cpu).collect())
    }
}

/// One run of each program over the files in `dir`, beside the runs before.
pub fn measure(all: &mut Vec<Hashed>, dir: &Path, scratch: &Path) {
    for (program, command) in programs(dir) {
        match child::run(command, &scratch.join("log")) {
            Ok(cost) => match all.iter_mut().find(|one| one.program == program) {
                Some(one) => one.runs.push(cost),
                None => all.push(Hashed {
                    program,
                    runs: vec![cost],
                }),
            },
            Err(error) => eprintln!("{program}: {error:#}"),
        }
    }
}

/// The fastest of them.
pub fn fastest(all: &[Hashed]) -> Option<&Hashed> {
    all.iter()
        .min_by(|one, other| one.wall().total_cmp(&other.wall()))
}

fn programs(dir: &Path) -> Vec<(&'static str, Command)> {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let in_shell = |program: &str| {
        let mut command = Command::new("sh");
        // Several files a process, and several processes a core.
        let script = format!(
            "find \"$1\" -type f -print0 | xargs -0 -n \"$2\" -P {cores} {program} >/dev/null"
        );
        let files = std::fs::read_dir(dir).map_or(1, |files| files.count());
        let each = (files / (4 * cores)).max(1).to_string();
        command.args(["-c", &script, "sh"]).arg(dir).arg(each);
        command
    };
    let mut own = Command::new(std::env::current_exe().unwrap_or_default());
    own.arg("hash").arg(dir);
    vec![
        ("sha256sum", in_shell("sha256sum")),
        ("openssl", in_shell("openssl dgst -sha256")),
        ("layercache's hasher", own),
    ]
}

/// Hashes every file in `dir` as layercache does.
pub fn hash(dir: &Path) -> Result<()> {
    let files: Vec<PathBuf> = std::fs::read_dir(dir)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    let hashing = Hashing::on_every_core();
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(
        futures::stream::iter(files)
            .map(|path| {
                let hashing = &hashing;
                async move {
                    let file = File::open(&path).with_context(|| path.display().to_string())?;
                    let size = file.metadata()?.len();
                    let feed = FileFeed::new(Arc::new(file), 0..size);
                    let (hasher, _) = hashing.run(Hasher::default(), feed).await?;
                    std::hint::black_box(hasher.digest());
                    anyhow::Ok(())
                }
            })
            .buffer_unordered(64)
            .try_collect(),
    )
}
