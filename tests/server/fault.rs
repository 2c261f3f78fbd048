//! What can go wrong on the wire, and the raw bytes that make it so.
//!
//! Most faults are ordinary answers of hyper. Those that break HTTP itself (a wrong length, a reset in
//! the middle) take the connection away from hyper and write to it directly.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use tokio::io::AsyncWriteExt as _;

use super::connection::Connection;

/// What the server does wrong with one request.
///
/// Unless said otherwise the request is read whole and *not* performed.
#[derive(Clone, Debug)]
pub enum Fault {
    /// An error with a proper XML body: status, code.
    Status(u16, &'static str),
    /// An error whose body is empty, as a proxy in between might give.
    StatusEmpty(u16),
    /// Status 200 with an `<Error>` of this code in the body.
    ErrorIn200(&'static str),
    /// 503 SlowDown, with `Retry-After` in seconds if given.
    Throttle { retry_after: Option<u64> },
    /// 301 PermanentRedirect that names the bucket's region and no location.
    Redirect { region: &'static str },
    /// A 200 whose XML ends in the middle of a tag.
    BadXml,
    /// A 200 with a web page.
    Html200,
    /// A 200 with nothing.
    Empty200,

    /// The connection is reset after the request was read.
    Reset,
    /// The connection is reset with the request's body unread.
    ResetBeforeReading,
    /// The connection is reset after (about) this many bytes of the request's body.
    ResetWhileReading(u64),
    /// Answered with this status before the body is read; then the connection closes.
    EarlyAnswer(u16),
    /// Never answered. The connection ends with the server.
    Hang,
    /// Performed; then the connection is reset without an answer.
    ApplyThenReset,
    /// Performed; then answered with an error: status, code.
    ApplyThenStatus(u16, &'static str),

    /// Performed; reset after this many bytes of the answer's body. The length is the whole body's.
    ResetMidBody(usize),
    /// Performed; closed in good order after this many bytes of the answer's body. The length is the
    /// whole body's.
    Truncate(usize),
    /// Performed; the length is one byte less than what is sent.
    ShortLength,
    /// Performed; the length is seven bytes more than the body, which is sent whole.
    WrongLength,
    /// Performed; the byte at this offset of the answer's body (modulo its size) has its bits flipped.
    FlipByte(usize),
    /// Performed; the answer's body comes in pieces of this many bytes, one each tick.
    SlowDrip { bytes: usize, tick: Duration },
    /// Performed, after a pause.
    Delay(Duration),
    /// Performed; one header of the answer holds a non-ASCII byte.
    NonAsciiHeader,
    /// Performed; this header is added to the answer, or replaces it.
    Header(&'static str, &'static str),
    /// Performed; the answer's body is what this function makes of it, with the right length.
    Rewrite(fn(&str) -> String),
    /// A 200 whose body never ends, with this content-length or with none.
    EndlessBody { length: Option<u64> },
}

/// How a connection taken from hyper ends.
pub enum Ending {
    Reset,
    Write { bytes: Vec<u8>, then: Then },
    Endless { head: Vec<u8> },
}

pub enum Then {
    Reset,
    Close,
    /// Close while the client may still be sending.
    CloseUnread,
}

impl Ending {
    pub async fn perform(self, mut stream: Connection) {
        match self {
            Self::Reset => stream.reset(),
            Self::Write { bytes, then } => {
                if stream.write_all(&bytes).await.is_err() {
                    return;
                }
                match then {
                    Then::Reset => {
                        // A reset discards what the kernel has not sent yet, so give it time.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        stream.reset();
                    }
                    Then::Close => stream.close().await,
                    Then::CloseUnread => {
                        let _ = stream.shutdown().await;
                        tokio::time::sleep(Duration::from_millis(500)).await;
                    }
                }
            }
            Self::Endless { head } => {
                let block = [b'x'; 64 * 1024];
                if stream.write_all(&head).await.is_ok() {
                    while stream.write_all(&block).await.is_ok() {}
                }
            }
        }
    }
}

/// The bytes of an HTTP/1.1 answer with a chosen length and the first bytes of a body.
pub fn raw_answer(
    status: StatusCode,
    headers: &HeaderMap,
    length: Option<u64>,
    body: &[u8],
) -> Vec<u8> {
    let mut raw = format!(
        "HTTP/1.1 {} {}\r\n",
        status.as_str(),
        status.canonical_reason().unwrap_or("Unknown")
    );
    if let Some(length) = length {
        raw.push_str(&format!("content-length: {length}\r\n"));
    }
    raw.push_str("connection: close\r\n");
    let mut raw = raw.into_bytes();
    for (name, value) in headers {
        if *name != http::header::CONTENT_LENGTH && *name != http::header::TRANSFER_ENCODING {
            raw.extend_from_slice(name.as_str().as_bytes());
            raw.extend_from_slice(b": ");
            raw.extend_from_slice(value.as_bytes());
            raw.extend_from_slice(b"\r\n");
        }
    }
    raw.extend_from_slice(b"\r\n");
    raw.extend_from_slice(body);
    raw
}

/// S3's error document.
pub fn error_xml(code: &str) -> Bytes {
    Bytes::from(format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code>\
         <Message>The test server was told to answer {code}.</Message>\
         <RequestId>0123456789ABCDEF</RequestId><HostId>test</HostId></Error>"
    ))
}

/// S3's name for a request, from its method, path, query and headers alone.
pub fn operation(
    method: &Method,
    has_key: bool,
    query: &[(String, String)],
    headers: &HeaderMap,
) -> &'static str {
    let has = |name: &str| query.iter().any(|(key, _)| key == name);
    let copy = headers.contains_key("x-amz-copy-source");
    match (method.as_str(), has_key) {
        ("GET", true) if has("uploadId") => "ListParts",
        ("GET", true) => "GetObject",
        ("HEAD", true) => "HeadObject",
        ("PUT", true) if has("partNumber") && copy => "UploadPartCopy",
        ("PUT", true) if has("partNumber") => "UploadPart",
        ("PUT", true) if copy => "CopyObject",
        ("PUT", true) => "PutObject",
        ("POST", true) if has("uploads") => "CreateMultipartUpload",
        ("POST", true) if has("uploadId") => "CompleteMultipartUpload",
        ("DELETE", true) if has("uploadId") => "AbortMultipartUpload",
        ("DELETE", true) => "DeleteObject",
        ("GET", false) if has("uploads") => "ListMultipartUploads",
        ("GET", false)
            if query
                .iter()
                .any(|(key, value)| key == "list-type" && value == "2") =>
        {
            "ListObjectsV2"
        }
        ("GET", false) if has("lifecycle") => "GetBucketLifecycleConfiguration",
        ("GET", false) if has("location") => "GetBucketLocation",
        ("GET", false) => "ListObjects",
        ("HEAD", false) => "HeadBucket",
        ("POST", false) if has("delete") => "DeleteObjects",
        ("PUT", false) if has("lifecycle") => "PutBucketLifecycleConfiguration",
        ("DELETE", false) if has("lifecycle") => "DeleteBucketLifecycle",
        _ => "Unknown",
    }
}
