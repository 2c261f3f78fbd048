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
use crate::output::{any_digest, lasting};
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
    for (read_only, expected) in [
        (
            "",
            expect![[r#"
        Ns reading the manifest
        error: cannot write into TMP: Permission denied (os error 13) (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
    "#]],
        ),
        (
            "blobs/sha256",
            expect![[r#"
        Ns reading the manifest
        error: cannot write into TMP/blobs/sha256: Permission denied (os error 13) (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
    "#]],
        ),
    ] {
        let directory = layout.path().join(read_only);
        set_mode(&directory, 0o555);
        server.clear_log();
        run_bound(Program::import(&spec, layout.path())).fails_with(expected);
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
    for expected in [
        expect![[r#"
        imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/new/layout as latest: 2 blobs: 2 fetched (300 B), 0 already there; 3 requests in N s
    "#]],
        expect![[r#"
        imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/new/layout as latest: 2 blobs: 0 fetched (0 B), 2 already there; 1 request in N s
    "#]],
    ] {
        Program::import(&server.spec(""), &layout)
            .args(["--verify", "--quiet"])
            .run()
            .succeeds()
            .prints(expected, expect![[""]]);
        assert_layout_is_sound(&layout, "verified");
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
    for (missing, code, stdout, stderr) in [
        (
            "error",
            1,
            expect![[""]],
            expect![[r#"
            error: S3 lacks 1 blob of the cache (expired?): sha256:c9e457dd6c54498707946dcd35bb9d9da54b649734249668c63f2caac6019826; export the cache again, or let --missing=drop leave out what needs them (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
            warning: blob sha256:c9e457dd6c54498707946dcd35bb9d9da54b649734249668c63f2caac6019826 of the layout is damaged: moved to TMP/.layercache/damaged-c9e457dd6c54498707946dcd35bb9d9da54b649734249668c63f2caac6019826
        "#]],
        ),
        (
            "drop",
            0,
            expect![[r#"
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 1 blob: 0 fetched (0 B), 1 already there; 2 requests in N s
        "#]],
            expect![[r#"
            warning: blob sha256:c9e457dd6c54498707946dcd35bb9d9da54b649734249668c63f2caac6019826 of the layout is damaged: moved to TMP/.layercache/damaged-c9e457dd6c54498707946dcd35bb9d9da54b649734249668c63f2caac6019826
            warning: S3 lacks 1 blob of the cache (expired?): left out 1 result and 1 layer
        "#]],
        ),
    ] {
        std::fs::write(blob_path(layout.path(), &digest), noise(3, 6000)).expect("it is damaged");
        Program::import(&spec, layout.path())
            .args(["--verify", "--missing", missing, "--quiet"])
            .run()
            .ends_with(code)
            .prints(stdout, stderr);
        assert!(!blob_path(layout.path(), &digest).exists());
        Program::import(&spec, layout.path())
            .args(["--missing", "error", "--quiet"])
            .run()
            .ends_with(1)
            .prints(expect![[""]], expect![[r#"
                error: S3 lacks 1 blob of the cache (expired?): sha256:c9e457dd6c54498707946dcd35bb9d9da54b649734249668c63f2caac6019826; export the cache again, or let --missing=drop leave out what needs them (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
            "#]]);
    }
    server.put(&key, blob);
    Program::import(&spec, layout.path())
        .run()
        .succeeds()
        .prints(expect![[r#"
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 2 blobs: 1 fetched (5.86 KiB), 1 already there; 2 requests in N s
        "#]], expect![[r#"
            Ns reading the manifest
            Ns fetching (1 blob, 5.86 KiB)
            Ns [N/1] downloaded sha256:c9e457dd6c54 5.86 KiB
        "#]]);
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
        .prints(expect![[r#"
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP as latest: 5 blobs: 3 fetched (600 B), 2 already there; 4 requests in N s
        "#]], expect![[r#"
            Ns reading the manifest
            Ns fetching (1 blob, 300 B)
            Ns [N/1] downloaded sha256:3f5adab03495 300 B
            Ns another process deleted 2 blobs of this cache from the layout; fetching again
            Ns fetching (2 blobs, 300 B)
            Ns [N/2] downloaded sha256:1fbe0eb2ee7a 100 B
            Ns [N/2] downloaded sha256:472bd52581df 200 B
        "#]]);
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
    run_bound(Program::export(&spec, layout.path()).arg("--quiet"))
        .ends_with(1)
        .prints(expect![[""]], expect![[r#"
            error: cannot open TMP/blobs/sha256/c9e457dd6c54498707946dcd35bb9d9da54b649734249668c63f2caac6019826: Permission denied (os error 13) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]]);
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
    let run = Program::export(&server.spec("mode=max"), layout.path())
        .arg("--quiet")
        .run();
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

/// How many bytes are missed depends on which part is read first.
fn however_many_bytes(mut run: Run) -> Run {
    let missing = run.stderr.split_once(" shrank while it was read: ");
    let (before, after) = missing.expect("it says what happened");
    let after = after.trim_start_matches(|c: char| c.is_ascii_digit());
    run.stderr = format!("{before} shrank while it was read: N{after}");
    run
}

#[test]
fn a_file_that_shrinks_while_it_is_sent_in_one_request_fails_the_export() {
    let shrink = |file: &File| file.set_len(28 * MIB as u64).expect("it shrinks");
    let (_, run) = export_while(31 * MIB, "PutObject", shrink);
    however_many_bytes(run).ends_with(1).prints(expect![[""]], expect![[r#"
        error: blob sha256:8fe7b325cba70dc8a7ea76fefd328fbc02df2de2ac06299337cc3fe8d6c94db1 of the layout shrank while it was read: N bytes are missing (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
    "#]]);
}

#[test]
fn a_file_that_shrinks_while_it_is_sent_in_parts_fails_the_export() {
    let shrink = |file: &File| file.set_len(12 * MIB as u64).expect("it shrinks");
    let (_, run) = export_while(40 * MIB, "CreateMultipartUpload", shrink);
    however_many_bytes(run).ends_with(1).prints(expect![[""]], expect![[r#"
        error: blob sha256:1eeeccfad50921f3d3f8f644d6316c2e07a16005aa9c3c0d8be33dd84346fd68 of the layout shrank while it was read: N bytes are missing (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
    "#]]);
}

#[test]
fn a_file_that_is_written_to_while_it_is_sent_fails_the_export() {
    for (size, operation, expected) in [
        (
            31,
            "PutObject",
            expect![[r#"
            error: TMP/blobs/sha256/8fe7b325cba70dc8a7ea76fefd328fbc02df2de2ac06299337cc3fe8d6c94db1 is damaged: its bytes hash to sha256:22b07ba7d24e72dc59fd195ea2ef7ad6624e5392a6225b1e681a5d6d383c7c96; remove it, and build or import it again (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
        ),
        (
            40,
            "CreateMultipartUpload",
            expect![[r#"
            error: TMP/blobs/sha256/1eeeccfad50921f3d3f8f644d6316c2e07a16005aa9c3c0d8be33dd84346fd68 is damaged: its bytes hash to sha256:d0d3217420e45dfef5d58439815694ab32e56731d990fe784fbef191c58bc3dc; remove it, and build or import it again (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
        ),
    ] {
        let overwrite = move |file: &File| {
            let end = (size * MIB) as u64 - 10;
            file.write_all_at(b"other", end).expect("it is written");
        };
        let (_, run) = export_while(size * MIB, operation, overwrite);
        run.ends_with(1).prints(expect![[""]], expected);
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
        .arg("--quiet")
        .run()
        .ends_with(1)
        .prints(expect![[""]], expect![[r#"
            error: TMP/blobs/sha256/ef94ef9bf8549f9d4048676cc1c4210bf643818c60ddad9c5ea5ad956c323dce is damaged: it has 5004 bytes where its descriptor says 5000 (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]]);
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
    for (name, sizes, expected) in [
        (
            "large",
            vec![20 * MIB, 9 * MIB, 500],
            expect![[r#"
            warning: too little disk space for TMP/cache: 29.0 MiB to fetch, 16.0 MiB free
            error: writing blob sha256:DIGEST into the layout: No space left on device (os error 28) (importing 'large' from s3://cache at http://127.0.0.1:PORT)
        "#]],
        ),
        (
            "small",
            vec![900_000; 24],
            expect![[r#"
            warning: too little disk space for TMP/cache: 20.6 MiB to fetch, 16.0 MiB free
            error: writing blob sha256:DIGEST into the layout: No space left on device (os error 28) (importing 'small' from s3://cache at http://127.0.0.1:PORT)
        "#]],
        ),
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
                let mut run = Program::import(&spec, &root).arg("--quiet").run();
                // Several are written at once.
                run.stderr = any_digest(&run.stderr, "blob sha256:");
                run.fails_with(expected);
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
        .args(["--metadata-file", "/dev/full", "--quiet"])
        .run()
        .ends_with(1)
        .prints(expect![[r#"
            exported 10 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 10 uploaded (62.9 KiB), 0 already there, 0 refreshed; 22 requests in N s
        "#]], expect![[r#"
            error: cannot write the metadata file /dev/full: No space left on device (os error 28)
        "#]]);
    assert!(server.object("manifests/buildkit").is_some());
}

#[test]
#[cfg(target_os = "linux")]
fn a_metadata_file_that_is_open_already_is_written_to_and_loses_nothing() {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let log = folder.path().join("log");
    let run = |redirected: &str, file: &str| {
        let export = Program::export(&server.spec("mode=max"), &fixture("local-max"));
        let export = Command::from(export.args(["-q", "--metadata-file", file]));
        let _ = std::fs::remove_file(&log);
        let number = &redirected[..1];
        let script = format!(
            "exec {redirected}{}; echo earlier >&{number}; \"$0\" \"$@\"; echo later >&{number}",
            log.display()
        );
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &script])
            .arg(export.get_program())
            .args(export.get_args());
        shell
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default());
        Run::from(shell.output().expect("sh runs")).succeeds();
        let log = std::fs::read_to_string(&log).expect("the log");
        let json = log.find('{').expect("JSON");
        let (before, json) = log.split_at(json);
        let (json, after) = json.split_at(json.rfind('}').expect("its end") + 1);
        let document: serde_json::Value = serde_json::from_str(json).expect("JSON");
        assert_eq!(document["results"][0]["command"], "export");
        lasting(&format!("{before}JSON{after}"))
    };
    run("1>", "-");
    let streams = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "-"];
    let logs = streams.map(|file| run("1>", file));
    expect![[r#"
        earlier
        exported 10 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 uploaded (0 B), 10 already there, 0 refreshed; 12 requests in N s
        JSON
        later
    "#]]
    .assert_eq(&logs[0]);
    assert!(logs.iter().all(|log| *log == logs[0]), "{logs:#?}");
    for (redirected, file) in [("2>", "/dev/stderr"), ("3>>", "/dev/fd/3")] {
        assert_eq!(run(redirected, file), "earlier\nJSON\nlater\n");
    }
    assert!(!Path::new("-").exists());
    assert_eq!(folder.path().read_dir().expect("it").count(), 1);
}

#[test]
fn a_metadata_file_that_has_no_place_is_found_out_before_any_request() {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let absent = folder.path().join("absent/metadata.json");
    for (file, expected) in [
        (
            &*absent,
            expect![[r#"
        error: cannot write the metadata file TMP/absent/metadata.json: there is no directory TMP/absent
    "#]],
        ),
        (
            folder.path(),
            expect![[r#"
        error: cannot write the metadata file TMP: it is a directory
    "#]],
        ),
    ] {
        // `ignore-error` does not hide it either.
        Program::export(&server.spec("ignore-error=true"), &fixture("local-max"))
            .arg("--metadata-file")
            .arg(file)
            .run()
            .ends_with(2)
            .prints(expect![[""]], expected);
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
        let mut command: Command = Program::export(&server.spec("mode=max"), &fixture("local-max"))
            .arg("--quiet")
            .into();
        let output = command.stdout(full()).stderr(stderr()).spawn();
        let output = output.and_then(|child| child.wait_with_output());
        let run = Run::from(output.expect("the program runs"));
        assert_eq!(run.code, Some(1));
        if !run.stderr.is_empty() {
            run.prints(
                expect![[""]],
                expect![[r#"
                error: cannot write the result to stdout: No space left on device (os error 28)
            "#]],
            );
        }
        assert!(server.object("manifests/buildkit").is_some());
    }
}
