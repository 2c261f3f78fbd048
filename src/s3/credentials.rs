//! Credentials: the spec's own, else those of AWS's default chain. They are loaded when the first request
//! is signed, cached until shortly before they expire, and never loaded twice at once.

use std::error::Error;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use aws_config::Region;
use aws_config::ecs::EcsCredentialsProvider;
use aws_config::environment::EnvironmentVariableCredentialsProvider;
use aws_config::imds::credentials::ImdsCredentialsProvider;
use aws_config::meta::credentials::CredentialsProviderChain;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::web_identity_token::WebIdentityTokenCredentialsProvider;
use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, future};
use tokio::sync::{Mutex, OnceCell};
use tokio::time::Instant;

use super::sign_in::SignIn;
use super::timing::Timing;
use super::tls::Trust;
use crate::config::StaticCredentials;
use crate::redact::Secrets;

/// Credentials are replaced this long before they expire, but not before half of their remaining time
/// has passed: some services return the same ones until shortly before they expire.
const EARLY: Duration = Duration::from_secs(120);
/// Many requests start at once: a failure of the chain is not repeated within this time.
const FAILURE_STANDS: Duration = Duration::from_secs(10);
/// Outside EC2 nothing responds at the metadata service's address.
const METADATA_TIMEOUT: Duration = Duration::from_secs(1);

/// Where credentials come from, and the ones in use.
pub(super) struct Keyring {
    provider: Provider,
    /// Is given every credential that is loaded.
    secrets: Secrets,
    cache: Mutex<Cache>,
    /// Where the ones in use came from.
    source: parking_lot::Mutex<Option<String>>,
}

enum Provider {
    Given(Credentials),
    Chain {
        region: String,
        trust: Trust,
        timing: Timing,
        chain: OnceCell<Box<dyn ProvideCredentials>>,
    },
}

#[derive(Default)]
struct Cache {
    current: Option<Credentials>,
    /// When they are replaced. `None`: never.
    replace_at: Option<SystemTime>,
    failed: Option<(Instant, String)>,
}

impl Keyring {
    pub(super) fn new(
        given: Option<&StaticCredentials>,
        region: &str,
        trust: Trust,
        timing: Timing,
        secrets: Secrets,
    ) -> Self {
        let provider = match given {
            Some(given) => Provider::Given(Credentials::new(
                given.access_key_id.as_str(),
                given.secret_access_key.as_str(),
                given
                    .session_token
                    .clone()
                    .filter(|token| !token.is_empty()),
                None,
                "spec",
            )),
            None => Provider::Chain {
                region: region.to_owned(),
                trust,
                timing,
                chain: OnceCell::new(),
            },
        };
        if let Provider::Given(given) = &provider {
            remember(&secrets, given);
        }
        let source = given.map(|_| "the spec".to_owned());
        Keyring {
            provider,
            secrets,
            cache: Mutex::default(),
            source: parking_lot::Mutex::new(source),
        }
    }

    #[cfg(test)]
    pub(super) fn with_chain(chain: impl ProvideCredentials + 'static) -> Self {
        Keyring {
            secrets: Secrets::default(),
            provider: Provider::Chain {
                region: "us-east-1".into(),
                trust: Trust::default(),
                timing: Timing::default(),
                chain: OnceCell::new_with(Some(Box::new(chain))),
            },
            cache: Mutex::default(),
            source: parking_lot::Mutex::default(),
        }
    }

    /// Where the credentials in use came from, in words. `None`: none are loaded.
    pub(super) fn source(&self) -> Option<String> {
        self.source.lock().clone()
    }

    /// The credentials to sign with now.
    pub(super) async fn get(&self) -> Result<Credentials> {
        match &self.provider {
            Provider::Given(given) => Ok(given.clone()),
            Provider::Chain { .. } => {
                let mut cache = self.cache.lock().await;
                let now = SystemTime::now();
                match &cache.current {
                    Some(current) if cache.replace_at.is_none_or(|at| now < at) => {
                        Ok(current.clone())
                    }
                    Some(current) if fresh_at(current, now) => {
                        // The old ones still work, so a failure to renew early does not matter.
                        let current = current.clone();
                        Ok(self.load(&mut cache).await.unwrap_or(current))
                    }
                    _ => self.load(&mut cache).await,
                }
            }
        }
    }

