//! BuildKit itself, where buildctl and buildkitd are on PATH: its own `type=s3` beside what layercache does
//! for the same build. buildkitd runs as root, with runc.
//!
//! A build has all its steps in the cache, and its result is an image in a tar, so that every layer is needed.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::child::{self, Cost};
use crate::layouts::Random;
use crate::server::{Network, Server};
use crate::table::{median, seconds};
use crate::tools::clean_environment;

pub const NAME: &str = "BuildKit, 8 × 32 MiB";
const LAYERS: usize = 8;
/// Bytes.
const LAYER: usize = 32 << 20;
const ROUNDS: usize = 3;
const NETWORKS: [(&str, Network); 2] = [
    (
        "loopback",
        Network {
            delay_ms: 0,
            rate_mib: 0,
            tls: false,
        },
    ),
    (
        "20 ms a request, 90 MiB/s a connection",
        Network {
            delay_ms: 20,
            rate_mib: 90,
            tls: false,
        },
    ),
];

/// A build daemon of our own, with nothing in it.
struct Daemon {
    process: Child,
    home: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Daemon {
    fn start(home: &Path) -> Result<Self> {
        fs::create_dir_all(home)?;
        let mut command = Command::new("buildkitd");
        command
            .arg("--root")
            .arg(home.join("root"))
            .arg("--addr")
            .arg(address(home))
            .args([
                "--oci-worker-snapshotter=native",
                "--oci-worker-net=host",
                "--containerd-worker=false",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(home.join("log"))?);
        child::dies_with_runner(&mut command);
        let process = command.spawn().context("starting buildkitd")?;
        let daemon = Daemon {
            process,
            home: home.to_owned(),
        };
        let begun = Instant::now();
        while !daemon
            .buildctl(&["debug", "workers"])
            .output()?
            .status
            .success()
        {
            ensure!(
                begun.elapsed() < Duration::from_secs(20),
                "buildkitd does not answer (it needs root and runc)"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(daemon)
    }

    fn buildctl(&self, args: &[&str]) -> Command {
        let mut command = Command::new("buildctl");
        clean_environment(&mut command, &self.home);
        command.env("BUILDKIT_HOST", address(&self.home)).args(args);
        command
    }

    /// Forgets every build.
    fn forget(&self) -> Result<()> {
        child::run(self.buildctl(&["prune", "--all"]), &self.log())?;
        Ok(())
    }

    /// A build of the context.
    fn build(&self, args: &[&str]) -> Command {
        let mut command = self.buildctl(&[
            "build",
            "--progress",
            "plain",
            "--frontend",
            "dockerfile.v0",
        ]);
        for name in ["context", "dockerfile"] {
            let local = format!("{name}={}", self.home.join("context").display());
            command.args(["--local", &local]);
        }
        command.args(args);
        command
    }

    fn log(&self) -> PathBuf {
        self.home.join("client")
    }

    /// Runs `command`, a build whose steps must all be cached, and adds the daemon's CPU time.
    fn cached(&self, command: Command) -> Result<Cost> {
        let log = self.log();
        let before = self.cpu()?;
        let mut cost = child::run(command, &log)?;
        cost.cpu += self.cpu()? - before;
        let cached = fs::read_to_string(log)?.matches(" CACHED\n").count();
        // The last one is shown as the transfer of its layers.
        ensure!(
            cached + 1 >= LAYERS,
            "{cached} of {LAYERS} steps were cached"
        );
        Ok(cost)
    }

    /// Seconds of CPU that the daemon and the processes it waited for have taken.
    fn cpu(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        let (_, fields) = stat.rsplit_once(')').context("the daemon's stat")?;
        let times = fields
            .split_whitespace()
            .skip(11)
            .take(4)
            .map(str::parse::<u64>);
        let ticks: u64 = times.sum::<Result<_, _>>()?;
        // SAFETY: has no preconditions.
        let rate = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        Ok(ticks as f64 / rate as f64)
    }
}

fn address(home: &Path) -> String {
    format!("unix://{}", home.join("sock").display())
}

/// A directory whose build adds a layer for each file.
fn write_context(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    let mut dockerfile = File::create(dir.join("Dockerfile"))?;
    writeln!(dockerfile, "FROM scratch")?;
    let mut bytes = vec![0; LAYER];
    for number in 0..LAYERS {
        Random::new(number as u64).fill(&mut bytes);
        fs::write(dir.join(number.to_string()), &bytes)?;
        writeln!(dockerfile, "COPY {number} /{number}")?;
    }
    Ok(())
}

/// How a cache gets to S3, or from there into a build.
#[derive(Clone, Copy)]
enum Way {
    /// BuildKit's `type=s3`.
    Own,
    /// `export` of a layout that BuildKit has written; `import`, then `type=local`.
    Layout,
    /// `serve`, as `type=registry`.
    Served,
}

/// What is measured in one place.
struct Measured<'a> {
    daemon: Daemon,
    layercache: &'a Path,
    server: Server,
    layout: PathBuf,
}

impl Measured<'_> {
    fn spec(&self) -> String {
        format!(
            "type=s3,region=us-east-1,bucket=buildkit,name=app,endpoint_url={},use_path_style=true,\
             access_key_id=x,secret_access_key=y",
            self.server.url()
        )
    }

    fn layercache(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.layercache);
        clean_environment(&mut command, &self.daemon.home);
        command.env("BUILDKIT_HOST", address(&self.daemon.home));
        command.args(args).args(["--progress", "quiet"]);
        command
    }

    fn export(&self, way: Way) -> Result<Cost> {
        self.server.clear("buildkit")?;
        let to = format!("{},mode=max", self.spec());
        match way {
            Way::Layout => {
                let mut command = self.layercache(&["export", "--cache-to", &to]);
                command.arg(&self.layout);
                child::run(command, &self.daemon.log())
            }
            Way::Own | Way::Served => self
                .daemon
                .cached(self.daemon.build(&["--export-cache", &to])),
        }
    }

    fn build(&self, way: Way) -> Result<Cost> {
        self.daemon.forget()?;
        let output = format!(
            "type=oci,dest={}",
            self.daemon.home.join("image.tar").display()
        );
        let build = |from: &str| {
            self.daemon
                .build(&["--output", &output, "--import-cache", from])
        };
        match way {
            Way::Own => self.daemon.cached(build(&self.spec())),
            Way::Layout => {
                let target = self.daemon.home.join("imported");
                let _ = fs::remove_dir_all(&target);
                let mut import = self.layercache(&["import", "--cache-from", &self.spec()]);
                import.arg(&target);
                let import = child::run(import, &self.daemon.log())?;
                let local = format!("type=local,src={}", target.display());
                let build = self.daemon.cached(build(&local))?;
                Ok(Cost {
                    wall: import.wall + build.wall,
                    cpu: import.cpu + build.cpu,
                    peak_memory: import.peak_memory,
                })
            }
            Way::Served => {
                let build = build("FROM");
                let args = build.get_args().map(|arg| match arg.to_string_lossy() {
                    arg if arg == "FROM" => "\"$LAYERCACHE_FROM\"".to_owned(),
                    arg => format!("'{arg}'"),
                });
                let script = format!("buildctl {}", args.collect::<Vec<_>>().join(" "));
                let mut serve = self.layercache(&["serve", "--cache-from", &self.spec()]);
                serve.args(["--", "sh", "-c", &script]);
                self.daemon.cached(serve)
            }
        }
    }
}

/// Measures each way through both networks, and prints it.
///
/// # Errors
/// If buildkitd cannot run here, or a build fails or finds a step missing.
pub fn measure(layercache: &Path, scratch: &Path) -> Result<()> {
    for (name, network) in NETWORKS {
        let home = scratch.join("buildkit");
        write_context(&home.join("context"))?;
        let daemon = Daemon::start(&home)?;
        let layout = home.join("layout");
        let local = format!("type=local,dest={},mode=max", layout.display());
        child::run(daemon.build(&["--export-cache", &local]), &daemon.log())?;
        let server = Server::start(network, &layout.join("blobs/sha256"))?;
        let measured = Measured {
            daemon,
            layercache,
            server,
            layout,
        };
        println!("\n{NAME}, {name}");
        type Run<'a, 'b> = &'a dyn Fn(&Measured<'b>, Way) -> Result<Cost>;
        let rows: [(&str, Way, Run<'_, '_>); 5] = [
            ("--cache-to type=s3", Way::Own, &Measured::export),
            ("layercache export", Way::Layout, &Measured::export),
            ("--cache-from type=s3", Way::Own, &Measured::build),
            (
                "layercache import, type=local",
                Way::Layout,
                &Measured::build,
            ),
            ("layercache serve", Way::Served, &Measured::build),
        ];
        let mut runs = rows.each_ref().map(|_| (Vec::new(), Vec::new()));
        for _ in 0..ROUNDS {
            for ((_, way, run), (walls, cpus)) in rows.iter().zip(&mut runs) {
                let cost = run(&measured, *way)?;
                walls.push(cost.wall);
                cpus.push(cost.cpu);
            }
        }
        let mut own = f64::NAN;
        for ((name, way, _), (walls, cpus)) in rows.iter().zip(runs) {
            let wall = median(walls);
            if let Way::Own = way {
                own = wall;
            }
            let (cpu, ratio) = (seconds(median(cpus)), wall / own);
            println!(
                "  {name:<30} {:>8}  {cpu:>8} CPU  {ratio:5.2} of BuildKit's",
                seconds(wall)
            );
        }
        drop(measured);
        fs::remove_dir_all(&home)?;
    }
    Ok(())
}
