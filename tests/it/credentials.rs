//! Every source of AWS's default chain, against scripted services on this machine.

use std::path::Path;
use std::time::{Duration, SystemTime};

use expect_test::expect;
use serde_json::json;
use tempfile::TempDir;

use crate::program::{Program, fixture, s3_manifest};
use crate::scripted::{Reply, Scripted, response};
use crate::server::{
    ACCESS_KEY, Fault, SECRET_KEY, SESSION_ACCESS_KEY, SESSION_SECRET_KEY, SESSION_TOKEN, Server,
};

const ROLE: &str = "arn:aws:iam::111122223333:role/ci-cache";
const HOUR: Duration = Duration::from_secs(3600);

/// An export whose credentials come from elsewhere.
fn export(server: &Server) -> Program {
    Program::export(&server.keyless_spec("mode=max"), &fixture("local-max")).arg("--quiet")
}

/// Checks that the cache arrived and that each request was signed with `key` and had its token, if any.
#[track_caller]
fn exported_with(server: &Server, key: &str, token: Option<&str>) {
    assert_eq!(
        server.objects()["manifests/buildkit"],
        s3_manifest("max.json")
    );
    for request in server.log() {
        let header = |name: &str| request.headers.get(name).and_then(|v| v.to_str().ok());
        let authorization = header("authorization").expect("it is signed");
        let signer = format!("AWS4-HMAC-SHA256 Credential={key}/");
        assert!(authorization.starts_with(&signer), "{authorization}");
        assert_eq!(header("x-amz-security-token"), token);
    }
}

fn home_with(files: &[(&str, &str)]) -> TempDir {
    let home = tempfile::tempdir().expect("a temporary directory");
    for (name, content) in files {
        let path = home.path().join(name);
        std::fs::create_dir_all(path.parent().expect("it is below the home"))
            .expect("a directory can be made");
        std::fs::write(path, content).expect("a file can be written");
    }
    home
}

/// The shared config of a profile `ci` with a role of SSO, after `section`; `profile` says which session.
fn sso_config(section: &str, profile: &str) -> String {
    format!(
        "{section}[profile ci]\n{profile}sso_account_id = 111122223333\nsso_role_name = Cache\n"
    )
}

/// What `aws sso login` caches.
fn sso_token(expires: SystemTime) -> String {
    json!({
        "accessToken": "the-portal-s-token",
        "expiresAt": at(expires),
        "region": "eu-west-1",
        "startUrl": "https://example.awsapps.com/start",
    })
    .to_string()
}

/// An export with the profile `ci` of `home`, whose role comes from `portal`.
fn signed_in(server: &Server, home: &Path, portal: &str) -> Program {
    export(server)
        .env("HOME", home)
        .env("AWS_PROFILE", "ci")
        .env("AWS_ENDPOINT_URL_SSO", portal)
}

/// A response of a service that credentials come from, with the header that EC2's metadata service
/// adds to a session token.
fn said(status: &str, body: impl AsRef<[u8]>) -> Reply {
    let header = "x-aws-ec2-metadata-token-ttl-seconds: 21600\r\n";
    Reply::Answer(response(status, header, body))
}

fn ok(body: impl AsRef<[u8]>) -> Reply {
    said("200 OK", body)
}

fn status(status: u16) -> Reply {
    said(&format!("{status} Scripted"), "")
}

fn at(time: SystemTime) -> String {
    let format =
        time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    time::OffsetDateTime::from(time)
        .format(format)
        .expect("the time can be written")
}

/// The answer of metadata services and credential processes.
fn temporary(expires: SystemTime) -> serde_json::Value {
    json!({
        "Version": 1,
        "Code": "Success",
        "Type": "AWS-HMAC",
        "LastUpdated": at(SystemTime::now()),
        "AccessKeyId": SESSION_ACCESS_KEY,
        "SecretAccessKey": SESSION_SECRET_KEY,
        "Token": SESSION_TOKEN,
        "SessionToken": SESSION_TOKEN,
        "Expiration": at(expires),
    })
}

