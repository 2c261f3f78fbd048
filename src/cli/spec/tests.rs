use proptest::prelude::*;

use super::attributes::{BOTH, FOREIGN, SECOND_LINE, TO_ONLY, fields};
use super::*;

const MINIMAL: &str = "type=s3,region=us-east-1,bucket=cache";

pub(crate) fn no_env(_: &str) -> Option<String> {
    None
}

pub(crate) fn env_of(
    pairs: &'static [(&'static str, &'static str)],
) -> impl Fn(&str) -> Option<String> {
    move |name| {
        let (_, value) = pairs.iter().find(|(key, _)| *key == name)?;
        Some((*value).to_owned())
    }
}

/// The minimal spec and `more`, as `--cache-to`.
fn to(more: &str) -> Parsed<ExportConfig> {
    cache_to(&format!("{MINIMAL},{more}"), &no_env).expect(more)
}

fn to_error(more: &str) -> String {
    error(cache_to(&format!("{MINIMAL},{more}"), &no_env))
}

fn error<T: std::fmt::Debug>(result: Result<Parsed<T>>) -> String {
    format!("{:#}", result.expect_err("the spec was accepted"))
}

#[test]
fn a_minimal_spec_has_the_documented_defaults() {
    let parsed = cache_to(MINIMAL, &no_env).unwrap();
    assert_eq!(
        parsed,
        Parsed {
            config: ExportConfig {
                s3: S3Config {
                    region: "us-east-1".to_owned(),
                    bucket: "cache".to_owned(),
                    endpoint_url: None,
                    use_path_style: false,
                    prefix: String::new(),
                    blobs_prefix: "blobs/".to_owned(),
                    manifests_prefix: "manifests/".to_owned(),
                    names: vec!["buildkit".to_owned()],
                    credentials: None,
                    retry_mode: RetryMode::Standard,
                    retry_max_attempts: 3,
                    disable_accept_encoding: false,
                    ca_bundle: None,
                },
                upload_parallelism: 4,
                small_uploads: 32,
                touch_refresh: Duration::from_secs(86_400),
                mode: Mode::Min,
                ignore_error: false,
            },
            warnings: vec![],
        }
    );
    let imported = cache_from(MINIMAL, &no_env).unwrap();
    assert_eq!(imported.config, parsed.config.s3);
    assert_eq!(imported.warnings, Vec::<String>::new());
}

#[test]
fn every_attribute_takes_effect() {
    let parsed = cache_to(
        "type=s3,region=eu-west-1,bucket=b.c_D,name=main;pr-1,prefix=app/,\
         endpoint_url=https://s3.example.com:9000/sub,blobs_prefix=b/,manifests_prefix=m/,\
         use_path_style=true,access_key_id=AKIA,secret_access_key=s=e/c+r,session_token=t==,\
         upload_parallelism=8,touch_refresh=1h30m,mode=max,ignore-error=1,\
         retry_mode=adaptive,retry_max_attempts=7,disable_accept_encoding=T",
        &no_env,
    )
    .unwrap();
    assert_eq!(
        parsed,
        Parsed {
            config: ExportConfig {
                s3: S3Config {
                    region: "eu-west-1".to_owned(),
                    bucket: "b.c_D".to_owned(),
                    endpoint_url: Some("https://s3.example.com:9000/sub".parse().unwrap()),
                    use_path_style: true,
                    prefix: "app/".to_owned(),
                    blobs_prefix: "b/".to_owned(),
                    manifests_prefix: "m/".to_owned(),
                    names: vec!["main".to_owned(), "pr-1".to_owned()],
                    credentials: Some(StaticCredentials {
                        access_key_id: "AKIA".to_owned(),
                        secret_access_key: "s=e/c+r".to_owned(),
                        session_token: Some("t==".to_owned()),
                    }),
                    retry_mode: RetryMode::Adaptive,
                    retry_max_attempts: 7,
                    disable_accept_encoding: true,
                    ca_bundle: None,
                },
                upload_parallelism: 8,
                small_uploads: 0,
                touch_refresh: Duration::from_secs(5400),
                mode: Mode::Max,
                ignore_error: true,
            },
            warnings: vec![],
        }
    );
}

#[test]
fn keys_are_lower_cased_and_trimmed_and_values_are_not() {
    let parsed = cache_to("TYPE=s3, Region=US-x,Bucket=cache,prefix= A", &no_env).unwrap();
    assert_eq!(parsed.config.s3.region, "US-x");
    assert_eq!(parsed.config.s3.prefix, " A");
}

