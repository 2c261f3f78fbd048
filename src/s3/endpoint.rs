//! Where a bucket is reached: host, addressing style, and the one percent-encoding that paths,
//! signatures and `x-amz-copy-source` all share.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::config::S3Config;

/// What SigV4 does not encode in a query: the unreserved characters of RFC 3986.
const QUERY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// The same in a path, where slashes separate.
const PATH: &AsciiSet = &QUERY.remove(b'/');

/// A key as it stands in a path, in the signature, and in `x-amz-copy-source`.
pub(super) fn encode_key(key: &str) -> String {
    utf8_percent_encode(key, PATH).to_string()
}

/// A name or value of a query.
pub(super) fn encode_query(text: &str) -> String {
    utf8_percent_encode(text, QUERY).to_string()
}

/// Where one bucket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    https: bool,
    /// Host and port: the value of the Host header.
    authority: String,
    /// Virtual-hosted style at an endpoint_url, which not every store supports.
    prefixed: bool,
    /// Path before the key, without a trailing slash: the endpoint's own, and in path style the bucket.
    base: String,
    path_style: bool,
    loopback: bool,
    aws: bool,
}

impl Endpoint {
    pub(super) fn new(config: &S3Config) -> Result<Self> {
        let bucket = config.bucket.as_str();
        let (https, host, port, prefix) = match &config.endpoint_url {
            Some(url) => {
                let https = match url.scheme() {
                    "https" => true,
                    "http" => false,
                    other => bail!("endpoint_url has scheme {other:?} (expected http or https)"),
                };
                let host = url.host_str().context("endpoint_url names no host")?;
                let prefix = url.path().trim_end_matches('/').to_owned();
                (https, host.to_owned(), url.port(), prefix)
            }
            None => {
                let host = aws_host(&config.region)?;
                (true, host, None, String::new())
            }
        };
        let path_style =
            config.use_path_style || address(&host).is_some() || !fits_host_name(bucket, https);
        let name = match port {
            Some(port) => format!("{host}:{port}"),
            None => host.clone(),
        };
        let (authority, base) = if path_style {
            (name, format!("{prefix}/{}", encode_query(bucket)))
        } else {
            (format!("{bucket}.{name}"), prefix)
        };
        Ok(Endpoint {
            https,
            loopback: is_loopback(&host),
            aws: config.endpoint_url.is_none(),
            authority,
            path_style,
            prefixed: !path_style && config.endpoint_url.is_some(),
            base,
        })
    }

    pub(super) fn is_https(&self) -> bool {
        self.https
    }

    /// Whether requests stay on this machine.
    pub(super) fn is_loopback(&self) -> bool {
        self.loopback
    }

    /// Host and port, as in the Host header and in messages.
    pub(super) fn authority(&self) -> &str {
        &self.authority
    }

    /// The store's name in messages: S3, or the endpoint's URL if it is not AWS.
    pub(super) fn name(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        match self.aws {
            true => "S3".to_owned(),
            false => format!("{scheme}://{}", self.authority),
        }
    }

    /// Whether use_path_style would lead to another host.
    pub(super) fn is_prefixed(&self) -> bool {
        self.prefixed
    }

    /// Whether the bucket is in the path, not in the host name.
    pub(super) fn is_path_style(&self) -> bool {
        self.path_style
    }

    /// The URI of an object, or of the bucket; `query` is encoded already.
    pub(super) fn uri(&self, key: Option<&str>, query: &str) -> String {
        let scheme = if self.https { "https" } else { "http" };
        let mut uri = format!("{scheme}://{}{}", self.authority, self.base);
        if let Some(key) = key {
            uri.push('/');
            uri.push_str(&encode_key(key));
        } else if self.base.is_empty() {
            uri.push('/');
        }
        if !query.is_empty() {
            uri.push('?');
            uri.push_str(query);
        }
        uri
    }
}

/// Whether a URL's host is this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    let is_loopback = |ip: IpAddr| ip.to_canonical().is_loopback();
    address(host).map_or_else(|| is_localhost(host), is_loopback)
}

/// The IP address that a URL has for its host.
fn address(host: &str) -> Option<IpAddr> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.parse().ok()
}

/// `localhost` and its subdomains are this machine (RFC 6761), whatever DNS says.
pub(super) fn is_localhost(host: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    host == "localhost" || host.ends_with(".localhost")
}

/// AWS's own endpoint of a region.
fn aws_host(region: &str) -> Result<String> {
    let sane = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if region.is_empty() || region.len() > 63 || !region.chars().all(sane) {
        bail!("{region:?} cannot be a region: set endpoint_url, or correct the region");
    }
    // The partitions of AWS; GovCloud shares the usual domain.
    let domain = [
        ("cn-", "amazonaws.com.cn"),
        ("us-isob-", "sc2s.sgov.gov"),
        ("us-isof-", "csp.hci.ic.gov"),
        ("us-iso-", "c2s.ic.gov"),
        ("eu-isoe-", "cloud.adc-e.uk"),
        ("eusc-", "amazonaws.eu"),
    ]
    .into_iter()
    .find(|(start, _)| region.starts_with(start))
    .map_or("amazonaws.com", |(_, domain)| domain);
    Ok(format!("s3.{region}.{domain}"))
}

