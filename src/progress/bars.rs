//! Bars on a terminal, redrawn ten times a second by a thread of their own.
//!
//! indicatif does the terminal work: one bar, whose message is the whole frame. It erases the last frame,
//! prints messages above it and draws the next one. Its output goes to a [`Screen`], which ends each
//! line, so that a recording of the terminal (`script`) has whole lines and a narrower window does not
//! tear them.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use parking_lot::Mutex;
use serde_json::Value;

use super::lines::{message, resumed};
use super::{Clock, Flight, Kind, Step, Tally, View, bytes, milliseconds, percent, short};
use crate::quote::printable;

const REDRAW: Duration = Duration::from_millis(100);

/// Milliseconds a stage or blob must last before it is shown.
const PATIENCE: u64 = 500;

/// Blobs with a bar of their own, if the terminal has enough rows.
const MOST_BARS: usize = 8;

/// Columns of the shortest bar worth drawing, with its brackets.
const SHORTEST_BAR: usize = 10;

/// Seconds over which rates are averaged.
const MEMORY: f64 = 5.0;

pub(super) struct Bars {
    /// Workers take this lock, so hold it only briefly.
    state: Mutex<State>,
    /// Its message is the frame on the screen. The lock is held while writing, which can block on the
    /// terminal.
    bar: ProgressBar,
    /// Calls that are printing elsewhere on the terminal.
    suspended: Mutex<usize>,
    size: SizeOf,
    clock: Clock,
    coloured: bool,
}

/// Rows and columns of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) rows: usize,
    pub(super) columns: usize,
}

type SizeOf = Arc<dyn Fn() -> Size + Send + Sync>;

/// The size of the terminal behind stderr. One that does not know its own is given 24 × 80.
pub(super) fn size() -> Size {
    let (rows, columns) = console::Term::stderr().size();
    let known = |n: u16, usual: usize| if n == 0 { usual } else { usize::from(n) };
    Size {
        rows: known(rows, 24),
        columns: known(columns, 80),
    }
}

/// Redraws until `bars` has ended or been dropped.
pub(super) fn keep_drawing(bars: &Arc<Bars>) {
    let bars = Arc::downgrade(bars);
    // Without the thread there are no bars, but the work continues.
    let _ = std::thread::Builder::new()
        .name("progress".into())
        .spawn(move || {
            while bars.upgrade().is_some_and(|bars| bars.draw()) {
                std::thread::sleep(REDRAW);
            }
        });
}

impl Bars {
    pub(super) fn new(
        out: Box<dyn Write + Send>,
        size: impl Fn() -> Size + Send + Sync + 'static,
        clock: Clock,
        coloured: bool,
    ) -> Self {
        let size: SizeOf = Arc::new(size);
        let screen = Screen {
            size: Arc::clone(&size),
            pen: Mutex::new(Pen {
                out,
                text: String::new(),
                line: String::new(),
                drawn: Vec::new(),
                on_screen: Vec::new(),
                cleared: 0,
            }),
        };
        let target = ProgressDrawTarget::term_like(Box::new(screen));
        let style = ProgressStyle::with_template("{msg}").expect("a valid template");
        Bars {
            state: Mutex::new(State {
                stage: None,
                flights: Vec::new(),
                sampled: milliseconds(&clock),
            }),
            bar: ProgressBar::with_draw_target(None, target).with_style(style),
            suspended: Mutex::new(0),
            size,
            clock,
            coloured,
        }
    }

    /// Draws the current numbers. False once the bars have ended.
    pub(super) fn draw(&self) -> bool {
        let frame = self
            .state
            .lock()
            .frame(milliseconds(&self.clock), (self.size)());
        let frame = frame.join("\n");
        let suspended = self.suspended.lock();
        if *suspended == 0 && !self.bar.is_finished() && frame != self.bar.message() {
            self.bar.set_message(frame);
        }
        !self.bar.is_finished()
    }
}

impl View for Bars {
    fn stage(&self, stage: &Arc<Tally>) {
        self.state.lock().stage = Some((Arc::clone(stage), Rate::default()));
    }

