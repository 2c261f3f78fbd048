//! What a person or a log sees while the work goes on: an observer, never a participant. The only
//! module that names indicatif.
//!
//! Those who work only touch atomics here. In plain and rawjson mode whoever finds that a line is
//! due writes it; on a terminal one thread draws ten times a second what the atomics say. Nothing
//! that goes wrong while showing (a closed pipe, a terminal that is gone) reaches the work.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use indicatif::{
    HumanBytes, HumanDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState,
    ProgressStyle,
};
use serde::Serialize;
use time::OffsetDateTime;
use time::macros::format_description;

use crate::cache::digest::Digest;

/// Milliseconds between two lines on the state of a stage in plain mode.
const PLAIN_INTERVAL: u64 = 10_000;
/// Milliseconds between two progress events of one blob in rawjson mode.
const RAW_INTERVAL: u64 = 200;
const REDRAW: Duration = Duration::from_millis(100);
/// Blobs that get a bar of their own, where the terminal is high enough.
const MOST_BARS: usize = 8;
/// Columns of the graphical part of a bar, its brackets and the blank behind it included.
const BAR_COLUMNS: usize = 22;

/// How progress is shown: buildx's `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// tty on a terminal, else plain
    Auto,
    /// one line for each thing that happened
    Plain,
    /// bars
    Tty,
    /// errors and warnings only
    // buildx has it by this name too.
    #[value(alias = "none")]
    Quiet,
    /// one JSON object a line
    Rawjson,
}

/// What is being done with a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    Upload,
    Download,
    Refresh,
    /// Hashing a local blob for its diffID, or for `--verify`.
    Hash,
}

impl Activity {
    /// The verb: infinitive, present and past participle.
    fn verb(self) -> [&'static str; 3] {
        match self {
            Activity::Upload => ["upload", "uploading", "uploaded"],
            Activity::Download => ["download", "downloading", "downloaded"],
            Activity::Refresh => ["refresh", "refreshing", "refreshed"],
            Activity::Hash => ["hash", "hashing", "hashed"],
        }
    }
}

/// `n` bytes as people read them, in binary units: `159 B`, `1.20 MiB`.
pub fn bytes(n: u64) -> String {
    HumanBytes(n).to_string()
}

/// `text` with everything escaped that could move the cursor, change colours or reorder what is
/// read: names come from the network, and must not steer the terminal that shows them.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(unprintable) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if unprintable(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

/// Control characters, line and paragraph separators, and the marks that turn the writing direction.
fn unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Cheap to clone; every clone shows on the same screen.
#[derive(Clone)]
pub struct Progress {
    shared: Arc<Shared>,
}

/// One blob in flight. Dropped without `done`, it counts as failed.
pub struct Blob {
    shared: Arc<Shared>,
    stage: Arc<Stage>,
    activity: Activity,
    digest: Digest,
    bytes: u64,
    /// Bytes that are through; the thread that draws looks at it.
    current: Arc<AtomicU64>,
    /// When the next progress event may be written.
    next_event: AtomicU64,
    finished: AtomicBool,
    /// Of its `Flight` on a terminal.
    flight: u64,
}

struct Shared {
    sink: Sink,
    verbose: bool,
    /// Time since 1970 that never goes backwards.
    clock: Box<dyn Fn() -> Duration + Send + Sync>,
    stage: Mutex<Arc<Stage>>,
    /// Nothing is said of blobs any more.
    over: AtomicBool,
}

enum Sink {
    Silent,
    Lines {
        format: Format,
        out: Mutex<Box<dyn Write + Send>>,
    },
    Terminal(Mutex<Screen>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Plain,
    Quiet,
    Raw,
}

/// The numbers of a stage. Blobs count in the stage that they began in, also when the next one has
/// begun since.
#[derive(Default)]
struct Stage {
    /// What was said to be expected.
    expected_blobs: u64,
    expected_bytes: u64,
    /// Blobs that have begun, and their bytes that are, or were, to be moved.
    begun: AtomicU64,
    claimed: AtomicU64,
    /// Expected bytes that need not be moved after all.
    skipped: AtomicU64,
    done: AtomicU64,
    current: AtomicU64,
    /// When the next line on the state is due, in milliseconds of the clock; when the last one was
    /// written, and how many bytes were through then.
    next_line: AtomicU64,
    last_line: AtomicU64,
    last_current: AtomicU64,
}

impl Stage {
    fn blobs(&self) -> u64 {
        self.expected_blobs.max(self.begun.load(Relaxed))
    }

