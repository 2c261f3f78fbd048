//! Output that nobody takes: the program reports it, and a signal ends the program all the same.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::program::{Program, Run, fixture};
use crate::server::Server;

#[cfg(target_os = "linux")]
#[test]
fn a_full_device_under_stdout_is_an_error() {
    let server = Server::start();
    let spec = server.spec("mode=max");
    let mut export: Command = Program::export(&spec, &fixture("local-max")).into();
    let full = File::options()
        .write(true)
        .open("/dev/full")
        .expect("a device");
    export.stdout(full).stderr(Stdio::piped());
    Run::from(export.output().expect("the program starts"))
        .ends_with(1)
        .says("error: cannot write the result to stdout: No space left on device");
    assert!(server.objects().contains_key("manifests/buildkit"));
}

/// A pipe that has no room left, and its other end.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: the array has room for both ends, which then belong to this function.
    let (read, write) = unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    };
    // SAFETY: plain calls on a descriptor that is open.
    unsafe {
        let flags = libc::fcntl(write.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(write.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK);
        while libc::write(write.as_raw_fd(), [0u8; 4096].as_ptr().cast(), 4096) > 0 {}
        while libc::write(write.as_raw_fd(), [0u8; 1].as_ptr().cast(), 1) > 0 {}
        libc::fcntl(write.as_raw_fd(), libc::F_SETFL, flags);
    }
    (read, write)
}

#[test]
fn a_signal_ends_a_program_whose_stdout_is_a_full_pipe() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let server = Server::start();
        let spec = server.spec("mode=max");
        let mut export: Command = Program::export(&spec, &fixture("local-max")).into();
        let (_reader, full) = full_pipe();
        let mut child = export
            .stdout(full)
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        let patience = Instant::now() + Duration::from_secs(60);
        while !server.objects().contains_key("manifests/buildkit") {
            assert!(Instant::now() < patience, "the export does not finish");
            std::thread::sleep(Duration::from_millis(10));
        }
        // The second one in case the first arrives while the work is being wrapped up.
        let pid = i32::try_from(child.id()).expect("a process id");
        let status = loop {
            // SAFETY: the child has not been waited for, so the id is still its own.
            unsafe { libc::kill(pid, signal) };
            std::thread::sleep(Duration::from_millis(200));
            if let Some(status) = child.try_wait().expect("a status") {
                break status;
            }
            assert!(Instant::now() < patience, "signal {signal} is ignored");
        };
        assert_eq!(status.signal(), None);
        assert_eq!(status.code(), Some(128 + signal));
    }
}
