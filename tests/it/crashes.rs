//! The program is killed or told to stop at every point of its work. After each run the test checks
//! what is left behind, and that the next run finishes the job.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;

use crate::aftermath::{assert_layout_is_sound, assert_store_is_sound, layout_of, put_cache, soak};
use crate::program::{Program, Run, files, fixture};
use crate::server::{Asked, Fault, Server};

const MIB: usize = 1 << 20;

/// One layer large enough for parts and pieces, and two that are not.
const LARGE: [usize; 3] = [40 * MIB, 70_000, 300];

/// A process that a rule of the server sends signals to.
#[derive(Clone, Default)]
pub struct Victim(Arc<OnceLock<i32>>);

impl Victim {
    fn is(&self, child: &Child) {
        let pid = i32::try_from(child.id()).expect("a process id");
        self.0.set(pid).expect("there is one victim");
    }

    /// Waits until the process is known. Nobody reaps it before the rule has run, so the id is still
    /// its own.
    pub fn signal(&self, signal: i32) {
        unsafe { libc::kill(*self.0.wait(), signal) };
    }
}

/// Runs the program under a rule that may send it signals.
pub fn run_under(
    program: Program,
    server: &Server,
    rule: impl Fn(&Asked, &Victim) -> Option<Fault> + Send + Sync + 'static,
) -> Run {
    let victim = Victim::default();
    let of_rule = victim.clone();
    server.fail(move |asked| rule(asked, &of_rule));
    let child = program.spawn();
    victim.is(&child);
    let run = child.wait_with_output().expect("the program ends").into();
    server.reset_faults();
    run
}

/// Kills the program when its `nth` request arrives. The request is then performed, or dropped.
fn kill_at(program: Program, server: &Server, nth: usize, performed: bool) {
    let run = run_under(program, server, move |asked, victim| {
        if asked.index == nth {
            victim.signal(libc::SIGKILL);
            return (!performed).then_some(Fault::Reset);
        }
        None
    });
    assert_eq!(run.code, None, "request {nth} came: {}", run.stderr);
}

fn fill(server: &Server, objects: &BTreeMap<String, Bytes>) {
    for (key, bytes) in objects {
        server.put(key, bytes.clone());
    }
}

/// What an undisturbed run leaves on the server, and its number of requests.
fn undisturbed_export(extra: &str, layout: &Path) -> (BTreeMap<String, Bytes>, usize) {
    let server = Server::start();
    Program::export(&server.spec(extra), layout)
        .run()
        .succeeds();
    (server.objects(), server.log().len())
}

#[test]
fn an_export_killed_at_any_request_leaves_nothing_wrong_and_the_next_one_finishes() {
    let layout = fixture("local-max");
    let untouched = files(&layout);
    for before in ["empty", "old"] {
        let extra = match before {
            "empty" => "mode=max",
            _ => "mode=max,touch_refresh=0s",
        };
        let (reference, requests) = undisturbed_export(extra, &layout);
        assert_eq!(
            requests, 22,
            "10 HEADs, 1 list of uploads, 10 blobs, 1 manifest"
        );
        for nth in 0..requests {
            for performed in [false, true] {
                let when = format!("{before}, request {nth}, performed: {performed}");
                let server = Server::start();
                if before == "old" {
                    fill(&server, &reference);
                    server.remove("manifests/buildkit");
                }
                let spec = server.spec(extra);
                kill_at(Program::export(&spec, &layout), &server, nth, performed);
                assert_store_is_sound(&server, &when);
                Program::export(&spec, &layout).run().succeeds();
                assert_eq!(server.objects(), reference, "{when}");
            }
        }
    }
    assert_eq!(files(&layout), untouched);
}

