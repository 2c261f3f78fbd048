//! The program writes no secret anywhere: successful runs and all kinds of failures, at the highest
//! verbosity, with all their output and files searched.

use std::path::Path;

use expect_test::expect;

use crate::program::{Program, Run, files, fixture};
use crate::server::{
    ACCESS_KEY, Fault, READER_ACCESS_KEY, READER_SECRET_KEY, SECRET_KEY, SESSION_ACCESS_KEY,
    SESSION_SECRET_KEY, SESSION_TOKEN, Server,
};

const WRONG_SECRET: &str = "wrong+secret/that/nobody/has+0123456789";

/// Everything that must not appear: of each secret also a part.
fn secrets(server: &Server) -> Vec<String> {
    let mut secrets: Vec<String> = Vec::new();
    for secret in [
        SECRET_KEY,
        READER_SECRET_KEY,
        SESSION_SECRET_KEY,
        SESSION_TOKEN,
        WRONG_SECRET,
    ] {
        // All of them begin with "leaked+secret/of/the/".
        secrets.push(secret[..16].to_owned());
        secrets.push(secret[secret.len() - 12..].to_owned());
    }
    secrets.extend([ACCESS_KEY, READER_ACCESS_KEY, SESSION_ACCESS_KEY].map(str::to_owned));
    for logged in server.log() {
        let authorization = logged.headers.get("authorization");
        let text = authorization
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        if let Some((_, signature)) = text.split_once("Signature=") {
            secrets.push(signature.to_owned());
        }
    }
    secrets
}

/// Runs at the highest verbosity, in each form of progress, and searches everything it wrote.
fn search(server: &Server, what: &str, make: impl Fn(&Path) -> Program, code: i32) -> Vec<Run> {
    let mut runs = Vec::new();
    for progress in ["plain", "rawjson", "tty"] {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let run = make(folder.path())
            .args(["--verbose", "--progress", progress, "--metadata-file"])
            .arg(folder.path().join("metadata.json"))
            .env("RUST_LOG", "trace")
            .env("RUST_BACKTRACE", "full")
            .run();
        assert_eq!(run.code, Some(code), "{what}: {}", run.stderr);
        assert!(!run.stderr.contains("panicked"), "{what}: {}", run.stderr);
        let written = files(folder.path());
        for secret in secrets(server) {
            for text in [&run.stdout, &run.stderr] {
                assert!(!text.contains(&secret), "{what}: {secret} is in\n{text}");
            }
            for (name, bytes) in &written {
                let found = bytes
                    .windows(secret.len())
                    .any(|window| window == secret.as_bytes());
                assert!(
                    !found && !name.contains(&secret),
                    "{what}: {secret} is in {name}"
                );
            }
        }
        runs.push(run);
    }
    runs
}

fn export(spec: &str) -> impl Fn(&Path) -> Program {
    let spec = spec.to_owned();
    move |_| Program::export(&spec, &fixture("local-max"))
}

fn import(spec: &str) -> impl Fn(&Path) -> Program {
    let spec = spec.to_owned();
    move |folder| Program::import(&spec, &folder.join("layout"))
}

/// [`Server::spec`] with a session token.
fn guest(server: &Server, extra: &str) -> String {
    server.keyless_spec(&format!(
        "access_key_id={SESSION_ACCESS_KEY},secret_access_key={SESSION_SECRET_KEY},\
         session_token={SESSION_TOKEN},{extra}"
    ))
}

#[test]
fn runs_that_work_show_no_secret() {
    let server = Server::start();
    for spec in [
        server.spec("mode=max"),
        guest(&server, "mode=max"),
        server.virtual_hosted_spec("mode=max"),
    ] {
        search(&server, "export", export(&spec), 0);
        let spec = spec.replace(",mode=max", "");
        search(&server, "import", import(&spec), 0);
        // On loopback a token may go unencrypted.
        let folder = tempfile::tempdir().expect("a temporary directory");
        let run = Program::import(&spec, folder.path()).arg("--quiet").run();
        assert_eq!(run.succeeds().stderr, "");
    }
}

