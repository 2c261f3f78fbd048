//! What is retried, how often, and from which offset.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use expect_test::expect;
use layercache::cache::digest::Digest;
use layercache::transfer::limits::Limits;

use crate::inside::{self, Inside};
use crate::output::lasting;
use crate::program::{Program, Run, files, fixture, s3_manifest};
use crate::server::{Fault, Logged, Server};

/// The largest blob of the fixtures, 12,259 bytes.
const LARGEST: &str = "sha256:b95b63489f91e905ecec28258dec6be243d51c7915ac3e504e6e983eaf36e1d2";

fn ready(limits: Limits) -> (Server, Inside, tokio::runtime::Runtime) {
    let server = Server::builder().min_part(1).start();
    let inside = Inside {
        limits,
        ..Inside::fast()
    };
    (server, inside, inside::runtime())
}

/// Puts the two-platform cache on the server.
fn stock(server: &Server) {
    server.put("manifests/buildkit", s3_manifest("multiarch.json"));
    for (name, bytes) in files(&fixture("local-multiarch")) {
        let hex = name.strip_prefix("blobs/sha256/").unwrap_or_default();
        if let Ok(digest) = format!("sha256:{hex}").parse::<Digest>() {
            server.put(&format!("blobs/{digest}"), bytes);
        }
    }
}

fn header(logged: &Logged, name: &str) -> Option<String> {
    let value = logged.headers.get(name)?.to_str().ok()?;
    Some(value.to_owned())
}

fn of_largest(server: &Server, operation: &str) -> Vec<Logged> {
    let mut log = server.log();
    log.retain(|l| l.operation == operation && l.key == format!("blobs/{LARGEST}"));
    log
}

