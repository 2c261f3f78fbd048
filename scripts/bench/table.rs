//! The measurements, as text for people and as Markdown for docs/performance.md.

use std::fmt::Write as _;

use crate::child::Cost;
use crate::hashed::Hashed;
use crate::server::Asked;
use crate::tools::{Operation, Tool};

/// All runs of one operation of one tool in one scenario.
pub struct Series {
    pub scenario: &'static str,
    pub operation: Operation,
    pub tool: Tool,
    pub runs: Vec<(Cost, Asked)>,
    /// Why a run failed; there are none after it.
    pub failed: Option<String>,
}

impl Series {
    fn of(&self, value: impl Fn(&Cost, &Asked) -> f64) -> f64 {
        median(
            self.runs
                .iter()
                .map(|(cost, asked)| value(cost, asked))
                .collect(),
        )
    }

    /// Seconds; the median.
    pub fn wall(&self) -> f64 {
        self.of(|cost, _| cost.wall)
    }

    /// Seconds; the median.
    pub fn cpu(&self) -> f64 {
        self.of(|cost, _| cost.cpu)
    }

    /// The median.
    pub fn requests(&self) -> f64 {
        self.of(|_, asked| asked.requests as f64)
    }

    /// The median.
    pub fn round_trips(&self) -> f64 {
        self.of(|_, asked| asked.round_trips as f64)
    }

    fn at_once(&self) -> f64 {
        self.of(|_, asked| asked.at_once as f64)
    }

    /// Bytes, in the worst run.
    pub fn peak_memory(&self) -> u64 {
        let all = self.runs.iter().map(|(cost, _)| cost.peak_memory);
        all.max().unwrap_or(0)
    }

    pub fn is_good(&self) -> bool {
        self.failed.is_none() && !self.runs.is_empty()
    }
}

/// NaN if there are no values.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

pub fn seconds(value: f64) -> String {
    match value {
        value if value.is_nan() => "-".to_owned(),
        value if value < 0.01 => format!("{:.1} ms", value * 1e3),
        value if value < 1.0 => format!("{:.0} ms", value * 1e3),
        value => format!("{value:.2} s"),
    }
}

pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// The peer that was fastest at something.
pub fn best_peer<'a>(
    series: &'a [Series],
    scenario: &str,
    operation: Operation,
) -> Option<&'a Series> {
    series
        .iter()
        .filter(|one| one.scenario == scenario && one.operation == operation)
        .filter(|one| one.tool.is_peer() && one.is_good())
        .min_by(|one, other| one.wall().total_cmp(&other.wall()))
}

/// One table: a row for each tool.
pub struct Table {
    pub title: String,
    pub head: Vec<&'static str>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    pub fn of(
        series: &[Series],
        scenario: &'static str,
        operation: Operation,
        hashed: Option<&Hashed>,
    ) -> Self {
        let best = best_peer(series, scenario, operation);
        let mut rows = Vec::new();
        for one in series {
            if one.scenario != scenario || one.operation != operation {
                continue;
            }
            let name = one.tool.name().to_owned();
            if let Some(why) = &one.failed {
                rows.push(vec![name, format!("failed: {why}")]);
                continue;
            }
            let ratio = |mine: f64, of: fn(&Series) -> f64| match best {
                Some(best) => format!("{:.2}", mine / of(best)),
                None => "-".to_owned(),
            };
            rows.push(vec![
                name,
                seconds(one.wall()),
                ratio(one.wall(), Series::wall),
                seconds(one.cpu()),
                ratio(one.cpu(), Series::cpu),
                mebibytes(one.peak_memory()),
                format!("{:.0}", one.requests()),
                format!("{:.0}", one.round_trips()),
                format!("{:.0}", one.at_once()),
                one.runs.len().to_string(),
            ]);
        }
        if let (Some(best), Some(hashed)) = (best, hashed) {
            let (wall, cpu) = (best.wall() + hashed.wall(), best.cpu() + hashed.cpu());
            let mut row = vec![
                format!(
                    "{}, and its files hashed ({})",
                    best.tool.name(),
                    hashed.program
                ),
                seconds(wall),
                format!("{:.2}", wall / best.wall()),
                seconds(cpu),
                format!("{:.2}", cpu / best.cpu()),
            ];
            row.resize(10, String::new());
            rows.push(row);
        }
        Table {
            title: format!("{scenario}: {}", operation.name()),
            head: vec![
                "tool",
                "wall",
                "÷ best peer",
                "CPU",
                "÷ its CPU",
                "peak memory",
                "requests",
                "round trips",
                "at once",
                "runs",
            ],
            rows,
        }
    }

    pub fn text(&self) -> String {
        let mut widths: Vec<usize> = self.head.iter().map(|cell| cell.chars().count()).collect();
        // A short row holds an error message, which may be wider.
        for row in self.rows.iter().filter(|row| row.len() == self.head.len()) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut out = format!("\n{}\n", self.title);
        let mut line = |cells: &[&str]| {
            out.push_str("  ");
            for (at, (cell, width)) in cells.iter().zip(&widths).enumerate() {
                let _ = if at == 0 || cells.len() < widths.len() {
                    write!(out, "{cell:<width$}  ")
                } else {
                    write!(out, "{cell:>width$}  ")
                };
            }
            out.truncate(out.trim_end().len());
            out.push('\n');
        };
        line(&self.head);
        for row in &self.rows {
            line(&row.iter().map(String::as_str).collect::<Vec<_>>());
        }
        out
    }
}

