//! Turns one `--cache-to` or `--cache-from` value, in buildx's CSV syntax, into checked
//! configuration. Pure: the environment is asked through a function, and nothing else is touched.
//!
//! BuildKit ignores what it does not understand; a cache then quietly goes to another place than
//! intended. Here that is an error, reported before any request is sent. What buildx accepts but
//! means nothing for this program is a warning, so that a spec pasted from a working buildx
//! command line works.
//!
//! No message holds the value of a credential, or of a field that could not be understood: that
//! field may be a piece of one.

mod attributes;
mod secrecy;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use url::Url;

pub(crate) use self::attributes::attribute;
use self::attributes::{Attributes, Direction};
use self::secrecy::quoted;
pub(crate) use self::secrecy::{is_spec, may_hold_credentials};
use crate::cache::digest::Digest;
use crate::config::{ExportConfig, Mode, RetryMode, S3Config, StaticCredentials};

/// How the environment is asked for a variable.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A checked spec, and what its author should know about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed<T> {
    pub config: T,
    pub warnings: Vec<String>,
}

/// Parses the value of `--cache-to`.
///
/// # Errors
/// Whatever is wrong with the spec or with a variable it falls back to; the text names the
/// attribute or the field's position, and what is accepted.
pub fn cache_to(spec: &str, env: Env) -> Result<Parsed<ExportConfig>> {
    target(spec, env, Mode::Min)
}

/// Parses the value of a copy's `--cache-to`. There is no build whose results a smaller cache would
/// keep, so all is copied unless the spec says otherwise.
///
/// # Errors
/// As [`cache_to`].
pub fn copy_to(spec: &str, env: Env) -> Result<Parsed<ExportConfig>> {
    target(spec, env, Mode::Max)
}

fn target(spec: &str, env: Env, mode: Mode) -> Result<Parsed<ExportConfig>> {
    let mut warnings = Vec::new();
    let mut attributes = Attributes::parse(spec, Direction::To, &mut warnings)?;
    let s3 = s3_config(&mut attributes, Direction::To, env, &mut warnings)?;
    let (upload_parallelism, small_uploads) = match attributes.take("upload_parallelism") {
        Some(value) => {
            let layers = usize::try_from(count("upload_parallelism", &value)?);
            // No cache has a million layers, and more than some semaphores can count is no use.
            (layers.map_or(1 << 20, |layers| layers.min(1 << 20)), 0)
        }
        // The limit is there for bandwidth, of which small blobs need little.
        None => (4, 32),
    };
    let config = ExportConfig {
        s3,
        upload_parallelism,
        small_uploads,
        touch_refresh: match attributes.take("touch_refresh") {
            Some(value) => duration("touch_refresh", &value)?,
            None => Duration::from_secs(24 * 60 * 60),
        },
        mode: match attributes.take("mode").as_deref() {
            None => mode,
            Some("min") => Mode::Min,
            Some("max") => Mode::Max,
            Some(other) => bail!("mode: {} is not a mode (accepted: min, max)", quoted(other)),
        },
        ignore_error: boolean(&mut attributes, "ignore-error")?,
    };
    Ok(Parsed { config, warnings })
}

/// Parses the value of `--cache-from`.
///
/// # Errors
/// As [`cache_to`].
pub fn cache_from(spec: &str, env: Env) -> Result<Parsed<S3Config>> {
    let mut warnings = Vec::new();
    let mut attributes = Attributes::parse(spec, Direction::From, &mut warnings)?;
    let config = s3_config(&mut attributes, Direction::From, env, &mut warnings)?;
    Ok(Parsed { config, warnings })
}

/// The specs in an environment variable: one a line. Blank lines and lines that begin with `#` are
/// left out.
pub fn specs_from_env(value: &str) -> Vec<String> {
    value
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
        .map(str::to_owned)
        .collect()
}