#[test]
fn an_export_in_parts_killed_at_any_request_leaves_no_upload_once_the_next_one_is_done() {
    let layout = layout_of(&LARGE);
    let (reference, requests) = undisturbed_export("mode=max", layout.path());
    let step = if soak() { 1 } else { 3 };
    for nth in (0..requests).step_by(step) {
        let when = format!("request {nth}");
        let server = Server::start();
        let spec = server.spec("mode=max");
        let program = Program::export(&spec, layout.path());
        kill_at(program, &server, nth, nth % 2 == 0);
        assert_store_is_sound(&server, &when);
        // An upload without parts could belong to any client, so it is left alone for an hour.
        server.age_uploads(Duration::from_secs(2 * 60 * 60));
        Program::export(&spec, layout.path()).run().succeeds();
        assert_eq!(server.objects(), reference, "{when}");
        assert_eq!(server.uploads(), 0, "{when}");
    }
}

#[test]
fn parts_that_a_killed_export_sent_are_not_sent_again() {
    let layout = layout_of(&LARGE);
    let (reference, _) = undisturbed_export("mode=max", layout.path());
    let server = Server::start();
    let spec = server.spec("mode=max");
    let program = Program::export(&spec, layout.path());
    run_under(program, &server, |asked, victim| {
        (asked.operation == "CompleteMultipartUpload").then(|| {
            victim.signal(libc::SIGKILL);
            Fault::Reset
        })
    });
    assert_eq!((server.count("UploadPart"), server.uploads()), (8, 1));
    server.clear_log();
    Program::export(&spec, layout.path()).run().succeeds();
    assert_eq!(server.objects(), reference);
    assert_eq!((server.count("UploadPart"), server.uploads()), (0, 0));
}

#[test]
fn an_import_killed_at_any_request_leaves_nothing_wrong_and_the_next_one_finishes() {
    let (objects, _) = undisturbed_export("mode=max", &fixture("local-max"));
    let reference = files(&fixture("local-max"));
    let server = Server::start();
    fill(&server, &objects);
    let spec = server.spec("");
    for nth in 0..11 {
        for performed in [false, true] {
            let when = format!("request {nth}, performed: {performed}");
            let layout = tempfile::tempdir().expect("a temporary directory");
            let program = Program::import(&spec, layout.path());
            kill_at(program, &server, nth, performed);
            assert_layout_is_sound(layout.path(), &when);
            assert!(!layout.path().join("index.json").exists(), "{when}");
            Program::import(&spec, layout.path()).run().succeeds();
            assert_eq!(files(layout.path()), reference, "{when}");
        }
    }
}

#[test]
fn an_import_in_pieces_killed_at_any_request_is_finished_by_the_next_one() {
    let server = Server::start();
    put_cache(&server, "buildkit", &LARGE);
    let spec = server.spec("");
    let layout = tempfile::tempdir().expect("a temporary directory");
    Program::import(&spec, layout.path()).run().succeeds();
    let reference = files(layout.path());
    let requests = server.log().len();
    assert_eq!(requests, 23, "the manifest, 20 pieces, 2 small blobs");
    for nth in (0..requests).step_by(if soak() { 1 } else { 3 }) {
        let when = format!("request {nth}");
        let layout = tempfile::tempdir().expect("a temporary directory");
        let program = Program::import(&spec, layout.path());
        kill_at(program, &server, nth, true);
        assert_layout_is_sound(layout.path(), &when);
        Program::import(&spec, layout.path()).run().succeeds();
        assert_eq!(files(layout.path()), reference, "{when}");
    }
}

