//! `make bench-check`: what a run costs that is the same on every machine (requests, bytes, round trips
//! where they do not depend on time, and calls on files), compared with `figures.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::layouts;
use crate::s3::{Server, round_trips};
use crate::tools::{self, Operation};

use Operation::{ColdExport, ColdImport, WarmExport, WarmImport};

/// Names and sizes of what is exported and imported: layers that go in parts, and many small ones.
const SHAPES: [(&str, usize, u64); 2] =
    [("2 × 40 MiB", 2, 40 << 20), ("60 × 20 KiB", 60, 20 << 10)];

/// Long enough for requests that are sent together to be seen together on a busy machine.
const DELAY: Duration = Duration::from_millis(50);

/// Calls on files of the layout that are watched under strace. Others depend on how many blobs happen
/// to be published together.
const CALLS: [&str; 6] = [
    "pread64", "read", "write", "pwrite64", "renameat", "unlinkat",
];

/// By operation, by what is counted.
type Figures = BTreeMap<String, BTreeMap<String, u64>>;

/// Compares with `figures.json`, or rewrites it.
pub fn run(layercache: &Path, update: bool) -> Result<()> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench/figures.json");
    let scratch = tempfile::tempdir()?;
    let strace = Command::new("strace").arg("-V").output().is_ok();
    if !strace {
        println!("strace is absent: calls on files are not counted");
    }
    let mut found = Figures::new();
    for (name, layers, size) in SHAPES {
        // strace writes other than ASCII as escapes.
        let home = scratch.path().join(layers.to_string());
        let layout = home.join("layout");
        layouts::write(&layout, layers, size, 1_700_000_000)?;
        let server = Server::builder().delay(DELAY).start();
        for operation in [ColdExport, WarmExport, ColdImport, WarmImport] {
            let counted = one_run(layercache, operation, &server, &home, strace);
            let counted = counted.with_context(|| format!("{name}: {}", operation.name()))?;
            found.insert(format!("{name}: {}", operation.name()), counted);
        }
    }
    if update {
        ensure!(strace, "without strace the figures would be incomplete");
        let text = serde_json::to_string_pretty(&found)?;
        std::fs::write(&committed, text + "\n")?;
        println!("wrote {}", committed.display());
        return Ok(());
    }
    let text = std::fs::read_to_string(&committed)
        .with_context(|| format!("reading {}", committed.display()))?;
    let mut differences = differences(&serde_json::from_str(&text)?, &found);
    if !strace {
        differences.retain(|difference| !difference.contains("calls: "));
    }
    if !differences.is_empty() {
        for difference in &differences {
            println!("{difference}");
        }
        bail!(
            "{} figures differ; if that is intended: make bench-check UPDATE=1",
            differences.len()
        );
    }
    println!("every figure is as committed");
    Ok(())
}

/// A line for each figure that is not the same.
fn differences(committed: &Figures, found: &Figures) -> Vec<String> {
    let empty = BTreeMap::new();
    let mut lines = Vec::new();
    let mut operations: Vec<_> = committed.keys().chain(found.keys()).collect();
    operations.sort();
    operations.dedup();
    for operation in operations {
        let before = committed.get(operation).unwrap_or(&empty);
        let now = found.get(operation).unwrap_or(&empty);
        let mut names: Vec<_> = before.keys().chain(now.keys()).collect();
        names.sort();
        names.dedup();
        for name in names {
            let figure = |figures: &BTreeMap<String, u64>| figures.get(name).copied().unwrap_or(0);
            let (before, now) = (figure(before), figure(now));
            if before != now {
                lines.push(format!("{operation}: {name}: {now}, committed {before}"));
            }
        }
    }
    lines
}

fn one_run(
    layercache: &Path,
    operation: Operation,
    server: &Server,
    home: &Path,
    strace: bool,
) -> Result<BTreeMap<String, u64>> {
    let (verb, flag, dir, more) = match operation.is_export() {
        true => ("export", "--cache-to", "layout", "mode=max"),
        false => ("import", "--cache-from", "imported", ""),
    };
    let (dir, trace) = (home.join(dir), home.join("trace"));
    let mut command = match strace {
        true => {
            let mut command = Command::new("strace");
            let calls = format!("trace={}", CALLS.join(","));
            command.args(["-f", "-qq", "-y", "-s", "0", "-e", &calls, "-o"]);
            command.arg(&trace).arg(layercache);
            command
        }
        false => Command::new(layercache),
    };
    tools::clean_environment(&mut command, home);
    server.clear_log();
    let output = command
        .args([verb, "--progress", "quiet", flag, &server.spec(more)])
        .arg(&dir)
        .output()
        .context("starting it")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut figures = BTreeMap::new();
    let mut add = |name: String, more: u64| *figures.entry(name).or_default() += more;
    let log = server.log();
    for logged in &log {
        add(format!("{} requests", logged.operation), 1);
        add("bytes sent".to_owned(), logged.body_len);
    }
    if matches!(operation, WarmExport | WarmImport) {
        add("round trips".to_owned(), round_trips(&log) as u64);
    }
    if strace {
        let text = std::fs::read_to_string(&trace)?;
        let blobs = [dir.join("blobs"), dir.join(".layercache")];
        for call in calls(&text, &blobs) {
            // How much is written at once depends on how much has arrived.
            match call.name {
                "write" | "pwrite64" => add("bytes written, by calls".to_owned(), call.result),
                name => add(format!("{name} calls"), 1),
            }
            if matches!(call.name, "read" | "pread64") {
                add("bytes read, by calls".to_owned(), call.result);
            }
        }
    }
    Ok(figures)
}

/// A call that has ended well.
struct FileCall {
    name: &'static str,
    result: u64,
}

/// The calls in an strace that are about files below `places`.
fn calls(trace: &str, places: &[PathBuf]) -> Vec<FileCall> {
    // "1234 pread64(9</x/blobs/sha256/ab>, <unfinished ...>" and "1234 <... pread64 resumed>…) = 5":
    // of two halves, the first has the path and the second the result.
    let mut begun: BTreeMap<&str, &str> = BTreeMap::new();
    let mut calls = Vec::new();
    for line in trace.lines() {
        let Some((thread, rest)) = line.split_once(' ') else {
            continue;
        };
        let rest = rest.trim_start();
        if rest.ends_with("<unfinished ...>") {
            begun.insert(thread, rest);
            continue;
        }
        let head = match rest.starts_with("<...") {
            true => begun.remove(thread).unwrap_or_default(),
            false => rest,
        };
        let name = head.split('(').next().unwrap_or_default();
        let name = CALLS.into_iter().find(|call| *call == name);
        let result = rest.rsplit_once(" = ").map(|(_, result)| result);
        let result = result.and_then(|result| {
            let end = result.find(|c: char| !c.is_ascii_digit());
            result[..end.unwrap_or(result.len())].parse().ok()
        });
        let is_ours = |place: &PathBuf| {
            let place = place.display().to_string();
            head.contains(&place) || rest.contains(&place)
        };
        if let (Some(name), Some(result)) = (name, result)
            && places.iter().any(is_ours)
        {
            calls.push(FileCall { name, result });
        }
    }
    calls
}
