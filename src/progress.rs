//! What a person or a log sees during a run. Progress only observes: workers update atomics, and a
//! display failure (a closed pipe, a lost terminal) never reaches them.
//!
//! Each form of output is a `View`: `events` writes rawjson, `lines` plain text, and `bars`
//! draws on a terminal.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use serde_json::Value;

use crate::cache::digest::Digest;

mod bars;
mod events;
mod lines;
#[cfg(test)]
mod tests;

use bars::Bars;
use events::Events;
use lines::Lines;

/// How progress is shown: buildx's `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Display {
    /// tty on a terminal, else plain
    Auto,
    /// one line for each thing that happened
    Plain,
    /// bars, if stderr is a terminal, else plain
    Tty,
    /// results, warnings and errors only
    // buildx has it by this name too.
    #[value(alias = "none")]
    Quiet,
    /// one JSON object a line
    Rawjson,
}

/// What is done to a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Upload,
    Download,
    Refresh,
    /// Within the store.
    Copy,
    /// A local blob, for its diffID or for `--verify`.
    Hash,
}

impl Verb {
    fn infinitive(self) -> &'static str {
        match self {
            Verb::Upload => "upload",
            Verb::Download => "download",
            Verb::Refresh => "refresh",
            Verb::Copy => "copy",
            Verb::Hash => "hash",
        }
    }

    fn present(self) -> &'static str {
        match self {
            Verb::Upload => "uploading",
            Verb::Download => "downloading",
            Verb::Refresh => "refreshing",
            Verb::Copy => "copying",
            Verb::Hash => "hashing",
        }
    }

    fn past(self) -> &'static str {
        match self {
            Verb::Upload => "uploaded",
            Verb::Download => "downloaded",
            Verb::Refresh => "refreshed",
            Verb::Copy => "copied",
            Verb::Hash => "hashed",
        }
    }
}

/// `1 layer`, `2 layers`.
pub fn count(n: u64, what: &str) -> String {
    match n {
        1 => format!("1 {what}"),
        _ => format!("{n} {what}s"),
    }
}