#[test]
fn what_a_killed_import_had_of_a_blob_is_not_fetched_again() {
    let server = Server::start();
    put_cache(&server, "buildkit", &LARGE);
    let spec = server.spec("");
    let layout = tempfile::tempdir().expect("a temporary directory");
    let staging = layout.path().join(".layercache");
    // The last piece waits until all others are in the file.
    let program = Program::import(&spec, layout.path());
    run_under(program, &server, move |asked, victim| {
        let range = asked.headers.get("range")?.to_str().ok()?;
        if !range.starts_with(&format!("bytes={}-", 38 * MIB)) {
            return None;
        }
        let (staging, victim) = (staging.clone(), victim.clone());
        std::thread::spawn(move || {
            let largest = || {
                let entries = std::fs::read_dir(&staging).into_iter().flatten().flatten();
                entries
                    .filter_map(|entry| Some(entry.metadata().ok()?.len()))
                    .max()
            };
            while largest() < Some(38 * MIB as u64) {
                std::thread::sleep(Duration::from_millis(5));
            }
            victim.signal(libc::SIGKILL);
        });
        Some(Fault::Hang)
    });
    assert_layout_is_sound(layout.path(), "killed");
    server.clear_log();
    Program::import(&spec, layout.path()).run().succeeds();
    let ranges: Vec<String> = server
        .log()
        .iter()
        .filter_map(|logged| Some(logged.headers.get("range")?.to_str().ok()?.to_owned()))
        .collect();
    assert_eq!(ranges, [format!("bytes={}-{}", 38 * MIB, 40 * MIB - 1)]);
    assert_layout_is_sound(layout.path(), "finished");
    assert!(!layout.path().join(".layercache").exists());
}

#[test]
fn either_signal_stops_an_export_in_parts_aborts_its_upload_and_says_so() {
    let layout = layout_of(&LARGE);
    let (reference, _) = undisturbed_export("mode=max", layout.path());
    let untouched = files(layout.path());
    for (signal, code, at) in [
        (libc::SIGINT, 130, "UploadPart"),
        (libc::SIGTERM, 143, "UploadPart"),
        (libc::SIGINT, 130, "CreateMultipartUpload"),
        (libc::SIGTERM, 143, "CompleteMultipartUpload"),
    ] {
        let server = Server::start();
        let spec = server.spec("mode=max");
        let program = Program::export(&spec, layout.path());
        run_under(program, &server, move |asked, victim| {
            if asked.operation != at || asked.nth > 2 {
                return None;
            }
            if asked.nth == 0 {
                victim.signal(signal);
            }
            match at {
                // The answer comes when nothing waits for it any more, and must not be lost.
                "CreateMultipartUpload" => Some(Fault::Delay(Duration::from_millis(300))),
                _ => Some(Fault::Hang),
            }
        })
        .ends_with(code)
        .says("interrupted: run the command again to finish");
        assert_eq!(server.uploads(), 0, "signal {signal} at {at}");
        assert_eq!(server.count("AbortMultipartUpload"), 1, "{signal} at {at}");
        assert_store_is_sound(&server, at);
        assert!(server.object("manifests/buildkit").is_none());
        Program::export(&spec, layout.path()).run().succeeds();
        assert_eq!(server.objects(), reference);
    }
    assert_eq!(files(layout.path()), untouched);
}

#[test]
fn either_signal_stops_an_import_and_the_next_one_finishes() {
    let (objects, _) = undisturbed_export("mode=max", &fixture("local-max"));
    let server = Server::start();
    fill(&server, &objects);
    let spec = server.spec("");
    for (signal, code) in [(libc::SIGINT, 130), (libc::SIGTERM, 143)] {
        for nth in [0, 5, 10] {
            let layout = tempfile::tempdir().expect("a temporary directory");
            let program = Program::import(&spec, layout.path());
            run_under(program, &server, move |asked, victim| {
                (asked.index == nth).then(|| {
                    victim.signal(signal);
                    Fault::Hang
                })
            })
            .ends_with(code)
            .says("interrupted: run the command again to finish");
            assert_layout_is_sound(layout.path(), "interrupted");
            Program::import(&spec, layout.path()).run().succeeds();
            assert_eq!(files(layout.path()), files(&fixture("local-max")));
        }
    }
}