    fn bytes(&self) -> u64 {
        let expected = self
            .expected_bytes
            .saturating_sub(self.skipped.load(Relaxed));
        expected.max(self.claimed.load(Relaxed))
    }
}

/// What is on the terminal.
struct Screen {
    multi: MultiProgress,
    /// The bar for the whole; none before the first stage and after `clear`.
    whole: Option<ProgressBar>,
    flights: Vec<Flight>,
    next_flight: u64,
    /// Whether the thread that draws runs.
    drawing: bool,
}

/// A blob in flight as the thread that draws sees it.
struct Flight {
    id: u64,
    current: Arc<AtomicU64>,
    /// Made at once, so that it measures the rate from the blob's first byte on.
    bar: ProgressBar,
    seen: bool,
    /// Whether the bar is on the screen.
    shown: bool,
}

/// One line of rawjson.
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
    text: Option<&'a str>,
}

impl Progress {
    /// Shows on stderr. `verbose` adds debug lines to plain output, to bars and to rawjson. Bars
    /// that the terminal cannot show (no terminal, `TERM=dumb`) become plain lines.
    pub fn new(mode: Mode, verbose: bool) -> Self {
        let capable = std::io::stderr().is_terminal()
            && std::env::var_os("TERM").is_some_and(|term| !term.is_empty() && term != "dumb");
        if matches!(mode, Mode::Auto | Mode::Tty) && capable {
            let screen = Screen {
                multi: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()),
                whole: None,
                flights: Vec::new(),
                next_flight: 0,
                drawing: false,
            };
            Self::with(Sink::Terminal(Mutex::new(screen)), verbose, clock())
        } else {
            Self::with_writer(mode, verbose, Box::new(std::io::stderr()))
        }
    }

    /// Shows on `out`, which is no terminal: `Auto` and `Tty` write plain lines.
    pub fn with_writer(mode: Mode, verbose: bool, out: Box<dyn Write + Send>) -> Self {
        Self::with(lines(mode, out), verbose, clock())
    }

    /// Shows nothing at all: for tests and benchmarks.
    pub fn silent() -> Self {
        Self::with(Sink::Silent, false, clock())
    }

    fn with(sink: Sink, verbose: bool, clock: Box<dyn Fn() -> Duration + Send + Sync>) -> Self {
        let shared = Shared {
            sink,
            verbose,
            clock,
            stage: Mutex::default(),
            over: AtomicBool::new(false),
        };
        let progress = Progress {
            shared: Arc::new(shared),
        };
        progress.shared.begin(0, 0);
        progress
    }

    /// A new stage of the work, with what it is expected to move (0, 0 if not known).
    pub fn stage(&self, title: &str, blobs: u64, bytes: u64) {
        let stage = self.shared.begin(blobs, bytes);
        let event = Event {
            event: "stage",
            total: (bytes > 0).then_some(bytes),
            text: Some(title),
            ..Event::default()
        };
        self.shared.say(event, || match blobs {
            0 => title.to_string(),
            1 => format!("{title} (1 blob, {})", HumanBytes(bytes)),
            _ => format!("{title} ({blobs} blobs, {})", HumanBytes(bytes)),
        });
        if let Sink::Terminal(screen) = &self.shared.sink {
            let weak = Arc::downgrade(&self.shared);
            lock(screen).begin(stage, weak);
        }
    }

    /// A blob of `bytes` is being worked on.
    pub fn blob(&self, activity: Activity, digest: &Digest, bytes: u64) -> Arc<Blob> {
        let shared = &self.shared;
        let stage = lock(&shared.stage).clone();
        stage.begun.fetch_add(1, Relaxed);
        stage.claimed.fetch_add(bytes, Relaxed);
        let current = Arc::new(AtomicU64::new(0));
        let mut next_event = 0;
        let mut flight = 0;
        match &shared.sink {
            Sink::Silent => {}
            Sink::Lines { format, .. } => {
                if *format == Format::Raw {
                    next_event = shared.now().saturating_add(RAW_INTERVAL);
                }
                if *format == Format::Raw || shared.verbose {
                    let event = Event {
                        event: "start",
                        activity: Some(activity.verb()[0]),
                        digest: Some(digest),
                        total: Some(bytes),
                        ..Event::default()
                    };
                    shared.say(event, || {
                        let verb = activity.verb()[1];
                        format!("{verb} sha256:{} {}", short(digest), HumanBytes(bytes))
                    });
                }
            }
            Sink::Terminal(screen) => {
                let mut screen = lock(screen);
                flight = screen.next_flight;
                screen.next_flight += 1;
                let digest = *digest;
                let bar = ProgressBar::hidden().with_style(style(move |state, width| {
                    blob_line(width, activity, &digest, &Measure::of(state))
                }));
                bar.set_length(bytes);
                screen.flights.push(Flight {
                    id: flight,
                    current: current.clone(),
                    bar,
                    seen: false,
                    shown: false,
                });
            }
        }
        Arc::new(Blob {
            shared: shared.clone(),
            stage,
            activity,
            digest: *digest,
            bytes,
            current,
            next_event: AtomicU64::new(next_event),
            finished: AtomicBool::new(false),
            flight,
        })
    }

    /// Something worth a line.
    pub fn note(&self, text: &str) {
        self.shared.say_text("note", "", text);
    }

    /// Something worth a line only with --verbose.
    pub fn debug(&self, text: &str) {
        if self.shared.verbose {
            self.shared.say_text("debug", "debug: ", text);
        }
    }

    /// A warning: shown in every mode, quiet included.
    pub fn warn(&self, text: &str) {
        self.shared.say_text("warning", "warning: ", text);
    }

    /// What made the run fail: shown in every mode.
    pub fn error(&self, text: &str) {
        self.shared.say_text("error", "layercache: ", text);
    }

    /// Takes the bars away, so that what follows is printed on a clean line, and says no more of blobs:
    /// tasks that were left behind may still let go of some. Later calls on this or any clone are no
    /// error.
    pub fn end(&self) {
        self.shared.over.store(true, Relaxed);
        if let Sink::Terminal(screen) = &self.shared.sink {
            lock(screen).clear();
        }
    }
}

