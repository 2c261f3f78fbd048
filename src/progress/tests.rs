use std::sync::atomic::AtomicUsize;

use super::bars::Size;
use super::*;

const MIB: u64 = 1 << 20;

/// From the first row of a frame on to the end of the screen.
const ERASE: &str = "\r\x1b[K\x1b[B\x1b[J\x1b[A";

/// An output that the test reads, and a clock and a terminal that it sets.
struct Rig {
    progress: Progress,
    written: Arc<Mutex<Vec<u8>>>,
    /// Milliseconds.
    time: Arc<AtomicU64>,
    bars: Option<Arc<Bars>>,
    columns: Arc<AtomicUsize>,
    rows: Arc<AtomicUsize>,
}

struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Rig {
    fn new(display: Display, verbosity: i8) -> Self {
        Self::coloured(display, verbosity, false)
    }

    fn coloured(display: Display, verbosity: i8, coloured: bool) -> Self {
        let written = Arc::new(Mutex::new(Vec::new()));
        let out = Box::new(Sink(written.clone()));
        let time = Arc::new(AtomicU64::new(1_700_000_000_000));
        let ticks = time.clone();
        let clock: Clock = Arc::new(move || Duration::from_millis(ticks.load(Relaxed)));
        let (rows, columns) = (
            Arc::new(AtomicUsize::new(24)),
            Arc::new(AtomicUsize::new(80)),
        );
        let (high, wide) = (rows.clone(), columns.clone());
        let size = move || Size {
            rows: high.load(Relaxed),
            columns: wide.load(Relaxed),
        };
        let quiet = display == Display::Quiet || verbosity < 0;
        let bars = (display == Display::Tty).then(|| {
            Arc::new(Bars::new(
                Box::new(Sink(written.clone())),
                size,
                clock.clone(),
                coloured,
            ))
        });
        let view: Arc<dyn View> = match (&bars, display) {
            (Some(bars), _) => bars.clone(),
            (None, Display::Rawjson) => Arc::new(Events::new(out, clock.clone(), quiet)),
            (None, _) if quiet => Arc::new(Lines::quiet(out, clock.clone(), coloured)),
            (None, _) => Arc::new(Lines::new(out, clock.clone(), coloured, verbosity > 0)),
        };
        Rig {
            progress: Progress::with(Some(view), verbosity > 0 && !quiet, clock),
            written,
            time,
            bars,
            columns,
            rows,
        }
    }

    fn pass(&self, milliseconds: u64) {
        self.time.fetch_add(milliseconds, Relaxed);
    }

    /// What was written since the last call.
    fn output(&self) -> String {
        String::from_utf8(std::mem::take(&mut *self.written.lock())).unwrap()
    }

    /// What drawing writes.
    fn drawn(&self) -> String {
        self.output();
        self.bars.as_ref().unwrap().draw();
        self.output()
    }

    /// The lines that drawing leaves on a terminal of so many columns.
    fn frame(&self, columns: usize) -> Vec<String> {
        self.columns.store(columns, Relaxed);
        let drawn = self.drawn();
        let lines = match drawn.rsplit_once(ERASE) {
            Some((_, lines)) => lines,
            None => &drawn,
        };
        lines.lines().map(str::to_owned).collect()
    }
}

// Its hex begins with e3b0c44298fc.
fn digest() -> Digest {
    Digest::of(b"")
}

