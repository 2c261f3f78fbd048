//! `layercache import --refresh`.

use std::time::{Duration, SystemTime};

use expect_test::expect;

use crate::aftermath::put_cache;
use crate::program::{Program, Run};
use crate::server::{READER_ACCESS_KEY, READER_SECRET_KEY, Server};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Two old blobs and a young one.
fn bucket() -> Server {
    let server = Server::start();
    put_cache(&server, "buildkit", &[100, 2_000, 30_000]);
    server.age_all(2 * DAY);
    let young = blobs(&server).pop().expect("a blob");
    server.change(&young, |object| object.modified += 2 * DAY);
    server
}

fn blobs(server: &Server) -> Vec<String> {
    let mut keys = server.keys();
    keys.retain(|key| key.starts_with("blobs/"));
    keys
}

fn old(server: &Server) -> usize {
    let is_old = |key: &String| {
        let modified = server.last_modified(key).expect("it is there");
        SystemTime::now()
            .duration_since(modified)
            .unwrap_or_default()
            > DAY
    };
    blobs(server).iter().filter(|key| is_old(key)).count()
}

fn import(spec: &str, flags: &[&str]) -> Run {
    let layout = tempfile::tempdir().expect("a temporary directory");
    Program::import(spec, &layout.path().join("cache"))
        .args(flags)
        .run()
        .succeeds()
        .without_blobs()
}

#[test]
fn a_plain_import_leaves_blobs_old_and_one_with_refresh_does_not() {
    let server = bucket();
    import(&server.spec(""), &[]);
    assert_eq!(old(&server), 2);
    import(&server.spec(""), &["--refresh", "--dry-run"]).prints(expect![[r#"
        dry run: would import 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/cache as latest: 3 blobs: would fetch 3 (31.3 KiB), 0 already there, would refresh 2 on S3; 7 requests in N s
    "#]], expect![[r#"
        Ns reading the manifest
        Ns looking for blobs on S3
    "#]]);
    assert_eq!(old(&server), 2);
    server.clear_log();
    import(&server.spec(""), &["--refresh"]).prints(expect![[r#"
        imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/cache as latest: 3 blobs: 3 fetched (31.3 KiB), 0 already there, 2 refreshed on S3; 9 requests in N s
    "#]], expect![[r#"
        Ns reading the manifest
        Ns fetching (3 blobs, 31.3 KiB)
        Ns refreshing (2 blobs, 29.4 KiB)
    "#]]);
    assert_eq!(old(&server), 0);
    assert_eq!(server.count("CopyObject"), 2);
    import(&server.spec(""), &["--refresh"]).prints(expect![[r#"
        imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/cache as latest: 3 blobs: 3 fetched (31.3 KiB), 0 already there, 0 refreshed on S3; 7 requests in N s
    "#]], expect![[r#"
        Ns reading the manifest
        Ns fetching (3 blobs, 31.3 KiB)
    "#]]);
    assert_eq!(server.count("CopyObject"), 2);
}

#[test]
fn a_refresh_that_is_not_allowed_is_a_warning() {
    let server = bucket();
    let spec = server.keyless_spec(&format!(
        "access_key_id={READER_ACCESS_KEY},secret_access_key={READER_SECRET_KEY}"
    ));
    import(&spec, &["--refresh"]).prints(expect![[r#"
        imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/cache as latest: 3 blobs: 3 fetched (31.3 KiB), 0 already there, 0 refreshed on S3; 9 requests in N s
    "#]], expect![[r#"
        Ns reading the manifest
        Ns fetching (3 blobs, 31.3 KiB)
        Ns refreshing (2 blobs, 29.4 KiB)
        warning: 2 blobs could not be refreshed: a lifecycle rule may delete them before the next export (-v says why)
    "#]]);
    assert_eq!(old(&server), 2);
}
