//! Prunes, copies and repairs of random buckets: with faults, kills, and exporters at work meanwhile.
//! After each run, no manifest names an absent blob, and nothing foreign was touched.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use layercache::cache::CacheConfig;
use layercache::cache::digest::Digest;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;

use crate::aftermath::soak;
use crate::inside::{self, Inside};
use crate::program::{Program, Run, fixture};
use crate::server::{Asked, Fault, Server, Store};

const DAY: Duration = Duration::from_secs(86_400);

/// What happened, for whoever reads the log of a long run.
#[derive(Default, Debug)]
struct Counts {
    prunes: usize,
    copies: usize,
    repairs: usize,
    /// Runs that did not end well: a fault was too much, or they were killed.
    failed: usize,
    killed: usize,
    exports: usize,
    deleted: usize,
}

/// What is disturbing a run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Disturbance {
    Nothing,
    Faults,
    Kill,
    Exporter,
    /// Another client's change, at some request.
    Change,
}

const DISTURBANCES: [Disturbance; 5] = [
    Disturbance::Nothing,
    Disturbance::Faults,
    Disturbance::Kill,
    Disturbance::Exporter,
    Disturbance::Change,
];

fn blob(text: &str) -> String {
    format!("blobs/{}", Digest::of(text.as_bytes()))
}

/// A cache whose blobs are short texts.
fn manifest(texts: &[String]) -> String {
    let created = "2026-11-21T20:37:36.959076185Z";
    let layers = texts.iter().map(|text| {
        let digest = Digest::of(text.as_bytes()).to_string();
        json!({"blob": digest, "parent": -1, "annotations": {"diffID": digest, "size": text.len(),
            "mediaType": "application/vnd.oci.image.layer.v1.tar", "createdAt": created}})
    });
    let records = texts.iter().enumerate().map(|(layer, text)| {
        json!({"digest": Digest::of(text.as_bytes()).to_string(),
            "layers": [{"layer": layer, "createdAt": created}]})
    });
    json!({"layers": layers.collect::<Vec<_>>(), "records": records.collect::<Vec<_>>()})
        .to_string()
}

fn some(random: &mut StdRng, of: &[String]) -> Vec<String> {
    let some = of.iter().filter(|_| random.random_range(0..3) == 0);
    some.cloned().collect()
}

/// A bucket with some caches, garbage, blobs that an exporter is going to find, and what is foreign.
fn fill(server: &Server, random: &mut StdRng) {
    let texts: Vec<String> = (0..12).map(|n| format!("blob {n}")).collect();
    for text in &texts {
        server.put(&blob(text), text.clone());
    }
    if random.random_bool(0.7) {
        for file in std::fs::read_dir(fixture("local-max/blobs/sha256")).expect("a fixture") {
            let path = file.expect("an entry").path();
            let hex = path
                .file_name()
                .and_then(|name| name.to_str())
                .expect("hex");
            server.put(
                &format!("blobs/sha256:{hex}"),
                std::fs::read(&path).expect("a blob"),
            );
        }
    }
    for n in 0..random.random_range(1..5) {
        server.put(&format!("manifests/c{n}"), manifest(&some(random, &texts)));
    }
    server.put("teams/x/release", manifest(&some(random, &texts)));
    server.put("README", "foreign");
    server.put("blobs/sha256:no-digest", "foreign");
    server.put("manifests/", "");
    for key in server.keys() {
        server.age(&key, DAY * random.random_range(0..20));
    }
}

/// No manifest names an absent blob; blobs are what their keys say.
fn check(objects: &BTreeMap<String, Bytes>) -> Result<(), String> {
    for (key, body) in objects {
        let (prefix, rest) = match key.strip_prefix("p/") {
            Some(rest) => ("p/", rest),
            None => ("", key.as_str()),
        };
        if let Some(digest) = rest.strip_prefix("blobs/")
            && digest
                .parse::<Digest>()
                .is_ok_and(|digest| digest != Digest::of(body))
        {
            return Err(format!("{key} is damaged"));
        }
        let name = rest
            .strip_prefix("manifests/")
            .or(rest.strip_prefix("teams/"));
        if name.is_none_or(str::is_empty) {
            continue;
        }
        let cache = CacheConfig::parse_s3(body).map_err(|error| format!("{key}: {error:#}"))?;
        for layer in &cache.layers {
            if !objects.contains_key(&format!("{prefix}blobs/{}", layer.blob)) {
                return Err(format!("{key} names {}, which is gone", layer.blob));
            }
        }
    }
    Ok(())
}