impl Blob {
    /// So many more bytes are through.
    pub fn advance(&self, bytes: u64) {
        // The stage first, here, and last where bytes are taken back: its sum never falls below
        // that of its blobs.
        self.stage.current.fetch_add(bytes, Relaxed);
        let current = self.current.fetch_add(bytes, Relaxed).saturating_add(bytes);
        if let Sink::Lines { format, .. } = &self.shared.sink {
            match format {
                Format::Plain => self.stage_line(),
                Format::Raw => self.progress_event(current),
                Format::Quiet => {}
            }
        }
    }

    /// So many bytes were for nothing, and come again.
    pub fn take_back(&self, bytes: u64) {
        let before = self
            .current
            .fetch_update(Relaxed, Relaxed, |now| Some(now.saturating_sub(bytes)))
            .unwrap_or_default();
        self.stage.current.fetch_sub(bytes.min(before), Relaxed);
    }

    /// Finished.
    pub fn done(&self) {
        if self.finished.swap(true, Relaxed) {
            return;
        }
        // What did not have to pass here (a server-side copy, a part that was there) is no longer
        // expected, rather than counted as moved: the rate would be a lie.
        let rest = self.bytes.saturating_sub(self.current.load(Relaxed));
        self.stage.claimed.fetch_sub(rest, Relaxed);
        self.stage.skipped.fetch_add(rest, Relaxed);
        self.stage.done.fetch_add(1, Relaxed);
        self.land();
        self.shared.say(self.event("done", None), || {
            let verb = self.activity.verb()[2];
            let bytes = HumanBytes(self.bytes);
            format!("{verb} sha256:{} {bytes}", short(&self.digest))
        });
    }

    fn failed(&self) {
        let current = self.current.load(Relaxed);
        self.stage.current.fetch_sub(current, Relaxed);
        self.stage.claimed.fetch_sub(self.bytes, Relaxed);
        self.stage.begun.fetch_sub(1, Relaxed);
        self.land();
        self.shared.say(self.event("failed", Some(current)), || {
            // Others stop where one failed, or the user said so: what failed is what the error says.
            format!(
                "stopped {} sha256:{} after {} of {}",
                self.activity.verb()[1],
                short(&self.digest),
                HumanBytes(current),
                HumanBytes(self.bytes)
            )
        });
    }

    /// Off the terminal.
    fn land(&self) {
        if let Sink::Terminal(screen) = &self.shared.sink {
            let mut screen = lock(screen);
            if let Some(at) = screen.flights.iter().position(|f| f.id == self.flight) {
                let flight = screen.flights.remove(at);
                screen.multi.remove(&flight.bar);
            }
        }
    }

