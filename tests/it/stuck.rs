//! Output that nobody takes: the program reports it, and a signal ends the program all the same.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::program::{Program, Run, fixture};
use crate::server::{Fault, Server};

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

const SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

#[track_caller]
fn wait_until(reached: impl Fn() -> bool) {
    let patience = Instant::now() + Duration::from_secs(60);
    while !reached() {
        assert!(Instant::now() < patience, "the program does not get there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends the signal until the program has ended: twice, if the first one arrives before the work is done.
#[track_caller]
fn assert_ended_by(signal: i32, child: &mut Child) {
    let patience = Instant::now() + Duration::from_secs(60);
    let pid = i32::try_from(child.id()).expect("a process id");
    let status: ExitStatus = loop {
        // SAFETY: the child has not been waited for, so the id is still its own.
        unsafe { libc::kill(pid, signal) };
        std::thread::sleep(Duration::from_millis(200));
        if let Some(status) = child.try_wait().expect("a status") {
            break status;
        }
        if Instant::now() > patience {
            let _ = child.kill();
            panic!("signal {signal} is ignored");
        }
    };
    assert_eq!(status.signal(), None);
    assert_eq!(status.code(), Some(128 + signal));
}

#[test]
fn a_signal_ends_a_program_whose_stdout_is_a_full_pipe() {
    for signal in SIGNALS {
        let server = Server::start();
        let spec = server.spec("mode=max");
        let mut export: Command = Program::export(&spec, &fixture("local-max")).into();
        let (_reader, full) = full_pipe();
        let export = export.stdout(full).stderr(Stdio::null());
        let mut child = export.spawn().expect("the program starts");
        wait_until(|| server.objects().contains_key("manifests/buildkit"));
        assert_ended_by(signal, &mut child);
    }
}

#[test]
fn a_signal_ends_a_program_whose_error_goes_into_a_full_pipe() {
    for signal in SIGNALS {
        let server = Server::start();
        server.fail_all("PutObject", Fault::Status(403, "AccessDenied"));
        let spec = server.spec("mode=max");
        let export = Program::export(&spec, &fixture("local-max")).arg("--quiet");
        let mut export: Command = export.into();
        let (_reader, full) = full_pipe();
        let export = export.stdout(Stdio::null()).stderr(full);
        let mut child = export.spawn().expect("the program starts");
        wait_until(|| server.count("PutObject") > 0);
        // Until the error is on its way.
        std::thread::sleep(Duration::from_millis(500));
        assert_ended_by(signal, &mut child);
    }
}

#[test]
fn a_signal_ends_a_program_whose_metadata_file_is_a_pipe_that_nobody_reads() {
    for signal in SIGNALS {
        let server = Server::start();
        let folder = tempfile::tempdir().expect("a temporary directory");
        let pipe = folder.path().join("metadata");
        let made = Command::new("mkfifo").arg(&pipe).status();
        assert!(made.expect("mkfifo runs").success());
        let export = Program::export(&server.spec("mode=max"), &fixture("local-max"));
        let export = export.arg("--metadata-file").arg(&pipe);
        let mut export: Command = export.into();
        let export = export.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = export.spawn().expect("the program starts");
        wait_until(|| server.objects().contains_key("manifests/buildkit"));
        // Until the file is opened.
        std::thread::sleep(Duration::from_millis(500));
        assert_ended_by(signal, &mut child);
    }
}