#[test]
fn a_connection_that_is_refused_again_and_again_is_reported_once() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let spec = Server::start().spec("name=app");
    let (before, after) = spec
        .split_once("endpoint_url=http://")
        .expect("an endpoint");
    let (_, after) = after.split_once(',').unwrap_or_default();
    let address = free.local_addr().unwrap();
    drop(free);
    let spec = format!("{before}endpoint_url=http://{address},{after}");
    let mut child = Program::import(&spec, Path::new("/nonexistent/cache")).spawn();
    std::thread::sleep(Duration::from_secs(3));
    child.kill().unwrap();
    let run = Run::from(child.wait_with_output().unwrap());
    expect![[r#"
        Ns reading the manifest
        Ns connection to 127.0.0.1:PORT refused, trying again for up to 10 s
    "#]]
    .assert_eq(&lasting(&run.stderr));
}

#[test]
fn what_may_pass_is_tried_up_to_retry_max_attempts_and_what_will_not_once() {
    let (server, inside, runtime) = ready(Limits::default());
    let passing = [
        Fault::Reset,
        Fault::ResetWhileReading(10),
        Fault::StatusEmpty(429),
        Fault::StatusEmpty(500),
        Fault::StatusEmpty(502),
        Fault::StatusEmpty(503),
        Fault::StatusEmpty(504),
        Fault::Status(503, "SlowDown"),
        Fault::Status(400, "RequestTimeout"),
        Fault::Status(400, "XAmzContentSHA256Mismatch"),
        Fault::Status(400, "BadDigest"),
        Fault::ErrorIn200("InternalError"),
        Fault::ErrorIn200("SlowDown"),
        Fault::ErrorIn200("RequestTimeout"),
    ];
    let lasting = [
        Fault::Status(400, "InvalidRequest"),
        Fault::Status(400, "ExpiredToken"),
        Fault::Status(403, "AccessDenied"),
        Fault::StatusEmpty(403),
        Fault::Status(404, "NoSuchBucket"),
        Fault::Redirect {
            region: "eu-west-1",
        },
    ];
    let passing = passing.into_iter().map(|fault| (fault, true));
    let lasting = lasting.into_iter().map(|fault| (fault, false));
    for (fault, again) in passing.chain(lasting) {
        for attempts in [1, 2, 5] {
            server.clear();
            let manifest = "manifests/buildkit";
            let wrong = fault.clone();
            server.fail(move |asked| (asked.key == manifest).then(|| wrong.clone()));
            let spec = server.spec(&format!("mode=max,retry_max_attempts={attempts}"));
            let task = inside::export(&spec, &fixture("local-multiarch"));
            let failed = runtime.block_on(inside.run(&task));
            failed.expect_err("the manifest cannot be written");
            let sent = server.log().iter().filter(|l| l.key == manifest).count();
            let expected = if again { attempts } else { 1 };
            assert_eq!(sent, expected, "{fault:?}, {attempts} attempts");
        }
    }
}

#[test]
fn each_request_is_sent_once_when_nothing_goes_wrong() {
    let (server, inside, runtime) = ready(Limits::default());
    let task = inside::export(&server.spec("mode=max"), &fixture("local-multiarch"));
    runtime.block_on(inside.run(&task)).expect("it works");
    let counts = ["HeadObject", "PutObject"].map(|operation| server.count(operation));
    // The eighth lists unfinished uploads.
    assert_eq!((counts, server.log().len()), ([3, 4], 8));
}

#[test]
fn a_download_that_broke_goes_on_from_there_with_range_and_if_match() {
    for fault in [Fault::ResetMidBody(5000), Fault::Truncate(5000)] {
        let (server, inside, runtime) = ready(Limits::default());
        stock(&server);
        let wrong = fault.clone();
        server.fail(move |asked| {
            (asked.key.ends_with(LARGEST) && !asked.headers.contains_key("range"))
                .then(|| wrong.clone())
        });
        let layout = tempfile::tempdir().expect("a temporary directory");
        let task = inside::import(&server.spec(""), layout.path());
        runtime.block_on(inside.run(&task)).expect("it works");
        let gets = of_largest(&server, "GetObject");
        let etag = server
            .object(&format!("blobs/{LARGEST}"))
            .expect("there")
            .etag;
        let asked: Vec<_> = gets
            .iter()
            .map(|get| (header(get, "range"), header(get, "if-match")))
            .collect();
        let [(None, None), (Some(range), Some(matched))] = asked.as_slice() else {
            panic!("{fault:?}: {asked:?}");
        };
        assert_eq!(range, "bytes=5000-12258", "{fault:?}");
        assert_eq!(matched.trim_matches('"'), etag, "{fault:?}");
        assert_eq!(files(layout.path()), files(&fixture("local-multiarch")));
    }
}

#[test]
fn an_object_replaced_in_the_middle_of_a_download_is_taken_from_its_replacement() {
    let (server, inside, runtime) = ready(Limits::default());
    stock(&server);
    // As a refresh by copying changes the ETag of a multipart object.
    let asked_first = Arc::new(AtomicUsize::new(0));
    server.fail(move |asked| {
        if !asked.key.ends_with(LARGEST) {
            return None;
        }
        match asked_first.fetch_add(1, Ordering::SeqCst) {
            0 => Some(Fault::Truncate(5000)),
            1 => Some(Fault::Status(412, "PreconditionFailed")),
            _ => None,
        }
    });
    let layout = tempfile::tempdir().expect("a temporary directory");
    let task = inside::import(&server.spec(""), layout.path());
    runtime.block_on(inside.run(&task)).expect("it works");
    assert_eq!(of_largest(&server, "GetObject").len(), 3);
    assert_eq!(files(layout.path()), files(&fixture("local-multiarch")));
}

#[test]
fn what_a_failed_import_had_of_a_blob_is_not_fetched_again() {
    let limits = Limits {
        piece: 3000,
        ..Limits::default()
    };
    let (server, inside, runtime) = ready(limits);
    stock(&server);
    server.fail(|asked| {
        let range = asked.headers.get("range")?.to_str().ok()?;
        range
            .starts_with("bytes=6000-")
            .then_some(Fault::Status(403, "AccessDenied"))
    });
    let layout = tempfile::tempdir().expect("a temporary directory");
    let task = inside::import(&server.spec(""), layout.path());
    runtime
        .block_on(inside.run(&task))
        .expect_err("a piece is denied");
    let hex = LARGEST.trim_start_matches("sha256:");
    let partial = layout
        .path()
        .join(".layercache")
        .join(format!("{hex}.partial"));
    assert_eq!(std::fs::metadata(&partial).expect("it is kept").len(), 6000);

    server.reset_faults();
    server.clear_log();
    runtime.block_on(inside.run(&task)).expect("it works");
    let mut ranges: Vec<_> = of_largest(&server, "GetObject")
        .iter()
        .filter_map(|get| header(get, "range"))
        .collect();
    ranges.sort();
    assert_eq!(
        ranges,
        ["bytes=12000-12258", "bytes=6000-8999", "bytes=9000-11999"]
    );
    assert_eq!(files(layout.path()), files(&fixture("local-multiarch")));
}

#[test]
fn what_an_earlier_run_left_is_verified_with_the_rest_and_fetched_anew_if_it_is_wrong() {
    let (server, inside, runtime) = ready(Limits::default());
    stock(&server);
    let layout = tempfile::tempdir().expect("a temporary directory");
    let staging = layout.path().join(".layercache");
    std::fs::create_dir(&staging).expect("a directory can be made");
    let hex = LARGEST.trim_start_matches("sha256:");
    std::fs::write(staging.join(format!("{hex}.partial")), [b'?'; 700]).expect("it is written");
    let task = inside::import(&server.spec(""), layout.path());
    runtime.block_on(inside.run(&task)).expect("it works");
    let ranges: Vec<_> = of_largest(&server, "GetObject")
        .iter()
        .map(|get| header(get, "range"))
        .collect();
    assert_eq!(ranges, [Some("bytes=700-12258".to_owned()), None]);
    assert_eq!(files(layout.path()), files(&fixture("local-multiarch")));
}

fn in_parts() -> Limits {
    Limits {
        multipart: 5000,
        part: 5000,
        ..Limits::default()
    }
}

#[test]
fn parts_that_an_interrupted_upload_holds_are_not_sent_again() {
    let (server, inside, runtime) = ready(in_parts());
    let task = inside::export(&server.spec("mode=max"), &fixture("local-multiarch"));
    // Part 3 fails and so does aborting, as if the run had been killed. It fails late, so that the other
    // parts have arrived.
    let asked_before = AtomicUsize::new(0);
    server.fail(move |asked| match asked.operation {
        "UploadPart" if asked.query.contains("partNumber=3") => {
            match asked_before.fetch_add(1, Ordering::SeqCst) {
                0 => Some(Fault::Throttle {
                    retry_after: Some(1),
                }),
                _ => Some(Fault::Status(403, "AccessDenied")),
            }
        }
        "AbortMultipartUpload" => Some(Fault::Status(403, "AccessDenied")),
        _ => None,
    });
    runtime
        .block_on(inside.run(&task))
        .expect_err("a part is denied");
    server.settle();
    assert_eq!(server.uploads(), 1);
    let held = of_largest(&server, "UploadPart")
        .iter()
        .filter(|l| l.status == 200)
        .count();

    server.reset_faults();
    server.clear_log();
    runtime.block_on(inside.run(&task)).expect("it works");
    assert_eq!(of_largest(&server, "UploadPart").len(), 3 - held);
    assert_eq!(server.count("CreateMultipartUpload"), 0);
    assert_eq!(server.uploads(), 0);
    let object = &server.objects()[&format!("blobs/{LARGEST}")];
    assert_eq!(Digest::of(object).to_string(), LARGEST);
}

#[test]
fn an_upload_whose_completion_was_not_answered_is_found_to_be_complete() {
    let (server, inside, runtime) = ready(in_parts());
    server.fail_first(1, "CompleteMultipartUpload", Fault::ApplyThenReset);
    let task = inside::export(&server.spec("mode=max"), &fixture("local-multiarch"));
    runtime.block_on(inside.run(&task)).expect("it works");
    assert_eq!(server.count("CompleteMultipartUpload"), 2);
    assert_eq!(server.count("CreateMultipartUpload"), 1);
    assert_eq!(server.uploads(), 0);
    let object: &Bytes = &server.objects()[&format!("blobs/{LARGEST}")];
    assert_eq!(Digest::of(object).to_string(), LARGEST);
}

#[test]
fn an_upload_that_began_without_an_answer_is_aborted() {
    for (times, works) in [(1, true), (3, false)] {
        let (server, inside, runtime) = ready(in_parts());
        server.fail_first(times, "CreateMultipartUpload", Fault::ApplyThenReset);
        let task = inside::export(&server.spec("mode=max"), &fixture("local-multiarch"));
        let done = runtime.block_on(inside.run(&task));
        assert_eq!(done.is_ok(), works, "{done:?}");
        server.settle();
        assert_eq!(server.uploads(), 0);
    }
}

#[test]
fn bytes_that_were_damaged_on_the_way_are_sent_again() {
    for (times, works) in [(2, true), (usize::MAX, false)] {
        let (server, inside, runtime) = ready(Limits::default());
        let damaged = Fault::Status(400, "XAmzContentSHA256Mismatch");
        server.fail_first(times, "PutObject", damaged);
        let spec = server.spec("mode=max,upload_parallelism=1");
        let task = inside::export(&spec, &fixture("local-multiarch"));
        match runtime.block_on(inside.run(&task)) {
            Ok(_) => assert!(works),
            Err(error) => {
                assert!(!works, "{error}");
                assert!(
                    error.contains(" (3 tries), uploading ")
                        && error.ends_with("something on the way damages them"),
                    "{error}"
                );
            }
        }
        assert_eq!(server.objects().is_empty(), !works);
    }
}

#[test]
fn all_requests_of_a_run_share_one_budget_of_retries() {
    // 500 tokens, 5 for each retry: 100 retries when every request fails and attempts are unlimited.
    let (server, inside, runtime) = ready(Limits::default());
    stock(&server);
    server.fail(|asked| (asked.key != "manifests/buildkit").then_some(Fault::StatusEmpty(500)));
    let layout = tempfile::tempdir().expect("a temporary directory");
    let mut inside = inside;
    inside.timing.backoff = std::time::Duration::ZERO;
    let task = inside::import(&server.spec("retry_max_attempts=1000000"), layout.path());
    let error = runtime
        .block_on(inside.run(&task))
        .expect_err("no blob can be fetched");
    assert!(
        error.contains("; the run's budget of retries is used up), reading s3://cache/blobs/"),
        "{error}"
    );
    server.settle();
    let sent = server.count("GetObject");
    assert!((100..=105).contains(&sent), "{sent} requests");
}

#[test]
fn a_store_that_says_how_long_to_wait_is_not_asked_before() {
    let (server, inside, runtime) = ready(Limits::default());
    let throttled = Fault::Throttle {
        retry_after: Some(1),
    };
    server.fail_first(1, "PutObject", throttled);
    let task = inside::export(&server.spec("mode=max"), &fixture("local-multiarch"));
    let began = std::time::Instant::now();
    runtime.block_on(inside.run(&task)).expect("it works");
    // The backoff in these tests is one millisecond.
    assert!(began.elapsed() >= std::time::Duration::from_secs(1));
    assert_eq!(server.count("PutObject"), 5);
}

#[test]
fn an_expired_token_is_replaced_once_and_then_the_error_stands() {
    for (expired, works) in [(1, true), (usize::MAX, false)] {
        let server = Server::start();
        server.fail_first(expired, "PutObject", Fault::Status(400, "ExpiredToken"));
        let directory = tempfile::tempdir().expect("a temporary directory");
        let runs = directory.path().join("runs");
        // With another expiry each time, to differ from the expired credentials.
        let config = format!(
            "[default]\ncredential_process = sh -c 'echo run >> {runs}; echo \"{{\\\"Version\\\":1,\\\"AccessKeyId\\\":\\\"{key}\\\",\\\"SecretAccessKey\\\":\\\"{secret}\\\",\\\"Expiration\\\":\\\"2099-01-01T00:00:$(printf %02d $(wc -l < {runs}))Z\\\"}}\"'\n",
            runs = runs.display(),
            key = crate::server::ACCESS_KEY,
            secret = crate::server::SECRET_KEY,
        );
        let file = directory.path().join("config");
        std::fs::write(&file, config).expect("a file can be written");
        let run = crate::program::Program::export(
            &server.keyless_spec("mode=max,upload_parallelism=1"),
            &fixture("local-multiarch"),
        )
        .env("AWS_CONFIG_FILE", &file)
        .run();
        run.ends_with(if works { 0 } else { 1 });
        let ran = std::fs::read_to_string(&runs)
            .expect("it ran")
            .lines()
            .count();
        assert_eq!(ran, 2, "once at the start, once for the expired token");
        assert_eq!(server.count("PutObject"), if works { 5 } else { 2 });
    }
}

#[test]
fn a_manifest_that_came_damaged_is_asked_for_again_and_one_that_was_written_so_is_not() {
    let newer = r#"{"layercache":{"version":99}}"#;
    let loose = r#"{"layers":[],"records":[{"layers":[{"layer":7}],"digest":"sha256:x"}]}"#;
    let foreign = b"{\"layers\":[{\"blob\":\"\xff\"}]}";
    for (bytes, attempts, tries) in [
        (newer.as_bytes(), 3, 1),
        (loose.as_bytes(), 3, 1),
        (b"[1]", 3, 1),
        (b"<html>", 3, 3),
        (b"<html>", 1, 1),
        (&newer.as_bytes()[..20], 3, 3),
        (foreign, 3, 3),
        (b"", 2, 2),
    ] {
        let server = Server::start();
        server.put("manifests/buildkit", bytes.to_vec());
        let folder = tempfile::tempdir().expect("a temporary directory");
        let spec = server.spec(&format!("retry_max_attempts={attempts}"));
        let task = inside::import(&spec, folder.path());
        let run = inside::runtime().block_on(Inside::fast().run(&task));
        let error = run.expect_err("there is no such cache");
        assert_eq!(server.count("GetObject"), tries, "{error}");
        let says = format!("({tries} tries)");
        assert_eq!(error.contains(&says), tries > 1, "{error}");
    }
}