#[test]
fn a_quoted_field_holds_commas_and_quotes() {
    let parsed = to(r#""prefix=a,b ""c""/",mode=max"#);
    assert_eq!(parsed.config.s3.prefix, r#"a,b "c"/"#);
    assert_eq!(parsed.config.mode, Mode::Max);
}

#[test]
fn a_line_break_at_either_end_is_no_second_record() {
    let parsed = cache_to(&format!("\n{MINIMAL}\r\n"), &no_env).unwrap();
    assert_eq!(parsed.config.s3.bucket, "cache");
}

#[test]
fn what_is_not_one_csv_record_of_pairs_is_refused() {
    for (spec, expected) in [
        (
            "",
            "the spec is empty (expected type=s3,region=...,bucket=...)",
        ),
        (
            "  ",
            "the spec is empty (expected type=s3,region=...,bucket=...)",
        ),
        (
            "\"\"",
            "the spec is empty (expected type=s3,region=...,bucket=...)",
        ),
        (
            "user/app:cache",
            "a spec without `=` is an image reference, and type=registry is not supported \
             (expected type=s3,region=...,bucket=...)",
        ),
        ("type=s3\ntype=s3", SECOND_LINE),
        ("type=s3\rregion=x", SECOND_LINE),
        (
            "type=s3,region",
            "field 2 has no `=` (expected key=value; a field whose value holds a comma is \
             quoted as a whole: \"key=a,b\")",
        ),
        ("type=s3,", "field 2 is empty (is there a comma too many?)"),
        ("type=s3,=x", "field 2 has no key before its `=`"),
        (
            "type=s3,name=\"a,b\"",
            "field 2 has a quote in its middle (a quoted field is quoted as a whole, \
             \"key=a,b\", and a quote inside it doubled)",
        ),
        (
            "\"type=s3\"x,region=a",
            "field 1 goes on after its closing quote (a quote inside a quoted field is doubled)",
        ),
        ("type=s3,\"name=a", "field 2 has no closing quote"),
    ] {
        assert_eq!(error(cache_to(spec, &no_env)), expected, "{spec:?}");
        assert_eq!(error(cache_from(spec, &no_env)), expected, "{spec:?}");
    }
}

#[test]
fn only_type_s3_is_accepted() {
    for (spec, expected) in [
        (
            "type=registry,ref=user/app",
            "type: \"registry\" is not supported (accepted: s3)",
        ),
        ("type=S3", "type: \"S3\" is not supported (accepted: s3)"),
        ("type=", "type: \"\" is not supported (accepted: s3)"),
        ("region=a,bucket=abc", "type: missing (expected type=s3)"),
        (
            "typ=s3,region=a",
            "typ: unknown attribute (did you mean `type`?)",
        ),
    ] {
        assert_eq!(error(cache_to(spec, &no_env)), expected, "{spec:?}");
    }
}

#[test]
fn a_duplicate_key_is_refused_by_name_alone() {
    assert_eq!(
        to_error("Region=eu-west-1"),
        "region: given twice (field 4)"
    );
    assert_eq!(
        to_error("secret_access_key=one,secret_access_key=two"),
        "secret_access_key: given twice (field 5)"
    );
    assert_eq!(to_error("dest=a,dest=b"), "dest: given twice (field 5)");
    assert_eq!(to_error("type=s3"), "type: given twice (field 4)");
}

#[test]
fn an_unknown_key_is_refused_with_what_was_probably_meant() {
    for (key, meant) in [
        ("regoin", "region"),
        ("buckt", "bucket"),
        ("endpoint", "endpoint_url"),
        ("endpoint-url", "endpoint_url"),
        ("upload-parallelism", "upload_parallelism"),
        ("ignore_error", "ignore-error"),
        ("secret_acess_key", "secret_access_key"),
        ("use_pathstyle", "use_path_style"),
        ("manifest_prefix", "manifests_prefix"),
        ("touch-refresh", "touch_refresh"),
        ("retry_max_attempt", "retry_max_attempts"),
    ] {
        assert_eq!(
            to_error(&format!("{key}=x")),
            format!("{key}: unknown attribute (did you mean `{meant}`?)")
        );
    }
    assert_eq!(
        to_error("colour=blue"),
        "colour: unknown attribute (accepted: type, region, bucket, name, prefix, \
         endpoint_url, blobs_prefix, manifests_prefix, use_path_style, access_key_id, \
         secret_access_key, session_token, retry_mode, retry_max_attempts, \
         disable_accept_encoding; on --cache-to also upload_parallelism, touch_refresh, mode, \
         ignore-error)"
    );
}

#[test]
fn region_and_bucket_fall_back_to_the_environment_below_the_spec() {
    let env = env_of(&[
        ("AWS_REGION", "eu-west-1"),
        ("AWS_DEFAULT_REGION", "eu-west-2"),
        ("AWS_BUCKET", "from-env"),
    ]);
    let s3 = cache_from("type=s3", &env).unwrap().config;
    assert_eq!(
        (s3.region, s3.bucket),
        ("eu-west-1".into(), "from-env".into())
    );
    let s3 = cache_from(MINIMAL, &env).unwrap().config;
    assert_eq!((s3.region, s3.bucket), ("us-east-1".into(), "cache".into()));
    let env = env_of(&[("AWS_REGION", ""), ("AWS_DEFAULT_REGION", "eu-west-2")]);
    let s3 = cache_from("type=s3,bucket=abc", &env).unwrap().config;
    assert_eq!(s3.region, "eu-west-2");
}

#[test]
fn a_missing_or_empty_region_or_bucket_is_refused() {
    for (spec, expected) in [
        (
            "type=s3,bucket=abc",
            "region: missing (give region=... in the spec, or set AWS_REGION or \
             AWS_DEFAULT_REGION)",
        ),
        (
            "type=s3,region=a",
            "bucket: missing (give bucket=... in the spec, or set AWS_BUCKET)",
        ),
        (
            "type=s3,region=,bucket=abc",
            "region: the value is empty (expected region=...; leave the attribute out to use \
             AWS_REGION or AWS_DEFAULT_REGION)",
        ),
        (
            "type=s3,region=a,bucket=",
            "bucket: the value is empty (expected bucket=...; leave the attribute out to use \
             AWS_BUCKET)",
        ),
    ] {
        assert_eq!(error(cache_to(spec, &no_env)), expected, "{spec}");
    }
}

#[test]
fn a_region_that_is_no_part_of_a_host_name_is_refused() {
    for region in ["auto", "us-east-1", "garage", "cn-north-1", "US", "1"] {
        let spec = format!("type=s3,bucket=abc,region={region}");
        assert_eq!(cache_to(&spec, &no_env).unwrap().config.s3.region, region);
    }
    let long = "a".repeat(64);
    for region in [
        "a/b", "a b", "a.b", " a", "-a", "a-", "a@b", "ü", "a#", &long,
    ] {
        let spec = format!("type=s3,bucket=abc,region={region}");
        assert_eq!(
            error(cache_to(&spec, &no_env)),
            format!(
                "region: {region:?} is not a region (accepted: letters, digits and `-`, as in \
                 us-east-1 or auto)"
            )
        );
    }
    let env = env_of(&[("AWS_REGION", "evil.example/")]);
    assert_eq!(
        error(cache_to("type=s3,bucket=abc", &env)),
        "AWS_REGION: \"evil.example/\" is not a region (accepted: letters, digits and `-`, as \
         in us-east-1 or auto)"
    );
}

#[test]
fn a_value_that_is_no_buckets_name_is_refused() {
    let longest = "a".repeat(255);
    for bucket in ["abc", "my.bucket-1", "Old_Bucket", &longest] {
        let spec = format!("type=s3,region=a,bucket={bucket}");
        assert_eq!(cache_to(&spec, &no_env).unwrap().config.s3.bucket, bucket);
    }
    let too_long = "a".repeat(256);
    for (bucket, expected) in [
        ("ab", "is not a bucket's name"),
        ("a b", "is not a bucket's name"),
        ("a?b", "is not a bucket's name"),
        ("bücket", "is not a bucket's name"),
        (&*too_long, "is not a bucket's name"),
        ("bucket/prefix", "holds a `/`"),
        ("s3://bucket", "holds a `/`"),
        (
            "arn:aws:s3:us-west-2:1:accesspoint/x",
            "is an ARN, and access points are not supported",
        ),
    ] {
        let message = error(cache_to(
            &format!("type=s3,region=a,bucket={bucket}"),
            &no_env,
        ));
        assert!(message.starts_with("bucket: \""), "{message}");
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn the_endpoint_comes_from_the_spec_then_from_the_environment() {
    let both = env_of(&[
        ("AWS_ENDPOINT_URL_S3", "http://s3.test:1"),
        ("AWS_ENDPOINT_URL", "http://all.test:2"),
    ]);
    let general = env_of(&[
        ("AWS_ENDPOINT_URL_S3", ""),
        ("AWS_ENDPOINT_URL", "http://all.test:2"),
    ]);
    let off = env_of(&[
        ("AWS_ENDPOINT_URL", "not even a URL"),
        ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "True"),
    ]);
    let with = format!("{MINIMAL},endpoint_url=http://spec.test");
    let empty = format!("{MINIMAL},endpoint_url=");
    for (spec, env, expected) in [
        (&*with, &both as Env, Some("http://spec.test/")),
        (&*with, &off, Some("http://spec.test/")),
        (MINIMAL, &both, Some("http://s3.test:1/")),
        (&*empty, &both, Some("http://s3.test:1/")),
        (MINIMAL, &general, Some("http://all.test:2/")),
        (MINIMAL, &off, None),
    ] {
        let endpoint = cache_from(spec, env).unwrap().config.endpoint_url;
        assert_eq!(endpoint.as_ref().map(Url::as_str), expected, "{spec}");
    }
}

#[test]
fn an_endpoint_that_is_no_plain_http_url_is_refused() {
    for (value, expected) in [
        (
            "localhost:9000",
            "\"localhost:9000\" has no scheme (write http:// or https:// before it)",
        ),
        (
            "127.0.0.1:9000",
            "\"127.0.0.1:9000\" has no scheme (write http:// or https:// before it)",
        ),
        (
            "http:/host",
            "\"http:/host\" has no scheme (write http:// or https:// before it)",
        ),
        (
            "ftp://host",
            "\"ftp://host\" is neither http nor https (expected http://host or https://host, \
             with a port or a path if need be)",
        ),
        (
            "http:///host",
            "\"http:///host\" is not a URL (expected http://host or https://host, with a port \
             or a path if need be)",
        ),
        (
            "http://host ",
            "\"http://host \" is not a URL (expected http://host or https://host, with a port \
             or a path if need be)",
        ),
        ("http://", "\"http://\" is not a URL: empty host"),
        (
            "http://host:99999",
            "\"http://host:99999\" is not a URL: invalid port number",
        ),
        (
            "http://me:pa55@host",
            "the URL holds a user name or password (give access_key_id and secret_access_key \
             instead)",
        ),
        (
            "http://@host",
            "the URL holds a user name or password (give access_key_id and secret_access_key \
             instead)",
        ),
        (
            "me:pa55@host",
            "the value has no scheme (write http:// or https:// before it)",
        ),
        (
            "https://host/?X-Amz-Signature=pa55",
            "the URL has a query or a fragment (expected http://host or https://host, with a \
             port or a path if need be)",
        ),
        (
            "https://host/#",
            "the URL has a query or a fragment (expected http://host or https://host, with a \
             port or a path if need be)",
        ),
    ] {
        assert_eq!(
            to_error(&format!("endpoint_url={value}")),
            format!("endpoint_url: {expected}")
        );
    }
    let env = env_of(&[("AWS_ENDPOINT_URL", "host:1")]);
    assert_eq!(
        error(cache_from(MINIMAL, &env)),
        "AWS_ENDPOINT_URL: \"host:1\" has no scheme (write http:// or https:// before it)"
    );
}

#[test]
fn credentials_come_together_or_not_at_all() {
    let credentials = |more: &str| to(more).config.s3.credentials;
    assert_eq!(
        credentials("access_key_id=a,secret_access_key=b"),
        Some(StaticCredentials {
            access_key_id: "a".to_owned(),
            secret_access_key: "b".to_owned(),
            session_token: None,
        })
    );
    assert_eq!(
        credentials("access_key_id=a,secret_access_key=b,session_token="),
        credentials("access_key_id=a,secret_access_key=b")
    );
    assert_eq!(
        credentials("access_key_id=,secret_access_key=,session_token="),
        None
    );
    for more in ["access_key_id=a", "access_key_id=a,secret_access_key="] {
        assert_eq!(
            to_error(more),
            "secret_access_key: missing (access_key_id is given without it, and \
             AWS_SECRET_ACCESS_KEY is not set)"
        );
    }
    assert_eq!(
        to_error("secret_access_key=b,session_token=c"),
        "access_key_id: missing (secret_access_key is given without it, and AWS_ACCESS_KEY_ID is \
         not set)"
    );
    assert_eq!(
        to_error("session_token=c"),
        "session_token: given without access_key_id and secret_access_key (and AWS_ACCESS_KEY_ID \
         and AWS_SECRET_ACCESS_KEY are not set)"
    );
    // The default chain reads the environment; here its credentials are none of our business.
    let env = env_of(&[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")]);
    assert_eq!(cache_to(MINIMAL, &env).unwrap().config.s3.credentials, None);
}

#[test]
fn what_a_spec_leaves_out_of_its_credentials_comes_from_the_environment() {
    let env = env_of(&[
        ("AWS_ACCESS_KEY_ID", "env-id"),
        ("AWS_SECRET_ACCESS_KEY", "env-secret"),
        ("AWS_SESSION_TOKEN", "env-token"),
    ]);
    let with = |more: &str, env| {
        let parsed = cache_to(&format!("{MINIMAL},{more}"), env).expect(more);
        let found = parsed.config.s3.credentials.expect(more);
        let token = found.session_token.unwrap_or_default();
        [found.access_key_id, found.secret_access_key, token]
    };
    for (more, expected) in [
        ("access_key_id=a", ["a", "env-secret", "env-token"]),
        ("secret_access_key=b", ["env-id", "b", "env-token"]),
        ("session_token=c", ["env-id", "env-secret", "c"]),
        ("access_key_id=a,session_token=c", ["a", "env-secret", "c"]),
        // The environment's token belongs to the environment's keys.
        ("access_key_id=a,secret_access_key=b", ["a", "b", ""]),
    ] {
        assert_eq!(with(more, &env), expected, "{more}");
    }
    let no_token = env_of(&[
        ("AWS_ACCESS_KEY_ID", "env-id"),
        ("AWS_SECRET_ACCESS_KEY", "env-secret"),
        ("AWS_SESSION_TOKEN", ""),
    ]);
    assert_eq!(with("access_key_id=a", &no_token), ["a", "env-secret", ""]);
    let half = env_of(&[("AWS_ACCESS_KEY_ID", "env-id")]);
    assert_eq!(
        error(cache_to(&format!("{MINIMAL},session_token=c"), &half)),
        "secret_access_key: missing (AWS_ACCESS_KEY_ID is given without it, and \
         AWS_SECRET_ACCESS_KEY is not set)"
    );
    let broken = env_of(&[("AWS_SECRET_ACCESS_KEY", "hidden\n")]);
    assert_eq!(
        error(cache_to(&format!("{MINIMAL},access_key_id=a"), &broken)),
        "AWS_SECRET_ACCESS_KEY: the value holds a line break or another control character"
    );
}

#[test]
fn a_credential_no_header_can_carry_is_refused_unseen() {
    assert_eq!(
        to_error("\"access_key_id=a\nb\",secret_access_key=c"),
        "access_key_id: the value holds a space, a line break or another character that no \
         credential has"
    );
    assert_eq!(
        to_error("access_key_id=a,secret_access_key=b,session_token=c d"),
        "session_token: the value holds a space, a line break or another character that no \
         credential has"
    );
    assert_eq!(
        to_error("access_key_id=a,\"secret_access_key=b\n\""),
        "secret_access_key: the value holds a line break or another control character"
    );
}

#[test]
fn a_manifest_cannot_take_the_place_of_a_blob() {
    let name = Digest::of(b"");
    let same = format!("{MINIMAL},manifests_prefix=blobs/,name={name}");
    let error = cache_to(&same, &no_env).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "name: \"{name}\" makes the manifest's key that of a blob, which it would overwrite \
             (choose another name or manifests_prefix)"
        )
    );
    assert!(cache_to(&format!("{MINIMAL},name={name}"), &no_env).is_ok());
    assert!(cache_to(&format!("{MINIMAL},manifests_prefix=blobs/"), &no_env).is_ok());
}

#[test]
fn aws_ca_bundle_is_part_of_the_config_unless_it_is_empty() {
    let bundle = |value: &str| {
        let env = |name: &str| (name == "AWS_CA_BUNDLE").then(|| value.to_owned());
        let spec = "type=s3,region=eu-west-1,bucket=cache";
        cache_to(spec, &env).unwrap().config.s3.ca_bundle
    };
    assert_eq!(bundle("/ca.pem"), Some(PathBuf::from("/ca.pem")));
    assert_eq!(bundle(""), None);
}

#[test]
fn names_are_split_at_semicolons_and_written_once() {
    let parsed = to("name=a;b;a");
    assert_eq!(parsed.config.s3.names, ["a", "b"]);
    assert_eq!(
        parsed.warnings,
        ["name: a name is given twice; it is written once"]
    );
    for (value, expected) in [
        ("", "name: \"\" holds an empty name"),
        ("a;", "name: \"a;\" holds an empty name"),
        (";a", "name: \";a\" holds an empty name"),
        ("a;;b", "name: \"a;;b\" holds an empty name"),
    ] {
        assert_eq!(
            to_error(&format!("name={value}")),
            format!("{expected} (expected one name, or several as a;b)")
        );
    }
}

#[test]
fn cache_from_reads_the_first_name_and_says_so() {
    let parsed = cache_from(&format!("{MINIMAL},name=a;b"), &no_env).unwrap();
    assert_eq!(parsed.config.names, ["a"]);
    assert_eq!(
        parsed.warnings,
        ["name: only the first name, \"a\", is imported; for the others repeat --cache-from"]
    );
    let parsed = cache_from(&format!("{MINIMAL},name=a;a"), &no_env).unwrap();
    assert_eq!(parsed.warnings, Vec::<String>::new());
}

#[test]
fn a_key_that_servers_would_change_is_refused() {
    for (more, expected) in [
        (
            "name=../x",
            "name: with its prefixes it makes the key \"manifests/../x\", whose `..` many \
             servers resolve as a path",
        ),
        (
            "name=a/./b",
            "name: with its prefixes it makes the key \"manifests/a/./b\", whose `.` many \
             servers resolve as a path",
        ),
        (
            "prefix=../",
            "blobs_prefix: with its prefixes it makes the key \"../blobs/sha256:\
             e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\", whose `..` \
             many servers resolve as a path",
        ),
        (
            "name=/x",
            "name: \"/x\" begins with `/` (many servers take `//` in a key for `/`)",
        ),
        ("\"name=a\nb\"", "name: \"a\\nb\" holds a control character"),
        (
            "prefix=\u{1b}[2J",
            "prefix: \"\\u{1b}[2J\" holds a control character",
        ),
    ] {
        assert_eq!(to_error(more), expected);
    }
    // Dots that are not a segment of their own are as good as any letter.
    assert_eq!(to("name=v1..v2").config.s3.names, ["v1..v2"]);
}

#[test]
fn a_key_has_at_most_1024_bytes() {
    // "manifests/" and, for a blob, "blobs/sha256:" and 64 digits come on top.
    assert_eq!(to(&format!("name={}", "n".repeat(1014))).warnings.len(), 0);
    assert_eq!(
        to_error(&format!("name={}", "n".repeat(1015))),
        "name: with its prefixes it makes a key of 1025 bytes (accepted: up to 1024)"
    );
    let prefix = |length: usize| format!("prefix={}/", "p".repeat(length - 1));
    assert_eq!(to(&prefix(947)).warnings.len(), 0);
    assert_eq!(
        to_error(&prefix(948)),
        "blobs_prefix: with its prefixes it makes a key of 1025 bytes (accepted: up to 1024)"
    );
}

#[test]
fn prefixes_may_be_empty_and_odd_slashes_are_warned_of() {
    let parsed = to("prefix=,blobs_prefix=,manifests_prefix=");
    assert_eq!(parsed.warnings, Vec::<String>::new());
    assert_eq!(parsed.config.s3.manifest_key("x"), "x");
    for more in ["prefix=/a/", "prefix=a//"] {
        assert_eq!(
            to(more).warnings,
            [
                "prefix: keys will begin with `/` or hold `//`, which some S3-compatible \
                 servers change"
            ]
        );
    }
}

#[test]
fn booleans_are_gos() {
    for (value, expected) in [
        ("1", true),
        ("t", true),
        ("T", true),
        ("TRUE", true),
        ("true", true),
        ("True", true),
        ("0", false),
        ("f", false),
        ("F", false),
        ("FALSE", false),
        ("false", false),
        ("False", false),
    ] {
        let config = to(&format!("use_path_style={value}")).config;
        assert_eq!(config.s3.use_path_style, expected, "{value}");
    }
    for key in ["use_path_style", "disable_accept_encoding", "ignore-error"] {
        for value in ["", "yes", "tRUE", "on", " true", "2"] {
            assert_eq!(
                to_error(&format!("{key}={value}")),
                format!(
                    "{key}: {value:?} is not a boolean (accepted: 1, t, T, TRUE, true, True, 0, \
                     f, F, FALSE, false, False)"
                )
            );
        }
    }
}

#[test]
fn durations_are_gos() {
    for (value, nanoseconds) in [
        ("0", 0),
        ("+0", 0),
        ("-0", 0),
        ("0s", 0),
        ("-0s", 0),
        ("24h", 86_400_000_000_000),
        ("1h30m", 5_400_000_000_000),
        ("1.5h", 5_400_000_000_000),
        ("300ms", 300_000_000),
        ("1us", 1000),
        ("1\u{b5}s", 1000),
        ("1\u{3bc}s", 1000),
        ("7ns", 7),
        (".5s", 500_000_000),
        ("1.s", 1_000_000_000),
        ("+5s", 5_000_000_000),
        ("1h1h", 7_200_000_000_000),
        ("0.123456789s", 123_456_789),
        ("2562047h47m16.854775807s", i64::MAX as u64),
    ] {
        let config = to(&format!("touch_refresh={value}")).config;
        assert_eq!(
            config.touch_refresh,
            Duration::from_nanos(nanoseconds),
            "{value}"
        );
    }
}

#[test]
fn what_is_no_duration_is_refused() {
    for value in [
        "",
        "24",
        "h",
        ".s",
        ".",
        "-",
        "1x",
        "1 h",
        " 1h",
        "1h ",
        "1H",
        "1h-30m",
        "forever",
        "1..5s",
        "1e3s",
        "2562047h47m16.854775808s",
        "99999999999999999999h",
        "9223372036854775807h",
    ] {
        assert_eq!(
            to_error(&format!("touch_refresh={value}")),
            format!(
                "touch_refresh: {value:?} is not a duration (accepted: numbers with a unit of \
                 h, m, s, ms, us or ns, as in 24h, 1h30m or 1.5h, up to 292 years)"
            )
        );
    }
    assert_eq!(
        to_error("touch_refresh=-1s"),
        "touch_refresh: \"-1s\" is negative (accepted: 0s and above)"
    );
    assert_eq!(
        to_error("touch_refresh=7d"),
        "touch_refresh: \"7d\" is not a duration (days are not a Go unit; write 168h)"
    );
}

#[test]
fn counts_are_whole_and_at_least_one() {
    assert_eq!(to("upload_parallelism=+1").config.upload_parallelism, 1);
    // More than the numbers' types hold is as good as no limit.
    let config = to("upload_parallelism=18446744073709551615,retry_max_attempts=4294967296");
    assert_eq!(config.config.upload_parallelism, 1 << 20);
    assert_eq!(config.config.s3.retry_max_attempts, u32::MAX);
    for key in ["upload_parallelism", "retry_max_attempts"] {
        for value in ["", "0", "-1", "four", "1.5", " 1", "1_000", "0x4"] {
            assert_eq!(
                to_error(&format!("{key}={value}")),
                format!("{key}: {value:?} is not a positive whole number (accepted: 1 and above)")
            );
        }
    }
}

#[test]
fn modes_are_spelt_as_buildkit_spells_them() {
    assert_eq!(
        to_error("mode="),
        "mode: \"\" is not a mode (accepted: min, max)"
    );
    assert_eq!(
        to_error("mode=Max"),
        "mode: \"Max\" is not a mode (accepted: min, max)"
    );
    assert_eq!(
        to_error("retry_mode=legacy"),
        "retry_mode: \"legacy\" is not a retry mode (accepted: standard, adaptive)"
    );
}

#[test]
fn a_cache_to_attribute_on_cache_from_is_ignored_with_a_warning() {
    let spec =
        format!("{MINIMAL},mode=most,upload_parallelism=0,touch_refresh=x,ignore-error=maybe");
    let parsed = cache_from(&spec, &no_env).unwrap();
    assert_eq!(
        parsed.warnings,
        [
            "mode: ignored: it means something on --cache-to only",
            "upload_parallelism: ignored: it means something on --cache-to only",
            "touch_refresh: ignored: it means something on --cache-to only",
            "ignore-error: ignored: it means something on --cache-to only",
        ]
    );
}

#[test]
fn other_backends_attributes_are_ignored_with_a_warning() {
    let parsed = to("compression=zstd,ghtoken=hidden");
    assert_eq!(
        parsed.warnings,
        [
            "compression: ignored: blobs are moved as they are, never compressed again",
            "ghtoken: ignored: it belongs to type=gha",
        ]
    );
    for (key, _) in FOREIGN {
        assert_eq!(to(&format!("{key}=whatever")).warnings.len(), 1, "{key}");
        let from = cache_from(&format!("{MINIMAL},{key}="), &no_env).unwrap();
        assert_eq!(from.warnings.len(), 1, "{key}");
    }
}

#[test]
fn a_variable_holds_one_spec_a_line() {
    assert_eq!(
        specs_from_env("\n type=s3,a=1\r\n\n  \ntype=s3,b=2\n"),
        [" type=s3,a=1", "type=s3,b=2"]
    );
    assert_eq!(specs_from_env(" \n"), Vec::<String>::new());
}

#[test]
fn a_spec_with_the_wrong_separators_is_not_repeated() {
    for spec in [
        "type=s3;region=a;secret_access_key=hidden",
        "type=s3 region=a secret_access_key=hidden",
        "type=s3,region=a;bucket=b;session_token=hidden",
    ] {
        let message = error(cache_to(spec, &no_env));
        assert!(message.contains("not shown"), "{message}");
        assert!(!message.contains("hidden"), "{message}");
    }
}

#[test]
fn the_rest_of_a_credential_with_a_comma_in_it_is_not_repeated() {
    for more in [
        "access_key_id=a,secret_access_key=b,hidden=c",
        "access_key_id=a,secret_access_key=b,hidden",
        "access_key_id=a,secret_access_key=b\"hidden",
    ] {
        let message = to_error(more);
        assert!(message.starts_with("field "), "{message}");
        assert!(!message.contains("hidden"), "{message}");
    }
}

/// A field as a careful author writes it.
fn csv_record(fields: &[String]) -> String {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(fields).unwrap();
    String::from_utf8(writer.into_inner().unwrap()).unwrap()
}

proptest! {
    #[test]
    fn no_text_panics(spec in any::<String>()) {
        let _ = cache_to(&spec, &no_env);
        let _ = cache_from(&spec, &no_env);
    }

    #[test]
    fn no_value_of_an_attribute_panics(
        key in prop::sample::select([BOTH, TO_ONLY].concat()),
        value in any::<String>(),
    ) {
        let mut spec = vec!["type=s3".to_owned(), format!("{key}={value}")];
        for (other, filler) in [("region", "a"), ("bucket", "abc")] {
            if other != key {
                spec.push(format!("{other}={filler}"));
            }
        }
        let _ = cache_to(&csv_record(&spec), &no_env);
        let _ = cache_from(&csv_record(&spec), &no_env);
    }

    #[test]
    fn no_duration_panics(value in "[-+]?([0-9.]{0,25}(ns|us|µs|ms|s|m|h|d|x)?){0,3}") {
        let _ = duration("touch_refresh", &value);
    }

    #[test]
    fn fields_survive_csv(fields_in in prop::collection::vec(any::<String>(), 1..6)) {
        prop_assert_eq!(fields(&csv_record(&fields_in)).unwrap(), fields_in);
    }

    #[test]
    fn a_credential_is_in_no_message(
        key in prop::sample::select(vec![
            "access_key_id", "secret_access_key", "session_token", "secret_acces_key", "nope",
        ]),
        secret in "[ -~\n\té\"]{0,4}HIDDEN[ -~\n\té\",]{0,4}",
        before in prop::sample::select(vec![
            "", "mode=x", "bare", "secret_access_key=b", "token=c", "session_token=t",
            "endpoint_url=http://h.test", "region=b", "prefix=..",
        ]),
        well_quoted in any::<bool>(),
    ) {
        let fields = [MINIMAL.to_owned(), before.to_owned(), format!("{key}={secret}")];
        let spec = if well_quoted {
            let mut fields = fields.to_vec();
            fields.remove(0);
            fields.retain(|field| !field.is_empty());
            format!("{MINIMAL},{}", csv_record(&fields))
        } else {
            fields.join(",")
        };
        for message in [
            cache_to(&spec, &no_env).map_or_else(
                |error| format!("{error:#} {error:?}"),
                |parsed| format!("{:?} {:?}", parsed.warnings, parsed.config),
            ),
            cache_from(&spec, &no_env).map_or_else(
                |error| format!("{error:#} {error:?}"),
                |parsed| format!("{:?} {:?}", parsed.warnings, parsed.config),
            ),
        ] {
            prop_assert!(!message.contains("HIDDEN"), "{}", message);
        }
    }
}

#[test]
fn the_documents_table_lists_every_attribute_and_its_direction() {
    let text = include_str!("../../../docs/spec.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    let listed: Vec<(&str, &str)> = rows
        .filter_map(|row| row.split_once("` | "))
        .map(|(key, rest)| (key, rest.split(" | ").next().unwrap_or_default()))
        .filter(|(_, direction)| ["both", "cache-to"].contains(direction))
        .collect();
    let own = attributes::BOTH.iter().map(|key| (*key, "both"));
    let to = attributes::TO_ONLY.iter().map(|key| (*key, "cache-to"));
    let mut expected: Vec<_> = own.chain(to).collect();
    let mut sorted = listed.clone();
    expected.sort_unstable();
    sorted.sort_unstable();
    assert_eq!(sorted, expected);
}

#[test]
fn an_address_or_a_spec_that_is_still_in_quotes_is_explained() {
    let address = |bucket: &str| {
        format!(
            "an s3:// address is not a spec (expected type=s3,region=...,bucket={bucket}, with \
             prefix=... and name=... for the rest)"
        )
    };
    let refused = |spec: &str| error(cache_to(spec, &no_env));
    assert_eq!(refused("s3://ci-cache/team/app"), address("ci-cache"));
    assert_eq!(refused(" S3://ci-cache,region=a"), address("ci-cache"));
    assert_eq!(refused("s3://id:secret@ci-cache"), address("..."));
    let quotes = "the spec is still in quotes (remove them: .env files and YAML blocks keep them as \
                  part of the value)";
    for spec in [
        "'type=s3,region=a,bucket=b'",
        "\"type=s3,region=a,bucket=b\"",
        " \"type=s3,region=a,bucket=b\"\n",
        "'type=s3",
    ] {
        assert_eq!(refused(spec), quotes, "{spec}");
    }
}

#[test]
fn a_prefix_without_a_slash_at_its_end_gets_a_warning() {
    assert_eq!(
        to("prefix=team,manifests_prefix=m-,blobs_prefix=b").warnings,
        [
            "prefix: \"team\" does not end in a slash, so keys will begin with \"teamb\"",
            "blobs_prefix: \"b\" does not end in a slash, so keys will begin with \
             \"teambsha256:\"",
        ]
    );
    assert_eq!(to("prefix=team/").warnings, Vec::<String>::new());
    assert_eq!(to("prefix=team-").warnings, Vec::<String>::new());
}

#[test]
fn an_endpoint_that_holds_the_buckets_name_gets_a_warning() {
    let warnings = |endpoint: &str| {
        let spec = format!("type=s3,region=a,bucket=ci-cache,endpoint_url={endpoint}");
        cache_to(&spec, &no_env).unwrap().warnings
    };
    let twice = "endpoint_url: holds the bucket's name, which will be in every address twice (write \
                 the endpoint without it)";
    assert_eq!(warnings("http://minio:9000/ci-cache"), [twice]);
    assert_eq!(warnings("http://minio:9000/s3/ci-cache/"), [twice]);
    assert_eq!(warnings("https://ci-cache.fra1.example.com"), [twice]);
    let none: [&str; 0] = [];
    assert_eq!(warnings("http://minio:9000/s3"), none);
    assert_eq!(warnings("http://ci-cache:9000"), none);
}
