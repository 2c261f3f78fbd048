//! Runs the program under ptrace(2) and kills it right before a chosen change to the disk: its n-th
//! write, sync, rename, … This reaches every state that a crash can leave behind, not just those that
//! some delay happens to hit.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::ptr::null_mut;

use crate::program::Program;

/// How a traced run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    Killed,
    /// It made no more than that many changes, and exited.
    Exited(i32),
}

/// Runs the program until it is about to make its `nth` change (from 0) to what is below `root`.
///
/// # Panics
/// If the program cannot be traced.
pub fn kill_before_change(program: Program, root: &Path, nth: usize) -> Ended {
    let mut command: Command = program.into();
    command.stdout(Stdio::null()).stderr(Stdio::null());
    // Makes only a system call between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    // waitpid() below reaps it.
    #[allow(clippy::zombie_processes)]
    let child = command.spawn().expect("the program can be traced");
    let main = i32::try_from(child.id()).expect("a process id");
    let mut status = 0;
    // Stopped at its exec.
    assert_eq!(
        unsafe { libc::waitpid(main, &mut status, libc::__WALL) },
        main
    );
    assert!(libc::WIFSTOPPED(status), "status {status:#x}");
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
    ask(libc::PTRACE_SETOPTIONS, main, options);
    ask(libc::PTRACE_SYSCALL, main, 0);
    let mut changes = 0;
    let mut killed = false;
    loop {
        // Only what this thread traces: other tests wait for their own children.
        let any = libc::__WALL | libc::__WNOTHREAD;
        let thread = unsafe { libc::waitpid(-1, &mut status, any) };
        assert!(thread > 0, "{}", io::Error::last_os_error());
        if thread == main && libc::WIFEXITED(status) {
            return Ended::Exited(libc::WEXITSTATUS(status));
        }
        if thread == main && libc::WIFSIGNALED(status) {
            assert!(killed, "killed by signal {}", libc::WTERMSIG(status));
            return Ended::Killed;
        }
        if killed || !libc::WIFSTOPPED(status) {
            continue;
        }
        let signal = match libc::WSTOPSIG(status) {
            // A system call's entry or exit.
            stop if stop == libc::SIGTRAP | 0x80 => {
                if begins_change(main, thread, root) {
                    if changes == nth {
                        unsafe { libc::kill(main, libc::SIGKILL) };
                        killed = true;
                        continue;
                    }
                    changes += 1;
                }
                0
            }
            // A thread was created, or is about to run.
            libc::SIGTRAP | libc::SIGSTOP => 0,
            signal => signal,
        };
        ask(libc::PTRACE_SYSCALL, thread, signal);
    }
}

/// Ignores a thread that has ended along with another one.
fn ask(request: libc::c_uint, thread: i32, data: i32) {
    unsafe { libc::ptrace(request, thread, null_mut::<()>(), i64::from(data)) };
}

/// Whether the thread is about to make a system call that changes what is below `root`.
fn begins_change(main: i32, thread: i32, root: &Path) -> bool {
    let mut info = MaybeUninit::<libc::ptrace_syscall_info>::zeroed();
    let size = size_of::<libc::ptrace_syscall_info>();
    let request = libc::PTRACE_GET_SYSCALL_INFO;
    let got = unsafe { libc::ptrace(request, thread, size, info.as_mut_ptr()) };
    let info = unsafe { info.assume_init() };
    if got <= 0 || info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return false;
    }
    let entry = unsafe { info.u.entry };
    // The first argument of each of these is a file or a directory.
    let below_root = || {
        let link = format!("/proc/{main}/fd/{}", entry.args[0] as i32);
        std::fs::read_link(link).is_ok_and(|path| path.starts_with(root))
    };
    match entry.nr as i64 {
        libc::SYS_openat => entry.args[2] as i32 & libc::O_CREAT != 0 && below_root(),
        libc::SYS_write
        | libc::SYS_pwrite64
        | libc::SYS_writev
        | libc::SYS_pwritev
        | libc::SYS_ftruncate
        | libc::SYS_fallocate
        | libc::SYS_fsync
        | libc::SYS_fdatasync
        | libc::SYS_fchmod
        | libc::SYS_mkdirat
        | libc::SYS_unlinkat
        | libc::SYS_renameat2 => below_root(),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_renameat => below_root(),
        // The layout's directory, and its parents.
        #[cfg(target_arch = "x86_64")]
        libc::SYS_mkdir => true,
        _ => false,
    }
}