    /// Replaces `stale`, which the store says have expired. True if there are others now.
    pub(super) async fn renew(&self, stale: &Credentials) -> Result<bool> {
        if let Provider::Given(_) = self.provider {
            return Ok(false);
        }
        let mut cache = self.cache.lock().await;
        if cache.current.as_ref().is_some_and(|now| now != stale) {
            return Ok(true);
        }
        let renewed = self.load(&mut cache).await?;
        Ok(renewed != *stale)
    }

    async fn load(&self, cache: &mut Cache) -> Result<Credentials> {
        let Provider::Chain {
            region,
            trust,
            timing,
            chain,
        } = &self.provider
        else {
            return Err(anyhow!("no credentials"));
        };
        if let Some((at, why)) = &cache.failed
            && at.elapsed() < FAILURE_STANDS
        {
            return Err(anyhow!("{why}"));
        }
        let loaded = async {
            let chain = chain
                .get_or_try_init(|| build(region, trust, timing))
                .await?;
            chain.provide_credentials().await.map_err(|e| {
                let env = |name: &str| std::env::var(name).ok();
                remember_tokens(&self.secrets, &env);
                anyhow!("{}", explain(&e, &env, &self.secrets))
            })
        };
        match loaded.await {
            Ok(credentials) => {
                remember(&self.secrets, &credentials);
                let source = credentials.get_property::<Source>();
                *self.source.lock() = source.map(|Source(source)| source.clone());
                cache.failed = None;
                cache.replace_at = credentials
                    .expiry()
                    .map(|end| replace_at(SystemTime::now(), end));
                cache.current = Some(credentials.clone());
                Ok(credentials)
            }
            Err(e) => {
                cache.failed = Some((Instant::now(), format!("{e:#}")));
                Err(e)
            }
        }
    }
}

fn remember(secrets: &Secrets, credentials: &Credentials) {
    secrets.add(credentials.secret_access_key());
    secrets.add(credentials.access_key_id());
    if let Some(token) = credentials.session_token() {
        secrets.add(token);
    }
}

/// Adds what the chain may have sent to a service, which could echo it in an error.
fn remember_tokens(secrets: &Secrets, env: &dyn Fn(&str) -> Option<String>) {
    for name in [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    ] {
        secrets.add(env(name).unwrap_or_default().trim());
    }
    for name in [
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    ] {
        let file = env(name).filter(|file| !file.is_empty());
        let token = file.and_then(|file| std::fs::read_to_string(file).ok());
        secrets.add(token.unwrap_or_default().trim());
    }
}

fn fresh_at(credentials: &Credentials, time: SystemTime) -> bool {
    credentials.expiry().is_none_or(|expiry| expiry > time)
}

/// When to replace credentials that were loaded at `now` and expire at `end`.
fn replace_at(now: SystemTime, end: SystemTime) -> SystemTime {
    let left = end.duration_since(now).unwrap_or_default();
    now + left.saturating_sub(EARLY).max(left / 2)
}

async fn build(
    region: &str,
    trust: &Trust,
    timing: &Timing,
) -> Result<Box<dyn ProvideCredentials>> {
    // The first link of the chain. If it has credentials, skip the others: loading the system's
    // certificates and the shared files takes longer than a request.
    let environment = Sourced::new(
        "the environment (AWS_ACCESS_KEY_ID)",
        EnvironmentVariableCredentialsProvider::new(),
    );
    if environment.provide_credentials().await.is_ok() {
        return Ok(Box::new(environment));
    }
    let http = SignIn::new(trust, timing).context("cannot look for credentials")?;
    let config = ProviderConfig::default()
        .with_http_client(http)
        .with_region(Some(Region::new(region.to_owned())));
    let metadata = aws_config::imds::Client::builder()
        .configure(&config)
        .connect_timeout(METADATA_TIMEOUT)
        .read_timeout(METADATA_TIMEOUT)
        .max_attempts(2)
        .build();
    // The default chain, link by link, so that the error can name the one that failed.
    let profile = ProfileFileCredentialsProvider::builder()
        .configure(&config)
        .build();
    let web_identity = WebIdentityTokenCredentialsProvider::builder()
        .configure(&config)
        .build();
    let container = EcsCredentialsProvider::builder().configure(&config).build();
    let instance = ImdsCredentialsProvider::builder()
        .configure(&config)
        .imds_client(metadata)
        .build();
    let name = std::env::var("AWS_PROFILE").unwrap_or_default();
    let name = if name.is_empty() { "default" } else { &name };
    let chain = CredentialsProviderChain::first_try("Environment", environment)
        .or_else(
            "Profile",
            Sourced::new(
                &format!("profile {name:?}"),
                Link::new(Origin::Profile, profile),
            ),
        )
        .or_else(
            "WebIdentityToken",
            Sourced::new(
                "web identity (AWS_WEB_IDENTITY_TOKEN_FILE)",
                Link::new(Origin::WebIdentity, web_identity),
            ),
        )
        .or_else(
            "EcsContainer",
            Sourced::new(
                "the container endpoint",
                Link::new(Origin::Container, container),
            ),
        )
        // Not a `Link`: if this one fails, all have been tried, and the user may not have meant it.
        .or_else(
            "Ec2InstanceMetadata",
            Sourced::new("EC2 instance metadata", instance),
        );
    Ok(Box::new(chain))
}