    fn blob(&self, step: Step, blob: &Arc<Flight>) {
        let mut state = self.state.lock();
        match step {
            Step::Start => state.flights.push((Arc::clone(blob), Rate::default())),
            Step::Waiting => {}
            Step::Done | Step::Present | Step::Failed => {
                state
                    .flights
                    .retain(|(flight, _)| !Arc::ptr_eq(flight, blob));
            }
        }
    }

    fn moved(&self, _: &Flight) {}

    fn message(&self, kind: Kind, text: &str) {
        self.bar.println(message(kind, text, self.coloured));
    }

    fn result(&self, _: &Value) {}

    fn suspend(&self, print: &mut dyn FnMut()) {
        {
            let mut suspended = self.suspended.lock();
            self.bar.set_message("");
            *suspended += 1;
        }
        // Not the bar's own `suspend`, which keeps it locked: stdout may be a pipe that nobody reads, and
        // workers still have messages to print.
        print();
        *self.suspended.lock() -= 1;
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

/// The terminal as indicatif sees it: so wide that no line wraps.
///
/// indicatif pads each line with blanks to the full width, which moves the cursor to the next line, and
/// erases as many lines as it drew. Here the padding becomes a newline, and the lines to erase become
/// the rows that they occupy now. Everything is written at once, on `flush`.
struct Screen {
    size: SizeOf,
    pen: Mutex<Pen>,
}

struct Pen {
    out: Box<dyn Write + Send>,
    /// Complete lines, not yet on the terminal.
    text: String,
    /// The line without a newline yet.
    line: String,
    /// Columns of the lines in `text`.
    drawn: Vec<usize>,
    /// Columns of the lines that the last flush left just above the cursor.
    on_screen: Vec<usize>,
    /// Lines to erase, from the last one up.
    cleared: usize,
}

impl fmt::Debug for Screen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Screen").finish_non_exhaustive()
    }
}

impl TermLike for Screen {
    fn width(&self) -> u16 {
        u16::MAX
    }

    fn height(&self) -> u16 {
        u16::MAX
    }

