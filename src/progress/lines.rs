//! Plain text, for logs: one line per event, elapsed seconds first. Warnings and errors begin with
//! their label instead, so that they are easy to search for.

use std::io::{Stderr, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use anstyle::AnsiColor;
use parking_lot::Mutex;
use serde_json::Value;

use super::{
    Clock, Flight, Kind, Step, Tally, View, bytes, is_due, milliseconds, percent, short, write_line,
};
use crate::quote::printable;

/// Milliseconds between two status lines of a stage.
pub(super) const INTERVAL: u64 = 10_000;

/// Up to this many blobs in a stage, each gets its own line.
const EACH: u64 = 20;

pub(super) struct Lines {
    out: Mutex<Box<dyn Write + Send>>,
    clock: Clock,
    /// Milliseconds of the clock.
    began: u64,
    coloured: bool,
    /// Summaries, warnings and errors only.
    quiet: bool,
    verbose: bool,
}

impl Lines {
    pub(super) fn new(
        out: Box<dyn Write + Send>,
        clock: Clock,
        coloured: bool,
        verbose: bool,
    ) -> Self {
        Lines {
            out: Mutex::new(out),
            began: milliseconds(&clock),
            clock,
            coloured,
            quiet: false,
            verbose,
        }
    }

    /// Shows summaries, warnings and errors only.
    pub(super) fn quiet(out: Box<dyn Write + Send>, clock: Clock, coloured: bool) -> Self {
        Lines {
            quiet: true,
            ..Lines::new(out, clock, coloured, false)
        }
    }

    fn write(&self, text: &str) {
        self.write_to(&mut **self.out.lock(), text);
    }

    fn write_to(&self, out: &mut dyn Write, text: &str) {
        let elapsed = milliseconds(&self.clock).saturating_sub(self.began);
        let (seconds, tenths) = (elapsed / 1000, elapsed % 1000 / 100);
        let line = format!("{seconds:>3}.{tenths}s {}", printable(text));
        write_line(out, line);
    }

    /// The final line of a blob, with the count of such lines.
    fn write_ended(&self, stage: &Tally, text: &str) {
        // Counted while no other line can be written, so that counts are in order.
        let mut out = self.out.lock();
        let told = stage.told.fetch_add(1, Relaxed).saturating_add(1);
        self.write_to(&mut **out, &format!("{}{text}", count(told, stage)));
    }

    /// The status of the blob's stage, if a line is due.
    fn state(&self, blob: &Flight) {
        let (stage, now) = (&*blob.stage, milliseconds(&self.clock));
        if self.quiet || !is_due(&stage.next_line, now, INTERVAL) {
            return;
        }
        let moved = stage.moved();
        let passed = now.saturating_sub(stage.last_line.swap(now, Relaxed));
        let rate = rate(
            moved.saturating_sub(stage.last_moved.swap(moved, Relaxed)),
            passed,
        );
        let (verb, total) = (blob.verb.present(), stage.bytes());
        let percent = percent(stage.current.load(Relaxed), total);
        self.write(&format!(
            "{}{verb}: {percent}% of {}, {rate}{}",
            count(stage.done.load(Relaxed), stage),
            bytes(total),
            resumed(", ", stage.resumed.load(Relaxed)),
        ));
    }

    /// One of many blobs has ended: writes a line about all of them if it was the last.
    fn ended(&self, blob: &Flight) {
        let stage = &*blob.stage;
        let is_last = stage.expected_blobs > 0 && stage.done.load(Relaxed) == stage.blobs();
        // Two that end at the same time may both look like the last.
        if !is_last || stage.next_line.swap(u64::MAX, Relaxed) == u64::MAX {
            return self.state(blob);
        }
        let passed = milliseconds(&self.clock).saturating_sub(stage.began);
        self.write(&format!(
            "{}{} {}, {}{}",
            count(stage.done.load(Relaxed), stage),
            blob.verb.past(),
            bytes(stage.current.load(Relaxed)),
            rate(stage.moved(), passed),
            resumed(", ", stage.resumed.load(Relaxed)),
        ));
    }
}

impl View for Lines {
    fn stage(&self, stage: &Arc<Tally>) {
        if !self.quiet {
            self.write(&match stage.expected_blobs {
                0 => stage.title.clone(),
                1 => format!("{} (1 blob, {})", stage.title, bytes(stage.expected_bytes)),
                n => format!(
                    "{} ({n} blobs, {})",
                    stage.title,
                    bytes(stage.expected_bytes)
                ),
            });
        }
    }

    fn blob(&self, step: Step, blob: &Arc<Flight>) {
        if self.quiet {
            return;
        }
        let verb = blob.verb;
        let name = format!("sha256:{} {}", short(&blob.digest), bytes(blob.bytes));
        let many = blob.stage.blobs() > EACH && !self.verbose;
        match step {
            Step::Start if self.verbose => self.write(&format!("{} {name}", verb.present())),
            Step::Start => {}
            Step::Waiting if many => {
                if !blob.stage.waiting.swap(true, Relaxed) {
                    self.write("waiting for other processes at work on the same blobs");
                }
            }
            Step::Waiting => self.write(&format!(
                "waiting for another process to {} {name}",
                verb.infinitive()
            )),
            Step::Done | Step::Present if many => self.ended(blob),
            Step::Done => {
                let resumed = blob.resumed.load(Relaxed);
                let resumed = self::resumed(", ", resumed);
                self.write_ended(&blob.stage, &format!("{} {name}{resumed}", verb.past()));
            }
            Step::Present => {
                let text = format!("another process {} {name}", verb.past());
                self.write_ended(&blob.stage, &text);
            }
            // Blobs stop when another fails or on a signal; the error names the cause.
            Step::Failed if self.verbose => self.write(&format!(
                "stopped {} sha256:{} after {} of {}",
                verb.present(),
                short(&blob.digest),
                bytes(blob.current.load(Relaxed)),
                bytes(blob.bytes)
            )),
            Step::Failed => {}
        }
    }

    fn moved(&self, blob: &Flight) {
        self.state(blob);
    }

    fn message(&self, kind: Kind, text: &str) {
        match kind {
            Kind::Summary | Kind::Warning | Kind::Error => {
                write_line(&mut **self.out.lock(), message(kind, text, self.coloured));
            }
            _ if self.quiet => {}
            Kind::Debug => self.write(&format!("debug: {text}")),
            Kind::Note | Kind::Retry => self.write(text),
        }
    }

    fn result(&self, _: &Value) {}

    fn suspend(&self, print: &mut dyn FnMut()) {
        print();
    }

    fn end(&self) {}
}

/// A message as a terminal shows it, without a newline.
pub(super) fn message(kind: Kind, text: &str, coloured: bool) -> String {
    let text = printable(text);
    let (label, colour) = match kind {
        Kind::Note | Kind::Retry | Kind::Summary => return text.into_owned(),
        Kind::Debug => return format!("debug: {text}"),
        Kind::Warning => ("warning:", AnsiColor::Yellow),
        Kind::Error => ("error:", AnsiColor::Red),
    };
    if coloured {
        // Like clap's own errors.
        let style = colour.on_default().bold();
        format!("{style}{label}{style:#} {text}")
    } else {
        format!("{label} {text}")
    }
}

/// Whether labels are coloured: on a terminal with colours unless `NO_COLOR` or `CLICOLOR=0` is set,
/// and under `CLICOLOR_FORCE` always.
pub(super) fn is_coloured(stderr: &Stderr) -> bool {
    anstream::AutoStream::choice(stderr) != anstream::ColorChoice::Never
}

/// `[3/10] `, or nothing while the total is unknown.
fn count(done: u64, stage: &Tally) -> String {
    match stage.expected_blobs {
        0 => String::new(),
        _ => format!("[{done}/{}] ", stage.blobs()),
    }
}

fn rate(moved: u64, milliseconds: u64) -> String {
    let rate = u128::from(moved) * 1000 / u128::from(milliseconds.max(1));
    format!("{}/s", bytes(u64::try_from(rate).unwrap_or(u64::MAX)))
}

/// `before` and the bytes that an earlier run had moved, or nothing if there were none.
pub(super) fn resumed(before: &str, resumed: u64) -> String {
    match resumed {
        0 => String::new(),
        _ => format!("{before}{} resumed", bytes(resumed)),
    }
}
