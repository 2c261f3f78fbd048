//! The command line: what builders are told, the command that is run, and how a run ends.

use std::time::Duration;

use expect_test::expect;

use super::Serve;
use crate::aftermath::put_cache;
use crate::program::{Program, Run};
use crate::server::Server;

/// `text` with the secrets of one run replaced.
fn lasting(text: &str) -> String {
    let mut out = String::new();
    for line in text.split_inclusive('\n') {
        let mut line = crate::output::lasting(line);
        for (start, end) in [("127.0.0.1:PORT/", "/"), ("token=", ",")] {
            if let Some(at) = line.find(start).map(|at| at + start.len()) {
                let rest = &line[at..];
                let length = rest
                    .find(end)
                    .unwrap_or(rest.trim_end().trim_end_matches('\'').len());
                let hidden = rest[..length].len();
                if hidden > 8 {
                    line.replace_range(at..at + hidden, "SECRET");
                }
            }
        }
        out.push_str(&line);
    }
    out
}

fn serve(args: &[&str], command: &[&str]) -> Program {
    Program::new()
        .arg("serve")
        .args(args)
        .arg("--")
        .args(command)
}

#[test]
fn a_command_finds_the_variables_and_its_exit_status_is_the_programs() {
    let server = Server::start();
    put_cache(&server, "main", &[100]);
    let from = server.spec("name=main");
    let to = server.spec("name=Feature/X,mode=max,ignore-error=true");
    let args = ["--cache-from", &from, "--cache-to", &to];
    let run = serve(
        &args,
        &["sh", "-c", "env | grep ^LAYERCACHE_ | sort; exit 7"],
    )
    .run();
    let run = run.ends_with(7);
    expect![[r#"
        LAYERCACHE_FROM=type=registry,ref=127.0.0.1:PORT/SECRET/main:latest
        LAYERCACHE_GHA_FROM=type=gha,url=http://127.0.0.1:PORT/SECRET
        LAYERCACHE_GHA_TO=type=gha,url=http://127.0.0.1:PORT/SECRET
        LAYERCACHE_REGISTRY=127.0.0.1:PORT/SECRET
        LAYERCACHE_TO=type=registry,ref=127.0.0.1:PORT/SECRET/feature-x-02cc1910:latest,mode=max,ignore-error=true
    "#]].assert_eq(&lasting(&run.stdout));
    expect![[r#"
        Ns serving: builds on this machine can use the cache now
        served 'main' from s3://cache/manifests/main at http://127.0.0.1:PORT: 0 lookups, 0 found; 0 blobs (0 B) read, 0 B fetched from S3; 0 requests in N s
        served 'Feature/X' from s3://cache/manifests/Feature/X at http://127.0.0.1:PORT: 0 lookups, 0 found; 0 blobs (0 B) read, 0 B fetched from S3; 0 requests in N s
        stored 0 manifests in s3://cache/manifests/Feature/X at http://127.0.0.1:PORT: 0 blobs uploaded (0 B), 0 already there, 0 refreshed
    "#]].assert_eq(&lasting(&run.stderr));
}

#[test]
fn a_cache_that_is_read_and_written_is_one_repository() {
    let server = Server::start();
    let spec = server.spec("");
    let run = serve(
        &["--cache-from", &spec, "--cache-to", &spec],
        &[
            "sh",
            "-c",
            "echo \"$LAYERCACHE_FROM\"; echo \"$LAYERCACHE_TO\"",
        ],
    )
    .run()
    .succeeds();
    expect![[r#"
        type=registry,ref=127.0.0.1:PORT/SECRET/buildkit:latest
        type=registry,ref=127.0.0.1:PORT/SECRET/buildkit:latest,mode=min
    "#]]
    .assert_eq(&lasting(&run.stdout));
    expect![[r#"
        Ns serving: builds on this machine can use the cache now
        served 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 lookups, 0 found; 0 blobs (0 B) read, 0 B fetched from S3; 0 requests in N s
        stored 0 manifests in s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 blobs uploaded (0 B), 0 already there, 0 refreshed
    "#]].assert_eq(&lasting(&run.stderr));
}

#[test]
fn the_variables_are_appended_to_a_file_or_printed_to_be_pasted() {
    let server = Server::start();
    let (one, other) = (server.spec("name=main"), server.spec("name=main,prefix=b/"));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("env");
    std::fs::write(&file, "BEFORE=1\n").expect("a file");
    let program = serve(
        &[
            "--cache-from",
            &one,
            "--cache-from",
            &other,
            "--env-file",
            &file.display().to_string(),
        ],
        &["true"],
    );
    program.run().succeeds();
    let written = std::fs::read_to_string(&file).expect("a file");
    expect![[r#"
        BEFORE=1
        LAYERCACHE_FROM<<LAYERCACHE_END
        type=registry,ref=127.0.0.1:PORT/SECRET/main:latest
        type=registry,ref=127.0.0.1:PORT/SECRET/main-2:latest
        LAYERCACHE_END
        LAYERCACHE_GHA_FROM=type=gha,url=http://127.0.0.1:PORT/SECRET
        LAYERCACHE_REGISTRY=127.0.0.1:PORT/SECRET
    "#]]
    .assert_eq(&lasting(&written));

    let running = Serve::start(&["--cache-from", &one, "--cache-from", &other]);
    let from = running.variables["LAYERCACHE_FROM"].clone();
    expect![[r#"
        type=registry,ref=127.0.0.1:PORT/SECRET/main:latest
        type=registry,ref=127.0.0.1:PORT/SECRET/main-2:latest"#]]
    .assert_eq(&lasting(&from));
    let summary = running.stop().succeeds();
    expect![[r#"
        served 'main' from s3://cache/manifests/main at http://127.0.0.1:PORT: 0 lookups, 0 found; 0 blobs (0 B) read, 0 B fetched from S3; 0 requests in N s
        served 'main' from s3://cache/b/manifests/main at http://127.0.0.1:PORT: 0 lookups, 0 found; 0 blobs (0 B) read, 0 B fetched from S3; 0 requests in N s
    "#]].assert_eq(&lasting(&summary.stdout));
}

#[test]
fn the_summary_is_also_in_the_metadata_file() {
    let server = Server::start();
    put_cache(&server, "buildkit", &[100]);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("metadata.json");
    let spec = server.spec("");
    let running = Serve::start(&[
        "--cache-from",
        &spec,
        "--metadata-file",
        &file.display().to_string(),
    ]);
    running.client("LAYERCACHE_FROM").pull();
    running.stop().succeeds();
    let written = std::fs::read_to_string(&file).expect("a file");
    let mut written: serde_json::Value = serde_json::from_str(&written).expect("JSON");
    written["results"][0]["seconds"] = 0.into();
    expect![[r#"
        {
          "version": 1,
          "results": [
            {
              "command": "serve",
              "endpoint": "http://127.0.0.1:PORT",
              "bucket": "cache",
              "names": [
                "buildkit"
              ],
              "keys": [
                "manifests/buildkit"
              ],
              "repository": "buildkit",
              "source": true,
              "target": false,
              "lookups": 1,
              "hits": 1,
              "blobs": 1,
              "bytesServed": 100,
              "bytesFetched": 100,
              "manifests": 0,
              "transferred": 0,
              "present": 0,
              "refreshed": 0,
              "bytes": 0,
              "requests": 3,
              "seconds": 0
            }
          ]
        }
    "#]]
    .assert_eq(&lasting(&format!("{written:#}\n")));
}

#[test]
fn the_summary_is_on_stderr_where_stdout_is_the_commands_even_if_the_run_is_quiet() {
    let server = Server::start();
    let from = server.spec("name=main");
    let args = ["-q", "--cache-from", &from];
    let run = serve(&args, &["echo", "built"]).run().succeeds();
    run.prints(expect![[r#"
        built
    "#]], expect![[r#"
        served 'main' from s3://cache/manifests/main at http://127.0.0.1:PORT: 0 lookups, 0 found; 0 blobs (0 B) read, 0 B fetched from S3; 0 requests in N s
    "#]]);
}

#[test]
fn a_signal_is_passed_on_to_the_command() {
    let server = Server::start();
    let spec = server.spec("");
    let script = "trap 'echo got TERM; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child = serve(&["--cache-from", &spec], &["sh", "-c", script]).spawn();
    let mut ready = [0; 6];
    std::io::Read::read_exact(child.stdout.as_mut().expect("piped"), &mut ready).expect("ready");
    let pid = i32::try_from(child.id()).expect("a pid");
    // SAFETY: it is our child, and has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    let run = Run::from(child.wait_with_output().expect("it ends")).ends_with(3);
    assert_eq!(run.stdout, "got TERM\n");
}

#[test]
fn a_command_that_dies_of_a_signal_or_is_not_there_has_the_status_of_a_shell() {
    let server = Server::start();
    let spec = server.spec("");
    let args = ["--cache-from", &*spec];
    serve(&args, &["sh", "-c", "kill -9 $$"])
        .run()
        .ends_with(137);
    let run = serve(&args, &["/nonexistent/builder"]).run().ends_with(127);
    expect![[r#"
        Ns serving: builds on this machine can use the cache now
        error: cannot run /nonexistent/builder: No such file or directory (os error 2)
    "#]]
    .assert_eq(&lasting(&run.stderr));
}

#[test]
fn what_is_wrong_with_the_command_line_is_told_before_anything_is_opened() {
    let server = Server::start();
    let (spec, another) = (server.spec(""), server.spec("name=another"));
    let cases: [&[&str]; 4] = [
        &[],
        &["--cache-to", &spec, "--cache-to", &another],
        &["--cache-from", &spec, "--listen", "0.0.0.0:0"],
        &["--cache-from", &spec, "--listen", "localhost"],
    ];
    let mut said = String::new();
    for args in cases {
        let run = Program::new().arg("serve").args(args).run().ends_with(2);
        assert_eq!(run.stdout, "");
        said.push_str(&run.stderr);
    }
    expect![[r#"
        error: no cache is given (use --cache-from or --cache-to type=s3,region=...,bucket=..., or set LAYERCACHE_CACHE_FROM or LAYERCACHE_CACHE_TO)
        error: --cache-to: 2 specs are given (accepted: one; name=a;b in it writes two caches)
        error: --listen: 0.0.0.0:0 can be reached from other machines, without TLS (accepted: loopback; --insecure-listen allows it)
        error: invalid value 'localhost' for '--listen <ADDRESS:PORT>': invalid socket address syntax

        For more information, try '--help'.
    "#]].assert_eq(&said);
    let open = [
        "--cache-from",
        &spec,
        "--listen",
        "0.0.0.0:0",
        "--insecure-listen",
    ];
    serve(&open, &["true"]).run().succeeds();
    assert_eq!(server.log().len(), 0);
}

#[test]
fn the_variables_for_specs_stand_in_only_where_no_flag_is_given() {
    let server = Server::start();
    let show = ["sh", "-c", "env | grep -c ^LAYERCACHE_TO= "];
    let spec = server.spec("");
    let both = |program: Program| {
        program
            .env("LAYERCACHE_CACHE_FROM", &spec)
            .env("LAYERCACHE_CACHE_TO", &spec)
    };
    assert_eq!(both(serve(&[], &show)).run().stdout, "1\n");
    assert_eq!(
        both(serve(&["--cache-from", &spec], &show)).run().stdout,
        "0\n"
    );
}

#[test]
fn an_upload_in_flight_is_finished_before_the_run_ends() {
    let server = Server::start();
    server.fail_first(
        1,
        "PutObject",
        crate::server::Fault::Delay(Duration::from_millis(500)),
    );
    let running = Serve::writing(&server.spec("mode=max"));
    let client = running.client("LAYERCACHE_TO");
    let bytes = b"some bytes".to_vec();
    let digest = layercache::cache::digest::Digest::of(&bytes).to_string();
    let key = format!("blobs/{digest}");
    let pushing = std::thread::spawn(move || client.push_blob(&digest, &bytes));
    while server.count("PutObject") == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    running.stop().succeeds();
    pushing.join().expect("the push succeeds");
    assert_eq!(server.keys(), [key]);
}
