//! A disk that is full, denies access, or changes while the program works on it.

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use expect_test::expect;
use layercache::cache::digest::Digest;

use crate::aftermath::{
    assert_layout_is_sound, assert_store_is_sound, layout_of, noise, put_cache,
};
use crate::program::{Program, Run, copy_of, files, fixture};
use crate::server::Server;

const MIB: usize = 1 << 20;

/// Runs the program bound by permissions: as root, without the capabilities that override them.
fn run_bound(program: Program) -> Run {
    let mut command: Command = program.into();
    #[cfg(target_os = "linux")]
    unsafe {
        command.pre_exec(|| {
            const CAP_DAC_OVERRIDE: libc::c_ulong = 1;
            const CAP_DAC_READ_SEARCH: libc::c_ulong = 2;
            // Fails for other users, who do not have these capabilities anyway.
            libc::prctl(libc::PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0);
            libc::prctl(libc::PR_CAPBSET_DROP, CAP_DAC_READ_SEARCH, 0, 0, 0);
            Ok(())
        });
    }
    command.output().expect("the program starts").into()
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode can be set");
}

fn blob_path(layout: &Path, digest: &Digest) -> PathBuf {
    layout.join("blobs/sha256").join(digest.hex())
}

#[test]
fn an_import_into_a_read_only_directory_fails_before_any_blob_is_fetched() {
    let server = Server::start();
    put_cache(&server, "buildkit", &[100, 200]);
    let spec = server.spec("");
    let layout = copy_of(&fixture("local-max"));
    let before = files(layout.path());
    for read_only in ["", "blobs/sha256"] {
        let directory = layout.path().join(read_only);
        set_mode(&directory, 0o555);
        server.clear_log();
        run_bound(Program::import(&spec, layout.path()))
            .ends_with(1)
            .says("cannot write into")
            .says("Permission denied");
        assert_eq!(server.log().len(), 1, "the manifest alone");
        set_mode(&directory, 0o755);
        assert_eq!(files(layout.path()), before);
    }
    Program::import(&spec, layout.path()).run().succeeds();
}

#[test]
fn verify_works_where_there_is_no_layout_yet() {
    let server = Server::start();
    put_cache(&server, "buildkit", &[100, 200]);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let layout = directory.path().join("new/layout");
    for fetched in ["2 fetched", "0 fetched"] {
        Program::import(&server.spec(""), &layout)
            .arg("--verify")
            .run()
            .succeeds()
            .says(fetched);
        assert_layout_is_sound(&layout, fetched);
    }
}

#[test]
fn a_damaged_blob_that_s3_lacks_does_not_count_as_present_from_then_on() {
    let server = Server::start();
    let layout = layout_of(&[5000, 6000]);
    put_cache(&server, "buildkit", &[5000, 6000]);
    let blob = noise(2, 6000);
    let digest = Digest::of(&blob);
    let key = format!("blobs/{digest}");
    server.remove(&key);
    let spec = server.spec("");
    for missing in ["error", "drop"] {
        std::fs::write(blob_path(layout.path(), &digest), noise(3, 6000)).expect("it is damaged");
        Program::import(&spec, layout.path())
            .args(["--verify", "--missing", missing])
            .run()
            .ends_with(i32::from(missing == "error"))
            .says(&format!("damaged-{}", digest.hex()));
        assert!(!blob_path(layout.path(), &digest).exists());
        Program::import(&spec, layout.path())
            .args(["--missing", "error"])
            .run()
            .ends_with(1)
            .says(&digest.to_string());
    }
    server.put(&key, blob);
    Program::import(&spec, layout.path())
        .run()
        .succeeds()
        .says("1 fetched");
    assert_layout_is_sound(layout.path(), "at the end");
    assert!(!layout.path().join(".layercache").exists());
}

#[test]
fn blobs_that_go_before_the_tag_is_set_are_fetched_again() {
    let server = Server::start();
    put_cache(&server, "buildkit", &[100, 200, 300]);
    let layout = layout_of(&[100, 200]);
    let blobs = layout.path().join("blobs/sha256");
    // As BuildKit's `reset=true`: whatever no manifest in the index names, at the last blob's request.
    std::fs::write(layout.path().join("index.json"), "").expect("the index");
    let last = Digest::of(&noise(3, 300)).to_string();
    server.fail(move |asked| {
        if asked.key.ends_with(&last) && asked.nth == 1 {
            for blob in std::fs::read_dir(&blobs).expect("the blobs") {
                std::fs::remove_file(blob.expect("a blob").path()).expect("it is removed");
            }
        }
        None
    });
    Program::import(&server.spec(""), layout.path())
        .run()
        .succeeds()
        .says("another process deleted 2 blobs")
        .says("3 fetched");
    assert_layout_is_sound(layout.path(), "at the end");
}