    fn event(&self, event: &'static str, current: Option<u64>) -> Event<'_> {
        Event {
            event,
            activity: Some(self.activity.verb()[0]),
            digest: Some(&self.digest),
            total: Some(self.bytes),
            current,
            ..Event::default()
        }
    }

    /// The state of the stage, if a line on it is due.
    fn stage_line(&self) {
        if self.shared.over.load(Relaxed) {
            return;
        }
        let stage = &self.stage;
        let now = self.shared.now();
        if !due(&stage.next_line, now, PLAIN_INTERVAL) {
            return;
        }
        let current = stage.current.load(Relaxed);
        let moved = current.saturating_sub(stage.last_current.swap(current, Relaxed));
        let passed = now.saturating_sub(stage.last_line.swap(now, Relaxed));
        let rate = u128::from(moved) * 1000 / u128::from(passed.max(1));
        let total = stage.bytes();
        self.shared.line(&format!(
            "{} {}% of {}, {}/s, {} of {} blobs done",
            self.activity.verb()[1],
            percent(current, total),
            HumanBytes(total),
            HumanBytes(u64::try_from(rate).unwrap_or(u64::MAX)),
            stage.done.load(Relaxed),
            stage.blobs(),
        ));
    }

    fn progress_event(&self, current: u64) {
        if due(&self.next_event, self.shared.now(), RAW_INTERVAL) {
            let event = self.event("progress", Some(current));
            self.shared.say(event, String::new);
        }
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        if !self.finished.swap(true, Relaxed) {
            self.failed();
        }
    }
}

impl Shared {
    /// Milliseconds of the clock.
    fn now(&self) -> u64 {
        u64::try_from((self.clock)().as_millis()).unwrap_or(u64::MAX)
    }

    fn begin(&self, blobs: u64, bytes: u64) -> Arc<Stage> {
        let now = self.now();
        let stage = Arc::new(Stage {
            expected_blobs: blobs,
            expected_bytes: bytes,
            next_line: AtomicU64::new(now.saturating_add(PLAIN_INTERVAL)),
            last_line: AtomicU64::new(now),
            ..Stage::default()
        });
        *lock(&self.stage) = stage.clone();
        stage
    }

    fn say_text(&self, event: &'static str, label: &str, text: &str) {
        let event = Event {
            event,
            text: Some(text),
            ..Event::default()
        };
        self.say(event, || format!("{label}{text}"));
    }

    /// Shows an event: as JSON, or as the line that `plain` makes.
    fn say(&self, mut event: Event<'_>, plain: impl FnOnce() -> String) {
        if event.digest.is_some() && self.over.load(Relaxed) {
            return;
        }
        match &self.sink {
            Sink::Lines { format, .. } => match format {
                Format::Raw => {
                    event.time = timestamp((self.clock)());
                    if let Ok(json) = serde_json::to_string(&event) {
                        self.write(ascii_controls(json));
                    }
                }
                Format::Quiet if !matches!(event.event, "warning" | "error") => {}
                Format::Plain | Format::Quiet => self.line(&plain()),
            },
            // There the bars show how the blobs fare, and errors come from the caller.
            Sink::Terminal(_) if event.digest.is_some() => {}
            Sink::Terminal(_) => self.line(&plain()),
            Sink::Silent => {}
        }
    }

    fn line(&self, text: &str) {
        let text = printable(text);
        match &self.sink {
            Sink::Silent => {}
            Sink::Lines { .. } => self.write(text.into_owned()),
            Sink::Terminal(screen) => {
                let screen = lock(screen);
                // indicatif leaves the cursor at the end of a line that no bar follows.
                let _ = match screen.whole {
                    Some(_) => screen.multi.println(text),
                    None => std::io::stderr().write_all(format!("{text}\n").as_bytes()),
                };
            }
        }
    }

    /// One write a line, so that those of several processes do not mix.
    fn write(&self, mut line: String) {
        if let Sink::Lines { out, .. } = &self.sink {
            line.push('\n');
            let mut out = lock(out);
            let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
        }
    }
}

impl Screen {
    fn begin(&mut self, stage: Arc<Stage>, shared: Weak<Shared>) {
        match self.whole.take() {
            Some(last) => self.multi.remove(&last),
            None => self.multi.set_draw_target(ProgressDrawTarget::stderr()),
        }
        let bar = ProgressBar::hidden().with_style(style(move |state, width| {
            let done = stage.done.load(Relaxed);
            whole_line(width, done, stage.blobs(), &Measure::of(state))
        }));
        self.whole = Some(self.multi.insert(0, bar));
        if !self.drawing {
            self.drawing = std::thread::Builder::new()
                .name("progress".into())
                .spawn(move || draw(&shared))
                .is_ok();
        }
    }

    fn clear(&mut self) {
        if let Some(whole) = self.whole.take() {
            for flight in &mut self.flights {
                self.multi.remove(&flight.bar);
                flight.shown = false;
            }
            self.multi.remove(&whole);
            let _ = self.multi.clear();
            self.multi.set_draw_target(ProgressDrawTarget::hidden());
        }
    }