#[test]
fn credentials_from_elsewhere_are_not_shown() {
    let server = Server::start();
    let home = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| home.path().join(name);
    let write = |name: &str, text: String| std::fs::write(path(name), text).expect("written");
    let keys = format!(
        "aws_access_key_id = {SESSION_ACCESS_KEY}\naws_secret_access_key = {SESSION_SECRET_KEY}\n\
         aws_session_token = {SESSION_TOKEN}\n"
    );
    write("credentials", format!("[ci]\n{keys}"));
    let json = |expiry: &str| {
        format!(
            "{{\"Version\":1,\"AccessKeyId\":\"{SESSION_ACCESS_KEY}\",\"SecretAccessKey\":\
             \"{SESSION_SECRET_KEY}\",\"SessionToken\":\"{SESSION_TOKEN}\"{expiry}}}"
        )
    };
    write("good.json", json(""));
    write(
        "expired.json",
        json(",\"Expiration\":\"2001-01-01T00:00:00Z\""),
    );
    write("broken.json", json(",").replace(",}", ",,}"));
    let shown = home.path().display();
    write(
        "config",
        format!(
            "[profile good]\ncredential_process = cat {shown}/good.json\n\
             [profile expired]\ncredential_process = cat {shown}/expired.json\n\
             [profile broken]\ncredential_process = cat {shown}/broken.json\n\
             [profile loud]\ncredential_process = sh -c \"cat {shown}/good.json >&2; exit 3\"\n"
        ),
    );
    write("malformed", format!("[profile malformed\n{keys}"));
    let spec = server.keyless_spec("mode=max");
    let by = |file: &str, profile: &str| {
        let (config, profile, spec) = (path(file), profile.to_owned(), spec.clone());
        let credentials = path("credentials");
        move |_: &Path| {
            Program::export(&spec, &fixture("local-max"))
                .env("AWS_CONFIG_FILE", &config)
                .env("AWS_SHARED_CREDENTIALS_FILE", &credentials)
                .env("AWS_PROFILE", &profile)
        }
    };
    search(&server, "a profile", by("config", "ci"), 0);
    search(&server, "a process", by("config", "good"), 0);
    search(
        &server,
        "a process that prints nonsense",
        by("config", "broken"),
        1,
    );
    search(&server, "a process that fails", by("config", "loud"), 1);
    search(&server, "a malformed file", by("malformed", "malformed"), 1);
    server.fail_all("PutObject", Fault::Status(400, "ExpiredToken"));
    search(&server, "an expired token", by("config", "expired"), 1);
    server.reset_faults();

    let environment = |secret: &'static str, token: &'static str| {
        let spec = spec.clone();
        move |_: &Path| {
            Program::export(&spec, &fixture("local-max"))
                .env("AWS_ACCESS_KEY_ID", SESSION_ACCESS_KEY)
                .env("AWS_SECRET_ACCESS_KEY", secret)
                .env("AWS_SESSION_TOKEN", token)
        }
    };
    search(
        &server,
        "the environment",
        environment(SESSION_SECRET_KEY, SESSION_TOKEN),
        0,
    );
    search(
        &server,
        "a wrong secret",
        environment(WRONG_SECRET, SESSION_TOKEN),
        1,
    );
    search(
        &server,
        "a token without end",
        environment(SESSION_SECRET_KEY, "leaked/session\n"),
        1,
    );
}