/// Blobs that are too young to go.
fn young(server: &Server) -> Vec<String> {
    let now = SystemTime::now();
    let is_young = |key: &String| {
        let age = now.duration_since(server.last_modified(key).expect("it is there"));
        key.starts_with("blobs/") && age.unwrap_or_default() < 2 * DAY
    };
    server.keys().into_iter().filter(is_young).collect()
}

fn fault(random: &mut StdRng) -> Option<Fault> {
    if random.random_range(0..8) > 0 {
        return None;
    }
    Some(match random.random_range(0..8) {
        0 => Fault::Status(500, "InternalError"),
        1 => Fault::StatusEmpty(502),
        2 => Fault::Throttle { retry_after: None },
        3 => Fault::Reset,
        4 => Fault::ApplyThenReset,
        5 => Fault::Status(403, "AccessDenied"),
        6 => Fault::Truncate(40),
        _ => Fault::Delay(Duration::from_millis(10)),
    })
}

/// What another client does, all at once: it refreshes blobs, and writes a manifest that names them.
fn change(store: &Store, random: &mut StdRng) {
    let texts: Vec<String> = (0..12).map(|n| format!("blob {n}")).collect();
    let named = some(random, &texts);
    for text in &named {
        store.put(&blob(text), text.clone());
    }
    store.put("manifests/late", manifest(&named));
}

/// The command line of a run.
fn command(server: &Server, random: &mut StdRng, counts: &mut Counts) -> Vec<String> {
    let to = |extra: &str| ["--cache-to".to_owned(), server.spec(extra)];
    let from = |extra: &str| ["--cache-from".to_owned(), server.spec(extra)];
    let mut words: Vec<String> = Vec::new();
    match random.random_range(0..10) {
        0 => {
            counts.copies += 1;
            words.push("copy".to_owned());
            words.extend(from("name=c0"));
            if random.random_bool(0.5) {
                words.extend(from("name=c1"));
            }
            let mode = if random.random_bool(0.5) {
                "max"
            } else {
                "min"
            };
            let prefix = if random.random_bool(0.5) {
                "prefix=p/,"
            } else {
                ""
            };
            words.extend(to(&format!("{prefix}mode={mode},name=copied")));
        }
        1 => {
            counts.repairs += 1;
            words.extend(["verify", "--repair"].map(str::to_owned));
            words.extend(from(""));
        }
        _ => {
            counts.prunes += 1;
            words.extend(["prune", "--yes", "--repair", "--allow-empty"].map(str::to_owned));
            words.extend(to(""));
            for flags in [
                ["--older-than", "5d"],
                ["--keep-last", "1"],
                ["--keep", "c1"],
                ["--max-size", "30B"],
                ["--name", "c*"],
            ] {
                if random.random_range(0..4) == 0 {
                    words.extend(flags.map(str::to_owned));
                }
            }
        }
    }
    words
}

/// One run. Returns what is wrong afterwards.
fn run(seed: u64, counts: &mut Counts) -> Result<(), String> {
    let mut random = StdRng::seed_from_u64(seed);
    let server = Server::start();
    fill(&server, &mut random);
    let words = command(&server, &mut random, counts);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut disturbance = DISTURBANCES[random.random_range(0..DISTURBANCES.len())];
    let is_repair = words[0] == "verify";
    if is_repair {
        // Something to repair: other specs' caches are not looked at, so none of theirs.
        server.remove("teams/x/release");
        let gone: Vec<_> = server
            .keys()
            .into_iter()
            .filter(|key| key.starts_with("blobs/sha256:") && key.len() == 77)
            .collect();
        for key in gone {
            if random.random_range(0..4) == 0 {
                server.remove(&key);
            }
        }
        if disturbance == Disturbance::Change {
            disturbance = Disturbance::Nothing;
        }
    }
    let (young, before) = (young(&server), server.objects());
    let foreign: Vec<_> = [
        "teams/x/release",
        "README",
        "blobs/sha256:no-digest",
        "manifests/",
    ]
    .into_iter()
    .filter(|key| before.contains_key(*key))
    .collect();
    let done = disturbed(&server, &words, disturbance, &mut random, counts);
    server.reset_faults();
    server.settle();
    let when = format!("{words:?} under {disturbance:?}, which ended with {done:?}");
    counts.failed += usize::from(done.is_err());
    // A repair that failed midway may have left some caches as they were.
    if !is_repair || done.is_ok() {
        check(&server.objects()).map_err(|wrong| format!("{when}: {wrong}"))?;
    }
    let untouched = |when: &str| -> Result<(), String> {
        let objects = server.objects();
        for key in &foreign {
            if objects.get(*key) != before.get(*key) {
                return Err(format!("{when}: {key} was touched"));
            }
        }
        match young.iter().find(|key| !objects.contains_key(*key)) {
            Some(key) => Err(format!("{when}: {key} is young, and gone")),
            None => Ok(()),
        }
    };
    untouched(&when)?;
    counts.deleted += before.len().saturating_sub(server.objects().len());

    // The next run finishes.
    let again = Program::new().args(&words).run();
    if again.code != Some(0) {
        return Err(format!(
            "{when}: the next run: {}{}",
            again.stdout, again.stderr
        ));
    }
    check(&server.objects()).map_err(|wrong| format!("{when}, then the next run: {wrong}"))?;
    untouched(&format!("{when}, then the next run"))
}