    // The cursor moves only among the lines to erase, and `flush` erases them all.
    fn move_cursor_up(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_down(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn write_line(&self, line: &str) -> io::Result<()> {
        let mut pen = self.pen.lock();
        pen.line.push_str(line);
        pen.end_line();
        Ok(())
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        let mut pen = self.pen.lock();
        let padding = !text.is_empty() && text.bytes().all(|byte| byte == b' ');
        if padding {
            pen.end_line();
        } else {
            pen.line.push_str(text);
        }
        Ok(())
    }

    fn clear_line(&self) -> io::Result<()> {
        self.pen.lock().cleared += 1;
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let columns = (self.size)().columns.max(1);
        self.pen.lock().flush(columns)
    }
}

impl Pen {
    fn end_line(&mut self) {
        self.drawn.push(width(&self.line));
        self.text.push_str(&self.line);
        self.text.push('\n');
        self.line.clear();
    }

    fn flush(&mut self, columns: usize) -> io::Result<()> {
        // A terminal that became narrower has wrapped what no longer fits. (xterm truncates instead, so
        // there some lines above the frame are erased, too.)
        let rows: usize = self
            .on_screen
            .iter()
            .rev()
            .take(std::mem::take(&mut self.cleared))
            .map(|width| width.div_ceil(columns).max(1))
            .sum();
        self.on_screen = std::mem::take(&mut self.drawn);
        let text = std::mem::take(&mut self.text);
        let erase = match rows {
            0 if text.is_empty() => return Ok(()),
            0 => String::new(),
            // Go to the first row, then erase it and everything below. Two steps, because tmux treats erasing
            // from the very first row as clearing the screen and keeps the old content in its history.
            _ => format!("\x1b[{rows}A\r\x1b[K\x1b[B\x1b[J\x1b[A"),
        };
        self.out.write_all((erase + &text).as_bytes())?;
        self.out.flush()
    }
}

struct State {
    stage: Option<(Arc<Tally>, Rate)>,
    /// In the order in which they began.
    flights: Vec<(Arc<Flight>, Rate)>,
    /// When the rates were last updated, in milliseconds of the clock.
    sampled: u64,
}

impl State {
    /// The lines to show on a terminal of `size`.
    fn frame(&mut self, now: u64, size: Size) -> Vec<String> {
        self.sample(now);
        // The cursor's line stays free, and one above for the latest message.
        let room = size.rows.saturating_sub(2);
        let columns = size.columns.saturating_sub(1);
        let mut rows = Vec::new();
        let mut head = None;
        if let Some((stage, rate)) = &self.stage {
            let elapsed = now.saturating_sub(stage.began);
            if elapsed < PATIENCE {
                return Vec::new();
            }
            let title = printable(&stage.title);
            if stage.expected_blobs == 0 {
                head = Some(format!("{title}, {}", clock_face(elapsed / 1000)));
            } else {
                head = (room > 1).then(|| title.into_owned());
                rows.push(Row::of_stage(stage, elapsed, rate.per_second()));
            }
        }
        let old: Vec<_> = self
            .flights
            .iter()
            .filter(|(blob, _)| now.saturating_sub(blob.began) >= PATIENCE)
            .collect();
        let bars = MOST_BARS.min(room.saturating_sub(3));
        let shown = old.iter().take(bars);
        rows.extend(shown.map(|(blob, rate)| Row::of_blob(blob, rate.per_second())));

        let mut frame = Vec::new();
        frame.extend(head.map(|head| cut(&head, columns)));
        frame.extend(table(&rows, columns));
        let more = format!("and {} more", old.len().saturating_sub(bars));
        if bars > 0 && old.len() > bars && more.len() <= columns {
            frame.push(more);
        }
        frame.retain(|line| !line.is_empty());
        frame.truncate(room);
        frame
    }

    fn sample(&mut self, now: u64) {
        let passed = now.saturating_sub(self.sampled);
        self.sampled = now;
        if let Some((stage, rate)) = &mut self.stage {
            rate.sample(stage.moved(), passed.min(now.saturating_sub(stage.began)));
        }
        for (blob, rate) in &mut self.flights {
            rate.sample(blob.moved(), passed.min(now.saturating_sub(blob.began)));
        }
    }
}

/// Bytes a second, as an exponential moving average.
#[derive(Default)]
struct Rate {
    /// As of the last sample.
    moved: u64,
    bytes: f64,
    seconds: f64,
}

impl Rate {
    fn sample(&mut self, moved: u64, milliseconds: u64) {
        let seconds = milliseconds as f64 / 1000.0;
        let keep = (-seconds / MEMORY).exp();
        let more = moved.saturating_sub(self.moved);
        self.moved = moved;
        self.bytes = self.bytes * keep + more as f64;
        self.seconds = self.seconds * keep + seconds;
    }

    fn per_second(&self) -> u64 {
        (self.bytes / self.seconds) as u64
    }
}

/// One line of the table.
#[derive(Default)]
struct Row {
    label: String,
    percent: u8,
    current: u64,
    total: u64,
    rate: u64,
    /// The last column, and a shorter form of it.
    tail: String,
    elapsed: String,
    /// Replaces everything but the label.
    instead: Option<&'static str>,
}

impl Row {
    fn of_stage(stage: &Tally, milliseconds: u64, rate: u64) -> Self {
        let (current, total) = (stage.current.load(Relaxed), stage.bytes());
        let elapsed = clock_face(milliseconds / 1000);
        let seconds_left = total.saturating_sub(current).checked_div(rate);
        // An estimate of 100 hours or more is meaningless.
        let left = match seconds_left.filter(|left| *left < 100 * 3600) {
            Some(left) if current > 0 && current < total => format!(", {} left", clock_face(left)),
            _ => String::new(),
        };
        let (done, blobs) = (stage.done.load(Relaxed), stage.blobs());
        Row {
            label: format!("{done}/{blobs} blobs"),
            // No bytes remain of those that need not be moved.
            percent: if done == blobs {
                100
            } else {
                percent(current, total)
            },
            current,
            total,
            rate,
            tail: format!("{elapsed}{left}"),
            elapsed,
            instead: None,
        }
    }

    fn of_blob(blob: &Flight, rate: u64) -> Self {
        let current = blob.current.load(Relaxed);
        let waiting = blob.waiting.load(Relaxed);
        Row {
            label: short(&blob.digest),
            percent: percent(current, blob.bytes),
            current,
            total: blob.bytes,
            rate,
            tail: resumed("", blob.resumed.load(Relaxed)),
            elapsed: String::new(),
            instead: waiting.then_some("waits for another process"),
        }
    }

    /// A cell's text. That of the bar depends on the room for it.
    fn cell(&self, column: Column, bar: usize) -> String {
        match column {
            Column::Label => self.label.clone(),
            Column::Percent => format!("{}%", self.percent),
            Column::Bar => {
                let inside = bar.saturating_sub(2);
                let filled = usize::from(self.percent) * inside / 100;
                format!("[{:<inside$}]", "#".repeat(filled))
            }
            Column::Sizes => format!("{}/{}", bytes(self.current), bytes(self.total)),
            Column::Rate => format!("{}/s", bytes(self.rate)),
            Column::Tail => self.tail.clone(),
            Column::Elapsed => self.elapsed.clone(),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Column {
    Label,
    Percent,
    Bar,
    Sizes,
    Rate,
    Tail,
    Elapsed,
}

impl Column {
    /// Its minimum width in terminal columns, so that the table stays still while numbers grow.
    fn least(self) -> usize {
        match self {
            Column::Label | Column::Elapsed => 0,
            Column::Percent => "100%".len(),
            Column::Bar => SHORTEST_BAR,
            Column::Sizes => "62.9 MiB/62.9 MiB".len(),
            Column::Rate => "62.9 MiB/s".len(),
            Column::Tail => "0:00, 0:00 left".len(),
        }
    }
}

/// What a table shows, from the widest terminal to the narrowest.
const LAYOUTS: [&[Column]; 7] = {
    use Column::{Bar, Elapsed, Label, Percent, Rate, Sizes, Tail};
    [
        &[Label, Percent, Bar, Sizes, Rate, Tail],
        &[Label, Percent, Sizes, Rate, Tail],
        &[Label, Percent, Sizes, Rate, Elapsed],
        &[Label, Percent, Rate, Elapsed],
        &[Label, Percent, Elapsed],
        &[Label, Percent],
        &[Percent],
    ]
};

/// The rows with aligned columns, at most `room` terminal columns wide. ASCII without colours, which
/// works in every terminal and locale.
fn table(rows: &[Row], room: usize) -> Vec<String> {
    for layout in LAYOUTS {
        let widths: Vec<usize> = layout
            .iter()
            .map(|&column| {
                let cells = rows.iter().filter(|row| row.instead.is_none());
                let widest = cells.map(|row| row.cell(column, 0).len()).max();
                widest.unwrap_or_default().max(column.least())
            })
            .collect();
        let taken = widths.iter().sum::<usize>() + layout.len() - 1;
        if taken > room {
            continue;
        }
        let bar = SHORTEST_BAR + room - taken;
        // Without labels, only the first row is meaningful.
        let worth = if layout.contains(&Column::Label) {
            rows.len()
        } else {
            1
        };
        let line = |row: &Row| {
            if let Some(instead) = row.instead {
                return cut(&format!("{} {instead}", row.label), room);
            }
            let mut line = String::new();
            for (&column, &width) in layout.iter().zip(&widths) {
                let cell = row.cell(column, bar);
                let _ = match column {
                    Column::Label => write!(line, "{cell:<width$} "),
                    Column::Bar | Column::Tail | Column::Elapsed => write!(line, "{cell} "),
                    Column::Percent | Column::Sizes | Column::Rate => {
                        write!(line, "{cell:>width$} ")
                    }
                };
            }
            line.truncate(line.trim_end().len());
            line
        };
        return rows.iter().take(worth).map(line).collect();
    }
    Vec::new()
}

/// `text`, cut to `columns` terminal columns.
fn cut(text: &str, columns: usize) -> String {
    console::truncate_str(text, columns, "").into_owned()
}

/// The width of `line` in terminal columns.
fn width(line: &str) -> usize {
    console::measure_text_width(line)
}

/// `0:03`, `12:03`, `1:02:03`.
fn clock_face(seconds: u64) -> String {
    let (minutes, seconds) = (seconds / 60, seconds % 60);
    match minutes / 60 {
        0 => format!("{minutes}:{seconds:02}"),
        hours => format!("{hours}:{:02}:{seconds:02}", minutes % 60),
    }
}
