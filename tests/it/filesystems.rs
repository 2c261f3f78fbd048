//! Layouts on file systems that lack something: the program works, or names the reason before it fetches
//! a blob.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use crate::program::{Program, Run, copy_of, files, fixture};
use crate::server::Server;

/// A server that holds the cache of `local-max`.
fn server_with_cache() -> Server {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .run()
        .succeeds();
    server.clear_log();
    server
}

#[track_caller]
fn assert_only_the_manifest_was_read(server: &Server) {
    let log = server.log();
    let asked: Vec<&str> = log.iter().map(|asked| asked.key.as_str()).collect();
    assert_eq!(asked, ["manifests/buildkit"]);
}

/// Runs the program with a system call that fails with `errno`.
fn run_without(program: Program, call: libc::c_long, errno: i32) -> Run {
    let call = u32::try_from(call).expect("a number of a system call");
    let errno = u32::try_from(errno).expect("an error code");
    let step = |code: u32, k, jf| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    // The number of the call is what the filter's data begins with.
    let filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, call, 1),
        step(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | errno,
            0,
        ),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let mut command: Command = program.into();
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog {
                len: filter.len() as u16,
                filter: filter.as_ptr().cast_mut(),
            };
            let installed = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(
                    libc::PR_SET_SECCOMP,
                    libc::SECCOMP_MODE_FILTER,
                    std::ptr::from_ref(&program),
                ) == 0;
            match installed {
                true => Ok(()),
                false => Err(std::io::Error::last_os_error()),
            }
        });
    }
    command.output().expect("the program starts").into()
}

#[test]
fn without_flock_an_import_names_the_reason_and_an_export_works() {
    let server = server_with_cache();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let layout = directory.path().join("layout");
    for errno in [libc::EOPNOTSUPP, libc::ENOLCK, libc::ENOSYS] {
        server.clear_log();
        let import = Program::import(&server.spec(""), &layout);
        run_without(import, libc::SYS_flock, errno)
            .ends_with(1)
            .says("this file system has no flock(2)")
            .says("keep the layout on a local disk");
        assert_only_the_manifest_was_read(&server);
        let export = Program::export(&server.spec("name=other"), &fixture("local-max"));
        run_without(export, libc::SYS_flock, errno).succeeds();
    }
}

#[test]
fn without_chmod_an_import_into_a_layout_works() {
    let server = server_with_cache();
    let layout = copy_of(&fixture("local-min"));
    let index = layout.path().join("index.json");
    for (errno, tag) in [(libc::EPERM, "one"), (libc::EOPNOTSUPP, "two")] {
        let import = Program::import(&server.spec(""), layout.path()).args(["--tag", tag]);
        run_without(import, libc::SYS_fchmod, errno).succeeds();
        let written = std::fs::read_to_string(&index).expect("the index");
        assert!(
            written.contains(&format!("ref.name\":\"{tag}\"")),
            "{written}"
        );
    }
    // Where there are permissions, those of the index stay.
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&index, private).expect("a mode can be set");
    Program::import(&server.spec(""), layout.path())
        .args(["--tag", "three"])
        .run()
        .succeeds();
    let mode = std::fs::metadata(&index).expect("the index").permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
}

/// Mounts a new file system, or `from`, at `path`, which only this thread and its children can see.
/// False where that is not permitted.
fn mount(from: Option<&Path>, path: &Path) -> bool {
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).expect("a path");
    let (source, path) = (from.map(text), text(path));
    let null = std::ptr::null();
    unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                null,
                c"/".as_ptr(),
                null,
                libc::MS_REC | libc::MS_PRIVATE,
                null.cast(),
            ) == 0
            && match source {
                Some(source) => {
                    let flags = libc::MS_BIND;
                    libc::mount(source.as_ptr(), path.as_ptr(), null, flags, null.cast())
                }
                None => {
                    let tmpfs = c"tmpfs".as_ptr();
                    libc::mount(tmpfs, path.as_ptr(), tmpfs, 0, null.cast())
                }
            } == 0
    }
}

#[test]
fn with_blobs_on_another_mount_an_import_names_the_reason_and_an_export_works() {
    let server = server_with_cache();
    for bind in [false, true] {
        let layout = copy_of(&fixture("local-min"));
        let elsewhere = copy_of(&fixture("local-min"));
        std::thread::scope(|scope| {
            // A thread of its own, because it leaves the mounts that the other tests see.
            let test = scope.spawn(|| {
                let blobs = layout.path().join("blobs");
                let from = elsewhere.path().join("blobs");
                if !mount(bind.then_some(&from), &blobs) {
                    println!("mounting is not permitted: not tested");
                    return;
                }
                server.clear_log();
                let index = std::fs::read(layout.path().join("index.json")).expect("the index");
                Program::import(&server.spec(""), layout.path())
                    .run()
                    .ends_with(1)
                    .says(&format!("{} is on another mount", blobs.display()))
                    .says("mount the whole layout");
                assert_only_the_manifest_was_read(&server);
                let after = std::fs::read(layout.path().join("index.json")).expect("the index");
                assert_eq!(after, index);
                if bind {
                    Program::export(&server.spec("name=other"), layout.path())
                        .run()
                        .succeeds();
                }
            });
            test.join().expect("the test passes");
        });
    }
}

/// Built into a library that is loaded before the C library: open files get another identity than their
/// names have. It is the same for each open file, or with `FICKLE` never the same twice.
#[cfg(target_env = "gnu")]
const IDENTITIES: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

int statx(int fd, const char *path, int flags, unsigned int mask, struct statx *found) {
    static unsigned long long next = 1;
    int result = syscall(SYS_statx, fd, path, flags, mask, found);
    if (result == 0 && fd >= 0 && (path == NULL || *path == 0))
        found->stx_ino = getenv("FICKLE") ? __sync_fetch_and_add(&next, 1) : ~found->stx_ino;
    return result;
}
"#;

#[test]
#[cfg(target_env = "gnu")]
fn where_open_files_have_another_identity_than_their_names_the_lock_works_or_is_given_up() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let (source, library) = (folder.path().join("i.c"), folder.path().join("i.so"));
    std::fs::write(&source, IDENTITIES).expect("a file can be written");
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status();
    if !compiled.is_ok_and(|status| status.success()) {
        println!("there is no C compiler: not tested");
        return;
    }
    let server = server_with_cache();
    let layout = folder.path().join("layout");
    Program::import(&server.spec(""), &layout)
        .env("LD_PRELOAD", &library)
        .run()
        .succeeds();
    assert_eq!(files(&layout), files(&fixture("local-max")));

    let layout = folder.path().join("fickle");
    server.clear_log();
    Program::import(&server.spec(""), &layout)
        .env("LD_PRELOAD", &library)
        .env("FICKLE", "1")
        .run()
        .ends_with(1)
        .says("cannot lock")
        .says("whether an open file still has its name")
        .says("keep the layout on a local disk");
    assert_only_the_manifest_was_read(&server);
}
