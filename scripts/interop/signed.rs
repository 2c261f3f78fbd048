//! Signed requests that neither the program nor its store can make: to create a bucket and to
//! delete objects.

use std::io::{BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use aws_credential_types::Credentials;
use aws_sigv4::http_request::{
    PayloadChecksumKind, PercentEncodingMode, SignableBody, SignableRequest, SigningSettings,
    UriPathNormalizationMode, sign,
};
use aws_sigv4::sign::v4;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use md5::{Digest as _, Md5};

use crate::wire::{read_head, read_response_body};

/// Sends `body` to `target` (path and query, encoded); the response's status and body.
pub fn send(
    address: SocketAddr,
    (key, secret): (&str, &str),
    method: &str,
    target: &str,
    body: &str,
) -> Result<(u16, String)> {
    let identity = Credentials::new(key, secret, None, None, "interop").into();
    let mut settings = SigningSettings::default();
    settings.percent_encoding_mode = PercentEncodingMode::Single;
    settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
    settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
    let parameters = v4::SigningParams::builder()
        .identity(&identity)
        .region("us-east-1")
        .name("s3")
        .time(SystemTime::now())
        .settings(settings)
        .build()?
        .into();
    let host = address.to_string();
    // What S3 demands of a batch of deletions.
    let md5 = BASE64_STANDARD.encode(Md5::digest(body));
    let headers = [("host", host.as_str()), ("content-md5", md5.as_str())];
    let request = SignableRequest::new(
        method,
        format!("http://{host}{target}"),
        headers.into_iter(),
        SignableBody::Bytes(body.as_bytes()),
    )?;
    let (signature, _) = sign(request, &parameters)?.into_parts();

    let mut text = format!("{method} {target} HTTP/1.1\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    for (name, value) in signature.headers() {
        text += &format!("{name}: {value}\r\n");
    }
    text += &format!(
        "content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let mut connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(Duration::from_secs(30)))?;
    connection.write_all(text.as_bytes())?;
    let mut from = BufReader::new(connection);
    let head = read_head(&mut from, &mut std::io::sink())?.context("no response")?;
    let body = read_response_body(&head, method, &mut from, &mut std::io::sink())?;
    Ok((head.status(), String::from_utf8_lossy(&body).into_owned()))
}
