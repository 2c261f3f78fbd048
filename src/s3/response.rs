//! Checks responses before rusoto parses them: rusoto panics on a bad number, loops on malformed XML, and
//! takes an error inside a 200 for success.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, StatusCode};
use xml::reader::{EventReader, ParserConfig, XmlEvent};

use crate::redact::Secrets;
use crate::retry::Trouble;
use crate::store::Kind;

/// Far deeper than any response of S3's.
const DEPTH: usize = 16;
/// Elements that rusoto parses as numbers; it panics if they are not.
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
/// Elements that rusoto parses as booleans; it panics if they are not.
const BOOLEANS: &[&str] = &["IsTruncated", "BucketKeyEnabled"];
/// How many characters of a foreign body a message quotes.
const FIRST_WORDS: usize = 80;

/// A response that is not a success. Its texts have been redacted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) code: Option<String>,
    pub(super) message: Option<String>,
    /// The region that the bucket is in, if the response names one.
    pub(super) region: Option<String>,
    /// The store's clock.
    pub(super) date: Option<SystemTime>,
    pub(super) retry_after: Option<Duration>,
    /// How the body begins, if it is not S3's.
    pub(super) foreign: Option<String>,
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

/// What XML must contain to be the expected response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// This root.
    Root(&'static str),
    /// This element, not empty, under any root: some stores give the root another name.
    Element(&'static str),
    /// Nothing.
    Any,
}

/// Examines the body of a success that should be XML.
pub(super) fn examine(body: &[u8], wanted: Wanted, status: u16, secrets: &Secrets) -> Content {
    let start = body
        .iter()
        .position(|byte| !byte.is_ascii_whitespace())
        .unwrap_or(body.len());
    let trimmed = &body[start..];
    if trimmed.is_empty() {
        return Content::Nonsense("an empty body".into());
    }
    let mut found = Found {
        wanted,
        root: None,
        holds: false,
        refusal: Refusal::default(),
    };
    let walked = walk(trimmed, &mut found, secrets);
    let good = match wanted {
        Wanted::Root(root) => found
            .root
            .as_ref()
            .is_some_and(|found| is_named(found, root)),
        Wanted::Element(_) => found.holds,
        Wanted::Any => true,
    };
    let name = found.root.unwrap_or_default();
    match walked {
        _ if is_error_root(&name) && (walked.is_ok() || found.refusal.code.is_some()) => {
            Content::Error(Refusal {
                status,
                ..found.refusal
            })
        }
        Ok(()) if good => Content::Good { start },
        Ok(()) => Content::Nonsense(format!("<{}>", secrets.outside(&name))),
        Err(why) => Content::Nonsense(why),
    }
}

/// The `<Error>` that a body is, if it is one.
pub(super) fn error_in(body: &[u8], status: u16, secrets: &Secrets) -> Option<Refusal> {
    match examine(body, Wanted::Any, status, secrets) {
        Content::Error(refusal) => Some(refusal),
        _ => None,
    }
}

/// Interprets a response that is not a success; its body may be anything.
pub(super) fn refusal(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    secrets: &Secrets,
) -> Refusal {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let said = error_in(body, status.as_u16(), secrets);
    let foreign = match said {
        Some(_) => None,
        None => first_words(body, secrets),
    };
    let said = said.unwrap_or_default();
    Refusal {
        status: status.as_u16(),
        region: text("x-amz-bucket-region")
            .map(str::to_owned)
            .or(said.region)
            .filter(|region| is_region(region)),
        date: text("date").and_then(|date| httpdate::parse_http_date(date).ok()),
        retry_after: retry_after(headers, SystemTime::now()),
        foreign,
        ..said
    }
}

/// Whether this could be a region, and is not a secret.
fn is_region(text: &str) -> bool {
    (1..=32).contains(&text.len()) && text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
}

/// The first words of a body that is not S3's, without tags. `None` if it is empty.
pub(super) fn first_words(body: &[u8], secrets: &Secrets) -> Option<String> {
    if body.trim_ascii().is_empty() {
        return None;
    }
    let mut words = String::new();
    let mut in_tag = false;
    for c in String::from_utf8_lossy(body).chars() {
        match c {
            '<' => in_tag = true,
            '>' if in_tag => {
                in_tag = false;
                words.push(' ');
            }
            _ if in_tag => {}
            c => words.push(c),
        }
    }
    let words = secrets.outside(&words);
    Some(match words.char_indices().nth(FIRST_WORDS) {
        Some((end, _)) => format!("{}…", words[..end].trim_end()),
        None => words,
    })
}

/// Whether a response is a web page; we store none.
pub(super) fn is_page(headers: &HeaderMap) -> bool {
    let kind = headers.get("content-type");
    kind.and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.trim_start().starts_with("text/html"))
}

