//! The servers, and how one is installed, started and stopped: by its script in `servers/`.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// A kind of server.
pub struct Kind {
    /// Of its script, and of its column.
    pub name: &'static str,
    /// Points of the contract that it cannot keep, and why.
    pub exceptions: &'static [(&'static str, &'static str)],
}

/// In the order in which they run: the quickest to install first.
pub const KINDS: &[Kind] = &[
    Kind {
        name: "moto",
        exceptions: &[
            ("wrong secret", "does not check signatures"),
            ("unknown key", "does not check signatures"),
        ],
    },
    Kind {
        name: "rclone",
        exceptions: &[("keys with //", "rejects them")],
    },
    Kind {
        name: "seaweedfs",
        exceptions: &[("no bucket", "creates a bucket that is not there")],
    },
    Kind {
        name: "s3rver",
        exceptions: &[
            (
                "unfinished uploads",
                "has neither their list nor that of their parts",
            ),
            ("keys with //", "rejects them"),
            ("wrong secret", "does not check signatures of version 4"),
        ],
    },
    Kind {
        name: "ceph-rgw",
        exceptions: &[],
    },
    Kind {
        name: "s3s-fs",
        exceptions: &[
            ("unfinished uploads", "has no list of them"),
            ("no bucket", "creates a bucket that is not there"),
        ],
    },
    Kind {
        name: "garage",
        exceptions: &[],
    },
];

impl Kind {
    pub fn exception(&self, point: &str) -> Option<&'static str> {
        let mut found = self.exceptions.iter().filter(|(known, _)| *known == point);
        found.next().map(|(_, why)| *why)
    }

    /// Installs the server below `dir`; its version.
    ///
    /// # Errors
    /// The last line that the installation printed.
    pub fn install(&self, dir: &Path) -> Result<String> {
        fs::create_dir_all(dir)?;
        self.run(dir, "install")?;
        self.run(dir, "version")
    }

    fn script(&self, dir: &Path, verb: &str) -> Command {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/interop/servers");
        let mut command = Command::new("sh");
        command
            .arg(scripts.join(format!("{}.sh", self.name)))
            .arg(verb)
            .current_dir(dir);
        command
    }

    fn run(&self, dir: &Path, verb: &str) -> Result<String> {
        let output = self.script(dir, verb).stdin(Stdio::null()).output()?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        let line = errors.lines().rev().find(|line| !line.trim().is_empty());
        bail!("{}", line.unwrap_or("no message").trim())
    }
}

/// A server that runs. Stops when dropped, and also if this process ends without dropping it:
/// the script waits for its standard input to close.
pub struct Server {
    process: Child,
    pub address: SocketAddr,
    pub key: String,
    pub secret: String,
}

impl Server {
    /// Starts an installed server, with nothing in it.
    pub fn start(kind: &Kind, dir: &Path) -> Result<Server> {
        let data = dir.join("data");
        if data.exists() {
            fs::remove_dir_all(&data)?;
        }
        fs::create_dir_all(&data)?;
        let mut process = kind
            .script(dir, "start")
            .env("PORTS", free_ports(8)?.join(" "))
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = process.stdout.take().context("the script's output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["ready", endpoint, key, secret] = words[..] else {
            let _ = process.wait();
            bail!("did not start: {}", last_line(&dir.join("server.log")));
        };
        Ok(Server {
            address: endpoint.trim_start_matches("http://").parse()?,
            key: key.to_owned(),
            secret: secret.to_owned(),
            process,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

pub fn last_line(file: &Path) -> String {
    let bytes = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    line.unwrap_or("no message").chars().take(200).collect()
}

/// Where a kind's files are.
pub fn directory(work: &Path, kind: &Kind) -> PathBuf {
    work.join(kind.name)
}

/// Ports that are free now, all at once.
fn free_ports(count: usize) -> Result<Vec<String>> {
    let listeners: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<std::io::Result<_>>()?;
    listeners
        .iter()
        .map(|listener| Ok(listener.local_addr()?.port().to_string()))
        .collect()
}
