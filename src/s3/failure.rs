//! Failures of a request, and how they are worded: refused, silent, broken, or without a body.

use std::io;
use std::time::Duration;

use rustls::pki_types::UnixTime;
use rustls::{CertificateError, InvalidMessage};
use time::OffsetDateTime;
use time::macros::format_description;

use super::call::{Call, Expect, Failure};
use super::outgoing::Fate;
use super::remote::Remote;
use super::response::Refusal;
use super::wire::{ProxyError, Unresolved};
use crate::quote::first_few;
use crate::retry::Trouble;
use crate::store::Kind;

/// Names of a certificate that a message shows.
const NAMES: usize = 4;

/// Advice for a store that may have no host name for each bucket.
const WITH_PATH_STYLE: &str = "use_path_style=true may be missing";

impl Failure {
    /// The store refused.
    pub(super) fn refused(remote: &Remote, call: &Call, refusal: Refusal) -> Self {
        if refusal.code.is_some() {
            remote.note_genuine();
        }
        let reads = matches!(call.expect, Expect::Object | Expect::Description);
        let verdict = refusal.verdict(remote.is_genuine());
        let mut advice = refusal.advice(&remote.region, reads);
        // The response to a HEAD has no body to say that the token has expired: S3 sends a bare 400.
        let mute = call.expect == Expect::Description
            && refusal.status == 400
            && refusal.code.is_none()
            && refusal.region.is_none();
        if mute {
            advice = Some(
                "this was a HEAD, whose answer gives no reason: the session token may have expired, \
                 or region or endpoint_url be wrong"
                    .into(),
            );
        }
        let mut cause = refusal.cause(&remote.endpoint.name());
        // A store that expects the bucket in the path mistakes the key's first part for it.
        if refusal.code.as_deref() == Some("NoSuchBucket") && remote.endpoint.is_prefixed() {
            cause = format!("{WITH_PATH_STYLE}: {cause}");
        }
        Failure {
            status: Some(refusal.status),
            advice,
            again: verdict.again,
            renew: verdict.renew || mute,
            refusal: Some(Box::new(refusal)),
            ..Failure::new(verdict.kind, cause)
        }
    }

    /// Nothing came for `limit`.
    pub(super) fn silence(remote: &Remote, limit: Duration) -> Self {
        let peer = remote.endpoint.authority();
        let cause = format!(
            "no answer from {peer} after {} s",
            limit.as_secs_f64().round()
        );
        Failure {
            again: Some(Trouble {
                timed_out: true,
                ..Trouble::default()
            }),
            ..Failure::new(Kind::Unavailable, cause)
        }
    }

    /// The body to send could not be read. Its error names the blob.
    pub(super) fn local(e: &io::Error) -> Self {
        Failure {
            general: true,
            ..Failure::new(Kind::LocalBody, e.to_string())
        }
    }

    /// There was no response.
    pub(super) fn broken(
        remote: &Remote,
        e: &hyper_util::client::legacy::Error,
        fate: Fate,
    ) -> Self {
        if let Fate::Local(e) = fate {
            return Failure::local(&e);
        }
        let endpoint = &remote.endpoint;
        let peer = endpoint.authority();
        let causes = Causes::of(e);
        let reasons = remote.secrets.outside(&causes.text);
        let mut failure = if let Some((cause, advice)) = causes.untrusted(peer, &reasons) {
            Failure::new(Kind::Other, cause).advise(advice)
        } else if causes.no_tls {
            let cause = format!("{peer} does not speak https ({reasons})");
            Failure::new(Kind::NotS3, cause)
                .advise(format!("check endpoint_url, or write http://{peer}"))
        } else if causes.refused && causes.proxy.is_none() {
            Failure::passing(Kind::Unavailable, format!("connection to {peer} refused"))
        } else if e.is_connect() {
            Failure::passing(
                Kind::Unavailable,
                format!("cannot connect to {peer} ({reasons})"),
            )
        } else {
            Failure::passing(
                Kind::Unavailable,
                format!("the connection to {peer} broke ({reasons})"),
            )
        };
        // Only AWS has a host name for each bucket.
        if endpoint.is_prefixed() && causes.proxy.is_none() && causes.wrong_name {
            failure.cause = format!("{WITH_PATH_STYLE}: {}", failure.cause);
        } else if causes.no_http && !endpoint.is_https() {
            failure.cause = format!("{peer} does not speak http ({reasons})");
            failure = failure.advise(format!(
                "if it speaks https, write endpoint_url=https://{peer}"
            ));
        }
        if let Some(trouble) = &mut failure.again {
            trouble.timed_out = causes.timed_out;
            trouble.refused = causes.refused;
        }
        failure
    }
}