#[test]
fn plain_has_a_line_for_each_thing_that_happened() {
    let rig = Rig::new(Display::Plain, 0);
    let progress = &rig.progress;
    progress.stage("exporting to s3://cache", 2, 1024 + 159);
    let small = progress.blob(Verb::Upload, &digest(), 159);
    small.advance(159);
    rig.pass(1_234);
    small.done();
    small.done();
    progress.blob(Verb::Refresh, &digest(), 1024).done();
    progress.note("a note");
    progress.debug("not shown");
    progress.retry("no answer from s3 after 30 s, trying again (2 of 3)");
    progress.result(&serde_json::json!({"command": "export"}));
    progress.warn("a warning");
    progress.error("an error");
    let broken = progress.clone().blob(Verb::Download, &digest(), 2048);
    broken.advance(1024);
    drop(broken);
    rig.pass(3_600_000);
    let left_behind = progress.blob(Verb::Download, &digest(), 7);
    progress.end();
    progress.clone().end();
    drop(left_behind);
    progress.note("the end");
    assert_eq!(
        rig.output(),
        "  0.0s exporting to s3://cache (2 blobs, 1.16 KiB)\n  \
         1.2s [1/2] uploaded sha256:e3b0c44298fc 159 B\n  \
         1.2s [2/2] refreshed sha256:e3b0c44298fc 1.00 KiB\n  \
         1.2s a note\n  \
         1.2s no answer from s3 after 30 s, trying again (2 of 3)\n\
         warning: a warning\n\
         error: an error\n\
         3601.2s the end\n"
    );
}

#[test]
fn verbose_adds_debug_lines_and_what_begins_and_what_stops() {
    let rig = Rig::new(Display::Auto, 1);
    rig.progress.stage("hashing", 0, 0);
    rig.progress.blob(Verb::Hash, &digest(), 5).done();
    rig.progress.debug("shown");
    let broken = rig.progress.blob(Verb::Download, &digest(), 2048);
    broken.advance(1024);
    broken.advance(1024);
    broken.take_back(1536);
    drop(broken);
    assert_eq!(
        rig.output(),
        "  0.0s hashing\n  \
         0.0s hashing sha256:e3b0c44298fc 5 B\n  \
         0.0s hashed sha256:e3b0c44298fc 5 B\n  \
         0.0s debug: shown\n  \
         0.0s downloading sha256:e3b0c44298fc 2.00 KiB\n  \
         0.0s stopped downloading sha256:e3b0c44298fc after 512 B of 2.00 KiB\n"
    );
}

#[test]
fn a_long_transfer_tells_its_state_every_ten_seconds() {
    let rig = Rig::new(Display::Plain, 0);
    rig.progress.stage("exporting", 3, 2000 * MIB);
    rig.progress
        .blob(Verb::Refresh, &digest(), 1000 * MIB)
        .done();
    let blob = rig.progress.blob(Verb::Upload, &digest(), 990 * MIB);
    rig.output();

    rig.pass(9_999);
    blob.advance(MIB);
    assert_eq!(rig.output(), "");

    rig.pass(1);
    blob.advance(449 * MIB);
    blob.advance(MIB);
    assert_eq!(
        rig.output(),
        " 10.0s [1/3] uploading: 45% of 1000 MiB, 45.0 MiB/s\n"
    );

    rig.pass(20_000);
    blob.take_back(451 * MIB);
    blob.advance(460 * MIB);
    assert_eq!(
        rig.output(),
        " 30.0s [1/3] uploading: 46% of 1000 MiB, 512 KiB/s\n"
    );
}

#[test]
fn blobs_that_end_at_once_are_counted_in_the_order_of_their_lines() {
    let rig = Rig::new(Display::Plain, 1);
    rig.progress.stage("hashing", 200, 200);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    rig.progress.blob(Verb::Hash, &digest(), 1).done();
                }
            });
        }
    });
    let counts: Vec<String> = rig
        .output()
        .lines()
        .filter_map(|line| line.strip_prefix("  0.0s [")?.split_once('/'))
        .map(|(count, _)| count.to_owned())
        .collect();
    let expected: Vec<String> = (1..=200).map(|count| count.to_string()).collect();
    assert_eq!(counts, expected);
}

