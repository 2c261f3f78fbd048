//! The GitHub action's script, in a runner's environment, with a release at a file:// URL.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use expect_test::{Expect, expect};
use layercache::cache::digest::Digest;

use crate::output::lasting;
use crate::program::{NO_HOME, Run, copy_of, fixture};
use crate::server::{ACCESS_KEY, SECRET_KEY, Server};

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn release_name() -> String {
    format!("layercache-{VERSION}-x86_64-unknown-linux-gnu")
}

/// A release's archive of this program.
fn archive(program: &[u8]) -> Vec<u8> {
    let stage = tempfile::tempdir().expect("a temporary directory");
    let folder = stage.path().join(release_name());
    std::fs::create_dir(&folder).expect("made");
    std::fs::write(folder.join("layercache"), program).expect("written");
    let executable = Permissions::from_mode(0o755);
    std::fs::set_permissions(folder.join("layercache"), executable).expect("set");
    let tar = Command::new("tar")
        .args([
            "--create",
            "--use-compress-program=gzip --fast",
            "--directory",
        ])
        .arg(stage.path())
        .arg(release_name())
        .output()
        .expect("tar runs");
    assert!(tar.status.success());
    tar.stdout
}

/// A job: the files through which a runner and its steps talk, and releases to download.
struct Job(tempfile::TempDir);

impl Job {
    /// The release holds the real program.
    fn new() -> Job {
        // It is large, so it is compressed once for all tests.
        static ARCHIVE: LazyLock<Vec<u8>> = LazyLock::new(|| {
            archive(&std::fs::read(env!("CARGO_BIN_EXE_layercache")).expect("the program"))
        });
        Job::with(&ARCHIVE)
    }

    fn with(archive: &[u8]) -> Job {
        let job = Job(tempfile::tempdir().expect("a temporary directory"));
        let release = format!("releases/v{VERSION}");
        std::fs::create_dir_all(job.path(&release)).expect("made");
        let name = format!("{}.tar.gz", release_name());
        std::fs::write(job.path(&format!("{release}/{name}")), archive).expect("written");
        let digest = Digest::of(archive).hex();
        job.write(
            &format!("{release}/SHA256SUMS"),
            &format!("{digest}  {name}\n"),
        );
        for file in ["env", "output", "summary"] {
            job.write(file, "");
        }
        job
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("a file can be written");
    }

    /// What a step has written to one of the runner's files.
    #[track_caller]
    fn holds(&self, file: &str, expected: Expect) {
        let text = std::fs::read_to_string(self.path(file)).expect("the file");
        expected.assert_eq(&lasting(&text));
    }

    fn step(&self, mode: &str, inputs: &[(&str, &str)]) -> Run {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/action.sh");
        let mut command = Command::new(script);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", NO_HOME)
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
            .env("RUNNER_TEMP", self.0.path())
            .env("GITHUB_ENV", self.path("env"))
            .env("GITHUB_OUTPUT", self.path("output"))
            .env("GITHUB_STEP_SUMMARY", self.path("summary"))
            .env("INPUT_MODE", mode)
            .env("INPUT_CACHE_FROM", "")
            .env("INPUT_CACHE_TO", "")
            .env("INPUT_PATH", "")
            .env("INPUT_VERSION", VERSION)
            .env(
                "INPUT_RELEASES",
                format!("file://{}", self.path("releases").display()),
            )
            .stdin(Stdio::null());
        for (name, value) in inputs {
            command.env(name, value);
        }
        command.output().expect("the script starts").into()
    }
}