fn s3_config(
    attributes: &mut Attributes,
    direction: Direction,
    env: Env,
    warnings: &mut Vec<String>,
) -> Result<S3Config> {
    let region = required(
        attributes,
        "region",
        &["AWS_REGION", "AWS_DEFAULT_REGION"],
        env,
    )?;
    check_region(&region.value).with_context(|| region.source)?;
    let bucket = required(attributes, "bucket", &["AWS_BUCKET"], env)?;
    check_bucket(&bucket.value).with_context(|| bucket.source)?;

    let mut prefix =
        |key, default: &str| attributes.take(key).unwrap_or_else(|| default.to_owned());
    let (blobs_prefix, manifests_prefix) = (
        prefix("blobs_prefix", "blobs/"),
        prefix("manifests_prefix", "manifests/"),
    );
    let prefix = prefix("prefix", "");
    let config = S3Config {
        region: region.value,
        bucket: bucket.value,
        endpoint_url: endpoint(attributes, env)?,
        use_path_style: boolean(attributes, "use_path_style")?,
        prefix,
        blobs_prefix,
        manifests_prefix,
        names: names(attributes.take("name"), direction, warnings)?,
        credentials: credentials(attributes, env)?,
        retry_mode: match attributes.take("retry_mode").as_deref() {
            None | Some("standard") => RetryMode::Standard,
            Some("adaptive") => RetryMode::Adaptive,
            Some(other) => bail!(
                "retry_mode: {} is not a retry mode (accepted: standard, adaptive)",
                quoted(other)
            ),
        },
        retry_max_attempts: match attributes.take("retry_max_attempts") {
            Some(value) => u32::try_from(count("retry_max_attempts", &value)?).unwrap_or(u32::MAX),
            None => 3,
        },
        disable_accept_encoding: boolean(attributes, "disable_accept_encoding")?,
        ca_bundle: env("AWS_CA_BUNDLE")
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
    };
    check_keys(&config, warnings)?;
    if holds_bucket(&config) {
        warnings.push(
            "endpoint_url: holds the bucket's name, which will be in every address twice (write \
             the endpoint without it)"
                .to_owned(),
        );
    }
    Ok(config)
}

/// Whether the endpoint already names the bucket, as `http://host/bucket` or `https://bucket.host`. A
/// path is put before the bucket, as the AWS SDKs do.
fn holds_bucket(config: &S3Config) -> bool {
    let Some(url) = &config.endpoint_url else {
        return false;
    };
    let bucket = &config.bucket;
    let in_path = url.path().trim_end_matches('/').rsplit('/').next() == Some(bucket);
    let host = url.host_str().unwrap_or_default();
    in_path
        || host
            .strip_prefix(bucket.as_str())
            .is_some_and(|rest| rest.starts_with('.'))
}

/// A value, and what to call it in an error: the attribute, or the variable.
struct Sourced {
    value: String,
    source: &'static str,
}

fn required(
    attributes: &mut Attributes,
    key: &'static str,
    variables: &[&'static str],
    env: Env,
) -> Result<Sourced> {
    if let Some(value) = attributes.take(key) {
        ensure!(
            !value.is_empty(),
            "{key}: the value is empty (expected {key}=...; leave the attribute out to use {})",
            variables.join(" or ")
        );
        return Ok(Sourced { value, source: key });
    }
    variables
        .iter()
        .find_map(|source| {
            let value = env(source).filter(|value| !value.is_empty())?;
            Some(Sourced { value, source })
        })
        .with_context(|| {
            format!(
                "{key}: missing (give {key}=... in the spec, or set {})",
                variables.join(" or ")
            )
        })
}

/// The region becomes part of a host name.
fn check_region(region: &str) -> Result<()> {
    let label = region.len() <= 63
        && region
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || c == b'-')
        && !region.starts_with('-')
        && !region.ends_with('-');
    ensure!(
        label,
        "{} is not a region (accepted: letters, digits and `-`, as in us-east-1 or auto)",
        quoted(region)
    );
    Ok(())
}

