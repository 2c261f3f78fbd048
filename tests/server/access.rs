//! Who may do what, and which bucket a request means.

use std::time::{Duration, SystemTime};

use http::{HeaderValue, StatusCode};
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::host::{S3Host, VirtualHost};
use s3s::{S3Error, S3ErrorCode, S3Result, s3_error};

use super::{
    ACCESS_KEY, READER_ACCESS_KEY, READER_SECRET_KEY, SECRET_KEY, SESSION_ACCESS_KEY,
    SESSION_SECRET_KEY, SESSION_TOKEN,
};

/// The secret keys of those who may sign.
pub struct Keys;

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        match access_key {
            ACCESS_KEY => Ok(SECRET_KEY.into()),
            READER_ACCESS_KEY => Ok(READER_SECRET_KEY.into()),
            SESSION_ACCESS_KEY => Ok(SESSION_SECRET_KEY.into()),
            _ => Err(s3_error!(InvalidAccessKeyId)),
        }
    }
}

/// What is checked once the signature has been verified.
#[derive(Clone, Debug, Default)]
pub struct Access {
    pub refused: Vec<(&'static str, u16, &'static str)>,
    pub region: Option<&'static str>,
    pub clock_ahead: Duration,
}

#[async_trait::async_trait]
impl S3Access for Access {
    async fn check(&self, cx: &mut S3AccessContext<'_>) -> S3Result<()> {
        let Some(credentials) = cx.credentials() else {
            return Err(s3_error!(AccessDenied));
        };
        let operation = cx.s3_op().name();
        let header = |name: &str| cx.headers().get(name).and_then(|value| value.to_str().ok());
        match credentials.access_key.as_str() {
            READER_ACCESS_KEY
                if !["Get", "Head", "List"]
                    .iter()
                    .any(|verb| operation.starts_with(verb)) =>
            {
                return Err(s3_error!(AccessDenied));
            }
            SESSION_ACCESS_KEY if header("x-amz-security-token") != Some(SESSION_TOKEN) => {
                return Err(s3_error!(InvalidToken));
            }
            _ => {}
        }
        // AKID/20261121/us-east-1/s3/aws4_request
        let scope = header("authorization").and_then(|value| value.split_once("Credential="));
        if let (Some(region), Some((_, scope))) = (self.region, scope)
            && scope.split('/').nth(2) != Some(region)
        {
            let code = "AuthorizationHeaderMalformed";
            return Err(error(
                StatusCode::BAD_REQUEST,
                code,
                &[("x-amz-bucket-region", region)],
            ));
        }
        if let Some(sent) = header("x-amz-date").and_then(amz_date) {
            let now = SystemTime::now() + self.clock_ahead;
            let skew = now
                .duration_since(sent)
                .unwrap_or_else(|ahead| ahead.duration());
            if skew > Duration::from_secs(15 * 60) {
                return Err(s3_error!(RequestTimeTooSkewed));
            }
        }
        if let Some((_, status, code)) = self
            .refused
            .iter()
            .find(|(refused, ..)| *refused == operation)
        {
            let status = StatusCode::from_u16(*status).unwrap_or(StatusCode::FORBIDDEN);
            return Err(error(status, code, &[]));
        }
        Ok(())
    }
}

fn error(status: StatusCode, code: &str, headers: &[(&'static str, &'static str)]) -> S3Error {
    let code = S3ErrorCode::from_bytes(code.as_bytes()).unwrap_or(S3ErrorCode::InternalError);
    let mut error = S3Error::with_message(code, "The test server was built to refuse this.");
    error.set_status_code(status);
    error.set_headers(
        headers
            .iter()
            .map(|(name, value)| {
                (
                    http::HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect(),
    );
    error
}

/// `20261121T221811Z`
fn amz_date(text: &str) -> Option<SystemTime> {
    let format = time::macros::format_description!("[year][month][day]T[hour][minute][second]Z");
    Some(
        time::PrimitiveDateTime::parse(text, format)
            .ok()?
            .assume_utc()
            .into(),
    )
}

/// `BUCKET.localhost` and `BUCKET.s3.localhost` name a bucket; any other host names none. The port may
/// be that of a proxy in front of the server.
pub struct Hosts;

impl Hosts {
    pub fn bucket<'a>(&self, host: &'a str) -> Option<&'a str> {
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        let name = name.strip_suffix(".localhost")?;
        match name.strip_suffix(".s3") {
            Some(bucket) => Some(bucket),
            None => Some(name).filter(|name| *name != "s3"),
        }
    }
}

impl S3Host for Hosts {
    fn parse_host_header<'a>(&'a self, host: &'a str) -> S3Result<VirtualHost<'a>> {
        Ok(match self.bucket(host) {
            Some(bucket) => VirtualHost::new(host).with_bucket(bucket),
            None => VirtualHost::new(host),
        })
    }
}
