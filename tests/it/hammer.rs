//! Many exporters and importers on one bucket and one layout at once, some of them killed, with a
//! server that fails now and then.

use std::fmt;
use std::process::Child;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use layercache::cache::CacheConfig;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::aftermath::{assert_layout_is_sound, assert_store_is_sound, layout_of, soak};
use crate::program::{Program, Run};
use crate::server::{Asked, Fault, Server, Store};

const MIB: usize = 1 << 20;
const NAMES: usize = 5;

/// One request in so many fails.
const FAULTS: u32 = 10;

/// One process in so many is killed.
const KILLS: u32 = 4;

/// What happened, for whoever reads the log of a long run.
#[derive(Default)]
struct Counts {
    exports: Ends,
    imports: Ends,
    faults: AtomicUsize,
    manifests: AtomicUsize,
}

#[derive(Default)]
struct Ends {
    done: AtomicUsize,
    failed: AtomicUsize,
    killed: AtomicUsize,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, ends) in [("exports", &self.exports), ("imports", &self.imports)] {
            let [done, failed, killed] =
                [&ends.done, &ends.failed, &ends.killed].map(|n| n.load(Relaxed));
            let all = done + failed + killed;
            write!(
                f,
                "{all} {what} ({done} done, {failed} failed, {killed} killed), "
            )?;
        }
        let [faults, manifests] = [&self.faults, &self.manifests].map(|n| n.load(Relaxed));
        write!(
            f,
            "{faults} faults; {manifests} manifests written, each checked against the bucket"
        )
    }
}

/// Whether the manifest at `key` names only blobs that are in the bucket, whole.
fn check_manifest(store: &Store, key: &str) -> Result<(), String> {
    let objects = store.objects();
    // The bucket stood still for `objects`; the request may have failed and left no manifest.
    let Some(manifest) = objects.get(key) else {
        return Ok(());
    };
    let cache = CacheConfig::parse_s3(manifest).map_err(|error| format!("{key}: {error:#}"))?;
    for layer in &cache.layers {
        let size = objects
            .get(&format!("blobs/{}", layer.blob))
            .map(Bytes::len);
        if size.map(|size| size as u64) != Some(layer.annotations.size) {
            return Err(format!(
                "{key} names {}, of which s3 has {size:?} bytes",
                layer.blob
            ));
        }
    }
    Ok(())
}

fn choose_fault(random: &mut StdRng, asked: &Asked) -> Option<Fault> {
    if random.random_range(0..FAULTS) > 0 {
        return None;
    }
    Some(match random.random_range(0..9) {
        0 => Fault::Status(500, "InternalError"),
        1 => Fault::StatusEmpty(502),
        2 => Fault::Throttle { retry_after: None },
        3 => Fault::Reset,
        4 => Fault::ResetWhileReading(10_000),
        5 => Fault::ApplyThenReset,
        6 if asked.operation == "GetObject" => Fault::FlipByte(random.random_range(0..MIB)),
        7 => Fault::Truncate(100),
        _ => Fault::Delay(Duration::from_millis(20)),
    })
}

/// Waits for the process, or kills it after a while.
fn end(mut child: Child, random: &mut StdRng, ends: &Ends) {
    if random.random_range(0..KILLS) == 0 {
        thread::sleep(Duration::from_millis(random.random_range(0..600)));
        let _ = child.kill();
    }
    let run = Run::from(child.wait_with_output().expect("the program ends"));
    let end = match run.code {
        Some(0) => &ends.done,
        Some(1) => &ends.failed,
        None => &ends.killed,
        Some(code) => panic!("it ended with {code}: {}{}", run.stdout, run.stderr),
    };
    end.fetch_add(1, Relaxed);
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
}

#[test]
fn exporters_and_importers_that_fail_and_die_leave_nothing_wrong() {
    let (each, rounds) = if soak() { (30, 160) } else { (5, 3) };
    let seed = rand::random();
    println!("seed {seed}");
    let server = Arc::new(Server::start());
    let counts = Arc::new(Counts::default());
    // They share blobs, one of which is uploaded in parts.
    let sources = [
        layout_of(&[1_000, 70_000]),
        layout_of(&[1_000, 70_000, 6 * MIB, 300]),
        layout_of(&[1_000, 80_000, 6 * MIB, 5_000, 20]),
    ];
    let layout = tempfile::tempdir().expect("a temporary directory");

    let wrong = Arc::new(Mutex::new(Vec::new()));
    let (found, checked) = (Arc::clone(&wrong), Arc::clone(&counts));
    server.watch(move |logged, store| {
        if logged.operation == "PutObject" && logged.key.starts_with("manifests/") {
            checked.manifests.fetch_add(1, Relaxed);
            let checked = check_manifest(store, &logged.key);
            found.lock().expect("no panic").extend(checked.err());
        }
    });
    let random = Mutex::new(StdRng::seed_from_u64(seed));
    let injected = Arc::clone(&counts);
    server.fail(move |asked| {
        let fault = choose_fault(&mut random.lock().expect("no panic"), asked)?;
        injected.faults.fetch_add(1, Relaxed);
        Some(fault)
    });

    let began = Instant::now();
    thread::scope(|scope| {
        for worker in 0..2 * each {
            let (server, counts, sources, layout) = (&server, &counts, &sources, layout.path());
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(seed ^ worker as u64);
                for _ in 0..rounds {
                    let name = format!("name=n{}", random.random_range(0..NAMES));
                    if worker % 2 == 0 {
                        if random.random_range(0..10) == 0 {
                            // Older than touch_refresh.
                            server.age_all(Duration::from_secs(30 * 60 * 60));
                        }
                        let spec = server.spec(&format!("{name},mode=max"));
                        let source = &sources[random.random_range(0..sources.len())];
                        let export = Program::export(&spec, source.path());
                        end(export.spawn(), &mut random, &counts.exports);
                    } else {
                        let import = Program::import(&server.spec(&name), layout);
                        let tag = format!("t{}", random.random_range(0..NAMES));
                        let import = import.args(["--tag", &tag]);
                        end(import.spawn(), &mut random, &counts.imports);
                    }
                }
            });
        }
    });
    println!("{counts}, in {:.0} s", began.elapsed().as_secs_f64());
    let wrong = std::mem::take(&mut *wrong.lock().expect("no panic"));
    assert_eq!(wrong, Vec::<String>::new());

    server.reset_faults();
    server.settle();
    assert_store_is_sound(&server, "after the hammer");
    assert_layout_is_sound(layout.path(), "after the hammer");
    server.age_uploads(Duration::from_secs(30 * 60 * 60));
    for source in &sources {
        let spec = server.spec("name=last,mode=max");
        Program::export(&spec, source.path()).run().succeeds();
        Program::import(&server.spec("name=last"), layout.path())
            .run()
            .succeeds();
    }
    assert_store_is_sound(&server, "after the last exports");
    assert_layout_is_sound(layout.path(), "after the last imports");
    assert_eq!(server.uploads(), 0, "uploads are left");
}
