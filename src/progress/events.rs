//! rawjson: one JSON object a line, for programs.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use time::macros::format_description;

use super::{Clock, Flight, Kind, Step, Tally, View, is_due, milliseconds, write_line};
use crate::cache::digest::Digest;
use crate::quote::is_unprintable;

/// Milliseconds between progress events of one blob.
pub(super) const INTERVAL: u64 = 200;

pub(super) struct Events {
    out: Mutex<Box<dyn Write + Send>>,
    clock: Clock,
    /// Warnings, errors and results only.
    quiet: bool,
}

#[derive(Default, Serialize)]
struct Event<'a> {
    time: String,
    event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    activity: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<&'a Digest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    current: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resumed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    fields: Option<&'a Value>,
}

impl<'a> Event<'a> {
    fn of(event: &'static str, blob: &'a Flight) -> Self {
        let resumed = blob.resumed.load(Relaxed);
        Event {
            event,
            activity: Some(blob.verb.infinitive()),
            digest: Some(&blob.digest),
            total: Some(blob.bytes),
            resumed: (resumed > 0).then_some(resumed),
            ..Event::default()
        }
    }
}

impl Events {
    pub(super) fn new(out: Box<dyn Write + Send>, clock: Clock, quiet: bool) -> Self {
        Events {
            out: Mutex::new(out),
            clock,
            quiet,
        }
    }

    fn write(&self, mut event: Event<'_>) {
        if self.quiet && !matches!(event.event, "warning" | "error" | "result") {
            return;
        }
        event.time = timestamp((self.clock)());
        if let Ok(json) = serde_json::to_string(&event) {
            write_line(&mut **self.out.lock(), printable_json(json));
        }
    }
}

impl View for Events {
    fn stage(&self, stage: &Arc<Tally>) {
        self.write(Event {
            event: "stage",
            total: (stage.expected_bytes > 0).then_some(stage.expected_bytes),
            text: Some(&stage.title),
            ..Event::default()
        });
    }

    fn blob(&self, step: Step, blob: &Arc<Flight>) {
        let current = || Some(blob.current.load(Relaxed));
        self.write(match step {
            Step::Start => Event::of("start", blob),
            Step::Waiting => Event::of("waiting", blob),
            Step::Done => Event::of("done", blob),
            Step::Present => Event::of("present", blob),
            Step::Failed => Event {
                current: current(),
                ..Event::of("failed", blob)
            },
        });
    }

    fn moved(&self, blob: &Flight) {
        if is_due(&blob.next_event, milliseconds(&self.clock), INTERVAL) {
            self.write(Event {
                current: Some(blob.current.load(Relaxed)),
                ..Event::of("progress", blob)
            });
        }
    }

    fn message(&self, kind: Kind, text: &str) {
        self.write(Event {
            event: match kind {
                // The fields of the `result` event say the same.
                Kind::Note | Kind::Summary => "note",
                Kind::Retry => "retry",
                Kind::Debug => "debug",
                Kind::Warning => "warning",
                Kind::Error => "error",
            },
            text: Some(text),
            ..Event::default()
        });
    }

    fn result(&self, fields: &Value) {
        self.write(Event {
            event: "result",
            fields: Some(fields),
            ..Event::default()
        });
    }

    fn suspend(&self, print: &mut dyn FnMut()) {
        print();
    }

    fn end(&self) {}
}

/// JSON leaves DEL, the C1 controls and others as they are, and a terminal may obey them. Only
/// strings can hold them, so escaping them keeps the document the same.
fn printable_json(json: String) -> String {
    if !json.contains(is_unprintable) {
        return json;
    }
    let mut escaped = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if is_unprintable(c) {
            escaped.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// RFC 3339, UTC, milliseconds.
fn timestamp(since_1970: Duration) -> String {
    let nanos = i128::try_from(since_1970.as_nanos()).unwrap_or_default();
    OffsetDateTime::from_unix_timestamp_nanos(nanos)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
        .format(format_description!(
            "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z"
        ))
        .unwrap_or_default()
}