#[test]
fn an_export_from_a_read_only_directory_works() {
    let server = Server::start();
    let layout = copy_of(&fixture("local-max"));
    set_mode(layout.path(), 0o555);
    run_bound(Program::export(&server.spec("mode=max"), layout.path())).succeeds();
    set_mode(layout.path(), 0o755);
    assert_eq!(files(layout.path()), files(&fixture("local-max")));
    assert_store_is_sound(&server, "at the end");
}

#[test]
fn a_blob_that_may_not_be_read_fails_the_export_before_its_manifest() {
    let server = Server::start();
    let layout = layout_of(&[5000, 6000]);
    let digest = Digest::of(&noise(2, 6000));
    set_mode(&blob_path(layout.path(), &digest), 0);
    let spec = server.spec("mode=max");
    run_bound(Program::export(&spec, layout.path()))
        .ends_with(1)
        .says(&digest.hex())
        .says("Permission denied");
    assert!(server.object("manifests/buildkit").is_none());
    assert_store_is_sound(&server, "at the end");
    set_mode(&blob_path(layout.path(), &digest), 0o644);
    Program::export(&spec, layout.path()).run().succeeds();
}

/// The first request of `operation` applies `change` to the blob's file.
fn export_while(
    size: usize,
    operation: &'static str,
    change: impl Fn(&File) + Send + Sync + 'static,
) -> (Server, Run) {
    let layout = layout_of(&[size]);
    let digest = Digest::of(&noise(1, size));
    let path = blob_path(layout.path(), &digest);
    let server = Server::start();
    server.fail(move |asked| {
        if asked.operation == operation && asked.nth == 0 {
            change(&File::options().write(true).open(&path).expect("the blob"));
        }
        None
    });
    let run = Program::export(&server.spec("mode=max"), layout.path()).run();
    assert_eq!(server.uploads(), 0);
    assert_store_is_sound(&server, "at the end");
    if run.code != Some(0) {
        assert_eq!(server.objects().len(), 0);
        // The layout is intact again, so a second run succeeds.
        let path = blob_path(layout.path(), &digest);
        std::fs::write(path, noise(1, size)).expect("the blob");
        server.reset_faults();
        Program::export(&server.spec("mode=max"), layout.path())
            .run()
            .succeeds();
        assert_store_is_sound(&server, "whole again");
    }
    (server, run)
}

// The server reads no body before its rule has returned. So all of a large blob but the few MiB that
// fit into the sockets' buffers is read from disk after the change.

#[test]
fn a_file_that_shrinks_while_it_is_sent_in_one_request_fails_the_export() {
    let shrink = |file: &File| file.set_len(28 * MIB as u64).expect("it shrinks");
    let (_, run) = export_while(31 * MIB, "PutObject", shrink);
    run.ends_with(1).says("shrank while it was read");
}

#[test]
fn a_file_that_shrinks_while_it_is_sent_in_parts_fails_the_export() {
    let shrink = |file: &File| file.set_len(12 * MIB as u64).expect("it shrinks");
    let (_, run) = export_while(40 * MIB, "CreateMultipartUpload", shrink);
    run.ends_with(1).says("shrank while it was read");
}

#[test]
fn a_file_that_is_written_to_while_it_is_sent_fails_the_export() {
    for (size, operation) in [(31, "PutObject"), (40, "CreateMultipartUpload")] {
        let overwrite = move |file: &File| {
            let end = (size * MIB) as u64 - 10;
            file.write_all_at(b"other", end).expect("it is written");
        };
        let (_, run) = export_while(size * MIB, operation, overwrite);
        run.ends_with(1).says("is damaged: its bytes hash to");
    }
}

#[test]
fn a_file_that_grows_while_it_is_sent_is_sent_as_it_was() {
    for (size, operation) in [(31, "PutObject"), (40, "CreateMultipartUpload")] {
        let grow = move |file: &File| {
            let end = (size * MIB) as u64;
            file.write_all_at(b"more", end).expect("it grows");
        };
        let (server, run) = export_while(size * MIB, operation, grow);
        run.succeeds();
        assert_eq!(server.objects().len(), 2);
    }
}