/// STS's response to `action`.
pub fn assumed(action: &str) -> Reply {
    let expires = at(SystemTime::now() + HOUR);
    ok(format!(
        "<{action}Response xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><{action}Result>\
         <AssumedRoleUser><Arn>{ROLE}/x</Arn><AssumedRoleId>AROA:x</AssumedRoleId></AssumedRoleUser>\
         <Credentials><AccessKeyId>{SESSION_ACCESS_KEY}</AccessKeyId>\
         <SecretAccessKey>{SESSION_SECRET_KEY}</SecretAccessKey>\
         <SessionToken>{SESSION_TOKEN}</SessionToken><Expiration>{expires}</Expiration></Credentials>\
         </{action}Result><ResponseMetadata><RequestId>1</RequestId></ResponseMetadata></{action}Response>"
    ))
}

#[test]
fn the_environment_s_keys_and_session_token_sign_every_request() {
    let server = Server::start();
    export(&server)
        .env("AWS_ACCESS_KEY_ID", SESSION_ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", SESSION_SECRET_KEY)
        .env("AWS_SESSION_TOKEN", SESSION_TOKEN)
        .run()
        .succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
}

#[test]
fn what_a_spec_leaves_out_comes_from_the_environment_but_no_token_for_keys_of_its_own() {
    let server = Server::start();
    let spec = server.keyless_spec(&format!("mode=max,access_key_id={SESSION_ACCESS_KEY}"));
    Program::export(&spec, &fixture("local-max"))
        .env("AWS_SECRET_ACCESS_KEY", SESSION_SECRET_KEY)
        .env("AWS_SESSION_TOKEN", SESSION_TOKEN)
        .run()
        .succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
    let server = Server::start();
    Program::export(&server.spec("mode=max"), &fixture("local-max"))
        .env("AWS_SESSION_TOKEN", SESSION_TOKEN)
        .run()
        .succeeds();
    exported_with(&server, ACCESS_KEY, None);
}

#[test]
fn a_profile_of_the_home_s_credentials_file_signs_every_request() {
    let server = Server::start();
    let other = "[default]\naws_access_key_id = AKIAOTHER\naws_secret_access_key = other\n";
    let mine =
        format!("[ci]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n");
    let home = home_with(&[(".aws/credentials", &format!("{other}\n{mine}"))]);
    export(&server)
        .env("HOME", home.path())
        .env("AWS_PROFILE", "ci")
        .run()
        .succeeds();
    exported_with(&server, ACCESS_KEY, None);
}

#[test]
fn the_default_profile_needs_no_name() {
    let server = Server::start();
    let home = home_with(&[(
        "shared",
        &format!("[default]\naws_access_key_id={ACCESS_KEY}\naws_secret_access_key={SECRET_KEY}\n"),
    )]);
    export(&server)
        .env("AWS_SHARED_CREDENTIALS_FILE", home.path().join("shared"))
        .run()
        .succeeds();
    exported_with(&server, ACCESS_KEY, None);
}

#[test]
fn a_profile_s_role_is_assumed_with_its_source_profile_s_keys() {
    let server = Server::start();
    let sts = Scripted::start(|_, _| assumed("AssumeRole"));
    let home = home_with(&[(
        "config",
        &format!(
            "[profile base]\naws_access_key_id = AKIABASE\naws_secret_access_key = base\n\
             [profile ci]\nrole_arn = {ROLE}\nsource_profile = base\nexternal_id = x-7\n"
        ),
    )]);
    export(&server)
        .env("AWS_CONFIG_FILE", home.path().join("config"))
        .env("AWS_PROFILE", "ci")
        .env("AWS_ENDPOINT_URL_STS", sts.url())
        .run()
        .succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
    let heard = sts.requests();
    assert_eq!(heard.len(), 1);
    let signed = heard[0].header("authorization").expect("it is signed");
    assert!(signed.contains("Credential=AKIABASE/"), "{signed}");
    let form: Vec<(String, String)> = url::form_urlencoded::parse(heard[0].body.as_bytes())
        .into_owned()
        .collect();
    for (name, value) in [
        ("Action", "AssumeRole"),
        ("RoleArn", ROLE),
        ("ExternalId", "x-7"),
    ] {
        assert!(form.contains(&(name.into(), value.into())), "{form:?}");
    }
}

#[test]
fn a_single_sign_on_profile_uses_the_token_that_aws_sso_login_left() {
    for (section, profile, cached_under) in [
        (
            "",
            "sso_start_url = https://example.awsapps.com/start\nsso_region = eu-west-1\n",
            "https://example.awsapps.com/start",
        ),
        (
            "[sso-session corp]\nsso_start_url = https://example.awsapps.com/start\n\
             sso_region = eu-west-1\n",
            "sso_session = corp\n",
            "corp",
        ),
    ] {
        let server = Server::start();
        let portal = Scripted::start(|_, _| {
            let expiration = SystemTime::now() + HOUR;
            let expiration = expiration
                .duration_since(SystemTime::UNIX_EPOCH)
                .expect("it is past 1970")
                .as_millis() as u64;
            ok(json!({"roleCredentials": {
                "accessKeyId": SESSION_ACCESS_KEY,
                "secretAccessKey": SESSION_SECRET_KEY,
                "sessionToken": SESSION_TOKEN,
                "expiration": expiration,
            }})
            .to_string())
        });
        let config = sso_config(section, profile);
        let token = sso_token(SystemTime::now() + HOUR);
        let cached = format!(".aws/sso/cache/{}.json", sha1(cached_under));
        let home = home_with(&[(".aws/config", &config), (&cached, &token)]);
        signed_in(&server, home.path(), &portal.url())
            .run()
            .succeeds();
        exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
        let heard = portal.requests();
        assert_eq!(heard.len(), 1);
        assert_eq!(
            heard[0].path,
            "/federation/credentials?role_name=Cache&account_id=111122223333"
        );
        assert_eq!(
            heard[0].header("x-amz-sso_bearer_token"),
            Some("the-portal-s-token")
        );
    }
}

/// The names of the AWS CLI's token files for these two.
fn sha1(text: &str) -> &'static str {
    match text {
        "https://example.awsapps.com/start" => "e8be5486177c5b5392bd9aa76563515b29358e6e",
        "corp" => "ee0bfd2552fbd840c02cc48b6e823320543c450f",
        other => panic!("{other}"),
    }
}

