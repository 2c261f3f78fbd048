//! `layercache doctor`: what it finds out about a bucket, and that it leaves nothing there.

use std::process::Command;
use std::time::Duration;

use expect_test::expect;

use crate::aftermath::put_cache;
use crate::output::lasting;
use crate::program::{Program, Run};
use crate::server::{Fault, READER_ACCESS_KEY, READER_SECRET_KEY, SECRET_KEY, Server};

fn doctor(spec: &str) -> Program {
    Program::new().args(["doctor", "--cache-to", spec])
}

/// A run for `--cache-to`.
fn examine(spec: &str) -> Run {
    steady(doctor(spec).run())
}

fn finished(program: Program) -> Run {
    steady(program.run())
}

/// The run with the scratch object's random name replaced.
fn steady(mut run: Run) -> Run {
    for text in [&mut run.stdout, &mut run.stderr] {
        let mut parts = text.split("layercache-doctor-");
        let mut lasting = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            lasting.push_str("layercache-doctor-RANDOM");
            lasting.push_str(&part[16..]);
        }
        *text = lasting;
    }
    run
}

#[test]
fn the_result_is_also_json() {
    let server = Server::builder()
        .refuse("DeleteObject", 403, "AccessDenied")
        .start();
    let run = steady(doctor(&server.spec("")).args(["--format", "json"]).run());
    let document: serde_json::Value = serde_json::from_str(&run.stdout).expect("JSON");
    let of = |field: &str| document[field].to_string();
    let (exports, imports) = (of("exportWorks"), of("importWorks"));
    assert_eq!((&*exports, &*imports), ("true", "true"), "{document:#}");
    let fails = document["checks"].as_array().expect("checks").iter();
    let fails: Vec<_> = fails.filter(|check| check["result"] == "fails").collect();
    let fails = format!("{:#}", serde_json::json!(fails));
    expect![[r#"
        [
          {
            "name": "delete an object",
            "neededFor": [
              "prune",
              "verify --repair"
            ],
            "result": "fails",
            "reason": "http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), deleting s3://cache/blobs/layercache-doctor-RANDOM",
            "consequence": "only a lifecycle rule removes what is no longer used",
            "permission": "s3:DeleteObject"
          }
        ]"#]].assert_eq(&lasting(&fails));
}

#[track_caller]
fn assert_empty(server: &Server) {
    assert_eq!(server.keys(), Vec::<String>::new());
    assert_eq!(server.uploads(), 0);
}

#[test]
fn a_bucket_that_allows_everything_passes_and_stays_empty() {
    let server = Server::start();
    examine(&server.spec("prefix=team/"))
        .succeeds()
        .prints(expect![[r#"
            checked s3://cache/team/manifests/buildkit: export works, import works; 17 requests in N s
              credentials  the spec
              region       us-east-1
              bucket URL   http://127.0.0.1:PORT/cache
              addressing   path style (use_path_style=true, or the endpoint needs it)
              clock        agrees with the store's
              round trip   N s
              works   list objects                 ls, verify, prune, speed
              works   look for a missing object    export, import
              works   put an object                export
              works   look for an object           export, import
              works   get an object                import
              works   get a range of an object     speed
              works   start a multipart upload     export
              works   upload a part                export
              works   list parts                   resuming
              works   list multipart uploads       resuming
              works   complete a multipart upload  export
              works   abort a multipart upload     cleaning up
              works   copy an object onto itself   refreshing
              works   delete an object             prune, verify --repair
        "#]], expect![[r#"
            Ns testing the bucket
        "#]]);
    assert_empty(&server);
    let keys = server.log().into_iter().map(|request| request.key);
    assert!(
        keys.filter(|key| !key.is_empty())
            .all(|key| key.starts_with("team/blobs/layercache-doctor-"))
    );
}

#[test]
fn what_only_costs_comfort_is_named_with_its_permission_and_is_no_failure() {
    let server = Server::builder()
        .no_list()
        .no_uploads_listing()
        .stale_copies()
        .refuse("ListParts", 403, "AccessDenied")
        .start();
    examine(&server.spec(""))
        .succeeds()
        .prints(expect![[r#"
            checked s3://cache/manifests/buildkit: export works, import works; 17 requests in N s
              credentials  the spec
              region       us-east-1
              bucket URL   http://127.0.0.1:PORT/cache
              addressing   path style (use_path_style=true, or the endpoint needs it)
              clock        agrees with the store's
              round trip   N s
              FAILS   list objects                 ls, verify, prune, speed
                      http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), listing s3://cache
                      without it, ls, verify and prune fail, and each blob is looked up by a request of its own
                      allow s3:ListBucket
              works   look for a missing object    export, import
              works   put an object                export
              works   look for an object           export, import
              works   get an object                import
              works   get a range of an object     speed
              works   start a multipart upload     export
              works   upload a part                export
              FAILS   list parts                   resuming
                      http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), listing the parts of s3://cache/blobs/layercache-doctor-RANDOM
                      without it, an interrupted upload of a large blob starts over
                      allow s3:ListMultipartUploadParts
              FAILS   list multipart uploads       resuming
                      http://127.0.0.1:PORT answered 501 NotImplemented (The test server was built to refuse this.), listing the uploads to s3://cache
                      without it, interrupted uploads are not found: they start over, and their parts stay and cost money until a lifecycle rule aborts them
              works   complete a multipart upload  export
              works   abort a multipart upload     cleaning up
              FAILS   copy an object onto itself   refreshing
                      the copy succeeded, but LastModified has not moved: blobs/layercache-doctor-RANDOM
                      without it, old blobs are uploaded again, or else expire although they are in use
              works   delete an object             prune, verify --repair
        "#]], expect![[r#"
            Ns testing the bucket
        "#]]);
    assert_empty(&server);
}

#[test]
fn a_role_that_may_not_write_fails_the_export_alone() {
    let server = Server::builder()
        .refuse("PutObject", 403, "AccessDenied")
        .refuse("CreateMultipartUpload", 403, "AccessDenied")
        .start();
    examine(&server.spec(""))
        .ends_with(1)
        .prints(expect![[r#"
            checked s3://cache/manifests/buildkit: export FAILS, import works; 9 requests in N s
              credentials  the spec
              region       us-east-1
              bucket URL   http://127.0.0.1:PORT/cache
              addressing   path style (use_path_style=true, or the endpoint needs it)
              clock        agrees with the store's
              round trip   N s
              works   list objects                 ls, verify, prune, speed
              works   look for a missing object    export, import
              FAILS   put an object                export
                      http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), uploading s3://cache/blobs/layercache-doctor-RANDOM
                      without it, nothing can be exported
                      allow s3:PutObject
              works   look for an object           export, import
              works   get an object                import
              -       get a range of an object     speed
                      there is no object to read
              FAILS   start a multipart upload     export
                      http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), starting the upload of s3://cache/blobs/layercache-doctor-RANDOM
                      without it, large blobs cannot be exported
                      allow s3:PutObject
              -       upload a part                export
                      there is no multipart upload
              -       list parts                   resuming
                      there is no multipart upload
              works   list multipart uploads       resuming
              -       complete a multipart upload  export
                      there is no multipart upload
              -       abort a multipart upload     cleaning up
                      there is no multipart upload
              -       copy an object onto itself   refreshing
                      there is no object to copy
              works   delete an object             prune, verify --repair
        "#]], expect![[r#"
            Ns testing the bucket
            error: an export would fail at s3://cache/manifests/buildkit: cannot put an object
        "#]]);
    assert_empty(&server);
}

#[test]
fn what_may_not_be_deleted_or_aborted_is_named_as_left_behind() {
    let server = Server::builder()
        .undeletable("")
        .refuse("AbortMultipartUpload", 403, "AccessDenied")
        .start();
    examine(&server.spec(""))
        .succeeds()
        .prints(expect![[r#"
            checked s3://cache/manifests/buildkit: export works, import works; 21 requests in N s
              credentials  the spec
              region       us-east-1
              bucket URL   http://127.0.0.1:PORT/cache
              addressing   path style (use_path_style=true, or the endpoint needs it)
              clock        agrees with the store's
              round trip   N s
              works   list objects                 ls, verify, prune, speed
              works   look for a missing object    export, import
              works   put an object                export
              works   look for an object           export, import
              works   get an object                import
              works   get a range of an object     speed
              works   start a multipart upload     export
              works   upload a part                export
              works   list parts                   resuming
              works   list multipart uploads       resuming
              works   complete a multipart upload  export
              FAILS   abort a multipart upload     cleaning up
                      http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), aborting the upload of s3://cache/blobs/layercache-doctor-RANDOM
                      without it, the parts of a failed upload stay and cost money until a lifecycle rule aborts it
                      allow s3:AbortMultipartUpload
              works   copy an object onto itself   refreshing
              FAILS   delete an object             prune, verify --repair
                      http://127.0.0.1:PORT answered 403 AccessDenied, deleting s3://cache/blobs/layercache-doctor-RANDOM
                      without it, only a lifecycle rule removes what is no longer used
                      allow s3:DeleteObject
        "#]], expect![[r#"
            Ns testing the bucket
            warning: left behind: the object s3://cache/blobs/layercache-doctor-RANDOM
            warning: left behind: a multipart upload of s3://cache/blobs/layercache-doctor-RANDOM
        "#]]);
    assert_eq!((server.keys().len(), server.uploads()), (1, 1));
}

/// A run for `--cache-from` with keys that only read.
fn examine_as_reader(server: &Server, more: &str) -> Run {
    let keys = format!("access_key_id={READER_ACCESS_KEY},secret_access_key={READER_SECRET_KEY}");
    let spec = server.keyless_spec(&format!("{keys},{more}"));
    finished(Program::new().args(["doctor", "--cache-from", &spec]))
}

#[test]
fn a_role_that_only_reads_is_tested_without_writing_anything() {
    let server = Server::start();
    put_cache(&server, "app", &[100]);
    let before = server.objects();
    examine_as_reader(&server, "name=app").succeeds().prints(
        expect![[r#"
            checked s3://cache/manifests/app: import works; 5 requests in N s
              credentials  the spec
              region       us-east-1
              bucket URL   http://127.0.0.1:PORT/cache
              addressing   path style (use_path_style=true, or the endpoint needs it)
              clock        agrees with the store's
              round trip   N s
              works   list objects                 ls, verify, prune, speed
              works   look for a missing object    import
              works   look for an object           import
              works   get an object                import
              works   get a range of an object     speed
        "#]],
        expect![[r#"
            Ns testing the bucket
        "#]],
    );
    assert_eq!(server.objects(), before);
    let log = server.log();
    let reads = ["ListObjectsV2", "HeadObject", "GetObject"];
    assert!(log.iter().all(|request| reads.contains(&request.operation)));
    // Before the first export.
    examine_as_reader(&server, "name=none").succeeds().prints(
        expect![[r#"
            checked s3://cache/manifests/none: import works; 4 requests in N s
              credentials  the spec
              region       us-east-1
              bucket URL   http://127.0.0.1:PORT/cache
              addressing   path style (use_path_style=true, or the endpoint needs it)
              clock        agrees with the store's
              round trip   N s
              works   list objects                 ls, verify, prune, speed
              works   look for a missing object    import
              works   look for an object           import
              works   get an object                import
              -       get a range of an object     speed
                      there is no cache to read yet
        "#]],
        expect![[r#"
            Ns testing the bucket
        "#]],
    );
}

#[test]
fn a_role_that_may_not_read_fails_the_import() {
    let server = Server::builder()
        .refuse("GetObject", 403, "AccessDenied")
        .start();
    put_cache(&server, "app", &[100]);
    examine_as_reader(&server, "name=app")
        .ends_with(1)
        .prints(expect![[r#"
            checked s3://cache/manifests/app: import FAILS; 5 requests in N s
              credentials  the spec
              region       us-east-1
              bucket URL   http://127.0.0.1:PORT/cache
              addressing   path style (use_path_style=true, or the endpoint needs it)
              clock        agrees with the store's
              round trip   N s
              works   list objects                 ls, verify, prune, speed
              works   look for a missing object    import
              works   look for an object           import
              FAILS   get an object                import
                      http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), reading s3://cache/manifests/app; s3:GetObject may be missing, or the object itself: without s3:ListBucket a missing key answers 403 too
                      without it, nothing can be imported
                      allow s3:GetObject
              FAILS   get a range of an object     speed
                      http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), reading s3://cache/manifests/app; s3:GetObject may be missing, or the object itself: without s3:ListBucket a missing key answers 403 too
                      without it, a large blob is fetched in one stream, and from its start if that breaks off
                      allow s3:GetObject
        "#]], expect![[r#"
            Ns testing the bucket
            error: an import would fail at s3://cache/manifests/app: cannot get an object
        "#]]);
}

#[test]
fn the_variables_are_tested_and_a_place_in_both_once() {
    let server = Server::start();
    let doctor = || {
        Program::new()
            .arg("doctor")
            .env("BUILDKIT_PROGRESS", "quiet")
    };
    let verdicts = |program: Program| {
        let run = program.run().succeeds();
        let checked = run
            .stdout
            .lines()
            .filter(|line| line.starts_with("checked "));
        let verdicts = checked.filter_map(|line| line.split_once(';'));
        verdicts
            .map(|(verdict, _)| format!("{verdict}\n"))
            .collect::<String>()
    };
    let (from, to) = ("LAYERCACHE_CACHE_FROM", "LAYERCACHE_CACHE_TO");
    let (app, pr) = (server.spec("name=app"), server.spec("name=pr"));
    let other = server.spec("name=app,prefix=other/");
    let seen = [
        verdicts(doctor().env(from, &app)),
        verdicts(doctor().env(to, &app)),
        verdicts(
            doctor()
                .env(to, &app)
                .env(from, format!("{app}\n{pr}\n{other}")),
        ),
        verdicts(doctor().env(to, &app).args(["--cache-from", &app])),
    ];
    expect![[r#"
        checked s3://cache/manifests/app: import works

        checked s3://cache/manifests/app: export works, import works

        checked s3://cache/manifests/app: export works, import works
        checked s3://cache/other/manifests/app: import works

        checked s3://cache/manifests/app: import works
    "#]]
    .assert_eq(&lasting(&seen.join("\n")));
    doctor()
        .run()
        .ends_with(2)
        .prints(expect![[""]], expect![[r#"
            error: no cache is given (use --cache-from or --cache-to type=s3,region=...,bucket=..., or set LAYERCACHE_CACHE_FROM or LAYERCACHE_CACHE_TO)
        "#]]);
}

#[test]
fn an_upload_that_cannot_be_completed_is_removed() {
    let server = Server::builder()
        .refuse("CompleteMultipartUpload", 403, "AccessDenied")
        .start();
    examine(&server.spec("")).ends_with(1).says(
        "an export would fail at s3://cache/manifests/buildkit: cannot complete a multipart upload",
    );
    assert_empty(&server);
}

#[test]
fn with_a_wrong_secret_one_check_says_all() {
    let server = Server::start();
    let spec = server.spec("").replace(SECRET_KEY, "wrong");
    examine(&spec)
        .ends_with(1)
        .prints(expect![[r#"
            checked s3://cache/manifests/buildkit: export FAILS, import FAILS; 1 request in N s
              credentials  the spec
              region       us-east-1
              bucket URL   http://127.0.0.1:PORT/cache
              addressing   path style (use_path_style=true, or the endpoint needs it)
              clock        agrees with the store's
        "#]], expect![[r#"
            Ns testing the bucket
            error: nothing works at s3://cache/manifests/buildkit: http://127.0.0.1:PORT answered 403 SignatureDoesNotMatch, listing s3://cache; check access_key_id and secret_access_key
        "#]]);
    assert_eq!(server.log().len(), 1);
}

#[test]
fn without_credentials_nothing_is_sent_and_the_error_says_so() {
    let server = Server::start();
    examine(&server.keyless_spec(""))
        .ends_with(1)
        .prints(expect![[r#"
            checked s3://cache/manifests/buildkit: export FAILS, import FAILS; 0 requests in N s
              credentials  none found
              region       us-east-1
              bucket URL   http://127.0.0.1:PORT/cache
              addressing   path style (use_path_style=true, or the endpoint needs it)
              clock        unknown: no response had a date
        "#]], expect![[r#"
            Ns testing the bucket
            error: nothing works at s3://cache/manifests/buildkit: no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the job a role (tried: environment, profile, web identity, container endpoint, EC2 metadata service: IMDS disabled by AWS_EC2_METADATA_DISABLED env var set to `true`)
        "#]]);
    assert_eq!(server.log().len(), 0);
}

#[test]
fn a_missing_bucket_ends_the_checks() {
    let server = Server::start();
    let spec = server.spec("").replace("bucket=cache", "bucket=absent");
    examine(&spec)
        .ends_with(1)
        .prints(expect![[r#"
            checked s3://absent/manifests/buildkit: export FAILS, import FAILS; 1 request in N s
              credentials  the spec
              region       us-east-1
              bucket URL   http://127.0.0.1:PORT/absent
              addressing   path style (use_path_style=true, or the endpoint needs it)
              clock        agrees with the store's
        "#]], expect![[r#"
            Ns testing the bucket
            error: nothing works at s3://absent/manifests/buildkit: http://127.0.0.1:PORT answered 404 NoSuchBucket, listing s3://absent; check bucket, region and endpoint_url
        "#]]);
    assert_eq!(server.log().len(), 1);
}

#[test]
fn a_clock_that_is_a_little_off_is_named() {
    let server = Server::builder()
        .clock_ahead(Duration::from_secs(600))
        .start();
    let run = examine(&server.spec("")).succeeds();
    let clock = run.stdout.lines().find(|line| line.contains("clock"));
    // The second may change between a request and its response.
    let clock = clock.unwrap_or_default().replace("599 s", "600 s");
    expect!["  clock        600 s behind the store's: over 15 minutes, S3 refuses all requests"]
        .assert_eq(&clock);
}

#[test]
fn a_clock_that_is_far_off_is_why_nothing_works() {
    let server = Server::builder()
        .clock_ahead(Duration::from_secs(3_600))
        .start();
    let mut run = examine(&server.spec(""));
    // The second may change between a request and its response.
    for text in [&mut run.stdout, &mut run.stderr] {
        *text = text.replace("3599 s", "3600 s");
    }
    run.ends_with(1)
        .prints(expect![[r#"
            checked s3://cache/manifests/buildkit: export FAILS, import FAILS; 1 request in N s
              credentials  the spec
              region       us-east-1
              bucket URL   http://127.0.0.1:PORT/cache
              addressing   path style (use_path_style=true, or the endpoint needs it)
              clock        3600 s behind the store's: over 15 minutes, S3 refuses all requests
        "#]], expect![[r#"
            Ns testing the bucket
            error: nothing works at s3://cache/manifests/buildkit: http://127.0.0.1:PORT answered 403 RequestTimeTooSkewed, listing s3://cache; this machine's clock is 3600 s behind the store's: set it
        "#]]);
    assert_eq!(server.log().len(), 1);
}

#[test]
fn interrupted_it_leaves_nothing_behind() {
    let server = Server::start();
    server.fail_all("ListParts", Fault::Hang);
    let child = doctor(&server.spec("")).spawn();
    while server.count("ListParts") == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!((server.keys().len(), server.uploads()), (1, 1));
    let killed = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(killed.expect("kill runs").success());
    let run = Run::from(child.wait_with_output().expect("the program ends"));
    run.ends_with(130);
    assert_empty(&server);
}

#[test]
fn the_metadata_file_has_each_check() {
    let server = Server::builder()
        .refuse("AbortMultipartUpload", 403, "AccessDenied")
        .start();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("meta.json");
    doctor(&server.spec(""))
        .arg("--metadata-file")
        .arg(&file)
        .run()
        .succeeds();
    let text = std::fs::read_to_string(file).expect("the file is there");
    let document: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    let result = &document["results"][0];
    assert_eq!(result["command"], "doctor");
    assert_eq!(result["credentials"], "the spec");
    assert_eq!(result["exportWorks"], true);
    let checks = result["checks"].as_array().expect("a list");
    assert_eq!(checks.len(), 14);
    let failed: Vec<_> = checks
        .iter()
        .filter(|check| check["result"] != "works")
        .map(|check| (&check["result"], &check["permission"]))
        .collect();
    assert_eq!(
        failed,
        [(&"fails".into(), &"s3:AbortMultipartUpload".into())]
    );
}