#[test]
fn of_more_than_twenty_blobs_plain_tells_the_count_only() {
    let rig = Rig::new(Display::Plain, 0);
    rig.progress.stage("uploading", 21, 21 * MIB);
    let upload = || {
        let blob = rig.progress.blob(Verb::Upload, &digest(), MIB);
        blob.advance(MIB);
        blob.done();
    };
    upload();
    rig.pass(10_000);
    upload();
    upload();
    rig.pass(5_000);
    for _ in 3..21 {
        upload();
    }
    assert_eq!(
        rig.output(),
        "  0.0s uploading (21 blobs, 21.0 MiB)\n \
         10.0s [1/21] uploading: 9% of 21.0 MiB, 205 KiB/s\n \
         15.0s [21/21] uploaded 21.0 MiB, 1.40 MiB/s\n"
    );

    let rig = Rig::new(Display::Plain, 1);
    rig.progress.stage("uploading", 21, 21 * MIB);
    rig.output();
    rig.progress.blob(Verb::Upload, &digest(), MIB).done();
    assert_eq!(
        rig.output(),
        "  0.0s uploading sha256:e3b0c44298fc 1.00 MiB\n  \
         0.0s [1/21] uploaded sha256:e3b0c44298fc 1.00 MiB\n"
    );
}

#[test]
fn bytes_of_an_earlier_run_are_through_but_not_in_the_rate() {
    let rig = Rig::new(Display::Plain, 0);
    rig.progress.stage("fetching", 1, 426 * MIB);
    let blob = rig.progress.blob(Verb::Download, &digest(), 426 * MIB);
    blob.resumed(213 * MIB);
    rig.pass(10_000);
    blob.advance(100 * MIB);
    blob.advance(113 * MIB);
    blob.done();
    assert_eq!(
        rig.output(),
        "  0.0s fetching (1 blob, 426 MiB)\n \
         10.0s [0/1] downloading: 73% of 426 MiB, 10.0 MiB/s, 213 MiB resumed\n \
         10.0s [1/1] downloaded sha256:e3b0c44298fc 426 MiB, 213 MiB resumed\n"
    );

    // They were wrong, and come again over the network.
    rig.progress.stage("fetching", 1, 426 * MIB);
    let blob = rig.progress.blob(Verb::Download, &digest(), 426 * MIB);
    blob.resumed(213 * MIB);
    blob.advance(213 * MIB);
    blob.take_back(426 * MIB);
    rig.output();
    rig.pass(10_000);
    blob.advance(213 * MIB);
    assert_eq!(
        rig.output(),
        " 20.0s [0/1] downloading: 50% of 426 MiB, 21.3 MiB/s\n"
    );
}

#[test]
fn a_blob_that_another_process_fetches_is_waited_for_and_then_there() {
    let rig = Rig::new(Display::Plain, 0);
    rig.progress.stage("fetching", 2, 2 * MIB);
    let blob = rig.progress.blob(Verb::Download, &digest(), MIB);
    blob.waiting();
    blob.waiting();
    rig.pass(3_000);
    blob.present();
    drop(blob);
    assert_eq!(
        rig.output(),
        "  0.0s fetching (2 blobs, 2.00 MiB)\n  \
         0.0s waiting for another process to download sha256:e3b0c44298fc 1.00 MiB\n  \
         3.0s [1/2] another process downloaded sha256:e3b0c44298fc 1.00 MiB\n"
    );
    let stage = rig.progress.hub.stage.lock().clone();
    assert_eq!((stage.bytes(), stage.moved()), (MIB, 0));
}

#[test]
fn of_more_than_twenty_blobs_plain_tells_once_that_others_are_waited_for() {
    let rig = Rig::new(Display::Plain, 0);
    rig.progress.stage("fetching", 21, 21 * MIB);
    rig.output();
    for _ in 0..21 {
        rig.progress.blob(Verb::Download, &digest(), MIB).waiting();
    }
    assert_eq!(
        rig.output(),
        "  0.0s waiting for other processes at work on the same blobs\n"
    );
}