    /// Shows the numbers as they are now. False once there is nothing to show them on.
    fn draw(&mut self, stage: &Stage) -> bool {
        let Some(whole) = &self.whole else {
            self.drawing = false;
            return false;
        };
        // Three lines are left for the whole, and for what is said.
        let height = usize::from(console::Term::stderr().size().0);
        let room = height.saturating_sub(3).min(MOST_BARS);
        let mut shown = self.flights.iter().filter(|f| f.shown).count();
        for flight in &mut self.flights {
            // Small blobs, gone by the second look, never flicker across the screen.
            if flight.seen && !flight.shown && shown < room {
                self.multi.add(flight.bar.clone());
                flight.shown = true;
                shown += 1;
            }
            flight.seen = true;
            flight.bar.set_position(flight.current.load(Relaxed));
            flight.bar.tick();
        }
        whole.set_position(stage.current.load(Relaxed));
        whole.set_length(stage.bytes());
        true
    }
}

/// The thread that draws: ends with the bars.
fn draw(shared: &Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        if let Sink::Terminal(screen) = &shared.sink {
            let mut screen = lock(screen);
            let stage = lock(&shared.stage).clone();
            if !screen.draw(&stage) {
                return;
            }
        }
        drop(shared);
        std::thread::sleep(REDRAW);
    }
}

/// What a bar tells.
struct Measure {
    current: u64,
    total: u64,
    /// Bytes a second.
    rate: u64,
    /// `None` while it cannot be told.
    eta: Option<Duration>,
}

impl Measure {
    fn of(state: &ProgressState) -> Self {
        let rate = state.per_sec() as u64;
        Measure {
            current: state.pos(),
            total: state.len().unwrap_or_default(),
            rate,
            eta: (rate > 0).then(|| state.eta()),
        }
    }
}

/// A style whose whole line is ours: indicatif's templates do not shorten what is too wide.
fn style(
    line: impl Fn(&ProgressState, usize) -> String + Clone + Send + Sync + 'static,
) -> ProgressStyle {
    ProgressStyle::default_bar()
        .template("{line}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .with_key(
            "line",
            move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                let width = usize::from(console::Term::stderr().size().1);
                let _ = out.write_str(&line(state, width));
            },
        )
}

/// The line for the whole, in at most `width` columns.
fn whole_line(width: usize, done: u64, blobs: u64, now: &Measure) -> String {
    let (current, total) = (HumanBytes(now.current), HumanBytes(now.total));
    let rate = HumanBytes(now.rate);
    let percent = percent(now.current, now.total);
    let eta = match now.eta {
        Some(eta) if eta < Duration::from_secs(100 * 86_400) => format!("{:#}", HumanDuration(eta)),
        _ => "-".to_string(),
    };
    fit(
        width,
        (now.current, now.total),
        &[
            format!("{done}/{blobs} blobs  {current}/{total}  {rate}/s  eta {eta}"),
            format!("{done}/{blobs} {current}/{total} {rate}/s {eta}"),
            format!("{done}/{blobs} {current} {rate}/s {eta}"),
            format!("{percent}% {rate}/s {eta}"),
            format!("{percent}%"),
        ],
    )
}

/// A blob's line, in at most `width` columns.
fn blob_line(width: usize, activity: Activity, digest: &Digest, now: &Measure) -> String {
    let (current, total) = (HumanBytes(now.current), HumanBytes(now.total));
    let rate = HumanBytes(now.rate);
    let percent = percent(now.current, now.total);
    let digest = short(digest);
    let verb = activity.verb()[0];
    fit(
        width,
        (now.current, now.total),
        &[
            format!("{digest} {verb}  {current}/{total}  {rate}/s"),
            format!("{digest} {current}/{total} {rate}/s"),
            format!("{digest} {current} {rate}/s"),
            format!("{digest} {percent}%"),
            format!("{percent}%"),
        ],
    )
}

/// The first of `texts` (ASCII, the fullest first) that fits, with the graphical bar before it where
/// one of the two fullest leaves room for it. ASCII, without colours: right for every terminal,
/// NO_COLOR and locale. The last column stays free: some terminals wrap on filling it.
fn fit(width: usize, (current, total): (u64, u64), texts: &[String]) -> String {
    let width = width.saturating_sub(1);
    let mut with_bar = texts.iter().take(2);
    if let Some(text) = with_bar.find(|text| text.len() + BAR_COLUMNS <= width) {
        let columns = BAR_COLUMNS - 3;
        let filled = usize::from(percent(current, total)) * columns / 100;
        return format!("[{:<columns$}] {text}", "#".repeat(filled));
    }
    match texts.iter().find(|text| text.len() <= width) {
        Some(text) => text.clone(),
        None => String::new(),
    }
}

