//! Serve: opens an endpoint over caches on S3, tells builders where it is, and serves until the
//! given command ends or a signal arrives.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use anyhow::{Context as _, Result};
use futures::future::FutureExt as _;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

use crate::blocking::blocking;
use crate::bucket::Bucket;
use crate::commands::Context;
use crate::config::{ExportConfig, Mode, S3Config, ServeTask};
use crate::interrupt::Interrupt;
use crate::progress::{self, count};
use crate::report::{AnyReport, Details, Outcome, Place, Report};
use crate::serve::{Endpoint, Repository, Served, Serving, TAG};
use crate::store::Store;
use crate::transfer::limits::Limits;

/// A shell's exit status for a command that does not exist.
const NOT_FOUND: u8 = 127;

/// Serves the caches of the task.
pub async fn run(task: &ServeTask, context: &Context<'_>) -> Outcome {
    let began = Instant::now();
    // What a command prints has priority over blobs in flight.
    let progress = context.progress.without_blobs();
    let mut outcome = Outcome::default();
    let caches = match context.interrupt.or(connect(task, context)).await {
        Ok(caches) => caches,
        Err(error) => {
            outcome.errors.push(error);
            return outcome;
        }
    };
    let stores: Vec<_> = caches
        .iter()
        .map(|cache| Arc::clone(cache.bucket.store()))
        .collect();
    // Each has buffers of its own, for both directions where builds may write.
    let sharing = caches.len() + usize::from(task.target.is_some());
    let limits = Limits {
        memory: context.limits.memory / sharing.max(1) as u64,
        ..context.limits
    };
    let endpoint = Endpoint::listen(task.listen, caches, &progress, limits);
    let endpoint = match endpoint.await {
        Ok(endpoint) => endpoint,
        Err(error) => {
            outcome.errors.push(error);
            return outcome;
        }
    };
    let serving = Arc::clone(&endpoint.serving);
    let variables = variables(&serving, task.target.as_ref());
    match announce(task, &variables, context).await {
        Ok(()) if task.command.is_empty() => {
            endpoint.run(context.interrupt.arrives().boxed()).await;
        }
        Ok(()) => match start(task, &variables) {
            Ok(child) => {
                let ended = endpoint.run(attend(child, context.interrupt).boxed()).await;
                match ended {
                    Ok(status) => outcome.status = Some(exit_status(status)),
                    Err(error) => outcome.errors.push(error),
                }
            }
            Err(error) => {
                outcome.errors.push(error);
                outcome.status = Some(NOT_FOUND);
                return outcome;
            }
        },
        Err(error) => {
            outcome.errors.push(error);
            return outcome;
        }
    }
    for (repository, store) in serving.repositories.iter().zip(stores) {
        let mut report = report(repository, &*store);
        report.cost.seconds = began.elapsed().as_secs_f64();
        match task.command.is_empty() {
            true => context.finish(&report),
            // stdout is the command's.
            false => {
                context.progress.result(&report.json());
                context.progress.summary(&report.summary());
            }
        }
        outcome.reports.push(Box::new(report));
    }
    outcome
}

/// Connects to every cache. A cache that is both read and written is one connection.
async fn connect(task: &ServeTask, context: &Context<'_>) -> Result<Vec<Served>> {
    let mut caches: Vec<Served> = Vec::new();
    for source in &task.sources {
        caches.push(Served {
            bucket: bucket(source, context).await?,
            source: true,
            target: None,
        });
    }
    if let Some(target) = &task.target {
        let mut same = caches.iter_mut();
        match same.find(|cache| *cache.bucket.config() == target.s3) {
            Some(cache) => cache.target = Some(target.clone()),
            None => caches.push(Served {
                bucket: bucket(&target.s3, context).await?,
                source: false,
                target: Some(target.clone()),
            }),
        }
    }
    Ok(caches)
}

async fn bucket(config: &S3Config, context: &Context<'_>) -> Result<Bucket> {
    let store: Arc<dyn Store> = (context.connect)(config, context.progress)
        .await
        .with_context(|| format!("serving {}", config.address()))?;
    Ok(Bucket::new(store, config, context.progress))
}