#[test]
fn a_blob_counts_in_the_stage_that_it_began_in() {
    let rig = Rig::new(Display::Plain, 0);
    rig.progress.stage("first", 1, 100);
    let old = rig.progress.blob(Verb::Upload, &digest(), 100);
    old.advance(60);
    rig.progress.stage("second", 1, 100);
    let new = rig.progress.blob(Verb::Download, &digest(), 100);
    rig.pass(10_000);
    drop(old);
    rig.output();
    new.advance(50);
    assert_eq!(
        rig.output(),
        " 10.0s [0/1] downloading: 50% of 100 B, 5 B/s\n"
    );
}

#[test]
fn quiet_shows_warnings_and_errors_only() {
    for (display, verbosity) in [(Display::Quiet, 1), (Display::Plain, -1)] {
        let rig = Rig::new(display, verbosity);
        rig.progress.stage("exporting", 1, 159);
        let blob = rig.progress.blob(Verb::Upload, &digest(), 159);
        blob.waiting();
        rig.pass(60_000);
        blob.advance(159);
        blob.done();
        drop(rig.progress.blob(Verb::Upload, &digest(), 159));
        rig.progress.note("a note");
        rig.progress.retry("a retry");
        rig.progress.debug("a debug line");
        rig.progress.warn("a warning");
        rig.progress.error("an error");
        assert_eq!(rig.output(), "warning: a warning\nerror: an error\n");
    }
}

#[test]
fn labels_are_coloured_where_colours_are_wanted() {
    for display in [Display::Plain, Display::Quiet, Display::Tty] {
        let rig = Rig::coloured(display, 0, true);
        rig.progress.warn("careful \x1b[31m");
        rig.progress.error("it failed");
        assert_eq!(
            rig.output(),
            "\x1b[1m\x1b[33mwarning:\x1b[0m careful \\u{1b}[31m\n\
             \x1b[1m\x1b[31merror:\x1b[0m it failed\n"
        );
    }
}

const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn rawjson_is_one_object_a_line() {
    let rig = Rig::new(Display::Rawjson, 1);
    let progress = &rig.progress;
    progress.stage("exporting", 2, 300);
    let blob = progress.blob(Verb::Upload, &digest(), 200);
    rig.pass(5);
    blob.done();
    drop(progress.blob(Verb::Download, &digest(), 100));
    let resumed = progress.blob(Verb::Download, &digest(), 100);
    resumed.waiting();
    resumed.resumed(70);
    resumed.done();
    progress.blob(Verb::Download, &digest(), 1).present();
    progress.note("a \"note\"\n");
    progress.retry("once more");
    progress.debug("detail");
    progress.warn("careful \u{9b}31m\u{7f}");
    progress.end();
    progress.result(&serde_json::json!({"command": "import", "names": ["a\u{9b}"]}));
    progress.error("it failed");
    let expected = [
        r#"{"time":"2023-11-14T22:13:20.000Z","event":"stage","total":300,"text":"exporting"}"#,
        r#"{"time":"2023-11-14T22:13:20.000Z","event":"start","activity":"upload","digest":"sha256:HEX","total":200}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"done","activity":"upload","digest":"sha256:HEX","total":200}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"start","activity":"download","digest":"sha256:HEX","total":100}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"failed","activity":"download","digest":"sha256:HEX","total":100,"current":0}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"start","activity":"download","digest":"sha256:HEX","total":100}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"waiting","activity":"download","digest":"sha256:HEX","total":100}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"done","activity":"download","digest":"sha256:HEX","total":100,"resumed":70}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"start","activity":"download","digest":"sha256:HEX","total":1}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"present","activity":"download","digest":"sha256:HEX","total":1}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"note","text":"a \"note\"\n"}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"retry","text":"once more"}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"debug","text":"detail"}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"warning","text":"careful \u009b31m\u007f"}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"result","command":"import","names":["a\u009b"]}"#,
        r#"{"time":"2023-11-14T22:13:20.005Z","event":"error","text":"it failed"}"#,
        "",
    ]
    .join("\n")
    .replace("HEX", HEX);
    assert_eq!(rig.output(), expected);
}