/// 100 only when all is through; 0 of 0 is 0.
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

/// Whether the moment in `next` has come; if so it is put off, and only one caller is told.
fn due(next: &AtomicU64, now: u64, interval: u64) -> bool {
    let at = next.load(Relaxed);
    now >= at
        && next
            .compare_exchange(at, now.saturating_add(interval), Relaxed, Relaxed)
            .is_ok()
}

/// JSON leaves DEL and the C1 controls as they are; a terminal may obey them. Only strings can hold
/// them, so escaping them keeps the document the same.
fn ascii_controls(json: String) -> String {
    if !json.contains(unprintable) {
        return json;
    }
    let mut escaped = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if unprintable(c) {
            escaped.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            escaped.push(c);
        }
    }
    escaped
}

fn timestamp(since_1970: Duration) -> String {
    let nanos = i128::try_from(since_1970.as_nanos()).unwrap_or_default();
    OffsetDateTime::from_unix_timestamp_nanos(nanos)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
        .format(format_description!(
            "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z"
        ))
        .unwrap_or_default()
}

fn lines(mode: Mode, out: Box<dyn Write + Send>) -> Sink {
    let format = match mode {
        Mode::Auto | Mode::Plain | Mode::Tty => Format::Plain,
        Mode::Quiet => Format::Quiet,
        Mode::Rawjson => Format::Raw,
    };
    Sink::Lines {
        format,
        out: Mutex::new(out),
    }
}

fn clock() -> Box<dyn Fn() -> Duration + Send + Sync> {
    let (start, from) = (Instant::now(), SystemTime::now());
    let from = from
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Box::new(move || from.saturating_add(start.elapsed()))
}