#[test]
fn a_credential_process_gives_temporary_credentials() {
    let server = Server::start();
    let home = home_with(&[(
        "keys.json",
        &temporary(SystemTime::now() + HOUR).to_string(),
    )]);
    let keys = home.path().join("keys.json");
    let config = format!(
        "[profile ci]\ncredential_process = cat {}\n",
        keys.display()
    );
    std::fs::write(home.path().join("config"), config).expect("a file can be written");
    export(&server)
        .env("AWS_CONFIG_FILE", home.path().join("config"))
        .env("AWS_PROFILE", "ci")
        .run()
        .succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
}

#[test]
fn a_web_identity_s_token_is_exchanged_for_the_role_s_credentials() {
    let server = Server::start();
    let sts = Scripted::start(|_, _| assumed("AssumeRoleWithWebIdentity"));
    let home = home_with(&[("token", "header.claims.signature")]);
    export(&server)
        .env("AWS_WEB_IDENTITY_TOKEN_FILE", home.path().join("token"))
        .env("AWS_ROLE_ARN", ROLE)
        .env("AWS_ROLE_SESSION_NAME", "ci")
        .env("AWS_ENDPOINT_URL_STS", sts.url())
        .run()
        .succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
    let heard = sts.requests();
    assert_eq!(heard.len(), 1);
    assert!(
        heard[0]
            .body
            .contains("WebIdentityToken=header.claims.signature"),
        "{}",
        heard[0].body
    );
}

/// A container's endpoint. The credentials it gives to the n-th request end at `expires(n)`.
fn container(expires: impl Fn(usize) -> SystemTime + Send + Sync + 'static) -> Scripted {
    Scripted::start(move |before, heard| match heard.header("authorization") {
        Some("the-pod-s-token") => ok(temporary(expires(before)).to_string()),
        _ => status(401),
    })
}

fn in_container(server: &Server, endpoint: &Scripted) -> Program {
    export(server)
        .env(
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            format!("{}/v1/credentials", endpoint.url()),
        )
        .env("AWS_CONTAINER_AUTHORIZATION_TOKEN", "the-pod-s-token")
}

#[test]
fn a_container_s_endpoint_gives_credentials_to_the_bearer_of_its_token() {
    let server = Server::start();
    let endpoint = container(|_| SystemTime::now() + HOUR);
    in_container(&server, &endpoint).run().succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
    let heard = endpoint.requests();
    assert_eq!(heard.len(), 1, "many requests at once ask once");
    assert_eq!(heard[0].path, "/v1/credentials");
}