/// What builders are told: variables by their names.
fn variables(serving: &Serving, target: Option<&ExportConfig>) -> Vec<(&'static str, String)> {
    let address = reachable(serving.address);
    let registry = format!("{address}/{}", serving.secret.text());
    // Builders speak plain HTTP only to loopback, unless told otherwise.
    let insecure = match address.ip().is_loopback() {
        true => "",
        false => ",registry.insecure=true",
    };
    let reference = |name: &str| format!("type=registry,ref={registry}/{name}:{TAG}{insecure}");
    let gha = |name: &str, writes: bool| {
        let mut tokens = serving.tokens.iter();
        let token = tokens.find(|token| token.writes == writes);
        let token = token.map_or("", |token| token.text());
        format!("type=gha,url=http://{address}/,token={token},version=1,scope={name}")
    };
    let sources: Vec<&str> = serving
        .repositories
        .iter()
        .filter(|repository| repository.source)
        .map(|repository| repository.name.as_str())
        .collect();
    let mut variables = Vec::new();
    if let Some(first) = sources.first() {
        let references: Vec<_> = sources.iter().map(|name| reference(name)).collect();
        variables.push(("LAYERCACHE_FROM", references.join("\n")));
        // One token gives access to every source.
        variables.push(("LAYERCACHE_GHA_FROM", gha(first, false)));
    }
    let mut all = serving.repositories.iter();
    if let (Some(target), Some(repository)) = (target, all.find(|r| r.push.is_some())) {
        let mut options = match target.mode {
            Mode::Min => ",mode=min".to_owned(),
            Mode::Max => ",mode=max".to_owned(),
        };
        if target.ignore_error {
            options.push_str(",ignore-error=true");
        }
        let name = repository.name.as_str();
        variables.push(("LAYERCACHE_TO", reference(name) + &options));
        variables.push(("LAYERCACHE_GHA_TO", gha(name, true) + &options));
    }
    variables.push(("LAYERCACHE_REGISTRY", registry));
    variables
}

/// An address that stands for all of the machine's addresses is reached on loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address.ip().is_unspecified() {
        true => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), address.port()),
        false => address,
    }
}

