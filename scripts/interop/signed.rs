//! The one request that neither the program nor its store can make: the one that creates a bucket.

use std::io::{BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use aws_credential_types::Credentials;
use aws_sigv4::http_request::{
    PayloadChecksumKind, SignableBody, SignableRequest, SigningSettings, sign,
};
use aws_sigv4::sign::v4;

use crate::wire::{read_head, read_response_body};

/// Sends a PUT without a body to `path`; the response's status and body.
pub fn put(address: SocketAddr, (key, secret): (&str, &str), path: &str) -> Result<(u16, String)> {
    let identity = Credentials::new(key, secret, None, None, "interop").into();
    let mut settings = SigningSettings::default();
    settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
    let parameters = v4::SigningParams::builder()
        .identity(&identity)
        .region("us-east-1")
        .name("s3")
        .time(SystemTime::now())
        .settings(settings)
        .build()?
        .into();
    let host = address.to_string();
    let request = SignableRequest::new(
        "PUT",
        format!("http://{host}{path}"),
        [("host", host.as_str())].into_iter(),
        SignableBody::Bytes(b""),
    )?;
    let (signature, _) = sign(request, &parameters)?.into_parts();

    let mut text = format!("PUT {path} HTTP/1.1\r\nhost: {host}\r\n");
    for (name, value) in signature.headers() {
        text += &format!("{name}: {value}\r\n");
    }
    text += "content-length: 0\r\nconnection: close\r\n\r\n";
    let mut connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(Duration::from_secs(30)))?;
    connection.write_all(text.as_bytes())?;
    let mut from = BufReader::new(connection);
    let head = read_head(&mut from, &mut std::io::sink())?.context("no response")?;
    let body = read_response_body(&head, "PUT", &mut from, &mut std::io::sink())?;
    Ok((head.status(), String::from_utf8_lossy(&body).into_owned()))
}
