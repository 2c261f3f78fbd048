//! One scenario: rounds in which the tools take turns.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use crate::hashed::{self, Hashed};
use crate::layouts::Layout;
use crate::scenarios::{BIG, Scenario};
use crate::server::{self, Server};
use crate::table::{Series, Table, best_peer, seconds};
use crate::tools::{Kind, Operation, Tool};
use crate::{Bench, child, floor};

use Operation::{ColdExport, ColdImport};

/// After so many rounds, a peer this many times slower than the fastest one does not run again: it
/// cannot become the best.
const SLOW: [(usize, f64); 2] = [(1, 8.0), (3, 3.0)];

impl Bench {
    pub fn run(&mut self, scenario: &'static Scenario) -> Result<()> {
        let mut runs = if self.args.quick {
            self.args.runs.min(3)
        } else {
            self.args.runs
        };
        let late = self.begun.elapsed() > Duration::from_secs(self.args.minutes * 60);
        if late && runs > 3 {
            runs = 3;
            self.notes.push(format!(
                "{} ran {runs} times only: {} minutes had gone",
                scenario.name, self.args.minutes
            ));
        }
        eprintln!("{}: writing the layout", scenario.name);
        let home = self.scratch.join("scenario");
        fs::create_dir_all(&home)?;
        let layout = Layout::make(
            home.join("layout"),
            scenario.layers,
            scenario.size,
            &self.scratch,
        )?;
        let server = Server::start(scenario.network, &layout.blobs())?;
        let first = self.series.len();
        for &operation in scenario.operations {
            for tool in &self.tools {
                if tool.runs_in(scenario, operation) {
                    self.series.push(Series {
                        scenario: scenario.name,
                        operation,
                        tool: tool.clone(),
                        runs: Vec::new(),
                        failed: None,
                    });
                }
            }
        }
        if scenario.filled {
            self.fill(&server, &layout, &home)?;
        }
        for round in 0..runs {
            eprintln!("{}: round {} of {runs}", scenario.name, round + 1);
            if scenario.single && round == 0 {
                self.single = Some(self.single_stream(&server, &layout)?);
            }
            for &operation in scenario.operations {
                let mut turns: Vec<usize> = (first..self.series.len())
                    .filter(|&at| self.series[at].operation == operation)
                    .collect();
                // The order changes, so that no tool always runs after the same one.
                let shift = round % turns.len().max(1);
                turns.rotate_left(shift);
                for at in turns {
                    if self.has_turn(scenario, round, at) {
                        self.measure(at, &server, &layout, &home);
                    }
                }
            }
            if scenario.operations.contains(&ColdExport) {
                let cost = floor::measure_export(&server, scenario, &layout, &self.scratch)?;
                let floors = self.export_floors.entry(scenario.name);
                floors.or_default().push(cost);
            }
            if scenario.operations.contains(&ColdImport) {
                let hashed = self.hashed.entry(scenario.name).or_default();
                hashed::measure(hashed, &layout.blobs(), &self.scratch);
                let cost = floor::measure_import(&server, scenario, &layout, &self.scratch)?;
                let floors = self.import_floors.entry(scenario.name);
                floors.or_default().push(cost);
            }
        }
        drop(server);
        fs::remove_dir_all(&home)?;
        if scenario.name == BIG {
            self.note_signing();
        }
        for &operation in scenario.operations {
            print!("{}", self.table(scenario.name, operation).text());
        }
        Ok(())
    }

    /// Hashing for the signature is CPU time that a client would not spend over HTTPS.
    fn note_signing(&mut self) {
        for one in &self.series {
            if one.scenario == BIG
                && one.operation == ColdExport
                && let Some((_, asked)) = one.runs.first()
            {
                let line = format!("{} signed bodies: {}", one.tool.name(), asked.signing);
                self.notes.push(line);
            }
        }
    }