#[test]
fn a_job_exports_and_the_next_one_imports() {
    let server = Server::start();
    let spec = server.keyless_spec("name=app");
    let layout = copy_of(&fixture("local-min"));
    let path = layout.path().to_str().expect("UTF-8");
    let job = Job::new();
    job.step("export", &[("INPUT_CACHE_TO", &spec), ("INPUT_PATH", path)])
        .succeeds();
    job.holds("summary", expect![[r#"
        ### layercache export

        | result |
        |---|
        | exported 5 blobs to s3://cache/manifests/app at http://127.0.0.1:PORT: 5 uploaded (30.1 KiB), 0 already there, 0 refreshed; 12 requests in N s |
    "#]]);
    job.holds("output", expect![[""]]);

    let job = Job::new();
    job.step("import", &[("INPUT_CACHE_FROM", &spec)])
        .succeeds();
    job.holds("summary", expect![[r#"
        ### layercache import

        | result |
        |---|
        | imported 'app' from s3://cache/manifests/app at http://127.0.0.1:PORT into TMP/layercache as latest: 5 blobs: 5 fetched (30.1 KiB), 0 already there; 6 requests in N s |
    "#]]);
    job.holds("output", expect![[r#"
        build-args=--cache-from type=local,src=TMP/layercache --cache-to type=local,dest=TMP/layercache,mode=max
    "#]]);
    job.holds("env", expect![[""]]);
    assert!(job.path("layercache/index.json").is_file());
}

#[test]
fn an_import_that_finds_nothing_or_fails_lets_the_build_go_on_without_cache() {
    let server = Server::start();
    let job = Job::new();
    let absent = server.keyless_spec("name=app");
    job.step("import", &[("INPUT_CACHE_FROM", &absent)])
        .succeeds()
        .prints(expect![[r#"
            no cache named 'app' in s3://cache at http://127.0.0.1:PORT yet: there is no manifests/app (--require makes this an error); 1 request in N s
        "#]], expect![[r#"
            Ns reading the manifest
        "#]]);
    job.holds(
        "output",
        expect![[r#"
        build-args=--cache-to type=local,dest=TMP/layercache,mode=max
    "#]],
    );
    let elsewhere = absent.replace("bucket=cache", "bucket=absent");
    job.step("import", &[("INPUT_CACHE_FROM", &elsewhere)])
        .succeeds()
        .prints(expect![[r#"
            ::warning title=layercache::the import failed; building without cache
        "#]], expect![[r#"
            Ns reading the manifest
            error: http://127.0.0.1:PORT answered 404 NoSuchBucket, reading s3://absent/manifests/app; check bucket, region and endpoint_url
        "#]]);
}

#[test]
fn an_export_that_fails_fails_the_step() {
    let job = Job::new();
    job.step(
        "export",
        &[("INPUT_CACHE_TO", "type=s3,region=a,bucket=cache")],
    )
    .ends_with(1)
    .prints(
        expect![[""]],
        expect![[r#"
        error: no OCI layout at TMP/layercache: no such directory
    "#]],
    );
}

#[test]
fn a_release_with_another_checksum_is_not_run() {
    let job = Job::new();
    job.write(
        &format!("releases/v{VERSION}/SHA256SUMS"),
        &format!(
            "{}  layercache-{VERSION}-x86_64-unknown-linux-gnu.tar.gz\n",
            "0".repeat(64)
        ),
    );
    job.step("import", &[])
        .ends_with(1)
        .prints(expect![[""]], expect![[r#"
            ::error title=layercache::layercache-0.2.0-x86_64-unknown-linux-gnu.tar.gz does not have the checksum in SHA256SUMS
        "#]]);
    job.write(&format!("releases/v{VERSION}/SHA256SUMS"), "");
    job.step("import", &[])
        .ends_with(1)
        .prints(expect![[""]], expect![[r#"
            ::error title=layercache::SHA256SUMS does not list layercache-0.2.0-x86_64-unknown-linux-gnu.tar.gz
        "#]]);
    job.step("import", &[("INPUT_VERSION", "v9.9.9")])
        .ends_with(1)
        .says("::error title=layercache::cannot download file://");
    job.step("fetch", &[]).ends_with(1).prints(
        expect![[""]],
        expect![[r#"
            ::error title=layercache::mode is import, export or serve, not 'fetch'
        "#]],
    );
}

#[test]
fn the_table_of_a_step_has_at_most_20_lines() {
    let server = Server::start();
    let names = (0..30).map(|n| server.keyless_spec(&format!("name=n{n}")) + "\n");
    let job = Job::new();
    job.step(
        "import",
        &[("INPUT_CACHE_FROM", &names.collect::<String>())],
    )
    .succeeds();
    let summary = std::fs::read_to_string(job.path("summary")).expect("the summary");
    let lines: Vec<&str> = summary.lines().collect();
    assert_eq!(
        (lines.len(), lines[18]),
        (19, "| and 16 more |"),
        "{summary}"
    );
}

#[test]
fn serve_goes_on_in_the_background_and_its_variables_reach_later_steps() {
    let job = Job::with(&archive(
        b"#!/bin/sh\n\
          test \"$1 $2\" = 'serve --env-file' || exit 9\n\
          echo \"from $LAYERCACHE_CACHE_FROM\"\n\
          echo LAYERCACHE_FROM=type=registry,ref=127.0.0.1:1/secret/app:latest >> \"$3\"\n\
          exec sleep 600\n",
    ));
    job.step("serve", &[("INPUT_CACHE_FROM", "type=s3,bucket=b")])
        .succeeds();
    let env = std::fs::read_to_string(job.path("env")).expect("the variables");
    let (variables, pid) = env.split_once("LAYERCACHE_PID=").expect("the process");
    assert_eq!(
        variables,
        "LAYERCACHE_FROM=type=registry,ref=127.0.0.1:1/secret/app:latest\n"
    );
    let killed = Command::new("kill").arg(pid.trim()).status();
    assert!(killed.expect("kill runs").success(), "it still ran");
    let log = std::fs::read_to_string(job.path("layercache-serve.log")).expect("the log");
    assert_eq!(log, "from type=s3,bucket=b\n");

    let job = Job::with(&archive(b"#!/bin/sh\necho 'error: no'\nexit 1\n"));
    job.step("serve", &[]).ends_with(1).prints(
        expect![[""]],
        expect![[r#"
            ::error title=layercache::serve ended: error: no
        "#]],
    );
}

#[test]
fn the_action_runs_the_release_of_its_own_version() {
    let action = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("action.yml"))
        .expect("action.yml");
    assert!(
        action.contains(&format!("default: \"{VERSION}\"")),
        "{action}"
    );
}
