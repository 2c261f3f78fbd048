//! Runs one command and measures its wall time, CPU time and peak memory.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// No command of the benchmark takes nearly as long unless it hangs.
pub const TIMEOUT: Duration = Duration::from_secs(150);

#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Seconds, from before the fork to the exit.
    pub wall: f64,
    /// Seconds, user and system, of the process and its reaped children.
    pub cpu: f64,
    /// Bytes.
    pub peak_memory: u64,
}

/// Makes the child die with the runner, where the system can do that.
pub fn dies_with_runner(command: &mut Command) {
    #[cfg(target_os = "linux")]
    // SAFETY: prctl is async-signal-safe, and nothing else happens between fork and exec.
    unsafe {
        command.pre_exec(
            || match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            },
        );
    }
    #[cfg(not(target_os = "linux"))]
    let _ = command;
}

/// Runs `command` with its standard error in `log`.
///
/// # Errors
/// If the command fails (with the last line of `log`) or takes longer than [`TIMEOUT`].
pub fn run(mut command: Command, log: &Path) -> Result<Cost> {
    let program = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(log)?);
    dies_with_runner(&mut command);
    let begun = Instant::now();
    let child = command
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let pid = child.id() as libc::pid_t;
    let (done, wait) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let late = wait.recv_timeout(TIMEOUT) == Err(RecvTimeoutError::Timeout);
        if late {
            // SAFETY: the process has not been reaped; that happens after this thread has ended.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        late
    });
    // SAFETY: waits for our child without reaping it; the pointer is to a local.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        while libc::waitid(
            libc::P_PID,
            pid as libc::id_t,
            &mut info,
            libc::WEXITED | libc::WNOWAIT,
        ) == -1
            && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted
        {}
    }
    let wall = begun.elapsed().as_secs_f64();
    drop(done);
    let late = watchdog.join().unwrap_or(false);
    let mut status = 0;
    // SAFETY: reaps that child; all pointers are to locals.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        if libc::wait4(pid, &mut status, 0, &mut usage) != pid {
            bail!("waiting for {program}: {}", std::io::Error::last_os_error());
        }
        usage
    };
    if late {
        bail!("{program} was not done after {} s", TIMEOUT.as_secs());
    }
    let status = ExitStatus::from_raw(status);
    if !status.success() {
        bail!("{program}: {status}: {}", end_of(log));
    }
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    Ok(Cost {
        wall,
        cpu: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        peak_memory: usage.ru_maxrss as u64 * unit,
    })
}

fn end_of(log: &Path) -> String {
    let mut bytes = Vec::new();
    let _ = File::open(log).and_then(|mut file| file.read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    line.unwrap_or("no message").chars().take(200).collect()
}