/// Looser than today's rules for new buckets: old ones have upper case, `_` and long names.
fn check_bucket(bucket: &str) -> Result<()> {
    ensure!(
        !bucket.starts_with("arn:"),
        "{} is an ARN, and access points are not supported (expected a bucket's name)",
        quoted(bucket)
    );
    ensure!(
        !bucket.contains('/'),
        "{} holds a `/` (expected the bucket's name alone; what follows it goes into prefix=...)",
        quoted(bucket)
    );
    let legal = bucket
        .bytes()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-'));
    ensure!(
        legal && (3..=255).contains(&bucket.len()),
        "{} is not a bucket's name (accepted: 3 to 63 letters, digits, `.` and `-`; up to 255 and \
         `_` for old buckets)",
        quoted(bucket)
    );
    Ok(())
}

/// The spec's endpoint, else the environment's, as the AWS SDKs have it.
fn endpoint(attributes: &mut Attributes, env: Env) -> Result<Option<Url>> {
    if let Some(value) = attributes.take_filled("endpoint_url") {
        return parse_endpoint(&value).context("endpoint_url").map(Some);
    }
    let ignored = env("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
        .is_some_and(|value| value.eq_ignore_ascii_case("true"));
    if ignored {
        return Ok(None);
    }
    for variable in ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"] {
        if let Some(value) = env(variable).filter(|value| !value.is_empty()) {
            return parse_endpoint(&value).context(variable).map(Some);
        }
    }
    Ok(None)
}

fn parse_endpoint(value: &str) -> Result<Url> {
    // A password before the host, or a signature after the path, is no text to repeat.
    // Where the `@` was forgotten, a second colon is left of one.
    let host = value.split_once("://").map_or(value, |(_, rest)| rest);
    let colons = authority(host).matches(':').count();
    let crowded = colons > 1 && !host.starts_with('[');
    let shown = if value.contains(['@', '?', '#']) || crowded {
        "the value".to_owned()
    } else {
        quoted(value)
    };
    const ACCEPTED: &str = "expected http://host or https://host, with a port or a path if need be";
    let Some((scheme, rest)) = value.split_once("://") else {
        bail!("{shown} has no scheme (write http:// or https:// before it)");
    };
    // The url crate mends such things in silence, as browsers do.
    ensure!(
        !value.contains(|c: char| c.is_whitespace() || c.is_control() || c == '\\')
            && !rest.starts_with('/'),
        "{shown} is not a URL ({ACCEPTED})"
    );
    ensure!(
        scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https"),
        "{shown} is neither http nor https ({ACCEPTED})"
    );
    // Its parse errors say what is wrong, never where: no part of the value is in them.
    let url = Url::parse(value).map_err(|reason| anyhow!("{shown} is not a URL: {reason}"))?;
    ensure!(url.has_host(), "{shown} names no host ({ACCEPTED})");
    ensure!(
        url.username().is_empty() && url.password().is_none() && !authority(rest).contains('@'),
        "the URL holds a user name or password (give access_key_id and secret_access_key instead)"
    );
    ensure!(
        url.query().is_none() && url.fragment().is_none(),
        "the URL has a query or a fragment ({ACCEPTED})"
    );
    Ok(url)
}

/// What stands between `://` and the path.
fn authority(rest: &str) -> &str {
    rest.split(['/', '?', '#']).next().unwrap_or_default()
}