#[test]
fn a_file_that_has_grown_before_fails_the_export() {
    let layout = layout_of(&[5000]);
    let path = blob_path(layout.path(), &Digest::of(&noise(1, 5000)));
    let server = Server::start();
    let file = File::options().append(true).open(path).expect("the blob");
    file.write_all_at(b"more", 5000).expect("it grows");
    Program::export(&server.spec("mode=max"), layout.path())
        .run()
        .ends_with(1)
        .says("it has 5004 bytes where its descriptor says 5000");
    assert_eq!(server.objects().len(), 0);
}

/// Mounts (or, with `remount`, resizes) a file system in memory, visible only to this thread and its
/// children. False where that is not allowed.
#[cfg(target_os = "linux")]
fn mount(path: &Path, mib: usize, remount: bool) -> bool {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt as _;
    let path = CString::new(path.as_os_str().as_bytes()).expect("a path");
    let size = CString::new(format!("size={mib}m")).expect("a size");
    let private = libc::MS_REC | libc::MS_PRIVATE;
    let null = std::ptr::null();
    unsafe {
        (remount
            || libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(null, c"/".as_ptr(), null, private, null.cast()) == 0)
            && libc::mount(
                c"none".as_ptr(),
                path.as_ptr(),
                c"tmpfs".as_ptr(),
                if remount { libc::MS_REMOUNT } else { 0 },
                size.as_ptr().cast(),
            ) == 0
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_fails_the_import_with_room_again_the_next_one_finishes() {
    let server = Server::start();
    for (name, sizes) in [
        ("large", vec![20 * MIB, 9 * MIB, 500]),
        ("small", vec![900_000; 24]),
    ] {
        put_cache(&server, name, &sizes);
        let spec = server.spec(&format!("name={name}"));
        let directory = tempfile::tempdir().expect("a temporary directory");
        let reference = tempfile::tempdir().expect("a temporary directory");
        Program::import(&spec, reference.path()).run().succeeds();
        let (disk, root) = (directory.path(), directory.path().join("cache"));
        std::thread::scope(|scope| {
            // In its own thread, because it leaves the mount namespace of the other tests.
            let test = scope.spawn(|| {
                if !mount(disk, 16, false) {
                    println!("not allowed to mount: not tested");
                    return;
                }
                Program::import(&spec, &root)
                    .run()
                    .ends_with(1)
                    .says("blob sha256:")
                    .says("No space left on device");
                assert_layout_is_sound(&root, name);
                assert!(!root.join("index.json").exists());
                assert!(mount(disk, 64, true), "our mount can be resized");
                Program::import(&spec, &root).run().succeeds();
                assert_eq!(files(&root), files(reference.path()));
            });
            test.join().expect("the test passes");
        });
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_metadata_file_that_cannot_be_written_fails_the_run_after_the_export_is_done() {
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .args(["--metadata-file", "/dev/full"])
        .run()
        .ends_with(1)
        .says("/dev/full")
        .says("No space left on device");
    assert!(server.object("manifests/buildkit").is_some());
}

#[test]
fn a_metadata_file_that_has_no_place_is_found_out_before_any_request() {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let absent = folder.path().join("absent/metadata.json");
    for file in [&*absent, folder.path()] {
        // `ignore-error` does not hide it either.
        Program::export(&server.spec("ignore-error=true"), &fixture("local-max"))
            .arg("--metadata-file")
            .arg(file)
            .run()
            .ends_with(2)
            .says("error: cannot write the metadata file ")
            .says(&file.display().to_string());
    }
    assert_eq!(server.log().len(), 0);
    assert_eq!(folder.path().read_dir().expect("it").count(), 0);
}

#[test]
#[cfg(target_os = "linux")]
fn results_that_cannot_be_printed_fail_the_export_that_was_made() {
    let server = Server::start();
    let full = || Stdio::from(File::options().write(true).open("/dev/full").expect("it"));
    for stderr in [Stdio::piped, full] {
        let mut command: Command =
            Program::export(&server.spec("mode=max"), &fixture("local-max")).into();
        let output = command.stdout(full()).stderr(stderr()).spawn();
        let output = output.and_then(|child| child.wait_with_output());
        let run = Run::from(output.expect("the program runs"));
        assert_eq!(run.code, Some(1));
        if let Some(error) = run.stderr.lines().last() {
            expect![
                "error: cannot write the result to stdout: No space left on device (os error 28)"
            ]
            .assert_eq(error);
        }
        assert!(server.object("manifests/buildkit").is_some());
    }
}