#[test]
fn quiet_rawjson_has_warnings_errors_and_results_only() {
    let rig = Rig::new(Display::Rawjson, -1);
    rig.progress.stage("exporting", 1, 159);
    rig.progress.blob(Verb::Upload, &digest(), 159).done();
    rig.progress.note("a note");
    rig.progress.retry("a retry");
    rig.progress.warn("a warning");
    rig.progress.result(&serde_json::json!({}));
    rig.progress.error("an error");
    assert_eq!(
        rig.output(),
        [
            r#"{"time":"2023-11-14T22:13:20.000Z","event":"warning","text":"a warning"}"#,
            r#"{"time":"2023-11-14T22:13:20.000Z","event":"result"}"#,
            r#"{"time":"2023-11-14T22:13:20.000Z","event":"error","text":"an error"}"#,
            "",
        ]
        .join("\n")
    );
}

#[test]
fn rawjson_tells_of_a_blob_at_most_every_200_ms() {
    let rig = Rig::new(Display::Rawjson, 0);
    let blob = rig.progress.blob(Verb::Upload, &digest(), 1000);
    rig.output();
    let mut told = Vec::new();
    for _ in 0..10 {
        rig.pass(50);
        blob.advance(100);
        for line in rig.output().lines() {
            let event: Value = serde_json::from_str(line).unwrap();
            assert_eq!(event["event"], "progress");
            assert_eq!(event["total"], 1000);
            told.push(event["current"].as_u64().unwrap());
        }
    }
    assert_eq!(told, [400, 800]);
}

#[test]
fn names_from_the_network_cannot_steer_the_terminal() {
    let rig = Rig::new(Display::Plain, 0);
    rig.progress
        .note("tag \x1b[2J\r\nfake \u{9b}0m \u{202e}gpj ✓ näme");
    assert_eq!(
        rig.output(),
        "  0.0s tag \\u{1b}[2J\\r\\nfake \\u{9b}0m \\u{202e}gpj ✓ näme\n"
    );
    let rig = Rig::new(Display::Tty, 0);
    rig.progress.stage("reading \x1b[2Jx", 0, 0);
    rig.pass(500);
    assert_eq!(rig.drawn(), "reading \\u{1b}[2Jx, 0:00\n");
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
    let (out, clock) = (|| Box::new(Closed), clock());
    let bars = Arc::new(Bars::new(out(), bars::size, clock.clone(), false));
    let views: [Arc<dyn View>; 4] = [
        Arc::new(Lines::new(out(), clock.clone(), false, true)),
        Arc::new(Lines::quiet(out(), clock.clone(), false)),
        Arc::new(Events::new(out(), clock.clone(), false)),
        bars.clone(),
    ];
    for view in views {
        let progress = Progress::with(Some(view), true, clock.clone());
        progress.stage("exporting", 1, 1);
        let blob = progress.blob(Verb::Upload, &digest(), 1);
        blob.advance(1);
        bars.draw();
        blob.done();
        progress.warn("a warning");
        progress.result(&serde_json::json!({}));
        assert_eq!(progress.suspend(|| 7), 7);
        assert_eq!(progress.hub.stage.lock().done.load(Relaxed), 1);
        progress.end();
    }
}

#[test]
fn absurd_numbers_do_no_harm() {
    let rig = Rig::new(Display::Plain, 0);
    rig.progress.stage("exporting", u64::MAX, u64::MAX);
    rig.progress.blob(Verb::Refresh, &digest(), u64::MAX).done();
    rig.output();
    let blob = rig.progress.blob(Verb::Upload, &digest(), 10);
    blob.take_back(5);
    rig.pass(u64::MAX / 2);
    blob.advance(30);
    assert_eq!(
        rig.output(),
        "9223372036854775.8s [1/18446744073709551615] uploading: 100% of 10 B, 0 B/s\n"
    );
    blob.done();
    assert_eq!(rig.output(), "");
}