fn names(
    value: Option<String>,
    direction: Direction,
    warnings: &mut Vec<String>,
) -> Result<Vec<String>> {
    let value = value.unwrap_or_else(|| "buildkit".to_owned());
    let mut names: Vec<String> = Vec::new();
    let mut repeated = false;
    for name in value.split(';') {
        ensure!(
            !name.is_empty(),
            "name: {} holds an empty name (expected one name, or several as a;b)",
            quoted(&value)
        );
        ensure!(
            !name.starts_with('/'),
            "name: {} begins with `/` (many servers take `//` in a key for `/`)",
            quoted(name)
        );
        if names.iter().any(|known| known == name) {
            repeated = true;
        } else {
            names.push(name.to_owned());
        }
    }
    match direction {
        Direction::To if repeated => {
            warnings.push("name: a name is given twice; it is written once".to_owned());
        }
        Direction::From if names.len() > 1 => {
            // As BuildKit does it.
            names.truncate(1);
            warnings.push(format!(
                "name: only the first name, {}, is imported; for the others repeat --cache-from",
                quoted(&names.concat())
            ));
        }
        Direction::To | Direction::From => {}
    }
    Ok(names)
}

/// Refuses what would make keys that no store, or only some stores, keep as they are.
fn check_keys(config: &S3Config, warnings: &mut Vec<String>) -> Result<()> {
    let no_control = |attribute: &str, value: &str| {
        ensure!(
            !value.contains(char::is_control),
            "{attribute}: {} holds a control character",
            quoted(value)
        );
        Ok(())
    };
    no_control("prefix", &config.prefix)?;
    no_control("blobs_prefix", &config.blobs_prefix)?;
    no_control("manifests_prefix", &config.manifests_prefix)?;
    for name in &config.names {
        no_control("name", name)?;
    }

    let manifests = format!("{}{}", config.prefix, config.manifests_prefix);
    let blobs = format!("{}{}", config.prefix, config.blobs_prefix);
    for (attribute, prefix, start) in [
        ("prefix", &config.prefix, blobs.clone()),
        (
            "blobs_prefix",
            &config.blobs_prefix,
            format!("{blobs}sha256:"),
        ),
        (
            "manifests_prefix",
            &config.manifests_prefix,
            format!("{manifests}{}", config.names[0]),
        ),
    ] {
        // `-` or `_` at the end is a separator that was chosen.
        if prefix.ends_with(char::is_alphanumeric) {
            warnings.push(format!(
                "{attribute}: {} does not end in a slash, so keys will begin with {}",
                quoted(prefix),
                quoted(&start)
            ));
        }
    }

    for name in &config.names {
        let key = config.manifest_key(name);
        let digest = key.strip_prefix(&blobs).map(str::parse::<Digest>);
        ensure!(
            !matches!(digest, Some(Ok(_))),
            "name: {} makes the manifest's key that of a blob, which it would overwrite (choose \
             another name or manifests_prefix)",
            quoted(name)
        );
    }

    // Every digest is as long as this one.
    let blob = ("blobs_prefix", config.blob_key(&Digest::of(b"")));
    let manifests = config
        .names
        .iter()
        .map(|name| ("name", config.manifest_key(name)));
    let mut folded = false;
    for (attribute, key) in std::iter::once(blob).chain(manifests) {
        ensure!(
            key.len() <= 1024,
            "{attribute}: with its prefixes it makes a key of {} bytes (accepted: up to 1024)",
            key.len()
        );
        for segment in key.split('/') {
            ensure!(
                segment != "." && segment != "..",
                "{attribute}: with its prefixes it makes the key {}, whose `{segment}` many \
                 servers resolve as a path",
                quoted(&key)
            );
        }
        folded |= key.starts_with('/') || key.contains("//");
    }
    if folded {
        warnings.push(
            "prefix: keys will begin with `/` or hold `//`, which some S3-compatible servers change"
                .to_owned(),
        );
    }
    Ok(())
}