#[test]
fn what_was_done_before_a_signal_is_reported() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("metadata.json");
    let server = Server::start();
    let program = Program::new()
        .arg("export")
        .args(["--cache-to", &server.spec("mode=max,name=a")])
        .args(["--cache-to", &server.spec("mode=max,name=b")])
        .args(["--cache-to", &server.spec("mode=max,name=c")])
        .arg(fixture("local-max"))
        .arg("--metadata-file")
        .arg(&file);
    let run = run_under(program, &server, move |asked, victim| {
        (asked.key == "manifests/b").then(|| {
            victim.signal(libc::SIGINT);
            Fault::Hang
        })
    })
    .ends_with(130);
    assert_eq!(run.stdout.lines().count(), 1, "{}", run.stdout);
    assert!(
        run.stdout
            .starts_with("exported 10 blobs to s3://cache/manifests/a"),
        "{}",
        run.stdout
    );
    assert_eq!(run.stderr.matches("error: ").count(), 1);
    let metadata = std::fs::read(&file).expect("it was written");
    let metadata: serde_json::Value = serde_json::from_slice(&metadata).expect("JSON");
    let results = metadata["results"].as_array().expect("results");
    assert_eq!(results.len(), 3);
    assert_eq!(results[0]["transferred"], 10);
    for (result, says) in results[1..].iter().zip(["interrupted", "not started"]) {
        let error = result["error"].as_str().expect("an error");
        assert!(error.starts_with(says), "{error}");
    }
}

#[test]
fn a_signal_stops_an_export_that_waits_for_credentials() {
    let server = Server::start();
    let home = tempfile::tempdir().expect("a temporary directory");
    // The thread ends with the directory.
    let asked = home.path().join("asked");
    let config = format!(
        "[profile slow]\ncredential_process = sh -c 'touch {0}; while [ -e {0} ]; do sleep 0.1; done'\n",
        asked.display()
    );
    std::fs::write(home.path().join("config"), config).expect("a file can be written");
    let child = Program::export(&server.keyless_spec(""), &fixture("local-max"))
        .env("AWS_CONFIG_FILE", home.path().join("config"))
        .env("AWS_PROFILE", "slow")
        .spawn();
    while !asked.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let victim = Victim::default();
    victim.is(&child);
    victim.signal(libc::SIGTERM);
    Run::from(child.wait_with_output().expect("the program ends")).ends_with(143);
    assert_eq!(server.log().len(), 0);
}