/// Where credentials came from, in words: they carry it as a property.
#[derive(Debug, Clone)]
struct Source(String);

/// A link of the chain whose credentials say where they came from.
#[derive(Debug)]
struct Sourced<P> {
    source: Source,
    provider: P,
}

impl<P> Sourced<P> {
    fn new(source: &str, provider: P) -> Self {
        let source = Source(source.to_owned());
        Sourced { source, provider }
    }
}

impl<P: ProvideCredentials> ProvideCredentials for Sourced<P> {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async {
            let mut credentials = self.provider.provide_credentials().await?;
            credentials.set_property(self.source.clone());
            Ok(credentials)
        })
    }
}

/// Where a link of the chain gets credentials.
#[derive(Debug, Clone, Copy)]
enum Origin {
    Profile,
    WebIdentity,
    Container,
}

/// A link of the chain whose error names it. The chain skips a link that is not configured, and ends
/// at one that fails.
#[derive(Debug)]
struct Link<P> {
    origin: Origin,
    provider: P,
}

impl<P> Link<P> {
    fn new(origin: Origin, provider: P) -> Self {
        Link { origin, provider }
    }
}

impl<P: ProvideCredentials> ProvideCredentials for Link<P> {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async {
            match self.provider.provide_credentials().await {
                Err(why) if !matches!(why, CredentialsError::CredentialsNotLoaded(_)) => {
                    let origin = self.origin;
                    Err(CredentialsError::provider_error(Broken { origin, why }))
                }
                other => other,
            }
        })
    }
}

/// A link of the chain that failed.
#[derive(Debug)]
struct Broken {
    origin: Origin,
    why: CredentialsError,
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.why.fmt(f)
    }
}

impl Error for Broken {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.why.source()
    }
}

impl Broken {
    /// Names the link by its configuration, and says what to check. The container URI is left out: an
    /// ECS task's URI is as good as a key.
    fn explain(
        &self,
        env: &dyn Fn(&str) -> Option<String>,
        reasons: &str,
        secrets: &Secrets,
    ) -> String {
        let set = |name: &str| env(name).filter(|value| !value.is_empty());
        let (from, remedy) = match self.origin {
            Origin::Profile => {
                let profile = set("AWS_PROFILE").unwrap_or_else(|| "default".into());
                // The errors of the cached token and of the SSO portal.
                let ended = [
                    "SSO token",
                    "/sso/cache/",
                    "UnauthorizedException",
                    "Session token not found",
                ];
                if ended.iter().any(|words| reasons.contains(words)) {
                    let reasons = secrets.outside(reasons);
                    return format!(
                        "the SSO session of profile {profile:?} has expired or is not there: run `aws \
                         sso login --profile {profile}` ({reasons})"
                    );
                }
                let files: Vec<_> = [
                    ("AWS_CONFIG_FILE", "~/.aws/config"),
                    ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
                ]
                .into_iter()
                .map(|(name, usual)| set(name).unwrap_or_else(|| usual.into()))
                .collect();
                (
                    format!("profile {profile:?} of {}", files.join(" and ")),
                    "correct it, or set another AWS_PROFILE",
                )
            }
            Origin::WebIdentity => {
                let value = |name: &str| set(name).unwrap_or_else(|| "none".into());
                (
                    format!(
                        "web identity (AWS_WEB_IDENTITY_TOKEN_FILE {}, AWS_ROLE_ARN {})",
                        value("AWS_WEB_IDENTITY_TOKEN_FILE"),
                        value("AWS_ROLE_ARN")
                    ),
                    "correct these two, or whom the role trusts",
                )
            }
            Origin::Container => {
                let name = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE";
                let token = set(name).map(|file| format!(" ({name} {file})"));
                (
                    format!("the container endpoint{}", token.unwrap_or_default()),
                    "correct the AWS_CONTAINER_ variables, or see what the endpoint logs",
                )
            }
        };
        let reasons = secrets.outside(reasons);
        format!("credentials from {from} failed ({reasons}); {remedy}")
    }
}