/// The spec's credentials; `None` if it has none, which leaves it to the default chain. What it
/// leaves out of the three comes from the environment, as in buildx. There, too, both keys in the
/// spec keep the environment's token out: it goes with other keys.
fn credentials(attributes: &mut Attributes, env: Env) -> Result<Option<StaticCredentials>> {
    let mut given = |source| {
        let value = attributes.take_filled(source)?;
        Some(Sourced { value, source })
    };
    let (id, secret, token) = (
        given("access_key_id"),
        given("secret_access_key"),
        given("session_token"),
    );
    let own_keys = id.is_some() && secret.is_some();
    if id.is_none() && secret.is_none() && token.is_none() {
        return Ok(None);
    }
    let from_env = |source| {
        let value = env(source).filter(|value| !value.is_empty())?;
        Some(Sourced { value, source })
    };
    let id = id.or_else(|| from_env("AWS_ACCESS_KEY_ID"));
    let secret = secret.or_else(|| from_env("AWS_SECRET_ACCESS_KEY"));
    let token = match token {
        None if !own_keys => from_env("AWS_SESSION_TOKEN"),
        token => token,
    };
    // These two are sent in headers; the secret only goes through HMAC. A line break that came
    // along from a file is refused rather than left to fail as a wrong signature.
    for sent in [&id, &token].into_iter().flatten() {
        ensure!(
            sent.value.bytes().all(|c| c.is_ascii_graphic()),
            "{}: the value holds a space, a line break or another character that no credential has",
            sent.source
        );
    }
    if let Some(secret) = &secret {
        ensure!(
            !secret.value.contains(char::is_control),
            "{}: the value holds a line break or another control character",
            secret.source
        );
    }
    match (id, secret) {
        (Some(id), Some(secret)) => Ok(Some(StaticCredentials {
            access_key_id: id.value,
            secret_access_key: secret.value,
            session_token: token.map(|token| token.value),
        })),
        (Some(id), None) => bail!(
            "secret_access_key: missing ({} is given without it, and AWS_SECRET_ACCESS_KEY is not \
             set)",
            id.source
        ),
        (None, Some(secret)) => bail!(
            "access_key_id: missing ({} is given without it, and AWS_ACCESS_KEY_ID is not set)",
            secret.source
        ),
        (None, None) => bail!(
            "session_token: given without access_key_id and secret_access_key (and \
             AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set)"
        ),
    }
}

/// Go's ParseBool; absent is false.
fn boolean(attributes: &mut Attributes, key: &str) -> Result<bool> {
    let Some(value) = attributes.take(key) else {
        return Ok(false);
    };
    match value.as_str() {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
        other => bail!(
            "{key}: {} is not a boolean (accepted: 1, t, T, TRUE, true, True, 0, f, F, FALSE, \
             false, False)",
            quoted(other)
        ),
    }
}

fn count(key: &str, value: &str) -> Result<u64> {
    match value.parse() {
        Ok(number) if number >= 1 => Ok(number),
        _ => bail!(
            "{key}: {} is not a positive whole number (accepted: 1 and above)",
            quoted(value)
        ),
    }
}

/// Go's ParseDuration, less the negative ones.
pub(super) fn duration(key: &str, value: &str) -> Result<Duration> {
    // Go takes a zero without a unit; go-duration does not.
    if matches!(value, "0" | "+0" | "-0") {
        return Ok(Duration::ZERO);
    }
    let Ok(duration) = value.parse::<go_duration::GoDuration>() else {
        let days = value
            .strip_suffix('d')
            .and_then(|days| days.parse::<u32>().ok())
            .map(|days| u64::from(days) * 24);
        if let Some(hours) = days {
            bail!(
                "{key}: {} is not a duration (days are not a Go unit; write {hours}h)",
                quoted(value)
            );
        }
        bail!(
            "{key}: {} is not a duration (accepted: numbers with a unit of h, m, s, ms, us or ns, \
             as in 24h, 1h30m or 1.5h, up to 292 years)",
            quoted(value)
        );
    };
    let Ok(nanoseconds) = u64::try_from(duration.nanoseconds()) else {
        bail!(
            "{key}: {} is negative (accepted: 0s and above)",
            quoted(value)
        );
    };
    Ok(Duration::from_nanos(nanoseconds))
}

#[cfg(test)]
pub(crate) mod tests;
