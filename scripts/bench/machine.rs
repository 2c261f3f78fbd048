//! The machine: what it is, and where on it layouts go.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A new directory for this run, in memory if possible, and a line that describes it.
pub fn scratch_dir(asked: Option<&Path>, target: &Path) -> Result<(PathBuf, String)> {
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

/// A line that describes it.
pub fn description() -> String {
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
pub fn remove_when_interrupted(scratch: PathBuf) {
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
