//! What the store said: looked through before rusoto may parse it, because rusoto panics on a bad
//! number, loops on malformed XML, and takes an error inside a 200 for success.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, StatusCode};
use xml::reader::{EventReader, ParserConfig, XmlEvent};

use crate::quote::one_line;
use crate::retry::Trouble;
use crate::store::Kind;

/// Nesting that no answer of S3's comes near.
const DEPTH: usize = 16;
/// Elements that rusoto parses as numbers, and panics if they are none.
const NUMBERS: &[&str] = &[
    "Size",
    "PartNumber",
    "PartNumberMarker",
    "NextPartNumberMarker",
    "MaxKeys",
    "KeyCount",
    "MaxParts",
    "MaxUploads",
];
/// Elements that rusoto parses as booleans, and panics if they are none.
const BOOLEANS: &[&str] = &["IsTruncated", "BucketKeyEnabled"];

/// An answer that is not success.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) code: Option<String>,
    pub(super) message: Option<String>,
    /// The region that the bucket is in, if the answer names one.
    pub(super) region: Option<String>,
    /// The store's clock.
    pub(super) date: Option<SystemTime>,
    pub(super) retry_after: Option<Duration>,
}

/// What a 200's body holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// What was expected, from this byte on.
    Good { start: usize },
    /// An `<Error>`.
    Error(Refusal),
    /// Neither.
    Nonsense(String),
}

/// Looks through the body of a success that should be XML under the element `root`.
pub(super) fn examine(body: &[u8], root: &str, status: u16) -> Content {
    let start = body
        .iter()
        .position(|byte| !byte.is_ascii_whitespace())
        .unwrap_or(body.len());
    let trimmed = &body[start..];
    if trimmed.is_empty() {
        return Content::Nonsense("an empty answer".into());
    }
    match walk(trimmed) {
        Ok(found) if is_error_root(&found.root) => Content::Error(Refusal {
            status,
            ..found.refusal
        }),
        Ok(found) if is_named(&found.root, root) => Content::Good { start },
        Ok(found) => Content::Nonsense(format!("an answer of {:?}", one_line(&found.root))),
        Err(why) => Content::Nonsense(why),
    }
}

/// What a body that was to be empty or unread says, if it is an `<Error>`.
pub(super) fn error_in(body: &[u8], status: u16) -> Option<Refusal> {
    match examine(body, "", status) {
        Content::Error(refusal) => Some(refusal),
        _ => None,
    }
}

/// Makes what can be made of an answer that is not success; the body may be anything.
pub(super) fn refusal(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Refusal {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let said = error_in(body, status.as_u16()).unwrap_or_default();
    Refusal {
        status: status.as_u16(),
        region: text("x-amz-bucket-region").map(one_line).or(said.region),
        date: text("date").and_then(|date| httpdate::parse_http_date(date).ok()),
        retry_after: retry_after(headers, SystemTime::now()),
        ..said
    }
}

/// How long the store wants us to wait: in milliseconds, in seconds, or until a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(millis) = text("x-amz-retry-after").and_then(|text| text.trim().parse().ok()) {
        return Some(Duration::from_millis(millis));
    }
    let text = text("retry-after")?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => {
            let date = httpdate::parse_http_date(text).ok()?;
            Some(date.duration_since(now).unwrap_or_default())
        }
    }
}

struct Found {
    root: String,
    refusal: Refusal,
}

/// Some stores (moto is one) say `Response` where S3 says `Result`.
fn is_named(found: &str, root: &str) -> bool {
    let stem = root.strip_suffix("Result").unwrap_or(root);
    found == root || (stem != root && found.strip_suffix("Response") == Some(stem))
}

fn is_error_root(root: &str) -> bool {
    // ErrorResponse is how some gateways, and AWS's other services, wrap it.
    root == "Error" || root == "ErrorResponse"
}