#[test]
fn runs_that_fail_show_no_secret() {
    let server = Server::start();
    // One try each, as retries wait.
    let good = server.spec("mode=max,retry_max_attempts=1");
    export(&good)(Path::new("")).run().succeeds();
    for (what, fault) in [
        ("denied", Fault::Status(403, "AccessDenied")),
        ("denied without a word", Fault::StatusEmpty(403)),
        (
            "a wrong signature",
            Fault::Status(403, "SignatureDoesNotMatch"),
        ),
        ("an expired token", Fault::Status(400, "ExpiredToken")),
        (
            "another region",
            Fault::Redirect {
                region: "eu-west-1",
            },
        ),
        (
            "throttled",
            Fault::Throttle {
                retry_after: Some(0),
            },
        ),
        ("out of order", Fault::Status(500, "InternalError")),
        ("reset", Fault::Reset),
        ("a web page", Fault::Html200),
        ("an error in a 200", Fault::ErrorIn200("AccessDenied")),
        ("a header that is not ASCII", Fault::NonAsciiHeader),
    ] {
        // Every request gets the fault.
        let denied = fault.clone();
        server.fail(move |_| Some(denied.clone()));
        let code = i32::from(!matches!(fault, Fault::NonAsciiHeader));
        search(&server, what, export(&good), code);
        search(
            &server,
            what,
            export(&guest(&server, "retry_max_attempts=1")),
            code,
        );
        let from = guest(&server, "retry_max_attempts=1");
        let runs = ["plain"].map(|_| import(&from));
        for run in &runs {
            let folder = tempfile::tempdir().expect("a temporary directory");
            let done = run(folder.path()).arg("--verbose").run();
            assert!(matches!(done.code, Some(0 | 1)), "{what}: {}", done.stderr);
            for secret in secrets(&server) {
                assert!(
                    !done.stderr.contains(&secret),
                    "{what}: {secret} in {}",
                    done.stderr
                );
            }
        }
        server.reset_faults();
    }
    server.clear();
    server.fail_all("PutObject", Fault::Reset);
    let again = good.replace("attempts=1", "attempts=2");
    search(&server, "retries", export(&again), 1);
    server.reset_faults();
    let wrong = good.replace(SECRET_KEY, WRONG_SECRET);
    search(&server, "a wrong secret", export(&wrong), 1);
    let nobody = good.replace(ACCESS_KEY, "AKIALAYERCACHETESTXX");
    search(&server, "an unknown key", export(&nobody), 1);
    let refused = good.replace(&server.url(), "http://127.0.0.1:1");
    search(&server, "connection refused", export(&refused), 1);
    let ignored = format!("{},ignore-error=true", refused);
    search(&server, "a failure that is ignored", export(&ignored), 0);
}

#[test]
fn a_manifest_that_holds_secrets_shows_none_and_no_more_than_a_line() {
    let server = Server::start();
    let spec = guest(&server, "");
    let spec = spec.trim_end_matches(',');
    for text in [
        SESSION_TOKEN.to_owned(),
        format!("{}{SESSION_TOKEN}", "x".repeat(170)),
        "x".repeat(30 << 20),
    ] {
        for manifest in [
            serde_json::json!({ "layers": text }),
            serde_json::json!({"layers": [{"blob": text, "parent": -1}]}),
            serde_json::json!({"records": [{"layers": [{"layer": 0, "createdAt": text}]}]}),
        ] {
            server.put("manifests/buildkit", manifest.to_string());
            for run in search(&server, "a manifest", import(spec), 1) {
                assert!(run.stderr.len() < 2000, "{}", run.stderr);
            }
        }
    }
}