/// Why the chain gave no credentials, and what to do.
fn explain(
    error: &(dyn Error + 'static),
    env: &dyn Fn(&str) -> Option<String>,
    secrets: &Secrets,
) -> String {
    let mut reasons: Vec<String> = Vec::new();
    let mut broken = None;
    let mut next = Some(error);
    while let Some(error) = next {
        broken = broken.or(error.downcast_ref::<Broken>());
        // The chain lists its links on lines of their own, which `one_line` takes apart.
        let lines: Vec<_> = error
            .to_string()
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        let mut reason = lines.join("\n");
        // What a credential_process printed before it failed may be the credentials themselves.
        if let Some(at) = reason.find("Stderr:").or_else(|| reason.find("Stdout:")) {
            reason.truncate(at);
            reason.push_str("what it printed is not shown, run it by hand");
        }
        if !reasons.iter().any(|earlier| earlier.contains(&reason)) {
            reasons.push(reason);
        }
        next = error.source();
    }
    let reasons = one_line(&reasons.join(": "));
    if let Some(broken) = broken {
        return broken.explain(env, &reasons, secrets);
    }
    let set = |name: &str| env(name).filter(|value| !value.is_empty());
    let pair = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];
    let remedy = match pair.map(|name| set(name).is_some()) {
        [true, false] => "AWS_SECRET_ACCESS_KEY is not set, and AWS_ACCESS_KEY_ID is".to_owned(),
        [false, true] => "AWS_ACCESS_KEY_ID is not set, and AWS_SECRET_ACCESS_KEY is".to_owned(),
        _ => match set("AWS_PROFILE") {
            Some(name) => format!(
                "there is nothing in profile {:?}; set another AWS_PROFILE, or AWS_ACCESS_KEY_ID and \
                 AWS_SECRET_ACCESS_KEY, or give the job a role",
                secrets.outside(&name)
            ),
            None => {
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the job \
                     a role"
                    .to_owned()
            }
        },
    };
    // Only the last link's own error says what happened to it.
    let metadata = match reasons.rsplit_once("Ec2InstanceMetadata: ") {
        Some((_, why)) => format!(": {}", secrets.outside(why)),
        None => String::new(),
    };
    format!(
        "no AWS credentials: {remedy} (tried: environment, profile, web identity, container endpoint, \
         EC2 metadata service{metadata})"
    )
}