/// Reads XML to its end with the parser and the settings that rusoto uses, so that what passes here
/// passes there.
fn walk(body: &[u8]) -> Result<Found, String> {
    // S3 has no document types; with one come entities, which can expand to more than any limit on
    // the answer's length foresees. In other encodings these bytes would look different.
    if std::str::from_utf8(body).is_err() {
        return Err("XML that is not UTF-8".into());
    }
    if holds(body, b"<!DOCTYPE") {
        return Err("a document with a DOCTYPE".into());
    }
    let config = ParserConfig::new().trim_whitespace(false);
    let mut root = None;
    let mut refusal = Refusal::default();
    let mut path: Vec<String> = Vec::new();
    let mut text = String::new();
    let mut pieces = 0;
    for event in EventReader::new_with_config(body, config) {
        let event = event.map_err(|e| format!("malformed XML ({})", one_line(&e.to_string())))?;
        match event {
            XmlEvent::StartDocument { encoding, .. } if !encoding.eq_ignore_ascii_case("utf-8") => {
                return Err("XML that is not UTF-8".into());
            }
            XmlEvent::StartElement { name, .. } => {
                if path.last().is_some_and(|parent| is_parsed(parent)) {
                    return Err("XML with an element inside a number".into());
                }
                // The parser itself lets this pass.
                if path.is_empty() && root.is_some() {
                    return Err("XML with two roots".into());
                }
                if path.len() >= DEPTH {
                    return Err("XML that is nested too deeply".into());
                }
                root.get_or_insert_with(|| name.local_name.clone());
                path.push(name.local_name);
                text.clear();
                pieces = 0;
            }
            XmlEvent::Characters(data) | XmlEvent::CData(data) => {
                text.push_str(&data);
                pieces += 1;
            }
            XmlEvent::EndElement { name } => {
                let name = name.local_name;
                path.pop();
                let good = if NUMBERS.contains(&name.as_str()) {
                    pieces == 1 && text.parse::<i64>().is_ok_and(|number| number >= 0)
                } else {
                    !BOOLEANS.contains(&name.as_str())
                        || (pieces == 1 && text.parse::<bool>().is_ok())
                };
                if !good {
                    return Err(format!("XML with {:?} for {name}", one_line(&text)));
                }
                if root.as_deref().is_some_and(is_error_root) {
                    let value = Some(one_line(&text)).filter(|value| !value.is_empty());
                    match name.as_str() {
                        "Code" => refusal.code = value,
                        "Message" => refusal.message = value,
                        "Region" => refusal.region = value,
                        _ => {}
                    }
                }
                text.clear();
                pieces = 0;
            }
            _ => {}
        }
    }
    match root {
        Some(root) => Ok(Found { root, refusal }),
        None => Err("malformed XML (no element)".into()),
    }
}

fn holds(body: &[u8], what: &[u8]) -> bool {
    body.windows(what.len()).any(|window| window == what)
}

fn is_parsed(name: &str) -> bool {
    NUMBERS.contains(&name) || BOOLEANS.contains(&name)
}

/// What follows from a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) kind: Kind,
    /// Worth another try.
    pub(super) again: Option<Trouble>,
    /// Worth other credentials.
    pub(super) renew: bool,
}

impl Refusal {
    pub(super) fn verdict(&self) -> Verdict {
        let code = self.code.as_deref().unwrap_or_default();
        let throttled = matches!(self.status, 429 | 503)
            || matches!(
                code,
                "SlowDown"
                    | "SlowDownRead"
                    | "SlowDownWrite"
                    | "Throttling"
                    | "ThrottlingException"
                    | "ThrottledException"
                    | "RequestThrottled"
                    | "RequestThrottledException"
                    | "RequestLimitExceeded"
                    | "BandwidthLimitExceeded"
                    | "TooManyRequests"
                    | "TooManyRequestsException"
            );
        let passing = throttled
            || matches!(self.status, 408 | 500 | 502 | 504)
            || matches!(
                code,
                "RequestTimeout"
                    | "RequestTimeoutException"
                    | "InternalError"
                    | "InternalFailure"
                    | "ServiceUnavailable"
                    | "OperationAborted"
                    | "ConditionalRequestConflict"
                    // What arrived is not what was promised. It was damaged on the way: the last
                    // bytes of a body go out only once its digest holds here.
                    | "XAmzContentSHA256Mismatch"
                    | "BadDigest"
            );
        let renew = matches!(
            code,
            "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "RequestExpired"
        );
        let kind = match (self.status, code) {
            _ if renew => Kind::Denied,
            _ if passing => Kind::Unavailable,
            (_, "NoSuchBucket") => Kind::NoBucket,
            (_, "NoSuchUpload") => Kind::NoSuchUpload,
            (304 | 412, _) | (_, "PreconditionFailed") => Kind::Changed,
            (405 | 501, _) | (_, "NotImplemented" | "MethodNotAllowed") => Kind::Unsupported,
            (_, "InvalidObjectState" | "RequestTimeTooSkewed") => Kind::Other,
            (401 | 403, _)
            | (
                _,
                "AccessDenied"
                | "InvalidAccessKeyId"
                | "SignatureDoesNotMatch"
                | "InvalidToken"
                | "InvalidSecurity",
            ) => Kind::Denied,
            _ => Kind::Other,
        };
        Verdict {
            kind,
            again: (passing && !renew).then_some(Trouble {
                throttled,
                retry_after: self.retry_after,
                timed_out: false,
            }),
            renew,
        }
    }