/// How long ago: `42 s`, `5 min`, `3 h`, `12 d`, in whole units.
pub fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        // Up to two days, hours are more informative.
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Three digits of a size, in binary units: `159 B`, `1.20 MiB`, `62.9 MiB`, `1023 MiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    // Rounded as it will be shown, or 1023.9 KiB would become 1024 KiB.
    let mut size = n as f64 / 1024.0;
    let mut unit = 0;
    while size >= 1023.5 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    let decimals = match size {
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{size:.decimals$} {}", UNITS[unit])
}

/// Time since 1970 that never goes backwards.
type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// A form of output. Workers call it, so it must be quick and cannot fail.
trait View: Send + Sync {
    fn stage(&self, stage: &Arc<Tally>);
    fn blob(&self, step: Step, blob: &Arc<Flight>);
    /// More bytes of the blob have moved. Called for each chunk.
    fn moved(&self, blob: &Flight);
    fn message(&self, kind: Kind, text: &str);
    fn result(&self, fields: &Value);
    /// Runs `print` while the bars are off the terminal.
    fn suspend(&self, print: &mut dyn FnMut());
    /// Removes whatever would be in the way of later output.
    fn end(&self);
}

/// What happens to a blob.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Start,
    Waiting,
    Done,
    /// Another process did the work.
    Present,
    Failed,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Note,
    Retry,
    Debug,
    Summary,
    Warning,
    Error,
}

/// Cheap to clone; every clone shows on the same screen.
#[derive(Clone)]
pub struct Progress {
    hub: Arc<Hub>,
}

/// One blob in flight. Dropped before `done` or `present`, it counts as failed.
pub struct Blob {
    hub: Arc<Hub>,
    flight: Arc<Flight>,
    finished: AtomicBool,
}

/// What all clones share.
struct Hub {
    /// `None` shows nothing.
    view: Option<Arc<dyn View>>,
    verbose: bool,
    clock: Clock,
    stage: Mutex<Arc<Tally>>,
    /// Blobs are no longer shown.
    over: AtomicBool,
}

/// The numbers of a stage. A blob counts in the stage in which it began, even if the next one has
/// begun since.
#[derive(Default)]
struct Tally {
    title: String,
    /// Milliseconds of the clock.
    began: u64,
    /// As announced; 0 if unknown.
    expected_blobs: u64,
    expected_bytes: u64,
    /// Blobs that have begun, and the bytes that they were to move.
    begun: AtomicU64,
    claimed: AtomicU64,
    /// Expected bytes that turned out not to need moving.
    skipped: AtomicU64,
    done: AtomicU64,
    /// Bytes done, and how many of those an earlier run had moved.
    current: AtomicU64,
    resumed: AtomicU64,
    /// Plain mode: when the stage's next line is due, when the last one was written, and the bytes moved
    /// by then.
    next_line: AtomicU64,
    last_line: AtomicU64,
    last_moved: AtomicU64,
    /// Blobs for which plain mode has written a final line.
    told: AtomicU64,
    /// Plain mode has said that the run is waiting for other processes.
    waiting: AtomicBool,
}

impl Tally {
    fn blobs(&self) -> u64 {
        self.expected_blobs.max(self.begun.load(Relaxed))
    }

    fn bytes(&self) -> u64 {
        let skipped = self.skipped.load(Relaxed);
        let expected = self.expected_bytes.saturating_sub(skipped);
        expected.max(self.claimed.load(Relaxed))
    }

    /// Bytes that this run has moved.
    fn moved(&self) -> u64 {
        let resumed = self.resumed.load(Relaxed);
        self.current.load(Relaxed).saturating_sub(resumed)
    }
}

/// A blob in flight as the views see it.
struct Flight {
    verb: Verb,
    digest: Digest,
    bytes: u64,
    /// Milliseconds of the clock.
    began: u64,
    stage: Arc<Tally>,
    current: AtomicU64,
    resumed: AtomicU64,
    /// Another process is working on it.
    waiting: AtomicBool,
    /// When rawjson may write the next progress event.
    next_event: AtomicU64,
}

impl Flight {
    fn moved(&self) -> u64 {
        let resumed = self.resumed.load(Relaxed);
        self.current.load(Relaxed).saturating_sub(resumed)
    }
}

impl Progress {
    /// Shows on stderr. `verbosity` counts: below 0 only summaries, warnings and errors are shown, from 1 on
    /// debug messages as well. Where the terminal cannot show bars (no terminal, `TERM=dumb`), they
    /// become plain lines.
    pub fn new(display: Display, verbosity: i8) -> Self {
        let stderr = std::io::stderr();
        let quiet = display == Display::Quiet || verbosity < 0;
        let capable = stderr.is_terminal()
            && std::env::var_os("TERM").is_some_and(|term| !term.is_empty() && term != "dumb");
        let coloured = lines::is_coloured(&stderr);
        let clock = clock();
        let out = Box::new(stderr);
        let view: Arc<dyn View> = match display {
            Display::Rawjson => Arc::new(Events::new(out, clock.clone(), quiet)),
            Display::Auto | Display::Tty if capable && !quiet => {
                let bars = Arc::new(Bars::new(out, bars::size, clock.clone(), coloured));
                bars::keep_drawing(&bars);
                bars
            }
            _ if quiet => Arc::new(Lines::quiet(out, clock.clone(), coloured)),
            _ => Arc::new(Lines::new(out, clock.clone(), coloured, verbosity > 0)),
        };
        Self::with(Some(view), verbosity > 0 && !quiet, clock)
    }

    /// Shows nothing at all: for tests and benchmarks.
    pub fn silent() -> Self {
        Self::with(None, false, clock())
    }

    /// The same screen without blobs: other output has priority there.
    pub fn without_blobs(&self) -> Self {
        let view = self.hub.view.clone();
        let progress = Self::with(view, self.hub.verbose, self.hub.clock.clone());
        progress.hub.over.store(true, Relaxed);
        progress
    }

    fn with(view: Option<Arc<dyn View>>, verbose: bool, clock: Clock) -> Self {
        let hub = Hub {
            view,
            verbose,
            clock,
            stage: Mutex::default(),
            over: AtomicBool::new(false),
        };
        hub.begin("", 0, 0);
        Progress { hub: Arc::new(hub) }
    }

    /// A new stage of the work, with the blobs and bytes that it is expected to move: 0 and 0 while
    /// that is unknown.
    pub fn stage(&self, title: &str, blobs: u64, bytes: u64) {
        let stage = self.hub.begin(title, blobs, bytes);
        if let Some(view) = &self.hub.view {
            view.stage(&stage);
        }
    }

    /// Work on a blob of `bytes` begins.
    pub fn blob(&self, verb: Verb, digest: &Digest, bytes: u64) -> Arc<Blob> {
        let now = self.hub.now();
        let stage = self.hub.stage.lock().clone();
        stage.begun.fetch_add(1, Relaxed);
        stage.claimed.fetch_add(bytes, Relaxed);
        let flight = Arc::new(Flight {
            verb,
            digest: *digest,
            bytes,
            began: now,
            stage,
            current: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            waiting: AtomicBool::new(false),
            next_event: AtomicU64::new(now.saturating_add(events::INTERVAL)),
        });
        self.hub.blob(Step::Start, &flight);
        Arc::new(Blob {
            hub: Arc::clone(&self.hub),
            flight,
            finished: AtomicBool::new(false),
        })
    }

    /// Something worth a line.
    pub fn note(&self, text: &str) {
        self.message(Kind::Note, text);
    }

    /// Something went wrong and is tried again. Shown in every mode except quiet.
    pub fn retry(&self, text: &str) {
        self.message(Kind::Retry, text);
    }

    /// Something worth a line only with `-v`.
    pub fn debug(&self, text: &str) {
        if self.hub.verbose {
            self.message(Kind::Debug, text);
        }
    }

    /// A warning: shown in every mode.
    pub fn warn(&self, text: &str) {
        self.message(Kind::Warning, text);
    }

    /// What made the run fail: shown in every mode.
    pub fn error(&self, text: &str) {
        self.message(Kind::Error, text);
    }

    /// The result of one spec: an event in rawjson, nothing in other modes, whose summary goes to
    /// stdout.
    pub fn result(&self, fields: &Value) {
        if let Some(view) = &self.hub.view {
            view.result(fields);
        }
    }

    /// A closing summary that cannot go to stdout: shown in every mode.
    pub fn summary(&self, text: &str) {
        for line in text.lines() {
            self.message(Kind::Summary, line);
        }
    }

    /// Runs `print`, which writes to stdout, with the bars off the screen.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        let Some(view) = &self.hub.view else {
            return print();
        };
        let mut print = Some(print);
        let mut printed = None;
        view.suspend(&mut || printed = print.take().map(|print| print()));
        printed.expect("every view calls it")
    }

    /// Removes the bars for good and stops showing blobs: tasks that outlive the run may still drop some.
    /// Messages continue. Idempotent.
    pub fn end(&self) {
        self.hub.over.store(true, Relaxed);
        if let Some(view) = &self.hub.view {
            view.end();
        }
    }

    fn message(&self, kind: Kind, text: &str) {
        if let Some(view) = &self.hub.view {
            view.message(kind, text);
        }
    }
}

impl Hub {
    /// Milliseconds of the clock.
    fn now(&self) -> u64 {
        milliseconds(&self.clock)
    }

    fn begin(&self, title: &str, blobs: u64, bytes: u64) -> Arc<Tally> {
        let now = self.now();
        let stage = Arc::new(Tally {
            title: title.to_owned(),
            began: now,
            expected_blobs: blobs,
            expected_bytes: bytes,
            next_line: AtomicU64::new(now.saturating_add(lines::INTERVAL)),
            last_line: AtomicU64::new(now),
            ..Tally::default()
        });
        *self.stage.lock() = stage.clone();
        stage
    }

    fn blob(&self, step: Step, flight: &Arc<Flight>) {
        if let Some(view) = &self.view
            && !self.over.load(Relaxed)
        {
            view.blob(step, flight);
        }
    }
}

impl Blob {
    /// `bytes` more have moved.
    pub fn advance(&self, bytes: u64) {
        let flight = &*self.flight;
        // The stage is updated first here and last in `take_back`, so it never falls below its blobs' sum.
        flight.stage.current.fetch_add(bytes, Relaxed);
        flight.current.fetch_add(bytes, Relaxed);
        if flight.waiting.load(Relaxed) {
            flight.waiting.store(false, Relaxed);
        }
        if let Some(view) = &self.hub.view
            && !self.hub.over.load(Relaxed)
        {
            view.moved(flight);
        }
    }

    /// An earlier run left this many bytes: they count as done, but not in the rate.
    pub fn resumed(&self, bytes: u64) {
        let flight = &*self.flight;
        flight.stage.resumed.fetch_add(bytes, Relaxed);
        flight.stage.current.fetch_add(bytes, Relaxed);
        flight.resumed.fetch_add(bytes, Relaxed);
        flight.current.fetch_add(bytes, Relaxed);
        flight.waiting.store(false, Relaxed);
    }

    /// This many bytes must be moved again; those of an earlier run are subtracted last.
    pub fn take_back(&self, bytes: u64) {
        let flight = &*self.flight;
        let before = flight
            .current
            .fetch_update(Relaxed, Relaxed, |now| Some(now.saturating_sub(bytes)))
            .unwrap_or_default();
        let left = before.saturating_sub(bytes);
        let resumed = flight.resumed.fetch_min(left, Relaxed);
        let lost = resumed.saturating_sub(left);
        flight.stage.resumed.fetch_sub(lost, Relaxed);
        flight.stage.current.fetch_sub(before - left, Relaxed);
    }

    /// Another process is working on the same blob; nothing moves here until it ends.
    pub fn waiting(&self) {
        // A waiting blob may report it more than once.
        if !self.flight.waiting.swap(true, Relaxed) {
            self.hub.blob(Step::Waiting, &self.flight);
        }
    }

    /// Finished.
    pub fn done(&self) {
        self.finish(Step::Done);
    }

    /// Finished: another process did it, so nothing had to be moved.
    pub fn present(&self) {
        self.finish(Step::Present);
    }

    fn finish(&self, step: Step) {
        if self.finished.swap(true, Relaxed) {
            return;
        }
        // Bytes that did not pass through here (a server-side copy, a part already there) are no longer
        // expected; counting them as moved would distort the rate.
        let flight = &self.flight;
        let rest = flight.bytes.saturating_sub(flight.current.load(Relaxed));
        flight.stage.claimed.fetch_sub(rest, Relaxed);
        flight.stage.skipped.fetch_add(rest, Relaxed);
        flight.stage.done.fetch_add(1, Relaxed);
        self.hub.blob(step, flight);
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        if self.finished.swap(true, Relaxed) {
            return;
        }
        let (flight, stage) = (&self.flight, &self.flight.stage);
        stage
            .resumed
            .fetch_sub(flight.resumed.load(Relaxed), Relaxed);
        stage
            .current
            .fetch_sub(flight.current.load(Relaxed), Relaxed);
        stage.claimed.fetch_sub(flight.bytes, Relaxed);
        stage.begun.fetch_sub(1, Relaxed);
        self.hub.blob(Step::Failed, flight);
    }
}

/// Whether the time in `next` has come. If so, postpones it; only one caller gets `true`.
fn is_due(next: &AtomicU64, now: u64, interval: u64) -> bool {
    let at = next.load(Relaxed);
    now >= at
        && next
            .compare_exchange(at, now.saturating_add(interval), Relaxed, Relaxed)
            .is_ok()
}

/// 100 only when everything is done; 0 of 0 is 0.
fn percent(current: u64, total: u64) -> u8 {
    let percent = u128::from(current.min(total)) * 100 / u128::from(total.max(1));
    u8::try_from(percent).unwrap_or(100)
}

/// A digest's first 12 hex digits, as docker shows them.
fn short(digest: &Digest) -> String {
    let mut hex = digest.hex();
    hex.truncate(12);
    hex
}

/// One write per line, so that lines of several processes do not mix.
fn write_line(out: &mut dyn Write, mut line: String) {
    line.push('\n');
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

fn clock() -> Clock {
    let (start, from) = (Instant::now(), SystemTime::now());
    let from = from
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Arc::new(move || from.saturating_add(start.elapsed()))
}

fn milliseconds(clock: &Clock) -> u64 {
    u64::try_from(clock().as_millis()).unwrap_or(u64::MAX)
}