/// Whether a response has headers that only S3 sends.
pub(super) fn is_evidence(headers: &HeaderMap) -> bool {
    headers
        .keys()
        .any(|name| name.as_str().starts_with("x-amz-"))
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
    wanted: Wanted,
    root: Option<String>,
    /// The wanted element was there.
    holds: bool,
    refusal: Refusal,
}

/// Some stores say `Response` where S3 says `Result` (moto), or neither (rclone).
pub(super) fn is_named(found: &str, root: &str) -> bool {
    let stem = |name: &str| {
        let stem = name.strip_suffix("Result");
        stem.or(name.strip_suffix("Response"))
            .unwrap_or(name)
            .to_owned()
    };
    stem(found) == stem(root)
}

fn is_error_root(root: &str) -> bool {
    // ErrorResponse is how some gateways, and AWS's other services, wrap it.
    root == "Error" || root == "ErrorResponse"
}

/// Reads XML to its end with the parser and the settings that rusoto uses, so that what passes here
/// passes there. `found` holds what came before an error, too.
fn walk(body: &[u8], found: &mut Found, secrets: &Secrets) -> Result<(), String> {
    // S3 sends no DOCTYPE. Its entities could expand beyond any limit on the response's length. In other
    // encodings the bytes searched for would look different.
    if std::str::from_utf8(body).is_err() {
        return Err("XML that is not UTF-8".into());
    }
    if holds(body, b"<!DOCTYPE") {
        return Err("a document with a DOCTYPE".into());
    }
    let config = ParserConfig::new().trim_whitespace(false);
    let Found {
        wanted,
        root,
        holds,
        refusal,
    } = found;
    let mut path: Vec<String> = Vec::new();
    let mut text = String::new();
    let mut pieces = 0;
    for event in EventReader::new_with_config(body, config) {
        let event =
            event.map_err(|e| format!("malformed XML ({})", secrets.outside(&e.to_string())))?;
        match event {
            XmlEvent::StartDocument { encoding, .. } if !encoding.eq_ignore_ascii_case("utf-8") => {
                return Err("XML that is not UTF-8".into());
            }
            XmlEvent::StartElement { name, .. } => {
                if path.last().is_some_and(|parent| is_parsed(parent)) {
                    return Err("XML with an element inside a number".into());
                }
                // The parser accepts this.
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
                    return Err(format!("XML with {:?} for {name}", secrets.outside(&text)));
                }
                *holds |= matches!(wanted, Wanted::Element(wanted) if *wanted == name)
                    && !text.is_empty();
                if root.as_deref().is_some_and(is_error_root) {
                    let value = Some(secrets.outside(&text)).filter(|value| !value.is_empty());
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
        Some(_) => Ok(()),
        None => Err("malformed XML (no element)".into()),
    }
}

fn holds(body: &[u8], what: &[u8]) -> bool {
    body.windows(what.len()).any(|window| window == what)
}

fn is_parsed(name: &str) -> bool {
    NUMBERS.contains(&name) || BOOLEANS.contains(&name)
}

/// How to treat a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) kind: Kind,
    /// Worth another try.
    pub(super) again: Option<Trouble>,
    /// Worth other credentials.
    pub(super) renew: bool,
}

impl Refusal {
    /// `genuine`: whether the endpoint is known to be S3.
    pub(super) fn verdict(&self, genuine: bool) -> Verdict {
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
                    // The body was damaged on the way: its last bytes are sent only after its
                    // digest has been verified here.
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
            _ if self.foreign.is_some() && !genuine => Kind::NotS3,
            (_, "NoSuchBucket") => Kind::NoBucket,
            (_, "NoSuchUpload") => Kind::NoSuchUpload,
            _ if self.is_absence() => Kind::Missing,
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
                ..Trouble::default()
            }),
            renew,
        }
    }

    fn passes(&self) -> bool {
        self.verdict(true).again.is_some()
    }

    /// Whether this says that the object is not there: in S3's words, or by a 404 without a body. A web
    /// server's 404 page does not.
    pub(super) fn is_absence(&self) -> bool {
        // Some gateways are less precise than S3.
        let gone = |code: &str| {
            matches!(
                code,
                "NoSuchKey" | "NotFound" | "404" | "NoSuchObject" | "KeyNotFound"
            )
        };
        match self.code.as_deref() {
            Some("NoSuchKey") => true,
            Some(code) => self.status == 404 && gone(code),
            None => self.status == 404 && self.foreign.is_none(),
        }
    }

    /// The response of `peer`: status, code and message.
    pub(super) fn cause(&self, peer: &str) -> String {
        let status = self.status;
        if let Some(words) = &self.foreign {
            let words = match words.as_str() {
                "" => String::new(),
                words => format!(" ({words})"),
            };
            // A load balancer responds while the store behind it is down.
            let but = match self.passes() {
                true => "",
                false => ", but not like S3",
            };
            return format!("{peer} answered {status}{but}{words}");
        }
        let mut text = format!("{peer} answered {status}");
        if let Some(code) = &self.code {
            text.push_str(&format!(" {code}"));
        }
        if let Some(message) = &self.message {
            text.push_str(&format!(" ({message})"));
        }
        text
    }

    /// What to try. `region` is ours; `reads` is whether the operation was HEAD or GET of an
    /// object.
    pub(super) fn advice(&self, region: &str, reads: bool) -> Option<String> {
        let code = self.code.as_deref().unwrap_or_default();
        let elsewhere = self.region.as_deref().filter(|there| *there != region);
        let misdirected =
            matches!(self.status, 301 | 307 | 308 | 400) || code == "AuthorizationHeaderMalformed";
        if let (Some(there), true) = (elsewhere, misdirected) {
            return Some(format!("the bucket is in {there}: use region={there}"));
        }
        if matches!(self.status, 301 | 302 | 307 | 308) {
            return Some("redirects are not followed: check region and endpoint_url".into());
        }
        if let Some(words) = self.foreign.as_ref().filter(|_| !self.passes()) {
            return Some(match words {
                words if words.contains("HTTPS") || words.contains("https") => {
                    "that port speaks https: use endpoint_url=https://…".into()
                }
                words if words.contains("MinIO") => MINIO.into(),
                _ => "check endpoint_url".into(),
            });
        }
        Some(match code {
            "NoSuchBucket" => "check bucket, region and endpoint_url".into(),
            "RequestTimeTooSkewed" => skew(self.date, SystemTime::now()),
            "InvalidAccessKeyId" | "SignatureDoesNotMatch" => {
                "check access_key_id and secret_access_key".into()
            }
            "XAmzContentSHA256Mismatch" | "BadDigest" => {
                "the bytes that arrived are not those that were sent: something on the way damages \
                 them"
                    .into()
            }
            _ if self.verdict(true).renew => {
                "the session token has expired: sign in again".into()
            }
            "InvalidObjectState" => "the object is archived, and must be restored first".into(),
            "" if self.status == 403 && reads => {
                "the keys may be wrong, or s3:GetObject missing, or the object itself: without \
                 s3:ListBucket a missing key answers 403 too"
                    .into()
            }
            // Garage's way to refuse keys.
            "AccessDenied" if self.refuses_keys() => {
                "check access_key_id and secret_access_key".into()
            }
            _ if self.status == 403 && reads => {
                "s3:GetObject may be missing, or the object itself: without s3:ListBucket a missing \
                 key answers 403 too"
                    .into()
            }
            _ => return None,
        })
    }

    /// Whether the message of an AccessDenied is about the keys rather than a permission.
    fn refuses_keys(&self) -> bool {
        let message = self.message.as_deref().unwrap_or_default().to_lowercase();
        message.contains("signature") || message.contains("no such key")
    }
}

