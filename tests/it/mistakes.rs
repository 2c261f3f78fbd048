//! Mistakes that people make, and all that the program then says.

use std::path::Path;
use std::time::Duration;

use expect_test::{Expect, expect};

use crate::output::{any_digest, lasting};
use crate::program::{Program, copy_of, fixture};
use crate::scripted::{Reply, Scripted, response};
use crate::server::{
    ACCESS_KEY, Authority, READER_ACCESS_KEY, READER_SECRET_KEY, SECRET_KEY, Server,
};

const SPEC: &str = "type=s3,region=us-east-1,bucket=cache";

/// Fails unless the run ends and prints as expected: the exit status, stdout, then stderr without its
/// progress.
#[track_caller]
fn says(program: Program, expected: Expect) {
    let run = program.arg("-q").run();
    let code = run
        .code
        .map_or("a signal".to_owned(), |code| code.to_string());
    // Which blob meets an error first is a matter of timing.
    let stderr = any_digest(&run.stderr, "blobs/sha256:");
    let (stdout, stderr) = (lasting(&run.stdout), lasting(&stderr));
    expected.assert_eq(&format!("[{code}]\n{stdout}{stderr}"));
}

fn export(spec: &str) -> Program {
    Program::export(spec, &fixture("local-max"))
}

/// An import that must not get as far as writing anything.
fn import(spec: &str) -> Program {
    Program::import(spec, Path::new("/nonexistent/cache"))
}