#[test]
fn a_pod_s_token_may_come_from_a_file() {
    let server = Server::start();
    let endpoint = container(|_| SystemTime::now() + HOUR);
    let home = home_with(&[("token", "the-pod-s-token")]);
    export(&server)
        .env("AWS_CONTAINER_CREDENTIALS_FULL_URI", endpoint.url())
        .env(
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
            home.path().join("token"),
        )
        .run()
        .succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
}

fn on_ec2(server: &Server, metadata: &Scripted) -> Program {
    export(server)
        .env("AWS_EC2_METADATA_DISABLED", "false")
        .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url())
}

#[test]
fn an_instance_s_metadata_gives_its_role_s_credentials_under_version_2() {
    let server = Server::start();
    let metadata = Scripted::start(|_, heard| {
        if heard.method == "PUT" && heard.path == "/latest/api/token" {
            return ok("the-session-s-token");
        }
        if heard.header("x-aws-ec2-metadata-token") != Some("the-session-s-token") {
            return status(401);
        }
        match heard.path.trim_end_matches('/') {
            "/latest/meta-data/iam/security-credentials" => ok("ci-cache"),
            "/latest/meta-data/iam/security-credentials/ci-cache" => {
                ok(temporary(SystemTime::now() + HOUR).to_string())
            }
            _ => status(404),
        }
    });
    on_ec2(&server, &metadata).run().succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
}

#[test]
fn credentials_that_have_ended_are_fetched_again_while_the_run_lasts() {
    let server = Server::start();
    let endpoint = container(|before| match before {
        0 => SystemTime::now() - Duration::from_secs(1),
        _ => SystemTime::now() + HOUR,
    });
    in_container(&server, &endpoint).run().succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
    assert_eq!(endpoint.requests().len(), 2);
}

#[test]
fn credentials_that_end_soon_are_not_asked_for_at_every_request() {
    let server = Server::start();
    let endpoint = container(|_| SystemTime::now() + Duration::from_secs(100));
    in_container(&server, &endpoint).run().succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
    assert_eq!(endpoint.requests().len(), 1);
}

#[test]
fn a_token_that_the_store_calls_expired_is_renewed_once() {
    let server = Server::start();
    // The second answer differs from the first, as with new credentials.
    let endpoint = container(|before| SystemTime::now() + HOUR * (before as u32 + 1));
    server.fail_first(1, "PutObject", Fault::Status(400, "ExpiredToken"));
    in_container(&server, &endpoint).run().succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
    assert_eq!(endpoint.requests().len(), 2);
}

#[test]
fn a_token_that_has_expired_is_renewed_also_where_the_answer_cannot_say_so() {
    let server = Server::start();
    let endpoint = container(|before| SystemTime::now() + HOUR * (before as u32 + 1));
    server.fail_first(1, "HeadObject", Fault::StatusEmpty(400));
    in_container(&server, &endpoint).run().succeeds();
    exported_with(&server, SESSION_ACCESS_KEY, Some(SESSION_TOKEN));
    assert_eq!(endpoint.requests().len(), 2);
}