/// Advice if MinIO's web console responds instead of its S3.
pub(super) const MINIO: &str =
    "check endpoint_url (MinIO's S3 is at port 9000, its console at 9001)";

/// Advice for a clock that is off.
fn skew(there: Option<SystemTime>, here: SystemTime) -> String {
    let is_off = |there: &SystemTime| {
        let off = here.duration_since(*there);
        off.unwrap_or_else(|behind| behind.duration()) > Duration::from_secs(60)
    };
    let Some(there) = there.filter(is_off) else {
        return "this machine's clock is off: set it".into();
    };
    let (ahead, seconds) = match here.duration_since(there) {
        Ok(ahead) => ("ahead of", ahead.as_secs()),
        Err(behind) => ("behind", behind.duration().as_secs()),
    };
    format!("this machine's clock is {seconds} s {ahead} the store's: set it")
}

/// The headers that rusoto is to see, if they are well-formed. It panics on values that are not ASCII, and
/// on bad numbers and booleans.
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

/// A valid Content-Length.
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

    fn no() -> Secrets {
        Secrets::default()
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
        assert_eq!(
            examine(body, Wanted::Root("R"), 200, &no()),
            Content::Good { start: 3 }
        );
        let response = b"<ListPartsResponse/>";
        assert_eq!(
            examine(response, Wanted::Root("ListPartsResult"), 200, &no()),
            Content::Good { start: 0 }
        );
    }

    #[test]
    fn an_error_in_a_200_is_an_error() {
        let body = b"<?xml version=\"1.0\"?>\n<Error><Code>InternalError</Code><Message>We\n encountered</Message></Error>";
        let Content::Error(refusal) = examine(body, Wanted::Any, 200, &no()) else {
            panic!("taken for success");
        };
        assert_eq!(refusal.code.as_deref(), Some("InternalError"));
        assert_eq!(refusal.message.as_deref(), Some("We encountered"));
        assert!(refusal.verdict(false).again.is_some());
        assert_eq!(error_in(body, 200, &no()), Some(refusal));
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
            let found = examine(body.as_bytes(), Wanted::Root("R"), 200, &no());
            assert!(matches!(found, Content::Nonsense(_)), "{body}: {found:?}");
        }
        let cut = b"<R><Key>\xff\xfe</Key></R>";
        assert!(matches!(
            examine(cut, Wanted::Root("R"), 200, &no()),
            Content::Nonsense(_)
        ));
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
            let verdict = refused(status, code).verdict(false);
            assert!(verdict.again.is_some(), "{status} {code}");
            assert_eq!(verdict.kind, Kind::Unavailable);
        }
        for (status, code, kind) in [
            (400, "InvalidArgument", Kind::Other),
            (400, "InvalidPart", Kind::Other),
            (403, "AccessDenied", Kind::Denied),
            (403, "", Kind::Denied),
            (404, "NoSuchKey", Kind::Missing),
            (404, "", Kind::Missing),
            (404, "NoSuchBucket", Kind::NoBucket),
            (404, "NoSuchUpload", Kind::NoSuchUpload),
            (405, "", Kind::Unsupported),
            (501, "NotImplemented", Kind::Unsupported),
            (412, "", Kind::Changed),
            (416, "InvalidRange", Kind::Other),
            (403, "RequestTimeTooSkewed", Kind::Other),
        ] {
            let verdict = refused(status, code).verdict(false);
            assert_eq!(verdict.again, None, "{status} {code}");
            assert_eq!(verdict.kind, kind, "{status} {code}");
            assert!(!verdict.renew);
        }
        assert!(refused(400, "ExpiredToken").verdict(false).renew);
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
        let says = |refusal: &Refusal| {
            let advice = refusal.advice("us-east-1", true);
            format!("{}; {}", refusal.cause("S3"), advice.unwrap_or_default())
        };
        let moved = refusal(
            StatusCode::MOVED_PERMANENTLY,
            &headers(&[("x-amz-bucket-region", b"eu-west-1")]),
            b"",
            &no(),
        );
        assert_eq!(
            says(&moved),
            "S3 answered 301; the bucket is in eu-west-1: use region=eu-west-1"
        );
        let malformed = refusal(
            StatusCode::BAD_REQUEST,
            &HeaderMap::new(),
            b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>",
            &no(),
        );
        assert!(says(&malformed).ends_with("use region=eu-west-1"));
        assert!(says(&refused(403, "")).contains("s3:ListBucket"));
        assert!(says(&refused(404, "NoSuchBucket")).contains("check bucket, region"));
        assert!(says(&refused(403, "RequestTimeTooSkewed")).contains("clock is off"));
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(10_000);
        assert_eq!(
            skew(Some(now - Duration::from_secs(1200)), now),
            "this machine's clock is 1200 s ahead of the store's: set it"
        );
    }

    #[test]
    fn what_is_not_s3_is_quoted_and_told_apart_from_s3_once_that_is_known() {
        let page =
            b"<html><head><title>404 Not Found</title></head><body>\n<h1>nginx</h1></body></html>";
        let found = refusal(StatusCode::NOT_FOUND, &HeaderMap::new(), page, &no());
        assert_eq!(found.verdict(false).kind, Kind::NotS3);
        assert!(!found.is_absence());
        assert_eq!(
            found.cause("http://gw"),
            "http://gw answered 404, but not like S3 (404 Not Found nginx)"
        );
        let advice = |status: u16, body: &[u8]| {
            let status = StatusCode::from_u16(status).unwrap();
            let found = refusal(status, &HeaderMap::new(), body, &no());
            (found.verdict(false).kind, found.advice("r", true))
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(
            advice(401, b"401 Unauthorized"),
            (Kind::NotS3, some("check endpoint_url"))
        );
        assert_eq!(
            advice(501, b"Unsupported method ('PUT')"),
            (Kind::NotS3, some("check endpoint_url"))
        );
        assert_eq!(
            advice(403, b"<title>MinIO Console</title>"),
            (Kind::NotS3, some(MINIO))
        );
        assert_eq!(
            advice(400, b"Client sent an HTTP request to an HTTPS server.\n"),
            (
                Kind::NotS3,
                some("that port speaks https: use endpoint_url=https://…")
            )
        );
        // A load balancer speaks for a store that is down.
        assert_eq!(advice(503, b"<h1>Down</h1>"), (Kind::Unavailable, None));
        // A store's proxy may say no in its own words.
        let denied = refusal(StatusCode::FORBIDDEN, &HeaderMap::new(), b"no", &no());
        assert_eq!(denied.verdict(true).kind, Kind::Denied);
    }

    #[test]
    fn a_hostile_message_stays_one_short_line_without_secrets() {
        let long = "x".repeat(5000);
        let body = format!(
            "<Error><Code>A\u{85}B\n</Code><Message>a\tb\u{200b}\n\n{long}</Message></Error>"
        );
        let status = StatusCode::BAD_REQUEST;
        let found = refusal(status, &HeaderMap::new(), body.as_bytes(), &no());
        assert_eq!(found.code.as_deref(), Some("A B"));
        let message = found.message.unwrap();
        assert!(message.starts_with("a b"));
        assert!(message.chars().count() <= crate::quote::ONE_LINE + 1);

        let secrets = Secrets::default();
        let secret = "wJalrXUtnFEMIbK7MDENG";
        secrets.add(secret);
        let body = format!(
            "<Error><Code>{secret}</Code><Message>{}{secret}</Message><Region>{secret}</Region></Error>",
            "x".repeat(190)
        );
        let headers = headers(&[("retry-after", b"wJalrXUtnFEMIbK7MDENG")]);
        for body in [
            &body,
            &body.replace("Error", "html"),
            &body[..body.len() - 9],
        ] {
            let found = refusal(status, &headers, body.as_bytes(), &secrets);
            let said = format!("{found:?}");
            assert!(!said.contains("wJalr"), "{said}");
        }
        for text in [secret.to_owned(), format!("<{secret}/>")] {
            let content = examine(text.as_bytes(), Wanted::Root("R"), 200, &secrets);
            let said = format!("{content:?}");
            assert!(!said.contains("wJalr"), "{said}");
        }
    }
}
