//! Responses, and the bodies of them.

use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName};
use http::{HeaderValue, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use serde_json::Value;

/// A body: in memory, or a blob that is still arriving. An error cuts the connection, so that the
/// client cannot mistake a part for the whole.
pub type Body = UnsyncBoxBody<Bytes, anyhow::Error>;

pub type Response = http::Response<Body>;

/// The text of an error that is not the client's. The client learns no more; the output says why.
pub const FAILED: &str = "layercache could not do that; its output says why";

/// A response without a body.
pub fn empty(status: StatusCode) -> Response {
    respond(
        status,
        Empty::new().map_err(|never| match never {}).boxed_unsync(),
    )
}

/// A response with a body from memory.
pub fn bytes(status: StatusCode, media_type: &str, body: impl Into<Bytes>) -> Response {
    let body = Full::new(body.into()).map_err(|never| match never {});
    with(
        respond(status, body.boxed_unsync()),
        CONTENT_TYPE,
        media_type,
    )
}

pub fn json(status: StatusCode, body: &Value) -> Response {
    bytes(status, "application/json", body.to_string())
}

/// A response whose body arrives; it has `length` bytes.
pub fn stream(
    status: StatusCode,
    length: u64,
    body: BoxStream<'static, anyhow::Result<Bytes>>,
) -> Response {
    let frames = body.map(|chunk| chunk.map(Frame::data));
    let response = respond(status, StreamBody::new(frames).boxed_unsync());
    let response = with(response, CONTENT_TYPE, "application/octet-stream");
    with(response, CONTENT_LENGTH, &length.to_string())
}

/// `response` with one more header. A value that is invalid in HTTP is left out.
pub fn with(mut response: Response, name: HeaderName, value: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
    response
}

fn respond(status: StatusCode, body: Body) -> Response {
    let mut response = http::Response::new(body);
    *response.status_mut() = status;
    response
}