/// Whether `bucket` can be part of the host name. Dots cannot under https: the wildcard certificate
/// covers one label.
fn fits_host_name(bucket: &str, https: bool) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
    };
    bucket.len() <= 63 && bucket.split('.').all(label) && !(https && bucket.contains('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::tests::config;

    fn uri(endpoint: Option<&str>, region: &str, bucket: &str, path_style: bool) -> String {
        let mut config = config("http://unused");
        config.endpoint_url = endpoint.map(|url| url.parse().unwrap());
        config.region = region.into();
        config.bucket = bucket.into();
        config.use_path_style = path_style;
        Endpoint::new(&config).unwrap().uri(Some("a/b"), "")
    }

    #[test]
    fn aws_regions_lie_in_their_partition_s_domain() {
        for (region, host) in [
            ("us-east-1", "s3.us-east-1.amazonaws.com"),
            ("us-gov-west-1", "s3.us-gov-west-1.amazonaws.com"),
            ("cn-north-1", "s3.cn-north-1.amazonaws.com.cn"),
            ("us-iso-east-1", "s3.us-iso-east-1.c2s.ic.gov"),
            ("us-isob-east-1", "s3.us-isob-east-1.sc2s.sgov.gov"),
            ("us-isof-south-1", "s3.us-isof-south-1.csp.hci.ic.gov"),
            ("eu-isoe-west-1", "s3.eu-isoe-west-1.cloud.adc-e.uk"),
            ("eusc-de-east-1", "s3.eusc-de-east-1.amazonaws.eu"),
        ] {
            assert_eq!(
                uri(None, region, "cache", false),
                format!("https://cache.{host}/a/b")
            );
        }
    }

    #[test]
    fn a_region_that_would_name_another_host_is_refused() {
        let mut config = config("http://unused");
        config.endpoint_url = None;
        for region in ["evil.example/", "a b", "", "x@evil"] {
            config.region = region.into();
            assert!(Endpoint::new(&config).is_err(), "{region:?} was accepted");
        }
    }

    #[test]
    fn the_bucket_goes_into_the_path_where_it_cannot_be_a_host_name() {
        let aws = "https://s3.eu-west-1.amazonaws.com";
        for (bucket, expected) in [
            ("with.dots", format!("{aws}/with.dots/a/b")),
            ("Upper", format!("{aws}/Upper/a/b")),
            ("under_score", format!("{aws}/under_score/a/b")),
            ("-dash", format!("{aws}/-dash/a/b")),
            ("../x?", format!("{aws}/..%2Fx%3F/a/b")),
        ] {
            assert_eq!(uri(None, "eu-west-1", bucket, false), expected);
        }
        assert_eq!(
            uri(None, "eu-west-1", "cache", true),
            format!("{aws}/cache/a/b")
        );
    }

    #[test]
    fn an_endpoint_keeps_its_port_and_path_and_loses_its_trailing_slashes() {
        for (endpoint, path_style, expected) in [
            ("http://minio:9000", true, "http://minio:9000/cache/a/b"),
            ("http://minio:9000/", false, "http://cache.minio:9000/a/b"),
            ("http://gw/s3//", true, "http://gw/s3/cache/a/b"),
            ("http://gw/s3", false, "http://cache.gw/s3/a/b"),
            ("https://gw:443", false, "https://cache.gw/a/b"),
            (
                "http://127.0.0.1:9000",
                false,
                "http://127.0.0.1:9000/cache/a/b",
            ),
            ("http://[::1]:9000", false, "http://[::1]:9000/cache/a/b"),
            (
                "http://localhost:9000",
                false,
                "http://cache.localhost:9000/a/b",
            ),
        ] {
            assert_eq!(
                uri(Some(endpoint), "r", "cache", path_style),
                expected,
                "{endpoint}"
            );
        }
        // Over plain http there is no certificate for dots to break.
        assert_eq!(
            uri(Some("http://gw"), "r", "a.b", false),
            "http://a.b.gw/a/b"
        );
    }

    #[test]
    fn a_bucket_s_own_uri_carries_its_query() {
        let mut config = config("http://gw:1");
        let styled = |config: &S3Config| Endpoint::new(config).unwrap().uri(None, "list-type=2");
        config.use_path_style = true;
        assert_eq!(styled(&config), "http://gw:1/cache?list-type=2");
        config.use_path_style = false;
        assert_eq!(styled(&config), "http://cache.gw:1/?list-type=2");
    }

    #[test]
    fn keys_are_encoded_as_sigv4_wants_them() {
        assert_eq!(
            encode_key("blobs/sha256:ab+c d~_-.é?%"),
            "blobs/sha256%3Aab%2Bc%20d~_-.%C3%A9%3F%25"
        );
        assert_eq!(encode_query("a/b c"), "a%2Fb%20c");
    }

    #[test]
    fn loopback_is_known_by_address_and_by_name() {
        for (endpoint, loopback) in [
            ("http://127.0.0.1:1", true),
            ("http://[::1]", true),
            ("http://[::ffff:127.0.0.1]", true),
            ("http://localhost", true),
            ("http://S3.LOCALHOST", true),
            ("http://localhost.example", false),
            ("http://10.0.0.1", false),
        ] {
            let endpoint_of = Endpoint::new(&config(endpoint)).unwrap();
            assert_eq!(endpoint_of.is_loopback(), loopback, "{endpoint}");
        }
    }
}