/// Shortens the chain's list of attempts, one a line, to one line.
fn one_line(reasons: &str) -> String {
    let reasons = match reasons.split_once("Attempted:\n") {
        Some((_, attempts)) => attempts,
        None => reasons,
    };
    let mut line = String::new();
    for part in reasons
        .lines()
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        if !line.is_empty() {
            line.push_str("; ");
        }
        line.push_str(
            &part
                .replace("the credential provider was not enabled: ", "")
                .replace("the credential provider was not enabled", "nothing set")
                .replace("an error occurred while loading credentials: ", ""),
        );
    }
    line
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Gives the n-th credentials a life of `life`, or fails.
    #[derive(Debug, Clone)]
    struct Chain {
        asked: Arc<AtomicU32>,
        life: Duration,
        works: bool,
    }

    impl ProvideCredentials for Chain {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            future::ProvideCredentials::new(async move {
                let asked = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
                tokio::task::yield_now().await;
                if !self.works {
                    return Err(CredentialsError::not_loaded("nothing there"));
                }
                let expiry = Some(SystemTime::now() + self.life);
                Ok(Credentials::new(
                    format!("key{asked}"),
                    "secret",
                    None,
                    expiry,
                    "test",
                ))
            })
        }
    }

    fn keyring(life: Duration, works: bool) -> (Keyring, Arc<AtomicU32>) {
        let asked = Arc::new(AtomicU32::new(0));
        let chain = Chain {
            asked: asked.clone(),
            life,
            works,
        };
        (Keyring::with_chain(chain), asked)
    }

    #[tokio::test]
    async fn many_requests_at_once_load_credentials_once() {
        let (keyring, asked) = keyring(Duration::from_secs(3600), true);
        futures::future::join_all((0..50).map(|_| keyring.get())).await;
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn credentials_that_have_ended_are_replaced() {
        let (keyring, _) = keyring(Duration::ZERO, true);
        assert_eq!(keyring.get().await.unwrap().access_key_id(), "key1");
        assert_eq!(keyring.get().await.unwrap().access_key_id(), "key2");
    }

    #[test]
    fn credentials_are_replaced_two_minutes_early_or_after_half_of_what_they_have_left() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (left, after) in [(3600, 3480), (240, 120), (100, 50), (2, 1), (0, 0)] {
            assert_eq!(
                replace_at(now, now + Duration::from_secs(left)),
                now + Duration::from_secs(after)
            );
        }
        assert_eq!(replace_at(now, now - Duration::from_secs(9)), now);
    }

    #[tokio::test]
    async fn expired_credentials_are_renewed_once_for_all_who_used_them() {
        let (keyring, asked) = keyring(Duration::from_secs(3600), true);
        let stale = keyring.get().await.unwrap();
        assert!(keyring.renew(&stale).await.unwrap());
        assert!(keyring.renew(&stale).await.unwrap());
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        assert_eq!(keyring.get().await.unwrap().access_key_id(), "key2");
    }

    #[tokio::test]
    async fn credentials_from_the_spec_cannot_be_renewed() {
        let given = StaticCredentials {
            access_key_id: "key".into(),
            secret_access_key: "secret".into(),
            session_token: Some(String::new()),
        };
        let keyring = Keyring::new(
            Some(&given),
            "us-east-1",
            Trust::default(),
            Timing::default(),
            Secrets::default(),
        );
        let credentials = keyring.get().await.unwrap();
        assert_eq!(credentials.session_token(), None);
        assert!(!keyring.renew(&credentials).await.unwrap());
    }

    #[tokio::test]
    async fn a_failure_says_what_was_tried_and_stands_for_a_while() {
        let (keyring, asked) = keyring(Duration::ZERO, false);
        let first = format!("{:#}", keyring.get().await.unwrap_err());
        let second = format!("{:#}", keyring.get().await.unwrap_err());
        assert_eq!(first, second);
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        assert!(first.starts_with("no AWS credentials: "), "{first}");
    }

    #[test]
    fn what_the_chain_says_fits_a_line() {
        let said = "the credential provider was not enabled: no credentials found in chain. Attempted:\n  \
                    Environment: the credential provider was not enabled: environment variable not set\n  \
                    Profile: the credential provider was not enabled";
        assert_eq!(
            one_line(said),
            "Environment: environment variable not set; Profile: nothing set"
        );
        let failed = "an error occurred while loading credentials: service error: AccessDenied";
        assert_eq!(one_line(failed), "service error: AccessDenied");
    }

    #[test]
    fn without_credentials_the_error_says_what_to_set_in_a_line() {
        let failure = CredentialsError::not_loaded(
            "no credentials found in chain. Attempted:\n  Environment: x\n  Ec2InstanceMetadata: no answer",
        );
        let says = |set: &[(&str, &str)]| {
            let env = |name: &str| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            explain(&failure, &env, &Secrets::default())
        };
        let tried = "(tried: environment, profile, web identity, container endpoint, EC2 metadata \
                     service: no answer)";
        assert_eq!(
            says(&[]),
            format!(
                "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, \
                 or give the job a role {tried}"
            )
        );
        assert_eq!(
            says(&[("AWS_ACCESS_KEY_ID", "AKID"), ("AWS_PROFILE", "ci")]),
            format!(
                "no AWS credentials: AWS_SECRET_ACCESS_KEY is not set, and AWS_ACCESS_KEY_ID is {tried}"
            )
        );
        assert_eq!(
            says(&[("AWS_PROFILE", "ci")]),
            format!(
                "no AWS credentials: there is nothing in profile \"ci\"; set another AWS_PROFILE, or \
                 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the job a role {tried}"
            )
        );
    }
}