/// What an error and its sources say.
#[derive(Default)]
pub(super) struct Causes {
    /// All of it in one line.
    pub(super) text: String,
    /// Why a certificate was refused.
    certificate: Option<CertificateError>,
    /// DNS does not know the name, or the certificate is for another.
    wrong_name: bool,
    timed_out: bool,
    /// Nobody listens there.
    refused: bool,
    /// The bytes received are not TLS, or not HTTP.
    no_tls: bool,
    no_http: bool,
    /// The proxy that failed.
    proxy: Option<String>,
}

impl Causes {
    pub(super) fn of(e: &(dyn std::error::Error + 'static)) -> Self {
        let mut causes = Causes::default();
        let mut reasons: Vec<String> = Vec::new();
        let mut next = Some(e);
        while let Some(e) = next {
            let mut cause = e.source();
            if let Some(io) = e.downcast_ref::<io::Error>() {
                causes.timed_out |= io.kind() == io::ErrorKind::TimedOut;
                causes.refused |= io.kind() == io::ErrorKind::ConnectionRefused;
                // An io::Error shows what it wraps, but does not give it as its source.
                if let Some(inner) = io.get_ref() {
                    cause = Some(inner as &(dyn std::error::Error + 'static));
                }
            }
            if let Some(e) = e.downcast_ref::<rustls::Error>() {
                if let rustls::Error::InvalidCertificate(refused) = e {
                    causes.certificate = Some(refused.clone());
                }
                causes.no_tls |= matches!(
                    e,
                    rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)
                );
            }
            if let Some(e) = e.downcast_ref::<hyper::Error>() {
                causes.no_http |= e.is_parse();
            }
            causes.wrong_name |= e.is::<Unresolved>();
            if let Some(e) = e.downcast_ref::<ProxyError>() {
                causes.proxy = Some(e.proxy.clone());
            }
            let reason = e.to_string();
            // hyper's own layers say nothing that a reader could use.
            let empty = reason.starts_with("client error");
            if !empty && !reasons.iter().any(|earlier| earlier.contains(&reason)) {
                reasons.push(reason);
            }
            next = cause;
        }
        causes.wrong_name |= matches!(
            causes.certificate,
            Some(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
            )
        );
        causes.text = reasons.join(": ");
        causes
    }

    /// If a certificate was refused, why it was, and what to do about it. `reasons` is what to show of
    /// the text.
    pub(super) fn untrusted(&self, peer: &str, reasons: &str) -> Option<(String, &'static str)> {
        let (why, advice) = why_refused(self.certificate.as_ref()?, reasons);
        let peer = match &self.proxy {
            Some(proxy) => format!("the proxy {proxy}"),
            None => peer.to_owned(),
        };
        Some((format!("the certificate of {peer} {why}"), advice))
    }
}

/// What is wrong with a certificate, and what to do about it. `reasons` is what rustls says.
fn why_refused(refused: &CertificateError, reasons: &str) -> (String, &'static str) {
    match refused {
        CertificateError::ExpiredContext { not_after, .. } => (
            format!("expired on {}", moment(not_after)),
            "have it renewed, or set the clock of this machine if it is wrong",
        ),
        CertificateError::NotValidYetContext { not_before, .. } => (
            format!("is not valid before {}", moment(not_before)),
            "set the clock of this machine if it is wrong",
        ),
        CertificateError::NotValidForNameContext { presented, .. } if !presented.is_empty() => {
            // As in `DnsName("s3.example")` and `IpAddress(192.0.2.1)`.
            let name = |shown: &'_ String| {
                let (_, name) = shown.split_once('(').unwrap_or(("", shown));
                name.trim_matches(['"', ')']).to_owned()
            };
            let names = first_few(presented.iter().map(name), NAMES);
            (format!("is for {names}"), "check endpoint_url")
        }
        _ => (
            match refused {
                CertificateError::UnknownIssuer => "is not trusted (unknown issuer)".to_owned(),
                // As `openssl req -x509` makes them.
                CertificateError::Other(why) if why.to_string().contains("CaUsedAsEndEntity") => {
                    "is not trusted (it is a CA's, and not in AWS_CA_BUNDLE)".to_owned()
                }
                _ => format!("is not trusted ({reasons})"),
            },
            "if a CA of your own has signed it, set AWS_CA_BUNDLE to its PEM file",
        ),
    }
}

/// A day and a minute, for people.
fn moment(time: &UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    let moment = OffsetDateTime::from_unix_timestamp(seconds).ok();
    let format = format_description!("[year]-[month]-[day] [hour]:[minute] UTC");
    let shown = moment.and_then(|moment| moment.format(&format).ok());
    shown.unwrap_or_else(|| format!("second {seconds} of UNIX time"))
}