    /// Status, code and message, then what to do about them. `region` is ours; `reads` is whether
    /// the operation was HEAD or GET of an object.
    pub(super) fn explain(&self, region: &str, bucket: &str, reads: bool) -> String {
        let mut text = format!("the store answered {}", self.status);
        if let Some(code) = &self.code {
            text.push_str(&format!(" {code}"));
        }
        if let Some(message) = &self.message {
            text.push_str(&format!(" ({message})"));
        }
        let code = self.code.as_deref().unwrap_or_default();
        let elsewhere = self.region.as_deref().filter(|there| *there != region);
        let misdirected =
            matches!(self.status, 301 | 307 | 308 | 400) || code == "AuthorizationHeaderMalformed";
        if let (Some(there), true) = (elsewhere, misdirected) {
            text.push_str(&format!("; the bucket is in {there}: use region={there}"));
        } else if matches!(self.status, 301 | 302 | 307 | 308) {
            text.push_str("; redirects are not followed: check region and endpoint_url");
        } else if code == "NoSuchBucket" {
            text.push_str(&format!(
                "; bucket {bucket:?} does not exist there: check bucket, region, endpoint_url and \
                 use_path_style"
            ));
        } else if code == "RequestTimeTooSkewed" {
            text.push_str(&skew(self.date, SystemTime::now()));
        } else if matches!(code, "InvalidAccessKeyId" | "SignatureDoesNotMatch") {
            text.push_str("; check access_key_id and secret_access_key");
        } else if matches!(code, "XAmzContentSHA256Mismatch" | "BadDigest") {
            text.push_str(
                "; the bytes that arrived are not those that were sent: something on the way \
                 damages them",
            );
        } else if self.verdict().renew {
            text.push_str("; the session token has expired: sign in again");
        } else if code == "InvalidObjectState" {
            text.push_str("; the object is archived, and must be restored first");
        } else if self.status == 403 && reads {
            if code.is_empty() {
                // An answer to HEAD has no room for a reason.
                text.push_str("; the keys may be wrong, or");
            } else {
                text.push(';');
            }
            text.push_str(
                " s3:GetObject may be missing, or the object itself: without s3:ListBucket a \
                 missing key answers 403 too",
            );
        }
        text
    }
}

/// What to say of a clock that is off.
fn skew(there: Option<SystemTime>, here: SystemTime) -> String {
    let Some(there) = there else {
        return "; this machine's clock is off: set it".into();
    };
    let (ahead, seconds) = match here.duration_since(there) {
        Ok(ahead) => ("ahead of", ahead.as_secs()),
        Err(behind) => ("behind", behind.duration().as_secs()),
    };
    format!("; this machine's clock is {seconds} s {ahead} the store's: set it")
}

/// The headers that we ask rusoto for, where they make sense. Everything else is kept from it: it
/// panics on a value that is not ASCII, and on numbers and booleans that are none.
pub(super) fn kept_headers(headers: &HeaderMap) -> Vec<(String, String)> {
    const KEPT: &[&str] = &[
        "content-length",
        "content-range",
        "etag",
        "last-modified",
        "x-amz-storage-class",
    ];
    let mut kept = Vec::new();
    for name in KEPT {
        let Some(value) = headers.get(*name).and_then(|value| value.to_str().ok()) else {
            continue;
        };
        if *name == "content-length" && content_length(headers).is_none() {
            continue;
        }
        kept.push(((*name).to_owned(), value.to_owned()));
    }
    kept
}

/// A Content-Length that is a length.
pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    let text = headers.get("content-length")?.to_str().ok()?;
    let digits = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    let length = if digits {
        text.parse::<i64>().ok()
    } else {
        None
    };
    length.and_then(|length| u64::try_from(length).ok())
}

