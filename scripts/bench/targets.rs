//! The targets, and what was measured of each.

use std::fs;

use crate::Bench;
use crate::child::Cost;
use crate::hashed::{self, Hashed};
use crate::planning;
use crate::scenarios::{BIG, BIG_DISTANT, BIG_DISTANT_TLS, BIG_TLS, HUGE, SMALL_DISTANT};
use crate::start;
use crate::table::{Series, Target, best_peer, mebibytes, seconds};
use crate::tools::{Kind, Operation};

use Operation::{ColdExport, ColdImport, Served, WarmExport, WarmImport};

/// What was measured, and whether that is enough.
type Outcome = Option<(String, bool)>;

impl Bench {
    pub fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        let mut add = |goal, outcome: Outcome| {
            let (measured, met) = match outcome {
                Some((measured, met)) => (measured, Some(met)),
                None => ("-".to_owned(), None),
            };
            targets.push(Target {
                goal,
                measured,
                met,
            });
        };
        add(
            "8 × 128 MiB at 20 ms and 90 MiB/s, TLS, export: at most 0.6 of the best peer's wall time, 0.5 of its CPU",
            self.of_best_peer(BIG_DISTANT_TLS, ColdExport, 0.6, 0.5),
        );
        add(
            "the same, import: at most 0.9 of the best peer's wall time",
            self.of_best_peer(BIG_DISTANT_TLS, ColdImport, 0.9, f64::INFINITY),
        );
        add(
            "the same, import: at most 0.6 of its wall time with its files hashed",
            self.of_hashed(BIG_DISTANT_TLS, 0.6, f64::INFINITY),
        );
        for (goal, operation) in [
            (
                "the same without TLS, export: at most 0.7 of the best peer's wall time",
                ColdExport,
            ),
            (
                "the same without TLS, import: at most 0.7 of the best peer's wall time",
                ColdImport,
            ),
        ] {
            add(
                goal,
                self.of_best_peer(BIG_DISTANT, operation, 0.7, f64::INFINITY),
            );
        }
        add(
            "8 × 128 MiB on loopback, export: at most 0.5 of the best peer's wall time, 0.42 of its CPU",
            self.of_best_peer(BIG, ColdExport, 0.5, 0.42),
        );
        add(
            "the same, import: at most 1.15 of the best peer's wall time",
            self.of_best_peer(BIG, ColdImport, 1.15, f64::INFINITY),
        );
        add(
            "the same, import: at most 0.6 of its wall time and CPU with its files hashed",
            self.of_hashed(BIG, 0.6, 0.6),
        );
        add(
            "TLS costs an import at most 0.3 s of CPU a GiB",
            self.cost_of_tls(),
        );
        for (goal, operation) in [
            (
                "2 GiB at 90 MiB/s a connection, export: at least 10 times one stream",
                ColdExport,
            ),
            ("the same, import: at least 10 times one stream", ColdImport),
        ] {
            add(goal, self.of_one_stream(operation, 10.0));
        }
        for (goal, operation, least) in [
            (
                "500 × 200 KiB at 20 ms, import: at least 1.5 times as fast as the best peer",
                ColdImport,
                1.5,
            ),
            (
                "the same, export at the default: at least as fast as the best peer",
                ColdExport,
                1.0,
            ),
        ] {
            let ours = self.find(SMALL_DISTANT, operation, Kind::Layercache);
            let best = best_peer(&self.series, SMALL_DISTANT, operation);
            let outcome = ours.zip(best).map(|(ours, best)| {
                let times = best.wall() / ours.wall();
                let mut text = format!(
                    "{times:.2} times {} ({} against {})",
                    best.tool.name(),
                    seconds(ours.wall()),
                    seconds(best.wall())
                );
                if times < least {
                    text.push_str(&self.floor(SMALL_DISTANT, operation));
                }
                (text, times >= least)
            });
            add(goal, outcome);
        }
        for (goal, scenario, most, of) in [
            (
                "2 GiB through serve at 90 MiB/s a connection: at most 1.2 times the import's wall time",
                HUGE,
                1.2,
                Series::wall as fn(&Series) -> f64,
            ),
            (
                "1 GiB through serve: at most 1.3 times the import's CPU time",
                BIG,
                1.3,
                Series::cpu,
            ),
        ] {
            let served = self.find(scenario, Served, Kind::Layercache);
            let import = self.find(scenario, ColdImport, Kind::Layercache);
            let outcome = served.zip(import).map(|(served, import)| {
                let times = of(served) / of(import);
                let (served, import) = (seconds(of(served)), seconds(of(import)));
                let text = format!("{times:.2} times ({served} against {import})");
                (text, times <= most)
            });
            add(goal, outcome);
        }
        for (goal, kinds, most) in [
            (
                "peak memory: at most 160 MiB",
                &[Kind::Layercache, Kind::LayercacheWide][..],
                160 << 20,
            ),
            (
                "peak memory with LAYERCACHE_MEMORY=64MiB: at most 64 MiB",
                &[Kind::LayercacheSmall][..],
                64 << 20,
            ),
        ] {
            add(goal, self.peak_memory(kinds, most));
        }
        let warm = self.find(SMALL_DISTANT, WarmExport, Kind::Layercache);
        let outcome = warm.map(|ours| {
            let text = format!(
                "{:.0} round trips, {:.0} requests, {}",
                ours.round_trips(),
                ours.requests(),
                seconds(ours.wall())
            );
            (text, ours.round_trips() <= 6.0)
        });
        add(
            "warm export of 500 layers at 20 ms: at most 6 round trips",
            outcome,
        );
        let warm = self.find(BIG, WarmImport, Kind::Layercache);
        let outcome = warm.map(|ours| {
            let (requests, cpu) = (ours.requests(), ours.cpu());
            let text = format!("{requests:.0} requests, {} CPU", seconds(cpu));
            (text, requests <= 1.0 && cpu < 0.1)
        });
        add(
            "warm import: one request, no hashing of blobs known good (1 GiB: under 100 ms of CPU)",
            outcome,
        );
        for (goal, scheme) in [
            (
                "first byte on the wire, http: within 20 ms of the start",
                "http",
            ),
            (
                "first byte on the wire, https: within 20 ms of the start",
                "https",
            ),
        ] {
            let taken = start::first_byte(&self.layercache, scheme, &self.scratch).ok();
            add(goal, taken.map(|wall| (seconds(wall), wall < 0.02)));
        }
        let version = start::version(&self.layercache, &self.scratch);
        add(
            "`layercache --version`: under 10 ms",
            version.map(|wall| (seconds(wall), wall < 0.01)),
        );
        add(
            "planning 10,000 layers and 50,000 records: under 200 ms",
            planning::measured()
                .map(|milliseconds| (format!("{milliseconds:.0} ms"), milliseconds < 200.0)),
        );
        let binary = fs::metadata(&self.layercache).ok();
        add(
            "release binary: under 15 MiB",
            binary.map(|file| (mebibytes(file.len()), file.len() < 15 << 20)),
        );
        targets
    }

    fn find(&self, scenario: &str, operation: Operation, kind: Kind) -> Option<&Series> {
        self.series.iter().find(|one| {
            one.scenario == scenario
                && one.operation == operation
                && one.tool.kind == kind
                && one.is_good()
        })
    }

    fn hashed(&self, scenario: &str) -> Option<&Hashed> {
        hashed::fastest(self.hashed.get(scenario)?)
    }

    /// How the floor looks, for a target that is not met.
    fn floor(&self, scenario: &str, operation: Operation) -> String {
        let floors = match operation {
            ColdExport => &self.export_floors,
            _ => &self.import_floors,
        };
        match floors.get(scenario) {
            Some(costs) if !costs.is_empty() => {
                format!(
                    "; a bare program: {} wall, {} CPU",
                    seconds(least(costs, |cost| cost.wall)),
                    seconds(least(costs, |cost| cost.cpu))
                )
            }
            _ => String::new(),
        }
    }

    fn of_best_peer(
        &self,
        scenario: &'static str,
        operation: Operation,
        most_wall: f64,
        most_cpu: f64,
    ) -> Outcome {
        let ours = self.find(scenario, operation, Kind::Layercache)?;
        let best = best_peer(&self.series, scenario, operation)?;
        let (wall, cpu) = (ours.wall() / best.wall(), ours.cpu() / best.cpu());
        let met = wall <= most_wall && cpu <= most_cpu;
        let mut text = format!(
            "{wall:.2} of the wall time ({} against {}) and {cpu:.2} of the CPU of {}",
            seconds(ours.wall()),
            seconds(best.wall()),
            best.tool.name(),
        );
        if !met {
            text.push_str(&self.floor(scenario, operation));
        }
        Some((text, met))
    }

    fn of_hashed(&self, scenario: &'static str, most_wall: f64, most_cpu: f64) -> Outcome {
        let ours = self.find(scenario, ColdImport, Kind::Layercache)?;
        let best = best_peer(&self.series, scenario, ColdImport)?;
        let hashed = self.hashed(scenario)?;
        let wall = ours.wall() / (best.wall() + hashed.wall());
        let cpu = ours.cpu() / (best.cpu() + hashed.cpu());
        let met = wall <= most_wall && cpu <= most_cpu;
        let mut text = format!(
            "{wall:.2} of the wall time and {cpu:.2} of the CPU of {} and {}",
            best.tool.name(),
            hashed.program
        );
        if !met {
            text.push_str(&self.floor(scenario, ColdImport));
        }
        Some((text, met))
    }

    fn cost_of_tls(&self) -> Outcome {
        let with = self.find(BIG_TLS, ColdImport, Kind::Layercache)?;
        let without = self.find(BIG, ColdImport, Kind::Layercache)?;
        let cost = with.cpu() - without.cpu();
        let bare = |scenario| Some(least(self.import_floors.get(scenario)?, |cost| cost.cpu));
        let mut text = format!("{cost:.2} s");
        if cost > 0.3
            && let Some((with, without)) = bare(BIG_TLS).zip(bare(BIG))
        {
            text.push_str(&format!("; a bare program: {:.2} s", with - without));
        }
        Some((text, cost <= 0.3))
    }

    fn of_one_stream(&self, operation: Operation, least: f64) -> Outcome {
        let (up, down) = self.single?;
        let ours = self.find(HUGE, operation, Kind::Layercache)?;
        let single = if operation.is_export() { up } else { down };
        let times = single / ours.wall();
        let mut text = format!(
            "{times:.2} times ({} against {})",
            seconds(ours.wall()),
            seconds(single)
        );
        if times < least {
            text.push_str(&self.floor(HUGE, operation));
        }
        Some((text, times >= least))
    }

    fn peak_memory(&self, kinds: &[Kind], most: u64) -> Outcome {
        let measured = self
            .series
            .iter()
            .filter(|one| kinds.contains(&one.tool.kind) && one.is_good());
        let one = measured.max_by_key(|one| one.peak_memory())?;
        let bytes = one.peak_memory();
        let (scenario, operation) = (one.scenario, one.operation.name());
        let text = format!("{} ({scenario}: {operation})", mebibytes(bytes));
        Some((text, bytes <= most))
    }
}

/// The least of what runs cost.
fn least(costs: &[Cost], of: fn(&Cost) -> f64) -> f64 {
    costs.iter().map(of).fold(f64::INFINITY, f64::min)
}