/// A panic elsewhere is no reason to stop showing.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sink that the test reads, and a clock that it sets, in milliseconds.
    struct Rig {
        progress: Progress,
        written: Arc<Mutex<Vec<u8>>>,
        clock: Arc<AtomicU64>,
    }

    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Rig {
        fn new(mode: Mode, verbose: bool) -> Self {
            let written = Arc::new(Mutex::new(Vec::new()));
            let clock = Arc::new(AtomicU64::new(1_700_000_000_000));
            let ticks = clock.clone();
            let now = move || Duration::from_millis(ticks.load(Relaxed));
            let sink = lines(mode, Box::new(Sink(written.clone())));
            Rig {
                progress: Progress::with(sink, verbose, Box::new(now)),
                written,
                clock,
            }
        }

        fn pass(&self, milliseconds: u64) {
            self.clock.fetch_add(milliseconds, Relaxed);
        }

        /// What was written since the last call.
        fn output(&self) -> String {
            String::from_utf8(std::mem::take(&mut *lock(&self.written))).unwrap()
        }
    }

    // Its hex begins with e3b0c44298fc.
    fn digest() -> Digest {
        Digest::of(b"")
    }

    #[test]
    fn plain_has_a_line_for_each_thing_that_happened() {
        let rig = Rig::new(Mode::Plain, false);
        let progress = &rig.progress;
        progress.stage("exporting to s3://cache", 2, 1024 + 159);
        let small = progress.blob(Activity::Upload, &digest(), 159);
        small.advance(159);
        small.done();
        small.done();
        progress.blob(Activity::Refresh, &digest(), 1024).done();
        progress.note("a note");
        progress.debug("not shown");
        progress.warn("a warning");
        let broken = progress.clone().blob(Activity::Download, &digest(), 2048);
        broken.advance(1024);
        broken.advance(1024);
        broken.take_back(1536);
        drop(broken);
        let left_behind = progress.blob(Activity::Download, &digest(), 7);
        progress.end();
        progress.clone().end();
        drop(left_behind);
        assert_eq!(
            rig.output(),
            "exporting to s3://cache (2 blobs, 1.16 KiB)\n\
             uploaded sha256:e3b0c44298fc 159 B\n\
             refreshed sha256:e3b0c44298fc 1.00 KiB\n\
             a note\n\
             warning: a warning\n\
             stopped downloading sha256:e3b0c44298fc after 512 B of 2.00 KiB\n"
        );
    }

    #[test]
    fn verbose_adds_debug_lines_and_what_begins() {
        let rig = Rig::new(Mode::Auto, true);
        rig.progress.stage("hashing", 0, 0);
        rig.progress.blob(Activity::Hash, &digest(), 5).done();
        rig.progress.debug("shown");
        assert_eq!(
            rig.output(),
            "hashing\n\
             hashing sha256:e3b0c44298fc 5 B\n\
             hashed sha256:e3b0c44298fc 5 B\n\
             debug: shown\n"
        );
    }

    #[test]
    fn a_long_transfer_tells_its_state_every_ten_seconds() {
        const MIB: u64 = 1 << 20;
        let rig = Rig::new(Mode::Plain, false);
        rig.progress.stage("exporting", 3, 2000 * MIB);
        rig.progress
            .blob(Activity::Refresh, &digest(), 1000 * MIB)
            .done();
        let blob = rig.progress.blob(Activity::Upload, &digest(), 990 * MIB);
        rig.output();

        rig.pass(9_999);
        blob.advance(MIB);
        assert_eq!(rig.output(), "");

        rig.pass(1);
        blob.advance(449 * MIB);
        blob.advance(MIB);
        assert_eq!(
            rig.output(),
            "uploading 45% of 1000.00 MiB, 45.00 MiB/s, 1 of 3 blobs done\n"
        );

        rig.pass(20_000);
        blob.take_back(451 * MIB);
        blob.advance(460 * MIB);
        assert_eq!(
            rig.output(),
            "uploading 46% of 1000.00 MiB, 512.00 KiB/s, 1 of 3 blobs done\n"
        );
    }

    #[test]
    fn a_blob_counts_in_the_stage_that_it_began_in() {
        let rig = Rig::new(Mode::Plain, false);
        rig.progress.stage("first", 1, 100);
        let old = rig.progress.blob(Activity::Upload, &digest(), 100);
        old.advance(60);
        rig.progress.stage("second", 1, 100);
        let new = rig.progress.blob(Activity::Download, &digest(), 100);
        rig.pass(10_000);
        drop(old);
        rig.output();
        new.advance(50);
        assert_eq!(
            rig.output(),
            "downloading 50% of 100 B, 5 B/s, 0 of 1 blobs done\n"
        );
    }

    #[test]
    fn quiet_shows_warnings_and_errors_only() {
        let rig = Rig::new(Mode::Quiet, true);
        rig.progress.stage("exporting", 1, 159);
        let blob = rig.progress.blob(Activity::Upload, &digest(), 159);
        rig.pass(60_000);
        blob.advance(159);
        blob.done();
        drop(rig.progress.blob(Activity::Upload, &digest(), 159));
        rig.progress.note("a note");
        rig.progress.debug("a debug line");
        rig.progress.warn("a warning");
        rig.progress.error("an error");
        assert_eq!(rig.output(), "warning: a warning\nlayercache: an error\n");
    }

    #[test]
    fn rawjson_is_one_object_a_line() {
        let rig = Rig::new(Mode::Rawjson, true);
        let progress = &rig.progress;
        progress.stage("exporting", 2, 300);
        let blob = progress.blob(Activity::Upload, &digest(), 200);
        rig.pass(5);
        blob.done();
        drop(progress.blob(Activity::Download, &digest(), 100));
        progress.note("a \"note\"\n");
        progress.debug("detail");
        progress.warn("careful \u{9b}31m\u{7f}");
        progress.error("it failed");
        const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let expected = [
            r#"{"time":"2023-11-14T22:13:20.000Z","event":"stage","total":300,"text":"exporting"}"#,
            r#"{"time":"2023-11-14T22:13:20.000Z","event":"start","activity":"upload","digest":"sha256:HEX","total":200}"#,
            r#"{"time":"2023-11-14T22:13:20.005Z","event":"done","activity":"upload","digest":"sha256:HEX","total":200}"#,
            r#"{"time":"2023-11-14T22:13:20.005Z","event":"start","activity":"download","digest":"sha256:HEX","total":100}"#,
            r#"{"time":"2023-11-14T22:13:20.005Z","event":"failed","activity":"download","digest":"sha256:HEX","total":100,"current":0}"#,
            r#"{"time":"2023-11-14T22:13:20.005Z","event":"note","text":"a \"note\"\n"}"#,
            r#"{"time":"2023-11-14T22:13:20.005Z","event":"debug","text":"detail"}"#,
            r#"{"time":"2023-11-14T22:13:20.005Z","event":"warning","text":"careful \u009b31m\u007f"}"#,
            r#"{"time":"2023-11-14T22:13:20.005Z","event":"error","text":"it failed"}"#,
            "",
        ]
        .join("\n")
        .replace("HEX", HEX);
        assert_eq!(rig.output(), expected);
    }

    #[test]
    fn rawjson_tells_of_a_blob_at_most_every_200_ms() {
        let rig = Rig::new(Mode::Rawjson, false);
        let blob = rig.progress.blob(Activity::Upload, &digest(), 1000);
        rig.output();
        let mut told = Vec::new();
        for _ in 0..10 {
            rig.pass(50);
            blob.advance(100);
            for line in rig.output().lines() {
                let event: serde_json::Value = serde_json::from_str(line).unwrap();
                assert_eq!(event["event"], "progress");
                assert_eq!(event["total"], 1000);
                told.push(event["current"].as_u64().unwrap());
            }
        }
        assert_eq!(told, [400, 800]);
    }

    #[test]
    fn names_from_the_network_cannot_steer_the_terminal() {
        let rig = Rig::new(Mode::Plain, false);
        rig.progress
            .note("tag \x1b[2J\r\nfake \u{9b}0m \u{202e}gpj ✓ näme");
        assert_eq!(
            rig.output(),
            "tag \\u{1b}[2J\\r\\nfake \\u{9b}0m \\u{202e}gpj ✓ näme\n"
        );
    }

    #[test]
    fn a_closed_pipe_is_no_reason_to_fail() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
        }
        for mode in [Mode::Plain, Mode::Quiet, Mode::Rawjson] {
            let progress = Progress::with_writer(mode, true, Box::new(Closed));
            progress.stage("exporting", 1, 1);
            progress.blob(Activity::Upload, &digest(), 1).done();
            progress.warn("a warning");
            assert_eq!(lock(&progress.shared.stage).done.load(Relaxed), 1);
        }
    }

    #[test]
    fn numbers_that_make_no_sense_do_no_harm() {
        let rig = Rig::new(Mode::Plain, false);
        rig.progress.stage("exporting", u64::MAX, u64::MAX);
        rig.progress
            .blob(Activity::Refresh, &digest(), u64::MAX)
            .done();
        rig.output();
        let blob = rig.progress.blob(Activity::Upload, &digest(), 10);
        blob.take_back(5);
        rig.pass(u64::MAX / 2);
        blob.advance(30);
        blob.done();
        assert_eq!(
            rig.output(),
            "uploading 100% of 10 B, 0 B/s, 1 of 18446744073709551615 blobs done\n\
             uploaded sha256:e3b0c44298fc 10 B\n"
        );
    }

    const HALF: Measure = Measure {
        current: 1_055_000_000,
        total: 2_110_000_000,
        rate: 94_371_840,
        eta: Some(Duration::from_secs(12)),
    };

    #[test]
    fn a_bar_tells_what_its_terminal_has_room_for() {
        let whole = |width| whole_line(width, 4, 5000, &HALF);
        assert_eq!(
            whole(75),
            "[#########          ] 4/5000 1006.13 MiB/1.97 GiB 90.00 MiB/s 12s"
        );
        assert_eq!(
            whole(80),
            "[#########          ] 4/5000 blobs  1006.13 MiB/1.97 GiB  90.00 MiB/s  eta 12s"
        );
        assert_eq!(whole(40), "4/5000 1006.13 MiB 90.00 MiB/s 12s");
        assert_eq!(whole(20), "50% 90.00 MiB/s 12s");
        assert_eq!(whole(10), "50%");
        let blob = |width| blob_line(width, Activity::Upload, &digest(), &HALF);
        assert_eq!(
            blob(80),
            "[#########          ] e3b0c44298fc upload  1006.13 MiB/1.97 GiB  90.00 MiB/s"
        );
        assert_eq!(blob(40), "e3b0c44298fc 1006.13 MiB 90.00 MiB/s");
        assert_eq!(blob(20), "e3b0c44298fc 50%");
    }

    #[test]
    fn no_bar_is_ever_wider_than_its_terminal() {
        let extreme = Measure {
            current: u64::MAX,
            total: u64::MAX,
            rate: u64::MAX,
            eta: Some(Duration::MAX),
        };
        for width in 0..200 {
            for now in [&HALF, &extreme] {
                let whole = whole_line(width, u64::MAX, u64::MAX, now);
                let blob = blob_line(width, Activity::Refresh, &digest(), now);
                assert!(whole.is_empty() || whole.len() < width, "{width}: {whole}");
                assert!(blob.is_empty() || blob.len() < width, "{width}: {blob}");
            }
        }
    }

    #[test]
    fn bytes_are_told_in_binary_units() {
        assert_eq!(bytes(159), "159 B");
        assert_eq!(bytes(1_258_291), "1.20 MiB");
    }
}