/// One line for each operation of each scenario, for docs/performance.md: layercache beside the fastest
/// peer, and beside that with its files hashed.
pub fn summary_markdown(
    series: &[Series],
    hashed: impl Fn(&'static str, Operation) -> Option<(f64, f64)>,
) -> String {
    let mut out = String::from(
        "\n| | layercache: wall | CPU | memory | requests | best peer | ÷ wall | ÷ CPU | ÷ hashed: wall | CPU |\n\
         |---|---:|---:|---:|---:|---|---:|---:|---:|---:|\n",
    );
    let ours = series
        .iter()
        .filter(|one| !one.tool.is_peer() && one.is_good());
    for one in ours {
        let (scenario, operation) = (one.scenario, one.operation);
        let variant = match one.tool.name().split_once(", ") {
            Some((_, variant)) => format!(" ({variant})"),
            None => String::new(),
        };
        let best = best_peer(series, scenario, operation);
        let over = |mine: f64, theirs: Option<f64>| match theirs {
            Some(theirs) => format!("{:.2}", mine / theirs),
            None => String::new(),
        };
        let hashed = best.zip(hashed(scenario, operation));
        let _ = writeln!(
            out,
            "| {scenario}: {}{variant} | {} | {} | {} | {:.0} | {} | {} | {} | {} | {} |",
            operation.name(),
            seconds(one.wall()),
            seconds(one.cpu()),
            mebibytes(one.peak_memory()),
            one.requests(),
            best.map_or("-", |best| best.tool.name()),
            over(one.wall(), best.map(Series::wall)),
            over(one.cpu(), best.map(Series::cpu)),
            over(
                one.wall(),
                hashed.map(|(best, (wall, _))| best.wall() + wall)
            ),
            over(one.cpu(), hashed.map(|(best, (_, cpu))| best.cpu() + cpu)),
        );
    }
    out
}

/// A target, and whether it was met.
pub struct Target {
    pub goal: &'static str,
    pub measured: String,
    /// `None`: not measured.
    pub met: Option<bool>,
}

impl Target {
    fn verdict(&self) -> &'static str {
        match self.met {
            Some(true) => "met",
            Some(false) => "NOT met",
            None => "not measured",
        }
    }
}

pub fn targets_text(targets: &[Target]) -> String {
    let mut out = String::from("\nTargets\n");
    for target in targets {
        let _ = writeln!(
            out,
            "  {:<12}  {}\n                {}",
            target.verdict(),
            target.goal,
            target.measured
        );
    }
    out
}

pub fn targets_markdown(targets: &[Target]) -> String {
    let mut out = String::from("\n### Targets\n\n| target | measured | |\n|---|---|---|\n");
    for target in targets {
        let cells = [target.goal, &target.measured, target.verdict()];
        let _ = writeln!(out, "| {} |", cells.join(" | ").replace('\n', " "));
    }
    out
}
