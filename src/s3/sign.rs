//! SigV4, over as few headers as it allows: proxies rewrite others after signing (Google Cloud
//! Storage rewrites Accept-Encoding, buildkit#3749).

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use aws_credential_types::Credentials;
use aws_sigv4::http_request::{
    PayloadChecksumKind, PercentEncodingMode, SignableBody, SignableRequest, SigningSettings,
    UriPathNormalizationMode,
};
use aws_sigv4::sign::v4;
use http::{HeaderMap, HeaderName, HeaderValue};

/// 10000-01-01T00:00:00Z, since 1970.
const YEAR_10000: Duration = Duration::from_secs(253_402_300_800);

/// The payload's part of a signature.
pub(super) enum Payload<'a> {
    /// In memory, or empty: hashed here.
    Bytes(&'a [u8]),
    /// 64 hex digits, known beforehand.
    Sha256(String),
    Unsigned,
}

/// Whether SigV4 demands that this header be signed.
fn is_signed(name: &HeaderName) -> bool {
    name == http::header::HOST
        || name == http::header::CONTENT_TYPE
        || name.as_str().starts_with("x-amz-")
}

/// Adds the headers of a signature to `headers`, which hold Host already. Returns the signature.
pub(super) fn sign(
    credentials: &Credentials,
    region: &str,
    now: SystemTime,
    method: &str,
    uri: &str,
    headers: &mut HeaderMap,
    payload: Payload<'_>,
) -> Result<String> {
    // aws-sigv4 would panic: SigV4's dates have four digits for the year.
    ensure!(
        now < SystemTime::UNIX_EPOCH + YEAR_10000,
        "the clock of this machine is past the year 9999: set it"
    );
    let mut settings = SigningSettings::default();
    // The path is encoded already, and a key may hold what a URI would normalise away.
    settings.percent_encoding_mode = PercentEncodingMode::Single;
    settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
    settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
    let identity = credentials.clone().into();
    let params = v4::SigningParams::builder()
        .identity(&identity)
        .region(region)
        .name("s3")
        .time(now)
        .settings(settings)
        .build()
        .context("cannot sign")?
        .into();
    let payload = match payload {
        Payload::Bytes(bytes) => SignableBody::Bytes(bytes),
        Payload::Sha256(hex) => SignableBody::Precomputed(hex),
        Payload::Unsigned => SignableBody::UnsignedPayload,
    };
    let signed: Vec<(&str, &str)> = headers
        .iter()
        .filter(|(name, _)| is_signed(name))
        .map(|(name, value)| Ok((name.as_str(), value.to_str()?)))
        .collect::<Result<_, http::header::ToStrError>>()
        .context("a header to sign is not ASCII")?;
    let request = SignableRequest::new(method, uri, signed.into_iter(), payload)
        .context("cannot sign the request")?;
    let (instructions, signature) = aws_sigv4::http_request::sign(request, &params)
        .context("cannot sign the request")?
        .into_parts();
    for header in instructions.into_parts().0 {
        let mut value = HeaderValue::from_str(header.value())
            .context("the credentials cannot stand in a header")?;
        value.set_sensitive(true);
        headers.insert(HeaderName::from_static(header.name()), value);
    }
    Ok(signature)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(uri: &str, extra: &[(&'static str, &'static str)]) -> HeaderMap {
        let credentials = Credentials::new(
            "AKIAIOSFODNN7EXAMPLE",
            "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            None,
            None,
            "test",
        );
        let mut headers = HeaderMap::new();
        headers.insert("host", "examplebucket.s3.amazonaws.com".parse().unwrap());
        for (name, value) in extra {
            headers.insert(*name, value.parse().unwrap());
        }
        // 2013-05-24T00:00:00Z
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_369_353_600);
        let payload = Payload::Bytes(b"");
        sign(
            &credentials,
            "us-east-1",
            now,
            "GET",
            uri,
            &mut headers,
            payload,
        )
        .unwrap();
        headers
    }

    #[test]
    fn a_clock_past_the_year_9999_is_an_error_that_names_the_clock() {
        let credentials = Credentials::new("id", "secret", None, None, "test");
        let (uri, payload) = ("http://h/", Payload::Unsigned);
        let now = SystemTime::UNIX_EPOCH + YEAR_10000;
        let headers = &mut HeaderMap::from_iter([(http::header::HOST, "h".parse().unwrap())]);
        let error = sign(&credentials, "r", now, "GET", uri, headers, payload).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the clock of this machine is past the year 9999: set it"
        );
        let (now, payload) = (now - Duration::from_secs(1), Payload::Unsigned);
        sign(&credentials, "r", now, "GET", uri, headers, payload).unwrap();
    }

    // The two examples of AWS's page on the authorization header that sign nothing but the host
    // and x-amz-*.
    #[test]
    fn the_signatures_are_those_of_aws_s_examples() {
        for (uri, signature) in [
            (
                "https://examplebucket.s3.amazonaws.com/?lifecycle=",
                "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
            ),
            (
                "https://examplebucket.s3.amazonaws.com/?max-keys=2&prefix=J",
                "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
            ),
        ] {
            let headers = example(uri, &[]);
            let authorization = headers["authorization"].to_str().unwrap();
            assert!(authorization.ends_with(signature), "{authorization}");
            assert!(headers["authorization"].is_sensitive());
        }
    }

    #[test]
    fn headers_that_proxies_touch_are_not_signed() {
        let uri = "https://examplebucket.s3.amazonaws.com/?lifecycle=";
        let plain = example(uri, &[]);
        let more = example(
            uri,
            &[
                ("accept-encoding", "identity"),
                ("range", "bytes=0-1"),
                ("if-match", "\"x\""),
                ("content-length", "0"),
                ("user-agent", "x"),
            ],
        );
        assert_eq!(plain["authorization"], more["authorization"]);
    }
}