/// Performs `words` while something happens.
fn disturbed(
    server: &Server,
    words: &[&str],
    disturbance: Disturbance,
    random: &mut StdRng,
    counts: &mut Counts,
) -> Result<(), String> {
    let nth = random.random_range(0..45);
    let mut faults = StdRng::seed_from_u64(random.random());
    match disturbance {
        Disturbance::Nothing => {}
        Disturbance::Kill => {
            counts.killed += 1;
            return killed(server, words, nth, random.random_bool(0.5));
        }
        Disturbance::Change => {
            server.before(nth, |_| true, move |store| change(store, &mut faults));
        }
        Disturbance::Faults => {
            let faults = Mutex::new(faults);
            server.fail(move |_| fault(&mut faults.lock().expect("no panic")));
        }
        Disturbance::Exporter => {}
    }
    let task = inside::command(words);
    inside::runtime().block_on(async {
        let run = Inside::fast();
        if disturbance != Disturbance::Exporter {
            return run.run(&task).await.map(drop);
        }
        counts.exports += 1;
        let export = inside::export(&server.spec("mode=max,name=late"), &fixture("local-max"));
        let delay = Duration::from_millis(random.random_range(0..40));
        let later = async {
            tokio::time::sleep(delay).await;
            Inside::fast().run(&export).await.map(drop)
        };
        let (done, exported) = tokio::join!(run.run(&task), later);
        exported.map_err(|error| format!("the export: {error}"))?;
        done.map(drop)
    })
}

/// Runs the program, and kills it at a request.
fn killed(server: &Server, words: &[&str], nth: usize, performed: bool) -> Result<(), String> {
    let victim: Arc<OnceLock<i32>> = Arc::default();
    let of_rule = Arc::clone(&victim);
    server.fail(move |asked: &Asked| {
        if asked.index != nth {
            return None;
        }
        unsafe { libc::kill(*of_rule.wait(), libc::SIGKILL) };
        (!performed).then_some(Fault::Reset)
    });
    let child = Program::new().args(words).spawn();
    let pid = i32::try_from(child.id()).expect("a process id");
    victim.set(pid).expect("there is one victim");
    let run = Run::from(child.wait_with_output().expect("the program ends"));
    match run.code {
        Some(0) => Ok(()),
        code => Err(format!("{code:?}: {}", run.stderr)),
    }
}

#[test]
fn what_is_destructive_leaves_no_manifest_that_names_an_absent_blob() {
    let runs = if soak() { 1_500 } else { 40 };
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let began = Instant::now();
    let done = AtomicUsize::new(0);
    let (counts, wrong) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut mine = Counts::default();
                loop {
                    let n = done.fetch_add(1, Relaxed);
                    if n >= runs {
                        break;
                    }
                    let seed = seed.wrapping_add(n as u64);
                    if let Err(error) = run(seed, &mut mine) {
                        let mut wrong = wrong.lock().expect("no panic");
                        wrong.push(format!("seed {seed}: {error}"));
                    }
                }
                counts.lock().expect("no panic").push(mine);
            });
        }
    });
    let counts = counts.into_inner().expect("no panic");
    let sum = |of: fn(&Counts) -> usize| counts.iter().map(of).sum::<usize>();
    println!(
        "{} prunes, {} copies, {} repairs; {} killed, {} beside an exporter, {} failed; {} objects \
         deleted; in {:.0} s",
        sum(|c| c.prunes),
        sum(|c| c.copies),
        sum(|c| c.repairs),
        sum(|c| c.killed),
        sum(|c| c.exports),
        sum(|c| c.failed),
        sum(|c| c.deleted),
        began.elapsed().as_secs_f64()
    );
    let wrong = wrong.into_inner().expect("no panic");
    assert!(
        wrong.is_empty(),
        "{} of {runs}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}