    fn has_turn(&self, scenario: &Scenario, round: usize, at: usize) -> bool {
        let one = &self.series[at];
        if !one.tool.is_peer() {
            return one.failed.is_none();
        }
        // After a failed operation, what it should have left is missing.
        let broken = self.series.iter().any(|other| {
            other.scenario == one.scenario
                && other.tool.kind == one.tool.kind
                && other.failed.is_some()
        });
        let best = best_peer(&self.series, scenario.name, one.operation);
        let slow = best.is_some_and(|best| {
            let mut rules = SLOW.iter();
            rules.any(|(rounds, times)| round >= *rounds && one.wall() > times * best.wall())
        });
        if broken {
            return false;
        }
        round == 0 || self.args.full || !(slow || scenario.single)
    }

    /// One run of one tool. A failure is noted and ends the tool's part in this series.
    fn measure(&mut self, at: usize, server: &Server, layout: &Layout, home: &Path) {
        let Series {
            operation, tool, ..
        } = &self.series[at];
        match one_run(*operation, tool, server, layout, home, &self.scratch) {
            Ok(run) => self.series[at].runs.push(run),
            Err(error) => {
                let why = format!("{error:#}");
                eprintln!("{} {}: {why}", tool.name(), operation.name());
                self.series[at].failed = Some(why);
            }
        }
    }

    /// Puts the cache on both sides, for each tool in its own form.
    fn fill(&mut self, server: &Server, layout: &Layout, home: &Path) -> Result<()> {
        for tool in self.tools.clone() {
            let target = home.join(tool.bucket());
            if tool.is_peer() {
                server.fill(tool.bucket(), "blobs/", layout.mtime)?;
                layout.copy_blobs(&target)?;
                continue;
            }
            server.fill(tool.bucket(), "blobs/sha256:", layout.mtime)?;
            if tool.kind != Kind::Layercache {
                continue;
            }
            for operation in [ColdExport, ColdImport] {
                let command = tool.command(operation, layout, &target, server, &self.scratch);
                if let Err(error) = child::run(command, &self.scratch.join("log")) {
                    // The measured runs will fail too, and the table will say so.
                    eprintln!("preparing {}: {error:#}", tool.name());
                }
            }
        }
        Ok(())
    }

    fn single_stream(&self, server: &Server, layout: &Layout) -> Result<(f64, f64)> {
        // The layer is by far the largest blob.
        let mut largest = (0, PathBuf::new());
        for entry in fs::read_dir(layout.blobs())? {
            let entry = entry?;
            largest = largest.max((entry.metadata()?.len(), entry.path()));
        }
        let name = largest.1.file_name().unwrap_or_default().to_string_lossy();
        let key = format!("blobs/{name}");
        server.clear("single")?;
        let up = server.upload("single", &key, &largest.1)?;
        let down = server.download("single", &key)?;
        println!(
            "\na single stream: up {}, down {}",
            seconds(up),
            seconds(down)
        );
        Ok((up, down))
    }

    /// What hashing the files costs, where that is compared.
    pub fn hashed_beside(&self, scenario: &str, operation: Operation) -> Option<&Hashed> {
        let all = self
            .hashed
            .get(scenario)
            .filter(|_| operation == ColdImport);
        hashed::fastest(all?)
    }

    fn table(&self, scenario: &'static str, operation: Operation) -> Table {
        let hashed = self.hashed_beside(scenario, operation);
        Table::of(&self.series, scenario, operation, hashed)
    }
}

fn one_run(
    operation: Operation,
    tool: &Tool,
    server: &Server,
    layout: &Layout,
    home: &Path,
    scratch: &Path,
) -> Result<(child::Cost, server::Asked)> {
    let target = home.join(tool.bucket());
    match operation {
        ColdExport => server.clear(tool.bucket())?,
        ColdImport if target.exists() => fs::remove_dir_all(&target)?,
        _ => {}
    }
    let command = tool.command(operation, layout, &target, server, scratch);
    server.reset()?;
    let cost = child::run(command, &scratch.join("log"))?;
    let asked = server.asked()?;
    if operation.is_export() {
        let (objects, bytes) = server.objects(tool.bucket())?;
        layout.check(objects, bytes)?;
    } else if operation != Operation::Served {
        layout.check_arrived(&target)?;
    }
    Ok((cost, asked))
}