#[test]
fn a_signal_stops_an_import_that_waits_for_the_lock() {
    let (objects, _) = undisturbed_export("mode=max", &fixture("local-max"));
    let server = Server::start();
    fill(&server, &objects);
    let spec = server.spec("");
    let reference = files(&fixture("local-max"));
    let layout = tempfile::tempdir().expect("a temporary directory");
    let lock = std::fs::File::create(layout.path().join("index.json.lock")).expect("a lock file");
    lock.lock().expect("a free lock");
    let child = Program::import(&spec, layout.path()).spawn();
    let blobs = reference.keys().filter(|name| name.len() > 64);
    for blob in blobs {
        while !layout.path().join(blob).exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let victim = Victim::default();
    victim.is(&child);
    victim.signal(libc::SIGINT);
    Run::from(child.wait_with_output().expect("the program ends"))
        .ends_with(130)
        .says("interrupted");
    assert!(!layout.path().join("index.json").exists());
    drop(lock);
    Program::import(&spec, layout.path()).run().succeeds();
    assert_eq!(files(layout.path()), reference);
}

#[test]
#[cfg(target_os = "linux")]
fn a_signal_stops_an_import_that_waits_to_read_the_index() {
    let server = Server::start();
    let layout = tempfile::tempdir().expect("a temporary directory");
    // As BuildKit leaves it for a moment while writing.
    std::fs::write(
        layout.path().join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .expect("a file can be written");
    std::fs::write(layout.path().join("index.json"), "{").expect("a file can be written");
    let path = layout.path().join("index.json.lock");
    let lock = std::fs::File::create(&path).expect("a lock file");
    lock.lock().expect("a free lock");
    let child = Program::import(&server.spec(""), layout.path()).spawn();
    let path = path.canonicalize().expect("a real path");
    let open = || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", child.id()));
        let mut fds = fds.into_iter().flatten().flatten();
        fds.any(|fd| std::fs::read_link(fd.path()).is_ok_and(|file| file == path))
    };
    while !open() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let victim = Victim::default();
    victim.is(&child);
    victim.signal(libc::SIGTERM);
    let run = Run::from(child.wait_with_output().expect("the program ends"));
    // Without the signal it would wait for a minute.
    run.ends_with(143).says("interrupted");
    assert_eq!(server.log().len(), 0);
}

#[test]
fn the_second_signal_waits_for_nothing() {
    let layout = layout_of(&LARGE);
    let server = Server::start();
    let second = Arc::new(AtomicBool::new(false));
    let sent = Arc::clone(&second);
    let program = Program::export(&server.spec("mode=max"), layout.path());
    // After the first signal the server answers nothing, so aborting would take its full time.
    run_under(program, &server, move |asked, victim| {
        match asked.operation {
            "UploadPart" if asked.nth == 0 => victim.signal(libc::SIGINT),
            "UploadPart" => {}
            "AbortMultipartUpload" => {
                sent.store(true, Ordering::SeqCst);
                victim.signal(libc::SIGTERM);
            }
            _ => return None,
        }
        Some(Fault::Hang)
    })
    .ends_with(143);
    assert!(second.load(Ordering::SeqCst));
    assert_store_is_sound(&server, "interrupted twice");
    assert_eq!(server.uploads(), 1);
    server.age_uploads(Duration::from_secs(2 * 60 * 60));
    Program::export(&server.spec("mode=max"), layout.path())
        .run()
        .succeeds();
    assert_eq!(server.uploads(), 0);
}

/// Kills an import before each of its changes to the disk in turn, until one completes; returns the
/// number of changes. Each import starts from what `start` makes.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn kill_at_every_change(
    spec: &str,
    arguments: &[&str],
    start: impl Fn() -> tempfile::TempDir,
    reference: &BTreeMap<String, Vec<u8>>,
) -> usize {
    use crate::traced::{Ended, kill_before_change};
    let import = |root: &Path| Program::import(spec, root).args(arguments);
    for nth in 0.. {
        let directory = start();
        let root = directory.path().canonicalize().expect("a real path");
        let layout = root.join("cache");
        match kill_before_change(import(&layout), &root, nth) {
            Ended::Killed => {}
            Ended::Exited(code) => {
                assert_eq!(code, 0);
                assert_eq!(&files(&layout), reference);
                println!("killed at {nth} points");
                return nth;
            }
        }
        assert_layout_is_sound(&layout, &format!("change {nth}"));
        import(&layout).run().succeeds();
        assert_eq!(&files(&layout), reference, "change {nth}");
    }
    unreachable!("numbers do not end")
}

#[test]
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn an_import_killed_before_any_change_to_the_disk_is_finished_by_the_next_one() {
    let (objects, _) = undisturbed_export("mode=max", &fixture("local-max"));
    let server = Server::start();
    fill(&server, &objects);
    let nothing = || tempfile::tempdir().expect("a temporary directory");
    let reference = files(&fixture("local-max"));
    let points = kill_at_every_change(&server.spec(""), &[], nothing, &reference);
    assert!(points > 50, "{points} points");
}

#[test]
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn an_import_into_a_layout_in_use_killed_before_any_change_loses_no_tag() {
    let (objects, _) = undisturbed_export("mode=max", &fixture("local-multiarch"));
    let server = Server::start();
    fill(&server, &objects);
    let in_use = || {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let layout = directory.path().join("cache");
        for (name, bytes) in files(&fixture("local-max")) {
            match name.ends_with('/') {
                true => std::fs::create_dir_all(layout.join(name)).expect("a directory"),
                false => {
                    let path = layout.join(name);
                    std::fs::create_dir_all(path.parent().expect("a parent")).expect("it");
                    std::fs::write(path, bytes).expect("a file");
                }
            }
        }
        directory
    };
    let undisturbed = in_use();
    let layout = undisturbed.path().join("cache");
    let arguments = ["--tag", "arm"];
    Program::import(&server.spec(""), &layout)
        .args(arguments)
        .run()
        .succeeds();
    let reference = files(&layout);
    let points = kill_at_every_change(&server.spec(""), &arguments, in_use, &reference);
    assert!(points > 20, "{points} points");
}
