//! Settings of the whole process that many transfers at once need.

use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The open files that we ask for.
const OPEN_FILES: u64 = 8_192;

/// Files of a layout opened at once. More would be as many threads, for an instant.
pub(crate) const OPENINGS: usize = 4;

/// Open files that a run needs besides its transfers: standard streams, the runtime's and the
/// signals' pipes, the layout's directories and lock, idle connections, files that a DNS look-up
/// reads.
const BASE_FILES: usize = 40;

/// Fewer open files than this are not enough for one transfer.
const LEAST_FILES: usize = BASE_FILES + 24;

/// Raises the soft limit on open files: many blobs at once are many files and connections. The usual
/// soft limits (1,024, or 256 on macOS) exist for programs that use select(2).
pub(crate) fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    let current = limit.current.unwrap_or(u64::MAX);
    let raised = limit
        .maximum
        .map_or(OPEN_FILES, |most| most.min(OPEN_FILES));
    if current < raised {
        // If the system refuses, the old limit is enough for most caches.
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(raised),
                maximum: limit.maximum,
            },
        );
    }
}

/// `wanted`, or as many as fit when each takes `files` of the open files that are allowed; at least 1.
pub(crate) fn within_open_files(wanted: usize, files: usize) -> usize {
    open_files().map_or(wanted, |limit| {
        (limit.saturating_sub(BASE_FILES) / files).clamp(1, wanted)
    })
}

/// The limit on open files; `None`: there is none.
fn open_files() -> Option<usize> {
    let limit = getrlimit(Resource::Nofile).current;
    limit.and_then(|limit| usize::try_from(limit).ok())
}

/// Checks that the process may open enough files, and start `threads` threads. The runtime would panic.
///
/// # Errors
/// A limit is too low; the text names it.
pub(crate) fn check_limits(threads: usize) -> Result<()> {
    if let Some(files) = open_files() {
        ensure!(
            files >= LEAST_FILES,
            "only {files} open files are allowed, and at least {LEAST_FILES} are needed: raise the \
             limit (ulimit -n)"
        );
    }
    let gate = parking_lot::Mutex::new(());
    thread::scope(|scope| {
        // The threads wait until the last one has started.
        let _closed = gate.lock();
        for _ in 0..threads {
            thread::Builder::new().spawn_scoped(scope, || drop(gate.lock()))?;
        }
        std::io::Result::Ok(())
    })
    .context("cannot start threads: raise the limit (ulimit -u, or the container's limit on pids)")
}

/// Makes a write beyond `ulimit -f` an error, which names the file. By default a signal ends the process
/// without a word.
pub(crate) fn survive_file_size_limit() {
    // SAFETY: to ignore a signal has no preconditions.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// Makes all threads share one heap. glibc keeps one for each thread, up to eight per core, and
/// does not reuse in one what was freed in another: peak memory was a third more, and grew with the
/// cores.
pub(crate) fn keep_one_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt has no preconditions and takes its own lock. If it fails, nothing changes.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