/// Writes the variables to where the task asks for them.
async fn announce(
    task: &ServeTask,
    variables: &[(&'static str, String)],
    context: &Context<'_>,
) -> Result<()> {
    if let Some(file) = &task.env_file {
        append(file, variables)
            .with_context(|| format!("cannot write --env-file {}", file.display()))?;
    } else if task.command.is_empty() {
        let mut lines = String::new();
        for (name, value) in variables {
            let _ = writeln!(lines, "export {name}='{value}'");
        }
        let shown = context.person.show(lines.trim_end()).await;
        shown.context("cannot write the variables to stdout")?;
    }
    context
        .progress
        .note("serving: builds on this machine can use the cache now");
    Ok(())
}

/// Appends the variables in the form of `$GITHUB_ENV`. A value of several lines stands between two
/// marks.
fn append(file: &Path, variables: &[(&'static str, String)]) -> Result<()> {
    let mut lines = String::new();
    for (name, value) in variables {
        let _ = match value.contains('\n') {
            true => writeln!(lines, "{name}<<LAYERCACHE_END\n{value}\nLAYERCACHE_END"),
            false => writeln!(lines, "{name}={value}"),
        };
    }
    // A new file is readable only by the user: it holds the secret.
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.append(true).create(true).mode(0o600).open(file)?;
    file.write_all(lines.as_bytes())?;
    Ok(())
}

fn start(task: &ServeTask, variables: &[(&'static str, String)]) -> Result<Child> {
    let mut command = Command::new(&task.command[0]);
    command.args(&task.command[1..]);
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command
        .spawn()
        .with_context(|| format!("cannot run {}", task.command[0].display()))
}

/// Waits for the command, and passes on to it the signals that would end us.
async fn attend(mut child: Child, interrupt: &Interrupt) -> Result<ExitStatus> {
    let pid = Pid::from_child(&child);
    let ended = blocking(move || child.wait().context("waiting for the command"));
    tokio::pin!(ended);
    tokio::select! {
        ended = &mut ended => return ended,
        signal = interrupt.arrives() => forward(signal, pid),
    }
    ended.await
}

fn forward(signal: i32, pid: Pid) {
    let signal = match signal {
        libc::SIGINT => Signal::INT,
        libc::SIGHUP => Signal::HUP,
        _ => Signal::TERM,
    };
    // A terminal sends these to the command as well.
    if signal != Signal::TERM && in_foreground() {
        return;
    }
    // The command may have ended.
    let _ = kill_process(pid, signal);
}

/// Whether what is typed at the terminal reaches our process group.
fn in_foreground() -> bool {
    let terminal = std::fs::File::open("/dev/tty");
    let foreground = terminal
        .ok()
        .and_then(|tty| rustix::termios::tcgetpgrp(tty).ok());
    foreground == Some(rustix::process::getpgrp())
}

/// The exit status as a shell gives it.
fn exit_status(status: ExitStatus) -> u8 {
    let code = match status.signal() {
        Some(signal) => 128 + signal,
        None => status.code().unwrap_or(1),
    };
    u8::try_from(code).unwrap_or(1)
}

/// What builders read from and wrote to one cache.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServeDetails {
    /// The cache's name in the registry.
    repository: String,
    /// Whether it is a `--cache-from`; whether it is the `--cache-to`.
    source: bool,
    target: bool,
    /// Tags and keys that were looked up, and how many were found.
    lookups: u64,
    hits: u64,
    /// Blobs read, bytes sent to builders, and bytes received from S3.
    blobs: u64,
    bytes_served: u64,
    bytes_fetched: u64,
    /// Manifests written.
    manifests: u64,
    /// Blobs uploaded.
    transferred: u64,
    /// Blobs that were already there, and young.
    present: u64,
    /// Blobs that were already there, but old, and were refreshed.
    refreshed: u64,
    /// Bytes of the uploaded blobs.
    bytes: u64,
}

fn report(repository: &Repository, store: &dyn Store) -> Report<ServeDetails> {
    let config = repository.bucket.config();
    let pushed = repository.push.as_ref().map(|push| push.pushed());
    let names = match pushed {
        Some(_) => &config.names[..],
        None => &config.names[..1],
    };
    let place = Place::new("serve", "serving", config, names);
    let target = pushed.is_some();
    let pushed = pushed.unwrap_or_default();
    let (lookups, traffic) = (&repository.lookups, &repository.traffic);
    let details = ServeDetails {
        repository: repository.name.clone(),
        source: repository.source,
        target,
        lookups: lookups.all.load(Relaxed),
        hits: lookups.hits.load(Relaxed),
        blobs: traffic.blobs.load(Relaxed),
        bytes_served: traffic.served.load(Relaxed),
        bytes_fetched: traffic.fetched.load(Relaxed),
        manifests: pushed.manifests,
        transferred: pushed.blobs,
        present: pushed.present,
        refreshed: pushed.refreshed,
        bytes: pushed.bytes,
    };
    let mut report = Report::new(place, details);
    report.cost.requests = store.requests();
    report
}

impl Details for ServeDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let addresses = place.addresses();
        let mut summary = format!(
            "served {} from {addresses}: {}, {} found; {} ({}) read, {} fetched from S3; {cost}",
            place.quoted_names(),
            count(self.lookups, "lookup"),
            self.hits,
            count(self.blobs, "blob"),
            progress::bytes(self.bytes_served),
            progress::bytes(self.bytes_fetched),
        );
        if self.target {
            let _ = write!(
                summary,
                "\nstored {} in {addresses}: {} uploaded ({}), {} already there, {} refreshed",
                count(self.manifests, "manifest"),
                count(self.transferred, "blob"),
                progress::bytes(self.bytes),
                self.present,
                self.refreshed,
            );
        }
        summary
    }

    fn of_failure(self) -> Self {
        ServeDetails {
            repository: self.repository,
            source: self.source,
            target: self.target,
            ..ServeDetails::default()
        }
    }
}
