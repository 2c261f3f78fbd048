//! The results, for people and for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::contract::POINTS;

pub enum Verdict {
    /// With what there is to add; empty if nothing.
    Ok(&'static str),
    /// The server is known not to do this, and why.
    NotSupported(&'static str),
    Failed(String),
}

/// One server's verdicts, in the order of [`POINTS`].
pub struct Column {
    pub server: &'static str,
    pub version: String,
    pub verdicts: Vec<Verdict>,
}

/// A server that was not tried, and why.
pub struct Absent {
    pub server: &'static str,
    pub why: String,
}

/// A Markdown table of points and servers, then every reason.
pub fn render(columns: &[Column], absent: &[Absent]) -> String {
    let mut rows = vec![vec![String::new()]];
    rows[0].extend(
        columns
            .iter()
            .map(|c| format!("{} {}", c.server, c.version)),
    );
    for (at, point) in POINTS.iter().enumerate() {
        let mut row = vec![point.name.to_owned()];
        row.extend(columns.iter().map(|column| match column.verdicts.get(at) {
            Some(Verdict::Ok("")) => "ok".to_owned(),
            Some(Verdict::Ok(note)) => format!("ok, {note}"),
            Some(Verdict::NotSupported(_)) => "not supported".to_owned(),
            Some(Verdict::Failed(_)) => "FAILED".to_owned(),
            None => String::new(),
        }));
        rows.push(row);
    }
    let widths: Vec<usize> = (0..=columns.len())
        .map(|at| {
            rows.iter()
                .map(|row| row[at].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    if columns.is_empty() {
        rows.clear();
    }
    for (at, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "| {cell:width$} ");
        }
        text += "|\n";
        if at == 0 {
            for width in &widths {
                let _ = write!(text, "|{:-<1$}", "", width + 2);
            }
            text += "|\n";
        }
    }
    text += "\n";
    for column in columns {
        for (point, verdict) in POINTS.iter().zip(&column.verdicts) {
            let (what, why) = match verdict {
                Verdict::Ok(_) => continue,
                Verdict::NotSupported(why) => ("not supported", *why),
                Verdict::Failed(why) => ("FAILED", why.as_str()),
            };
            let _ = writeln!(text, "{}: {}: {what}: {why}", column.server, point.name);
        }
    }
    for Absent { server, why } in absent {
        let _ = writeln!(text, "{server}: not tried: {why}");
    }
    text
}

pub fn machine_readable(columns: &[Column], absent: &[Absent]) -> Value {
    let servers: Vec<Value> = columns
        .iter()
        .map(|column| {
            let points = POINTS.iter().zip(&column.verdicts).map(|(point, verdict)| {
                let (verdict, detail) = match verdict {
                    Verdict::Ok(note) => ("ok", *note),
                    Verdict::NotSupported(why) => ("not supported", *why),
                    Verdict::Failed(why) => ("failed", why.as_str()),
                };
                json!({"point": point.name, "verdict": verdict, "detail": detail})
            });
            let points: Vec<Value> = points.collect();
            json!({"server": column.server, "version": column.version, "points": points})
        })
        .collect();
    let absent: Vec<Value> = absent
        .iter()
        .map(|absent| json!({"server": absent.server, "reason": absent.why}))
        .collect();
    json!({"version": 1, "servers": servers, "notTried": absent})
}
