//! One operation: what rusoto's request has no field for, and the error if it fails.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;

use super::page::Listing;
use super::remote::Remote;
use super::response::Refusal;
use crate::quote::printable;
use crate::retry::Trouble;
use crate::store::{Kind, StoreError, UploadBody};

/// What the success of a request looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expect {
    /// An object's bytes, streamed.
    Object,
    /// Headers that describe an object.
    Description,
    /// An ETag, and no body.
    ETag,
    /// No body. If there is no ETag, the caller checks that the object is there.
    Stored,
    /// A status.
    Nothing,
    /// XML under this root, as long as a listing may be.
    Listing(&'static str),
    /// XML with this element.
    XmlWith(&'static str),
    /// XML under this root.
    Xml(&'static str),
}

pub(super) struct Call {
    /// What is being done, as in "{doing} KEY".
    pub(super) doing: &'static str,
    /// `None`: the bucket's own.
    pub(super) key: Option<String>,
    pub(super) body: Option<Arc<dyn UploadBody>>,
    /// Sent instead of rusoto's payload.
    pub(super) payload: Option<Bytes>,
    /// Receives the response body, which rusoto then does not parse.
    pub(super) kept: Option<Arc<Mutex<Bytes>>>,
    /// Receives the page of a listing, which rusoto then does not parse.
    pub(super) page: Option<Arc<Mutex<Listing>>>,
    /// The bytes that are asked for.
    pub(super) range: Option<Range<u64>>,
    pub(super) expect: Expect,
    /// The store may need minutes before it responds.
    pub(super) slow: bool,
    /// It creates an upload whose id only the response gives.
    pub(super) begins_upload: bool,
    failure: Mutex<Option<StoreError>>,
    /// Room for the response in memory.
    room: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Call {
    pub(super) fn new(doing: &'static str, key: Option<&str>, expect: Expect) -> Self {
        Call {
            doing,
            key: key.map(str::to_owned),
            body: None,
            payload: None,
            kept: None,
            page: None,
            range: None,
            expect,
            slow: false,
            begins_upload: false,
            failure: Mutex::new(None),
            room: Mutex::new(None),
        }
    }

    pub(super) fn with_body(mut self, body: Arc<dyn UploadBody>) -> Self {
        self.body = Some(body);
        self
    }

    pub(super) fn with_payload(mut self, payload: impl Into<Bytes>) -> Self {
        self.payload = Some(payload.into());
        self
    }

    pub(super) fn keeping(mut self, kept: &Arc<Mutex<Bytes>>) -> Self {
        self.kept = Some(Arc::clone(kept));
        self
    }

    pub(super) fn reading(mut self, page: &Arc<Mutex<Listing>>) -> Self {
        self.page = Some(Arc::clone(page));
        self
    }

    pub(super) fn with_range(mut self, range: Option<Range<u64>>) -> Self {
        self.range = range;
        self
    }

    pub(super) fn slow(mut self) -> Self {
        self.slow = true;
        self
    }

    pub(super) fn begins_upload(mut self) -> Self {
        self.begins_upload = true;
        self
    }

    /// Keeps the room until the call is done.
    pub(super) fn hold(&self, room: Option<OwnedSemaphorePermit>) {
        *self.room.lock() = room;
    }

    pub(super) fn fail(&self, error: StoreError) {
        *self.failure.lock() = Some(error);
    }

    /// Why the dispatcher failed, if it did.
    pub(super) fn failure(&self) -> Option<StoreError> {
        self.failure.lock().take()
    }
}

/// A try that failed.
pub(super) struct Failure {
    pub(super) kind: Kind,
    pub(super) status: Option<u16>,
    /// Why, in words that begin a message.
    pub(super) cause: String,
    /// What to try.
    pub(super) advice: Option<String>,
    /// The kind of trouble, if it may pass.
    pub(super) again: Option<Trouble>,
    /// Whether other credentials may help.
    pub(super) renew: bool,
    /// Whether it has nothing to do with the object.
    pub(super) general: bool,
    /// What the store said.
    pub(super) refusal: Option<Box<Refusal>>,
}

impl Failure {
    pub(super) fn new(kind: Kind, cause: impl Into<String>) -> Self {
        Failure {
            kind,
            status: None,
            cause: cause.into(),
            advice: None,
            again: None,
            renew: false,
            general: false,
            refusal: None,
        }
    }

    /// One that every request would meet.
    pub(super) fn general(kind: Kind, cause: &anyhow::Error) -> Self {
        Failure {
            general: true,
            ..Failure::new(kind, format!("{cause:#}"))
        }
    }

    /// One that may pass.
    pub(super) fn passing(kind: Kind, cause: impl Into<String>) -> Self {
        Failure {
            again: Some(Trouble::default()),
            ..Failure::new(kind, cause)
        }
    }

    /// The response is not one that S3 sends.
    pub(super) fn unexpected(remote: &Remote, what: &str) -> Self {
        let peer = remote.endpoint.name();
        Failure::passing(
            Kind::Nonsense,
            format!("unexpected response from {peer}: {what}"),
        )
    }

    pub(super) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// The error that the caller gets: cause, tries, object, advice.
    pub(super) fn into_error(
        self,
        remote: &Remote,
        call: &Call,
        tries: Option<&str>,
    ) -> StoreError {
        let subject = match &call.key {
            Some(key) => format!("s3://{}/{key}", remote.bucket),
            None => format!("s3://{}", remote.bucket),
        };
        let mut message = self.cause;
        if let Some(tries) = tries {
            message.push_str(&format!(" ({tries})"));
        }
        if !self.general {
            message.push_str(&format!(", {} {}", call.doing, printable(&subject)));
        }
        if let Some(advice) = &self.advice {
            message.push_str(&format!("; {advice}"));
        }
        StoreError {
            kind: self.kind,
            status: self.status,
            code: self.refusal.and_then(|refusal| refusal.code),
            message,
            located: !self.general,
        }
    }
}