#[test]
fn a_token_that_stays_expired_is_an_error_after_one_renewal() {
    let server = Server::start();
    let endpoint = container(|before| SystemTime::now() + HOUR * (before as u32 + 1));
    server.fail(|_| Some(Fault::Status(400, "ExpiredToken")));
    in_container(&server, &endpoint)
        .run()
        .fails_with(expect![[r#"
            error: http://127.0.0.1:PORT answered 400 ExpiredToken (The test server was told to answer ExpiredToken.), looking for s3://cache/blobs/sha256:DIGEST; the session token has expired: sign in again
        "#]]);
    assert!(server.objects().is_empty());
    // Each failed request was sent twice, with a shared renewal in between.
    assert!(endpoint.requests().len() <= 1 + server.log().len() / 2);
}

#[test]
fn without_credentials_the_metadata_service_is_asked_four_times_at_most() {
    for (refusal, expected) in [
        (
            403,
            expect![[r#"
            error: no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the job a role (tried: environment, profile, web identity, container endpoint, EC2 metadata service) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
        ),
        (
            404,
            expect![[r#"
            error: no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the job a role (tried: environment, profile, web identity, container endpoint, EC2 metadata service: received 404 from IMDS) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
        ),
        (
            500,
            expect![[r#"
            error: no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the job a role (tried: environment, profile, web identity, container endpoint, EC2 metadata service) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
        ),
    ] {
        let server = Server::start();
        let metadata = Scripted::start(move |_, _| status(refusal));
        on_ec2(&server, &metadata).run().fails_with(expected);
        let asked = metadata.requests().len();
        // Ten layers want to be looked for: what fails once is not asked for each.
        assert!((1..=4).contains(&asked), "{refusal}: {asked} times");
        assert_eq!(server.log().len(), 0);
    }
}

#[test]
fn a_source_that_fails_is_named_in_the_error() {
    let server = Server::start();
    let sts = Scripted::start(|_, _| {
        let body = "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type>\
                    <Code>AccessDenied</Code><Message>Not authorized to perform sts:AssumeRoleWithWebIdentity</Message>\
                    </Error><RequestId>1</RequestId></ErrorResponse>";
        said("403 Forbidden", body)
    });
    let home = home_with(&[("token", "header.claims.signature")]);
    export(&server)
        .env("AWS_WEB_IDENTITY_TOKEN_FILE", home.path().join("token"))
        .env("AWS_ROLE_ARN", ROLE)
        .env("AWS_ENDPOINT_URL_STS", sts.url())
        .run()
        .fails_with(expect![[r#"
            error: credentials from web identity (AWS_WEB_IDENTITY_TOKEN_FILE TMP/token, AWS_ROLE_ARN arn:aws:iam::111122223333:role/ci-cache) failed (service error: unhandled error (AccessDenied): Error { code: "AccessDenied", message: "Not authorized to perform sts:AssumeRoleWithWebIdentity" }); correct these two, or whom the role trusts (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]]);
    let export = |name: &str, value: &str| export(&server).env(name, value).run();
    export("AWS_PROFILE", "absent").fails_with(expect![[r#"
        error: no AWS credentials: there is nothing in profile "absent"; set another AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the job a role (tried: environment, profile, web identity, container endpoint, EC2 metadata service: IMDS disabled by AWS_EC2_METADATA_DISABLED env var set to `true`) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
    "#]]);
    export("AWS_ACCESS_KEY_ID", "x").fails_with(expect![[r#"
        error: no AWS credentials: AWS_SECRET_ACCESS_KEY is not set, and AWS_ACCESS_KEY_ID is (tried: environment, profile, web identity, container endpoint, EC2 metadata service: IMDS disabled by AWS_EC2_METADATA_DISABLED env var set to `true`) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
    "#]]);
    export("AWS_SECRET_ACCESS_KEY", "x").fails_with(expect![[r#"
        error: no AWS credentials: AWS_ACCESS_KEY_ID is not set, and AWS_SECRET_ACCESS_KEY is (tried: environment, profile, web identity, container endpoint, EC2 metadata service: IMDS disabled by AWS_EC2_METADATA_DISABLED env var set to `true`) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
    "#]]);
    assert_eq!(server.log().len(), 0);
}

#[test]
fn a_token_service_that_echoes_the_token_has_it_shown_nowhere() {
    let server = Server::start();
    let token =
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJyZXBvOm93bmVyL3JlcG8ifQ.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg";
    let sts = Scripted::start(|_, heard| {
        let body = format!(
            "<ErrorResponse><Error><Type>Sender</Type><Code>InvalidIdentityToken</Code><Message>{}</Message>\
             </Error></ErrorResponse>",
            heard.body.replace('&', " ")
        );
        said("400 Scripted", body)
    });
    let home = home_with(&[("token", token)]);
    let spec = server.keyless_spec("mode=max");
    let run = |verbosity| {
        Program::export(&spec, &fixture("local-max"))
            .arg(verbosity)
            .env("AWS_WEB_IDENTITY_TOKEN_FILE", home.path().join("token"))
            .env("AWS_ROLE_ARN", ROLE)
            .env("AWS_ENDPOINT_URL_STS", sts.url())
            .run()
    };
    let shown = run("--verbose").stderr;
    for start in 0..token.len() - 16 {
        assert!(!shown.contains(&token[start..start + 16]), "{shown}");
    }
    run("--quiet").fails_with(expect![[r#"
        error: credentials from web identity (AWS_WEB_IDENTITY_TOKEN_FILE TMP/token, AWS_ROLE_ARN arn:aws:iam::111122223333:role/ci-cache) failed (service error: InvalidIdentityTokenException:); correct these two, or whom the role trusts (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
    "#]]);
}

#[test]
fn a_single_sign_on_session_that_has_ended_or_never_began_says_how_to_begin_one() {
    let start_url = "https://example.awsapps.com/start";
    let place = format!("sso_start_url = {start_url}\nsso_region = eu-west-1\n");
    let session = format!("[sso-session corp]\n{place}");
    let by_session = (&*session, "sso_session = corp\n", "corp");
    let by_url = ("", &*place, start_url);
    for ((section, profile, cached_under), expired, expected) in [
        (
            by_session,
            true,
            expect![[r#"
            error: the SSO session of profile "ci" has expired or is not there: run `aws sso login --profile ci` (an error occurred while loading an access token: the SSO token has expired and cannot be refreshed) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
        ),
        (
            by_session,
            false,
            expect![[r#"
            error: the SSO session of profile "ci" has expired or is not there: run `aws sso login --profile ci` (an error occurred while loading an access token: failed to load the cached SSO token) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
        ),
        (
            by_url,
            true,
            expect![[r#"
            error: the SSO session of profile "ci" has expired or is not there: run `aws sso login --profile ci` (service error: unhandled error: Error { message: "Session token not found or invalid" }) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
        ),
        (
            by_url,
            false,
            expect![[r#"
            error: the SSO session of profile "ci" has expired or is not there: run `aws sso login --profile ci` (failed to read `TMP/.aws/sso/cache/e8be5486177c5b5392bd9aa76563515b29358e6e.json`: No such file or directory (os error 2)) (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
        "#]],
        ),
    ] {
        let server = Server::start();
        let portal = Scripted::start(|_, _| {
            let message = json!({"message": "Session token not found or invalid"});
            said("401 Scripted", message.to_string())
        });
        let config = sso_config(section, profile);
        let token = sso_token(SystemTime::now() - HOUR);
        let cached = match expired {
            true => format!(".aws/sso/cache/{}.json", sha1(cached_under)),
            false => "unrelated".to_owned(),
        };
        let home = home_with(&[(".aws/config", &config), (&cached, &token)]);
        signed_in(&server, home.path(), &portal.url())
            .run()
            .fails_with(expected);
    }
}

#[test]
fn what_broke_the_chain_is_named_and_not_what_was_never_asked() {
    let server = Server::start();
    let endpoint = Scripted::start(|_, _| status(500));
    let home = home_with(&[("config", "[profile ci]\ncredential_process = false\n")]);
    let config = home.path().join("config");
    let token = "/nope/token".to_owned();
    let cases = [
        (
            vec![
                ("AWS_WEB_IDENTITY_TOKEN_FILE", token.clone()),
                ("AWS_ROLE_ARN", ROLE.to_owned()),
            ],
            expect![[r#"
                error: credentials from web identity (AWS_WEB_IDENTITY_TOKEN_FILE /nope/token, AWS_ROLE_ARN arn:aws:iam::111122223333:role/ci-cache) failed (No such file or directory (os error 2)); correct these two, or whom the role trusts (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
            "#]],
        ),
        (
            vec![
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", endpoint.url()),
                ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token),
            ],
            expect![[r#"
                error: credentials from the container endpoint (AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE /nope/token) failed (No such file or directory (os error 2)); correct the AWS_CONTAINER_ variables, or see what the endpoint logs (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
            "#]],
        ),
        (
            vec![("AWS_CONTAINER_CREDENTIALS_FULL_URI", endpoint.url())],
            expect![[r#"
                error: credentials from the container endpoint failed (Non-success status from HTTP credential provider: StatusCode(500)); correct the AWS_CONTAINER_ variables, or see what the endpoint logs (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
            "#]],
        ),
        (
            vec![
                ("AWS_CONFIG_FILE", config.display().to_string()),
                ("AWS_PROFILE", "ci".to_owned()),
            ],
            expect![[r#"
                error: credentials from profile "ci" of TMP/config and ~/.aws/credentials failed (Error retrieving credentials: external process exited with code exit status: 1. what it printed is not shown, run it by hand); correct it, or set another AWS_PROFILE (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
            "#]],
        ),
    ];
    for (environment, expected) in cases {
        let mut program = export(&server);
        for (name, value) in environment {
            program = program.env(name, value);
        }
        program.run().fails_with(expected);
    }
    assert_eq!(server.log().len(), 0);
}