#[test]
fn specs_that_are_wrong_show_no_secret() {
    let server = Server::start();
    let good = server.spec("mode=max");
    let key = "secret_access_key=";
    for (what, spec) in [
        (
            "an unknown attribute",
            good.replace(key, "secret_acces_key="),
        ),
        ("no equals sign", good.replace(key, "")),
        ("a colon", good.replace(key, "secret_access_key:")),
        ("semicolons", good.replace(',', ";")),
        ("spaces", good.replace(',', " ")),
        ("a lost comma", good.replace(",secret", "secret")),
        ("a quote", good.replace(key, "\"secret_access_key\"=")),
        ("an open quote", good.replace(key, "\"secret_access_key=")),
        ("twice", format!("{good},secret_access_key={WRONG_SECRET}")),
        (
            "only half",
            good.replace(&format!("access_key_id={ACCESS_KEY},"), ""),
        ),
        (
            "a line break",
            good.replace(
                SECRET_KEY,
                &SECRET_KEY.replace("TestServer", "TestServer\n"),
            ),
        ),
        (
            "as a value",
            good.replace("mode=max", &format!("mode=max {key}{WRONG_SECRET}")),
        ),
        (
            "in the URL",
            good.replace("http://", &format!("http://u:{WRONG_SECRET}@")),
        ),
        ("another type", good.replace("type=s3", "type=s4")),
    ] {
        search(&server, what, export(&spec), 2);
        // An import ignores the mode.
        if what != "as a value" {
            search(&server, what, import(&spec.replace(",mode=max", "")), 2);
        }
    }
    // A spec where none belongs.
    let spec = good.clone();
    search(
        &server,
        "as the layout",
        move |_| Program::new().args(["export", &spec]),
        2,
    );
    let spec = good.clone();
    search(
        &server,
        "as the command",
        move |_| Program::new().arg(&spec),
        2,
    );
    let spec = good.clone();
    let twice = move |_: &Path| Program::export(&spec, &fixture("local-max")).arg(&spec);
    search(&server, "as one too many", twice, 2);
    let spec = good;
    let tagged =
        move |_: &Path| Program::export(&spec, &fixture("local-max")).args(["--digest", &spec]);
    search(&server, "as a digest", tagged, 2);
    assert!(server.log().is_empty());
}

#[test]
fn a_token_over_plain_http_to_another_machine_is_warned_of() {
    // Names below .invalid never resolve, so no packet leaves this machine.
    let server = Server::start();
    let spec = guest(&server, "retry_max_attempts=1");
    for (to, expected) in [
        (
            "http://cache.invalid",
            expect![[r#"
            warning: --cache-from: endpoint_url: holds the bucket's name, which will be in every address twice (write the endpoint without it)
            warning: the session token is sent to cache.invalid over plain http, readable by anyone on the path: use https
            error: cannot connect to cache.invalid (dns error: failed to lookup address information: REASON), reading s3://cache/manifests/buildkit
        "#]],
        ),
        (
            "https://cache.invalid",
            expect![[r#"
            warning: --cache-from: endpoint_url: holds the bucket's name, which will be in every address twice (write the endpoint without it)
            error: cannot connect to cache.invalid (dns error: failed to lookup address information: REASON), reading s3://cache/manifests/buildkit
        "#]],
        ),
        (
            "http://localhost:1",
            expect![[r#"
            error: connection to localhost:PORT refused, reading s3://cache/manifests/buildkit
        "#]],
        ),
        (
            "http://[::1]:1",
            expect![[r#"
            error: connection to [::1]:1 refused, reading s3://cache/manifests/buildkit
        "#]],
        ),
        (
            "http://127.0.0.1:1",
            expect![[r#"
            error: connection to 127.0.0.1:PORT refused, reading s3://cache/manifests/buildkit
        "#]],
        ),
        (
            "http://localhost.invalid",
            expect![[r#"
            warning: the session token is sent to localhost.invalid over plain http, readable by anyone on the path: use https
            error: cannot connect to localhost.invalid (dns error: failed to lookup address information: REASON), reading s3://cache/manifests/buildkit
        "#]],
        ),
    ] {
        let spec = spec.replace(&server.url(), to);
        search(&server, to, import(&spec), 1);
        let folder = tempfile::tempdir().expect("a temporary directory");
        Program::import(&spec, &folder.path().join("layout"))
            .arg("--quiet")
            .run()
            .whatever_the_resolver_says()
            .fails_with(expected);
    }
}