#[test]
fn words_that_make_no_command() {
    let line = |words: &[&str]| Program::new().args(words);
    says(
        line(&["exprot", "."]),
        expect![[r#"
        [2]
        error: unrecognized subcommand 'exprot'

          tip: a similar subcommand exists: 'export'

        Usage: layercache [OPTIONS] <COMMAND>

        For more information, try '--help'.
    "#]],
    );
    says(
        line(&["export"]),
        expect![[r#"
        [2]
        error: the following required arguments were not provided:
          <LAYOUT>

        Usage: layercache export --quiet <LAYOUT>

        For more information, try '--help'.
    "#]],
    );
    says(
        line(&["export", "--cache-from", SPEC, "."]),
        expect![[r#"
        [2]
        error: unexpected argument '--cache-from' found

          tip: a similar argument exists: '--cache-to'

        Usage: layercache export --cache-to <SPEC> <LAYOUT>

        For more information, try '--help'.
    "#]],
    );
    for (words, expected) in [
        (
            ["export", ".", "--name", "app"],
            expect![[r#"
            [2]
            error: unexpected argument '--name' found

              tip: name is part of the spec: --cache-to type=s3,...,name=...

            Usage: layercache export <LAYOUT>

            For more information, try '--help'.
        "#]],
        ),
        (
            ["export", ".", "--ignore-error", "true"],
            expect![[r#"
            [2]
            error: unexpected argument '--ignore-error' found

              tip: ignore-error is part of the spec: --cache-to type=s3,...,ignore-error=...

            Usage: layercache export <LAYOUT>

            For more information, try '--help'.
        "#]],
        ),
        (
            ["import", ".", "--endpoint-url", "x"],
            expect![[r#"
            [2]
            error: unexpected argument '--endpoint-url' found

              tip: endpoint_url is part of the spec: --cache-from type=s3,...,endpoint_url=...

            Usage: layercache import <LAYOUT>

            For more information, try '--help'.
        "#]],
        ),
        // It says nothing about what is read.
        (
            ["import", ".", "--mode", "max"],
            expect![[r#"
            [2]
            error: unexpected argument '--mode' found

              tip: to pass '--mode' as a value, use '-- --mode'

            Usage: layercache import <LAYOUT>

            For more information, try '--help'.
        "#]],
        ),
    ] {
        says(line(&words), expected);
    }
    says(
        line(&["verify", "--cache-to", "x"]),
        expect![[r#"
        [2]
        error: unexpected argument '--cache-to' found

          tip: a similar argument exists: '--cache-from'

        Usage: layercache verify --cache-from <SPEC> [LAYOUT]

        For more information, try '--help'.
    "#]],
    );
    says(
        line(&["prune", "--cache-from", "x"]),
        expect![[r#"
        [2]
        error: unexpected argument '--cache-from' found

          tip: a similar argument exists: '--cache-to'

        Usage: layercache prune --cache-to <SPEC> [LAYOUT]

        For more information, try '--help'.
    "#]],
    );
    says(
        line(&["export", SPEC, "."]),
        expect![[r#"
        [2]
        error: unexpected argument '.' found

        Usage: layercache export [OPTIONS] <LAYOUT>

        For more information, try '--help'.
    "#]],
    );
    says(
        line(&["export", SPEC]),
        expect![[r#"
        [2]
        error: LAYOUT looks like a spec (put --cache-to before the spec, and the directory last)
    "#]],
    );
    says(
        line(&["export", "."]),
        expect![[r#"
        [2]
        error: no cache is given (use --cache-to type=s3,region=...,bucket=..., or set LAYERCACHE_CACHE_TO to one spec per line)
    "#]],
    );
    says(
        line(&["import", "--missing=keep", "."]),
        expect![[r#"
        [2]
        error: invalid value 'keep' for '--missing <WHAT>'
          [possible values: drop, error]

        For more information, try '--help'.
    "#]],
    );
    says(
        export(SPEC).args(["--tag", "a", "--digest", "sha256:12"]),
        expect![[r#"
            [2]
            error: invalid value 'sha256:12' for '--digest <DIGEST>': "sha256:12" is not a digest (expected sha256: and 64 lower-case hex digits)

            For more information, try '--help'.
        "#]],
    );
    says(
        export(SPEC).args(["--metadata-file", "/nonexistent/file"]),
        expect![[r#"
            [2]
            error: cannot write the metadata file /nonexistent/file: there is no directory /nonexistent
        "#]],
    );
}

#[test]
fn specs_that_are_none() {
    for (spec, expected) in [
        (
            "s3://ci-cache/app",
            expect![[r#"
            [2]
            error: --cache-to: an s3:// address is not a spec (expected type=s3,region=...,bucket=ci-cache, with prefix=... and name=... for the rest)
        "#]],
        ),
        (
            "\"type=s3,region=us-east-1,bucket=cache\"",
            expect![[r#"
            [2]
            error: --cache-to: the spec is still in quotes (remove them: .env files and YAML blocks keep them as part of the value)
        "#]],
        ),
        (
            "'type=s3",
            expect![[r#"
            [2]
            error: --cache-to: the spec is still in quotes (remove them: .env files and YAML blocks keep them as part of the value)
        "#]],
        ),
        (
            "type=gha",
            expect![[r#"
            [2]
            error: --cache-to: type: "gha" is not supported (accepted: s3)
        "#]],
        ),
        (
            "type=s3 region=us-east-1 bucket=cache",
            expect![[r#"
            [2]
            error: --cache-to: type: "s3 region=us-east-1 bucket=cache" is not supported (accepted: s3; fields are separated by commas alone)
        "#]],
        ),
        (
            "registry.example.com/app:cache",
            expect![[r#"
            [2]
            error: --cache-to: a spec without `=` is an image reference, and type=registry is not supported (expected type=s3,region=...,bucket=...)
        "#]],
        ),
        (
            "type=s3,bucket=cache",
            expect![[r#"
            [2]
            error: --cache-to: region: missing (give region=... in the spec, or set AWS_REGION or AWS_DEFAULT_REGION)
        "#]],
        ),
        (
            "type=s3,region=us-east-1,buckt=cache",
            expect![[r#"
            [2]
            error: --cache-to: buckt: unknown attribute (did you mean `bucket`?)
        "#]],
        ),
        (
            "type=s3,region=us-east-1,bucket=s3://cache",
            expect![[r#"
            [2]
            error: --cache-to: bucket: "s3://cache" holds a `/` (expected the bucket's name alone; what follows it goes into prefix=...)
        "#]],
        ),
        (
            "type=s3,region=us-east-1,bucket=cache,mode=all",
            expect![[r#"
                [2]
                error: --cache-to: mode: "all" is not a mode (accepted: min, max)
            "#]],
        ),
        (
            "type=s3,region=us-east-1,bucket=cache,touch_refresh=7d",
            expect![[r#"
                [2]
                error: --cache-to: touch_refresh: "7d" is not a duration (days are not a Go unit; write 168h)
            "#]],
        ),
        (
            "type=s3,region=us-east-1,bucket=cache,endpoint_url=minio:9000",
            expect![[r#"
                [2]
                error: --cache-to: endpoint_url: "minio:9000" has no scheme (write http:// or https:// before it)
            "#]],
        ),
        (
            "type=s3,region=us-east-1,bucket=cache,access_key_id=AKIA",
            expect![[r#"
                [2]
                error: --cache-to: secret_access_key: missing (access_key_id is given without it, and AWS_SECRET_ACCESS_KEY is not set)
            "#]],
        ),
    ] {
        says(export(spec), expected);
    }
}

#[test]
fn layouts_that_are_none() {
    let layout = |path: &Path| Program::export(SPEC, path);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("file");
    std::fs::write(&file, "").expect("a file");
    says(
        layout(Path::new("/nonexistent/cache")),
        expect![[r#"
        [1]
        error: no OCI layout at /nonexistent/cache: no such directory
    "#]],
    );
    says(
        layout(&file),
        expect![[r#"
        [1]
        error: TMP/file is not a directory, as an OCI layout is (an archive must be unpacked first)
    "#]],
    );
    says(
        layout(directory.path()),
        expect![[r#"
        [1]
        error: TMP is not an OCI layout: it has no file oci-layout
    "#]],
    );
    says(
        export(SPEC).args(["--tag", "v9"]),
        expect![[r#"
        [1]
        error: cannot choose from REPOSITORY/tests/fixtures/local-max/index.json: no tag "v9": it has tag "latest" (sha256:3ad8fd726190cfb2a0575cbc1a775dfb7a14653b764c594dba744cf2e69744ad)
    "#]],
    );
    let digest = format!("sha256:{}", "0".repeat(64));
    says(
        export(SPEC).args(["--digest", &digest]),
        expect![[r#"
        [1]
        error: sha256:0000000000000000000000000000000000000000000000000000000000000000 is neither in REPOSITORY/tests/fixtures/local-max/index.json nor a blob of the layout; of the index: it has tag "latest" (sha256:3ad8fd726190cfb2a0575cbc1a775dfb7a14653b764c594dba744cf2e69744ad)
    "#]],
    );
    says(
        Program::import(SPEC, directory.path()),
        expect![[r#"
        [1]
        error: TMP is not empty and not an OCI layout (no file oci-layout): name another directory
    "#]],
    );
    says(
        Program::import(SPEC, &file),
        expect![[r#"
        [1]
        error: TMP/file is not a directory, as an OCI layout is (an archive must be unpacked first)
    "#]],
    );
}

#[test]
fn layouts_that_are_damaged() {
    let server = Server::start();
    let blob = "blobs/sha256/710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece";
    let layout = copy_of(&fixture("local-max"));
    let path = layout.path().join(blob);
    let mut bytes = std::fs::read(&path).expect("the blob");
    bytes[5000] ^= 1;
    std::fs::write(&path, &bytes).expect("written");
    says(
        Program::export(&server.spec("mode=max"), layout.path()),
        expect![[r#"
            [1]
            error: TMP/blobs/sha256/710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece is damaged: its bytes hash to sha256:adb11f62d38835fc7b72cdb00c98d0374805f677c48d0659ec3b94cb7f6f3377; remove it, and build or import it again (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
    );
    std::fs::write(&path, &bytes[1..]).expect("written");
    says(
        Program::export(&server.spec("mode=max"), layout.path()),
        expect![[r#"
            [1]
            error: TMP/blobs/sha256/710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece is damaged: it has 6264 bytes where its descriptor says 6265 (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
    );
    std::fs::remove_file(&path).expect("removed");
    says(
        Program::export(&server.spec("mode=max"), layout.path()),
        expect![[r#"
            [1]
            error: blob sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece is not in TMP: the layout is incomplete (was it pruned, or copied in part?) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
    );
    std::fs::write(layout.path().join("index.json"), "{").expect("written");
    says(
        Program::export(&server.spec("mode=max"), layout.path()),
        expect![[r#"
            [1]
            error: cannot parse TMP/index.json: not a JSON object: EOF while parsing an object at line 1 column 1
        "#]],
    );
}

#[test]
fn a_layout_in_the_build_context() {
    let server = Server::start();
    let layout = copy_of(&fixture("local-min"));
    let context = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(context.path().join("Dockerfile"), "FROM scratch\n").expect("written");
    let inside = context.path().join("cache");
    std::fs::rename(layout.path(), &inside).expect("moved");
    says(
        Program::export(&server.spec(""), &inside),
        expect![[r#"
        [0]
        exported 5 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 5 uploaded (30.1 KiB), 0 already there, 0 refreshed; 12 requests in N s
        warning: TMP/cache is in a build context: TMP has a Dockerfile, and `COPY . .` would copy the cache into the image. Keep the cache elsewhere, or add cache to .dockerignore
    "#]],
    );
    std::fs::write(context.path().join(".dockerignore"), "cache\n").expect("written");
    says(
        Program::export(&server.spec(""), &inside),
        expect![[r#"
        [0]
        exported 5 blobs to s3://cache/manifests/buildkit at http://127.0.0.1:PORT: 0 uploaded (0 B), 5 already there, 0 refreshed; 7 requests in N s
    "#]],
    );
}

#[test]
fn credentials_that_are_missing_or_wrong() {
    let server = Server::start();
    let keys = |id: &str, secret: &str| {
        server.keyless_spec(&format!("access_key_id={id},secret_access_key={secret}"))
    };
    let keyless = server.keyless_spec("");
    says(
        export(&keyless),
        expect![[r#"
        [1]
        error: no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the job a role (tried: environment, profile, web identity, container endpoint, EC2 metadata service: IMDS disabled by AWS_EC2_METADATA_DISABLED env var set to `true`) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
    "#]],
    );
    says(
        import(&keyless).env("AWS_ACCESS_KEY_ID", ACCESS_KEY),
        expect![[r#"
            [1]
            error: no AWS credentials: AWS_SECRET_ACCESS_KEY is not set, and AWS_ACCESS_KEY_ID is (tried: environment, profile, web identity, container endpoint, EC2 metadata service: IMDS disabled by AWS_EC2_METADATA_DISABLED env var set to `true`) (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
        "#]],
    );
    says(
        import(&keyless).env("AWS_PROFILE", "ci"),
        expect![[r#"
        [1]
        error: no AWS credentials: there is nothing in profile "ci"; set another AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the job a role (tried: environment, profile, web identity, container endpoint, EC2 metadata service: IMDS disabled by AWS_EC2_METADATA_DISABLED env var set to `true`) (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
    "#]],
    );
    says(
        export(&keys("AKIAUNKNOWN", SECRET_KEY)),
        expect![[r#"
        [1]
        error: http://127.0.0.1:PORT answered 403 InvalidAccessKeyId, looking for s3://cache/blobs/sha256:DIGEST; check access_key_id and secret_access_key
    "#]],
    );
    says(
        import(&keys("AKIAUNKNOWN", SECRET_KEY)),
        expect![[r#"
        [1]
        error: http://127.0.0.1:PORT answered 403 InvalidAccessKeyId, reading s3://cache/manifests/buildkit; check access_key_id and secret_access_key
    "#]],
    );
    says(
        export(&keys(ACCESS_KEY, "wrong")),
        expect![[r#"
        [1]
        error: http://127.0.0.1:PORT answered 403 SignatureDoesNotMatch, looking for s3://cache/blobs/sha256:DIGEST; check access_key_id and secret_access_key
    "#]],
    );
    says(
        import(&keys(ACCESS_KEY, "wrong")),
        expect![[r#"
        [1]
        error: http://127.0.0.1:PORT answered 403 SignatureDoesNotMatch, reading s3://cache/manifests/buildkit; check access_key_id and secret_access_key
    "#]],
    );
    says(
        export(&keys(READER_ACCESS_KEY, READER_SECRET_KEY)),
        expect![[r#"
            [1]
            error: http://127.0.0.1:PORT answered 403 AccessDenied, uploading s3://cache/blobs/sha256:DIGEST; layercache doctor tells which permission is missing
        "#]],
    );
}

#[test]
fn a_cache_that_is_elsewhere() {
    let server = Server::start();
    says(
        import(&server.spec("name=app")),
        expect![[r#"
        [0]
        no cache named 'app' in s3://cache at http://127.0.0.1:PORT yet: there is no manifests/app (--require makes this an error); 1 request in N s
    "#]],
    );
    says(
        import(&server.spec("name=app")).arg("--require"),
        expect![[r#"
            [1]
            error: there is no cache yet, and --require was given (importing 'app' from s3://cache at http://127.0.0.1:PORT)
        "#]],
    );
    says(
        import(&server.spec("prefix=team")),
        expect![[r#"
        [0]
        no cache named 'buildkit' in s3://cache at http://127.0.0.1:PORT yet: there is no teammanifests/buildkit (--require makes this an error); 1 request in N s
        warning: --cache-from: prefix: "team" does not end in a slash, so keys will begin with "teamblobs/"
    "#]],
    );
    let elsewhere = server.spec("").replace("bucket=cache", "bucket=ci-cache");
    says(
        import(&elsewhere),
        expect![[r#"
        [1]
        error: http://127.0.0.1:PORT answered 404 NoSuchBucket, reading s3://ci-cache/manifests/buildkit; check bucket, region and endpoint_url
    "#]],
    );
    says(
        export(&elsewhere),
        expect![[r#"
        [1]
        error: http://127.0.0.1:PORT answered 404 NoSuchBucket, uploading s3://ci-cache/blobs/sha256:DIGEST; check bucket, region and endpoint_url
    "#]],
    );
    says(
        export(&elsewhere.replace("type=s3", "type=s3,ignore-error=true")),
        expect![[r#"
            [0]
            warning: ignored because of ignore-error=true: http://127.0.0.1:PORT answered 404 NoSuchBucket, uploading s3://ci-cache/blobs/sha256:DIGEST; check bucket, region and endpoint_url
        "#]],
    );
    let in_oregon = Server::builder().region("us-west-2").start();
    says(
        import(&in_oregon.spec("")),
        expect![[r#"
        [1]
        error: http://127.0.0.1:PORT answered 400 AuthorizationHeaderMalformed (The test server was built to refuse this.), reading s3://cache/manifests/buildkit; the bucket is in us-west-2: use region=us-west-2
    "#]],
    );
    says(
        export(&in_oregon.spec("")),
        expect![[r#"
        [1]
        error: http://127.0.0.1:PORT answered 400, looking for s3://cache/blobs/sha256:DIGEST; the bucket is in us-west-2: use region=us-west-2
    "#]],
    );
}

#[test]
fn endpoints_that_are_not_the_stores() {
    let server = Server::start();
    let at = |url: &str| server.spec("").replace(&server.url(), url);
    says(
        import(&at(&format!("{}/cache", server.url()))),
        expect![[r#"
            [0]
            no cache named 'buildkit' in s3://cache at http://127.0.0.1:PORT/cache yet: there is no manifests/buildkit (--require makes this an error); 1 request in N s
            warning: --cache-from: endpoint_url: holds the bucket's name, which will be in every address twice (write the endpoint without it)
        "#]],
    );
    says(
        import(&at(&server.url().replace("http:", "https:"))),
        expect![[r#"
            [1]
            error: 127.0.0.1:PORT does not speak https (received corrupt message of type InvalidContentType), reading s3://cache/manifests/buildkit; check endpoint_url, or write http://127.0.0.1:PORT
        "#]],
    );
    let secure = Server::builder().tls(&Authority::new()).start();
    let at_secure = |url: &str| at(url).replace("use_path_style=true", "retry_max_attempts=1");
    says(
        import(&at_secure(&secure.url().replace("https:", "http:"))),
        expect![[r#"
            [1]
            error: 127.0.0.1:PORT does not speak http (invalid HTTP version parsed), reading s3://cache/manifests/buildkit; if it speaks https, write endpoint_url=https://127.0.0.1:PORT
        "#]],
    );
    says(
        import(&at_secure(&secure.url())),
        expect![[r#"
            [1]
            error: the certificate of 127.0.0.1:PORT is not trusted (unknown issuer), reading s3://cache/manifests/buildkit; if a CA of your own has signed it, set AWS_CA_BUNDLE to its PEM file
        "#]],
    );
    let once = "retry_max_attempts=1";
    let keys = format!("access_key_id={ACCESS_KEY},secret_access_key={SECRET_KEY}");
    let unknown = format!("{SPEC},endpoint_url=http://minio.invalid:9000,{keys},{once}");
    says(
        import(&unknown),
        expect![[r#"
        [1]
        error: use_path_style=true may be missing: cannot connect to cache.minio.invalid:9000 (dns error: failed to lookup address information: Name or service not known), reading s3://cache/manifests/buildkit
    "#]],
    );
    says(
        import(&format!("{unknown},use_path_style=true")),
        expect![[r#"
            [1]
            error: cannot connect to minio.invalid:9000 (dns error: failed to lookup address information: Name or service not known), reading s3://cache/manifests/buildkit
        "#]],
    );
    let console = Scripted::start(|_, _| {
        Reply::Answer(response(
            "200 OK",
            "content-type: text/html\r\n",
            "<!doctype html><title>MinIO Console</title>",
        ))
    });
    says(
        import(&at(&console.url())),
        expect![[r#"
        [1]
        error: unexpected response from http://127.0.0.1:PORT: a web page, which is not what S3 answers (3 tries), reading s3://cache/manifests/buildkit; check endpoint_url (MinIO's S3 is at port 9000, its console at 9001)
    "#]],
    );
    says(
        export(&at(&console.url())),
        expect![[r#"
        [1]
        error: unexpected response from http://127.0.0.1:PORT: a web page, which is not what S3 answers (3 tries), looking for s3://cache/blobs/sha256:DIGEST; check endpoint_url (MinIO's S3 is at port 9000, its console at 9001)
    "#]],
    );
    let website =
        Scripted::start(|_, _| Reply::Answer(response("404 Not Found", "", "<h1>Not Found</h1>")));
    says(
        import(&at(&website.url())),
        expect![[r#"
        [1]
        error: http://127.0.0.1:PORT answered 404, but not like S3 (Not Found), reading s3://cache/manifests/buildkit; check endpoint_url
    "#]],
    );
}

/// A store at a host name of which every subdomain leads to it, and that looks for buckets in the path.
#[test]
fn virtual_hosted_addresses_at_a_store_that_knows_only_paths() {
    let store = Scripted::start(|_, _| {
        let body = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>NoSuchBucket</Code>\
                    <Message>The specified bucket does not exist</Message></Error>";
        Reply::Answer(response(
            "404 Not Found",
            "content-type: application/xml\r\n",
            body,
        ))
    });
    let endpoint = store.url().replace("127.0.0.1", "localhost");
    let keys = format!("access_key_id={ACCESS_KEY},secret_access_key={SECRET_KEY}");
    let spec = format!("{SPEC},endpoint_url={endpoint},{keys}");
    says(
        import(&spec),
        expect![[r#"
        [1]
        error: use_path_style=true may be missing: http://cache.localhost:PORT answered 404 NoSuchBucket (The specified bucket does not exist), reading s3://cache/manifests/buildkit; check bucket, region and endpoint_url
    "#]],
    );
}

#[test]
fn a_clock_that_is_wrong() {
    let server = Server::builder()
        .clock_ahead(Duration::from_secs(3600))
        .start();
    says(
        export(&server.spec("")),
        expect![[r#"
            [1]
            error: http://127.0.0.1:PORT answered 403 RequestTimeTooSkewed, looking for s3://cache/blobs/sha256:DIGEST; this machine's clock is 3599 s behind the store's: set it
        "#]],
    );
    says(
        import(&server.spec("")),
        expect![[r#"
            [1]
            error: http://127.0.0.1:PORT answered 403 RequestTimeTooSkewed, reading s3://cache/manifests/buildkit; this machine's clock is 3599 s behind the store's: set it
        "#]],
    );
}

#[test]
fn caches_that_are_damaged_on_s3() {
    let server = Server::start();
    export(&server.spec("mode=max")).run().succeeds();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let blob = "blobs/sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece";
    let into = |name: &str| Program::import(&server.spec(""), &directory.path().join(name));
    let size = server.objects()[blob].len();
    server.put(blob, vec![7; size]);
    says(
        into("a"),
        expect![[r#"
            [0]
            imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/a as latest: 9 blobs: 9 fetched (56.8 KiB), 0 already there; 13 requests in N s
            warning: blob blobs/sha256:DIGEST on S3 is damaged: its bytes hash to sha256:0a1e876600d4a1f403ab4c7f96c18d845200198b551881be7b94fff4581027f1; export the cache again with --verify-remote
            warning: S3 lacks 1 blob of the cache (gone or damaged): left out 5 results and 5 layers
        "#]],
    );
    says(
        into("b").arg("--missing=error"),
        expect![[r#"
            [1]
            error: blob blobs/sha256:DIGEST on S3 is damaged: its bytes hash to sha256:0a1e876600d4a1f403ab4c7f96c18d845200198b551881be7b94fff4581027f1; export the cache again with --verify-remote (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
        "#]],
    );
    server.remove(blob);
    says(
        into("c"),
        expect![[r#"
        [0]
        imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/c as latest: 9 blobs: 9 fetched (56.8 KiB), 0 already there; 11 requests in N s
        warning: S3 lacks 1 blob of the cache (expired?): left out 5 results and 5 layers
    "#]],
    );
    says(
        into("d").arg("--missing=error"),
        expect![[r#"
        [1]
        error: S3 lacks 1 blob of the cache (expired?): sha256:710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece; export the cache again, or let --missing=drop leave out what needs them (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
    "#]],
    );
    server.put("manifests/buildkit", b"{}".to_vec());
    says(
        into("e").arg("--require"),
        expect![[r#"
        [1]
        imported 'buildkit' from s3://cache/manifests/buildkit at http://127.0.0.1:PORT into TMP/e as latest: 0 blobs: 0 fetched (0 B), 0 already there; 1 request in N s
        error: --require: the cache has no usable result
    "#]],
    );
    server.put("manifests/buildkit", b"<html>".to_vec());
    says(
        into("f"),
        expect![[r#"
        [1]
        error: manifests/buildkit is damaged: it is not JSON (expected value at line 1 column 1) (3 tries) (importing 'buildkit' from s3://cache at http://127.0.0.1:PORT)
    "#]],
    );
}

#[test]
fn a_cache_that_is_larger_than_the_disk() {
    let server = Server::start();
    let digest = format!("sha256:{}", "1".repeat(64));
    let layer = format!(
        r#"{{"layers":[{{"blob":"{digest}","parent":-1,"annotations":{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","diffID":"{digest}","size":1152921504606846976,"createdAt":"2026-01-02T03:04:05Z"}}}}],"records":[]}}"#
    );
    server.put("manifests/buildkit", layer.into_bytes());
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Program::import(&server.spec(""), &directory.path().join("cache"))
        .arg("--dry-run")
        .run()
        .succeeds();
    let warning = run
        .stderr
        .lines()
        .find(|line| line.starts_with("warning: too little"));
    let (warning, free) = warning
        .expect("a warning")
        .rsplit_once(" to fetch, ")
        .expect("sizes");
    expect!["warning: too little disk space for TMP/cache: 1.00 EiB"].assert_eq(&lasting(warning));
    assert!(free.ends_with("iB free"), "{free}");
}