#[test]
fn bytes_have_three_digits_in_binary_units() {
    for (n, shown) in [
        (0, "0 B"),
        (159, "159 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1_258_291, "1.20 MiB"),
        (10_240 - 1, "10.0 KiB"),
        (65_955_430, "62.9 MiB"),
        (213 * MIB, "213 MiB"),
        (1023 * MIB, "1023 MiB"),
        (1024 * MIB - 1, "1.00 GiB"),
        (u64::MAX, "16.0 EiB"),
    ] {
        assert_eq!(bytes(n), shown);
    }
}

/// An export in full swing: 3 s in, blobs of all kinds in flight.
fn busy() -> (Rig, Vec<Arc<Blob>>) {
    let rig = Rig::new(Display::Tty, 0);
    rig.progress.stage("uploading", 40, 400 * MIB);
    let mut blobs = Vec::new();
    for n in 0..12 {
        rig.progress.blob(Verb::Upload, &digest(), n * MIB).done();
    }
    for n in 0..12_u64 {
        let digest = Digest::of(&[n as u8]);
        blobs.push(rig.progress.blob(Verb::Upload, &digest, (20 - n) * MIB));
    }
    blobs[0].resumed(9 * MIB);
    blobs[1].waiting();
    rig.drawn();
    for _ in 0..30 {
        rig.pass(100);
        for blob in &blobs[2..] {
            blob.advance(MIB / 10);
        }
        rig.drawn();
    }
    blobs.push(rig.progress.blob(Verb::Upload, &digest(), MIB));
    (rig, blobs)
}

#[test]
fn a_frame_tells_what_its_terminal_has_room_for() {
    let (rig, _blobs) = busy();
    for (columns, expected) in [
        (
            200,
            &[
                "uploading",
                "12/40 blobs   11% [##############                                                                                                                       ]  39.0 MiB/334 MiB 10.0 MiB/s 0:03, 0:29 left",
                "6e340b9cffb3  45% [###########################################################                                                                          ] 9.00 MiB/20.0 MiB      0 B/s 9.00 MiB resumed",
                "4bf5122f3445 waits for another process",
                "dbc1b4c900ff  16% [#####################                                                                                                                ] 3.00 MiB/18.0 MiB 1.00 MiB/s",
                "084fed08b978  17% [######################                                                                                                               ] 3.00 MiB/17.0 MiB 1.00 MiB/s",
                "e52d9c508c50  18% [#######################                                                                                                              ] 3.00 MiB/16.0 MiB 1.00 MiB/s",
                "e77b9a9ae9e3  19% [#########################                                                                                                            ] 3.00 MiB/15.0 MiB 1.00 MiB/s",
                "67586e98fad2  21% [###########################                                                                                                          ] 3.00 MiB/14.0 MiB 1.00 MiB/s",
                "ca358758f6d2  23% [##############################                                                                                                       ] 3.00 MiB/13.0 MiB 1.00 MiB/s",
                "and 4 more",
            ][..],
        ),
        (
            80,
            &[
                "uploading",
                "12/40 blobs   11% [#            ]  39.0 MiB/334 MiB 10.0 MiB/s 0:03, 0:29 left",
                "6e340b9cffb3  45% [#####        ] 9.00 MiB/20.0 MiB      0 B/s 9.00 MiB resumed",
                "4bf5122f3445 waits for another process",
                "dbc1b4c900ff  16% [##           ] 3.00 MiB/18.0 MiB 1.00 MiB/s",
                "084fed08b978  17% [##           ] 3.00 MiB/17.0 MiB 1.00 MiB/s",
                "e52d9c508c50  18% [##           ] 3.00 MiB/16.0 MiB 1.00 MiB/s",
                "e77b9a9ae9e3  19% [##           ] 3.00 MiB/15.0 MiB 1.00 MiB/s",
                "67586e98fad2  21% [##           ] 3.00 MiB/14.0 MiB 1.00 MiB/s",
                "ca358758f6d2  23% [##           ] 3.00 MiB/13.0 MiB 1.00 MiB/s",
                "and 4 more",
            ][..],
        ),
        (
            60,
            &[
                "uploading",
                "12/40 blobs   11%  39.0 MiB/334 MiB 10.0 MiB/s 0:03",
                "6e340b9cffb3  45% 9.00 MiB/20.0 MiB      0 B/s",
                "4bf5122f3445 waits for another process",
                "dbc1b4c900ff  16% 3.00 MiB/18.0 MiB 1.00 MiB/s",
                "084fed08b978  17% 3.00 MiB/17.0 MiB 1.00 MiB/s",
                "e52d9c508c50  18% 3.00 MiB/16.0 MiB 1.00 MiB/s",
                "e77b9a9ae9e3  19% 3.00 MiB/15.0 MiB 1.00 MiB/s",
                "67586e98fad2  21% 3.00 MiB/14.0 MiB 1.00 MiB/s",
                "ca358758f6d2  23% 3.00 MiB/13.0 MiB 1.00 MiB/s",
                "and 4 more",
            ][..],
        ),
        (
            40,
            &[
                "uploading",
                "12/40 blobs   11% 10.0 MiB/s 0:03",
                "6e340b9cffb3  45%      0 B/s",
                "4bf5122f3445 waits for another process",
                "dbc1b4c900ff  16% 1.00 MiB/s",
                "084fed08b978  17% 1.00 MiB/s",
                "e52d9c508c50  18% 1.00 MiB/s",
                "e77b9a9ae9e3  19% 1.00 MiB/s",
                "67586e98fad2  21% 1.00 MiB/s",
                "ca358758f6d2  23% 1.00 MiB/s",
                "and 4 more",
            ][..],
        ),
        (
            20,
            &[
                "uploading",
                "12/40 blobs   11%",
                "6e340b9cffb3  45%",
                "4bf5122f3445 waits ",
                "dbc1b4c900ff  16%",
                "084fed08b978  17%",
                "e52d9c508c50  18%",
                "e77b9a9ae9e3  19%",
                "67586e98fad2  21%",
                "ca358758f6d2  23%",
                "and 4 more",
            ][..],
        ),
        (10, &["uploading", " 11%"][..]),
        (3, &["up"][..]),
    ] {
        assert_eq!(rig.frame(columns), expected, "{columns} columns");
    }
}

#[test]
fn no_line_of_a_frame_is_wider_than_its_terminal() {
    let (rig, blobs) = busy();
    for extreme in [false, true] {
        if extreme {
            rig.progress
                .stage(&"a long title ".repeat(30), u64::MAX, u64::MAX);
            rig.pass(u64::MAX / 2);
            blobs[2].resumed(u64::MAX / 2);
        }
        for columns in 1..200 {
            // The last column stays free: some terminals wrap on filling it.
            for line in rig.frame(columns) {
                assert!(line.len() < columns, "{columns}: {line}");
            }
        }
    }
}

#[test]
fn a_frame_leaves_room_for_the_cursor_and_what_was_said() {
    let (rig, _blobs) = busy();
    for (rows, expected) in [
        (2, &[][..]),
        (3, &["12/40 blobs  11%"]),
        (4, &["uploading", "12/40 blobs  11%"]),
        (
            6,
            &[
                "uploading",
                "12/40 blobs   11%",
                "6e340b9cffb3  45%",
                "and 11 more",
            ],
        ),
    ] {
        rig.rows.store(rows, Relaxed);
        assert_eq!(rig.frame(20), expected, "{rows} rows");
    }
}

#[test]
fn what_takes_less_than_half_a_second_has_no_bar() {
    let rig = Rig::new(Display::Tty, 0);
    rig.progress.stage("looking for blobs on s3", 0, 0);
    rig.pass(499);
    assert_eq!(rig.drawn(), "");
    rig.pass(1);
    assert_eq!(rig.drawn(), "looking for blobs on s3, 0:00\n");
    rig.pass(61_000);
    assert_eq!(
        rig.drawn(),
        format!("\x1b[1A{ERASE}looking for blobs on s3, 1:01\n")
    );

    rig.progress.stage("uploading", 2, 2 * MIB);
    let blob = rig.progress.blob(Verb::Upload, &digest(), MIB);
    assert_eq!(rig.drawn(), format!("\x1b[1A{ERASE}"));
    rig.pass(499);
    let young = rig.progress.blob(Verb::Upload, &digest(), MIB);
    assert_eq!(rig.drawn(), "");
    rig.pass(1);
    assert_eq!(
        rig.frame(30),
        ["uploading", "0/2 blobs      0% 0:00", "e3b0c44298fc   0%"]
    );
    blob.done();
    young.done();
    assert_eq!(rig.frame(30), ["uploading", "2/2 blobs 100% 0:00"]);
}

#[test]
fn messages_go_above_the_bars_and_the_end_takes_the_bars_away() {
    let rig = Rig::new(Display::Tty, 0);
    rig.progress.note("before");
    rig.progress.stage("fetching", 0, 0);
    rig.pass(500);
    assert_eq!(rig.drawn(), "fetching, 0:00\n");
    assert_eq!(rig.drawn(), "");
    rig.progress.warn("a warning");
    rig.progress.debug("not shown");
    assert_eq!(
        rig.output(),
        format!("\x1b[1A{ERASE}warning: a warning\nfetching, 0:00\n")
    );
    rig.progress.suspend(|| {
        assert_eq!(rig.output(), format!("\x1b[1A{ERASE}"));
        assert_eq!(rig.drawn(), "");
        rig.progress.note("meanwhile");
        assert_eq!(rig.output(), "meanwhile\n");
    });
    assert_eq!(rig.drawn(), "fetching, 0:00\n");
    rig.progress.end();
    rig.progress.end();
    rig.progress.error("an error");
    assert_eq!(rig.output(), format!("\x1b[1A{ERASE}error: an error\n"));
    rig.pass(1_000);
    assert_eq!(rig.drawn(), "");
}

#[test]
fn a_frame_that_a_narrower_terminal_has_wrapped_goes_as_a_whole() {
    let rig = Rig::new(Display::Tty, 0);
    rig.progress.stage("reading the manifest", 0, 0);
    rig.pass(500);
    assert_eq!(rig.drawn(), "reading the manifest, 0:00\n");
    rig.columns.store(10, Relaxed);
    assert_eq!(rig.drawn(), format!("\x1b[3A{ERASE}reading t\n"));
    rig.columns.store(80, Relaxed);
    assert_eq!(
        rig.drawn(),
        format!("\x1b[1A{ERASE}reading the manifest, 0:00\n")
    );
}

#[test]
fn the_readme_shows_a_frame_of_bars() {
    const MIB: u64 = 1 << 20;
    let rig = Rig::new(Display::Tty, 0);
    rig.progress.stage("fetching", 37, 1_400 * MIB);
    for n in 0..30_u8 {
        let blob = rig
            .progress
            .blob(Verb::Download, &Digest::of(&[n]), 20 * MIB);
        blob.advance(20 * MIB);
        blob.done();
    }
    let _blobs: Vec<_> = [(400, 260), (200, 31), (100, 77)]
        .into_iter()
        .enumerate()
        .map(|(n, (size, done))| {
            let digest = Digest::of(&[100 + n as u8]);
            let blob = rig.progress.blob(Verb::Download, &digest, size * MIB);
            blob.advance(done * MIB);
            blob
        })
        .collect();
    rig.pass(9_000);
    let frame = rig.frame(100).join("\n");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let readme = std::fs::read_to_string(path).unwrap();
    let (before, rest) = readme.split_once("<!-- frame -->\n```text\n").unwrap();
    let (shown, after) = rest.split_once("\n```\n").unwrap();
    if shown != frame && std::env::var_os("UPDATE_EXPECT").is_some() {
        let text = format!("{before}<!-- frame -->\n```text\n{frame}\n```\n{after}");
        std::fs::write(path, text).unwrap();
        return;
    }
    assert_eq!(shown, frame, "run `make docs`");
}