/// First byte, last byte and total of a Content-Range.
pub(super) fn content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let number = |text: &str| {
        text.bytes()
            .all(|c| c.is_ascii_digit())
            .then(|| text.parse::<u64>().ok())
            .flatten()
    };
    let (first, last, total) = (number(first)?, number(last)?, number(total)?);
    (first <= last && last < total).then_some((first, last, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static [u8])]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                let name = http::HeaderName::from_static(name);
                (name, http::HeaderValue::from_bytes(value).unwrap())
            })
            .collect()
    }

    fn refused(status: u16, code: &str) -> Refusal {
        Refusal {
            status,
            code: Some(code.into()).filter(|code: &String| !code.is_empty()),
            ..Refusal::default()
        }
    }

    #[test]
    fn what_stores_do_differently_is_let_through() {
        let body = b"\n \n<?xml version=\"1.0\"?><R><Size>1</Size></R>";
        assert_eq!(examine(body, "R", 200), Content::Good { start: 3 });
        let response = b"<ListPartsResponse/>";
        assert_eq!(
            examine(response, "ListPartsResult", 200),
            Content::Good { start: 0 }
        );
    }

    #[test]
    fn an_error_in_a_200_is_an_error() {
        let body = b"<?xml version=\"1.0\"?>\n<Error><Code>InternalError</Code><Message>We\n encountered</Message></Error>";
        let Content::Error(refusal) = examine(body, "CopyObjectResult", 200) else {
            panic!("taken for success");
        };
        assert_eq!(refusal.code.as_deref(), Some("InternalError"));
        assert_eq!(refusal.message.as_deref(), Some("We encountered"));
        assert!(refusal.verdict().again.is_some());
        assert_eq!(error_in(body, 200), Some(refusal));
    }

    #[test]
    fn what_would_make_rusoto_panic_or_loop_is_nonsense() {
        let deep = format!("<R>{}{}</R>", "<a>".repeat(40), "</a>".repeat(40));
        let bomb = "<!DOCTYPE r [<!ENTITY a \"aaaaaaaaaa\"><!ENTITY b \"&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;\">\
                    <!ENTITY c \"&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;\">]><r>&c;</r>";
        for body in [
            "",
            " \n",
            "not xml",
            "<html><body>Sign in</body></html>",
            "<!DOCTYPE html><html><br></html>",
            "<R",
            "<R>",
            "<R></S>",
            "<R></R><R></R>",
            "<R><Size></Size></R>",
            "<R><Size/></R>",
            "<R><Size> 1</Size></R>",
            "<R><Size> </Size></R>",
            "<R><Size>one</Size></R>",
            "<R><Size>-1</Size></R>",
            "<R><Size>99999999999999999999</Size></R>",
            "<R><Size><b>1</b></Size></R>",
            "<R><Size>1<!-- c --><![CDATA[2]]></Size></R>",
            "<R><c><PartNumber>1.5</PartNumber></c></R>",
            "<R><MaxKeys>0x10</MaxKeys></R>",
            "<R><KeyCount>NaN</KeyCount></R>",
            "<R><IsTruncated>True</IsTruncated></R>",
            "<R><IsTruncated></IsTruncated></R>",
            "<R>&unknown;</R>",
            "<R>\u{0}</R>",
            &deep,
            bomb,
        ] {
            let found = examine(body.as_bytes(), "R", 200);
            assert!(matches!(found, Content::Nonsense(_)), "{body}: {found:?}");
        }
        let cut = b"<R><Key>\xff\xfe</Key></R>";
        assert!(matches!(examine(cut, "R", 200), Content::Nonsense(_)));
    }

    #[test]
    fn only_headers_that_make_sense_are_kept() {
        let kept = kept_headers(&headers(&[
            ("etag", b"\"abc\""),
            ("content-length", b"+5"),
            ("last-modified", b"caf\xe9"),
            ("x-amz-delete-marker", b"maybe"),
            ("x-amz-mp-parts-count", b"many"),
            ("x-amz-missing-meta", b""),
            ("x-amz-meta-name", b"\xff"),
        ]));
        assert_eq!(kept, [("etag".to_owned(), "\"abc\"".to_owned())]);
    }

    #[test]
    fn a_content_length_is_digits_that_fit() {
        for (text, length) in [
            ("0", Some(0)),
            ("9223372036854775807", Some(i64::MAX as u64)),
            ("9223372036854775808", None),
            ("-1", None),
            ("+1", None),
            ("1, 1", None),
            ("", None),
        ] {
            let headers = headers(&[("content-length", text.as_bytes())]);
            assert_eq!(content_length(&headers), length, "{text}");
        }
    }

    #[test]
    fn a_content_range_is_three_numbers_in_order() {
        assert_eq!(content_range("bytes 0-4/10"), Some((0, 4, 10)));
        for text in [
            "",
            "bytes */10",
            "bytes 0-4/*",
            "bytes 4-0/10",
            "bytes 0-10/10",
            "bytes -1-4/10",
            "bytes +0-4/10",
            "0-4/10",
            "bytes 0-99999999999999999999/100000000000000000000",
        ] {
            assert_eq!(content_range(text), None, "{text}");
        }
    }

    #[test]
    fn what_passes_is_tried_again_and_what_is_wrong_is_not() {
        for (status, code) in [
            (408, ""),
            (429, ""),
            (500, ""),
            (502, ""),
            (503, ""),
            (504, ""),
            (500, "InternalError"),
            (503, "SlowDown"),
            (200, "SlowDown"),
            (200, "InternalError"),
            (400, "RequestTimeout"),
            (409, "OperationAborted"),
            (400, "XAmzContentSHA256Mismatch"),
            (400, "BadDigest"),
        ] {
            let verdict = refused(status, code).verdict();
            assert!(verdict.again.is_some(), "{status} {code}");
            assert_eq!(verdict.kind, Kind::Unavailable);
        }
        for (status, code, kind) in [
            (400, "InvalidArgument", Kind::Other),
            (400, "InvalidPart", Kind::Other),
            (403, "AccessDenied", Kind::Denied),
            (403, "", Kind::Denied),
            (404, "NoSuchKey", Kind::Other),
            (404, "", Kind::Other),
            (404, "NoSuchBucket", Kind::NoBucket),
            (404, "NoSuchUpload", Kind::NoSuchUpload),
            (405, "", Kind::Unsupported),
            (501, "NotImplemented", Kind::Unsupported),
            (412, "", Kind::Changed),
            (416, "InvalidRange", Kind::Other),
            (403, "RequestTimeTooSkewed", Kind::Other),
        ] {
            let verdict = refused(status, code).verdict();
            assert_eq!(verdict.again, None, "{status} {code}");
            assert_eq!(verdict.kind, kind, "{status} {code}");
            assert!(!verdict.renew);
        }
        assert!(refused(400, "ExpiredToken").verdict().renew);
    }

    #[test]
    fn retry_after_is_milliseconds_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Fri, 15 May 2015 15:34:21 GMT").unwrap();
        for (name, value, waits) in [
            ("x-amz-retry-after", "1500", Some(1500)),
            ("retry-after", "3", Some(3000)),
            ("retry-after", "Fri, 15 May 2015 15:34:31 GMT", Some(10_000)),
            ("retry-after", "Fri, 15 May 2015 15:34:11 GMT", Some(0)),
            ("retry-after", "soon", None),
        ] {
            let headers = headers(&[(name, value.as_bytes())]);
            assert_eq!(
                retry_after(&headers, now),
                waits.map(Duration::from_millis),
                "{value}"
            );
        }
    }

    #[test]
    fn the_message_says_what_to_do() {
        let says = |refusal: &Refusal| refusal.explain("us-east-1", "cache", true);
        let moved = refusal(
            StatusCode::MOVED_PERMANENTLY,
            &headers(&[("x-amz-bucket-region", b"eu-west-1")]),
            b"",
        );
        assert_eq!(
            says(&moved),
            "the store answered 301; the bucket is in eu-west-1: use region=eu-west-1"
        );
        let malformed = refusal(
            StatusCode::BAD_REQUEST,
            &HeaderMap::new(),
            b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>",
        );
        assert!(says(&malformed).ends_with("use region=eu-west-1"));
        assert!(says(&refused(403, "")).contains("s3:ListBucket"));
        assert!(says(&refused(404, "NoSuchBucket")).contains("\"cache\" does not exist"));
        assert!(says(&refused(403, "RequestTimeTooSkewed")).contains("clock is off"));
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(10_000);
        assert_eq!(
            skew(Some(now - Duration::from_secs(1200)), now),
            "; this machine's clock is 1200 s ahead of the store's: set it"
        );
    }

    #[test]
    fn a_hostile_message_stays_one_short_line() {
        let long = "x".repeat(5000);
        let body = format!(
            "<Error><Code>A\u{85}B\n</Code><Message>a\tb\u{200b}\n\n{long}</Message></Error>"
        );
        let refusal = refusal(StatusCode::BAD_REQUEST, &HeaderMap::new(), body.as_bytes());
        assert_eq!(refusal.code.as_deref(), Some("A B"));
        let message = refusal.message.unwrap();
        assert!(message.starts_with("a b"));
        assert!(message.chars().count() <= crate::quote::ONE_LINE + 1);
    }
}
