//! What a terminal shows: the program runs on a pseudo-terminal.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use expect_test::{Expect, expect};
use layercache::cache::digest::Digest;
use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::aftermath::{noise, put_cache};
use crate::output::{lasting, steady};
use crate::program::{Program, fixture, s3_manifest};
use crate::server::Server;

/// Wide enough that no line wraps.
const WIDE: u16 = 250;

/// Runs `program` on a terminal, and returns all that it wrote there.
fn on_terminal(program: Program) -> String {
    answered(program, WIDE, None)
}

/// Runs `program` on a terminal of so many columns where `answer` is typed, and returns all that it
/// wrote there.
fn answered(program: Program, columns: u16, answer: Option<&str>) -> String {
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    rustix::pty::grantpt(&ours).expect("a terminal");
    rustix::pty::unlockpt(&ours).expect("a terminal");
    let name = rustix::pty::ptsname(&ours, Vec::new()).expect("it has a name");
    let theirs = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty());
    let theirs: OwnedFd = theirs.expect("a terminal can be opened");
    let size = Winsize {
        ws_row: 24,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&theirs, size).expect("it takes a size");
    let mut command = Command::from(program);
    let stdout = theirs.try_clone().expect("a descriptor");
    if let Some(answer) = answer {
        let stdin = theirs.try_clone().expect("a descriptor");
        command.stdin(Stdio::from(stdin));
        // The terminal keeps it until it is read.
        rustix::io::write(&ours, answer.as_bytes()).expect("a line can be typed");
    }
    command
        .stdout(Stdio::from(stdout))
        .stderr(Stdio::from(theirs));
    let mut child = command.spawn().expect("the program starts");
    // It holds the program's end of the terminal, which would never end.
    drop(command);
    let mut written = Vec::new();
    // Linux ends it with EIO.
    let _ = File::from(ours).read_to_end(&mut written);
    child.wait().expect("it ends");
    String::from_utf8(written).expect("UTF-8")
}

/// The lines left on a terminal of so many columns that was sent `written`. Colours are shown by their
/// numbers: `<31>`.
fn screen(written: &str, columns: u16) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut row = 0_usize;
    let mut rest = written;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            // Only the begin of a line is ever returned to.
            '\r' => assert!(rest.starts_with(['\n', '\x1b']), "{rest:?}"),
            '\n' => row += 1,
            '\x1b' => {
                let end = rest
                    .find(|c: char| c.is_ascii_alphabetic())
                    .expect("it ends");
                let count = rest[1..end].parse().unwrap_or(1);
                match &rest[end..=end] {
                    "A" => {
                        let above = row.checked_sub(count).expect("no line above the first");
                        for line in &lines[above..=row] {
                            let fits = line.chars().count() < columns.into();
                            assert!(fits, "{line:?} takes more than one row");
                        }
                        row = above;
                    }
                    "m" => lines[row].push_str(&format!("<{}>", &rest[1..end])),
                    "B" => row += count,
                    "K" => lines[row].clear(),
                    "J" => {
                        lines[row].clear();
                        lines.truncate(row + 1);
                    }
                    other => panic!("an unexpected sequence: {other}"),
                }
                rest = &rest[end + 1..];
            }
            c => lines[row].push(c),
        }
        if lines.len() == row {
            lines.push(String::new());
        }
    }
    lines
}

fn slow_server() -> Server {
    let server = Server::builder().delay(Duration::from_secs(1)).start();
    server.put("manifests/buildkit", s3_manifest("max.json"));
    for file in std::fs::read_dir(fixture("local-max/blobs/sha256")).expect("the fixture is there")
    {
        let path = file.expect("an entry").path();
        let hex = path.file_name().and_then(|name| name.to_str());
        let key = format!("blobs/sha256:{}", hex.expect("hex digits"));
        server.put(&key, std::fs::read(&path).expect("a blob"));
    }
    server
}

fn import(server: &Server, layout: &Path) -> Program {
    Program::import(&server.spec(""), layout)
        .arg("--require")
        .env("TERM", "xterm-256color")
}

#[test]
fn bars_come_and_go_and_leave_whole_lines() {
    let server = slow_server();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let written = on_terminal(import(&server, &folder.path().join("cache")));
    for shown in [
        "reading the manifest, 0:00\r\n",
        "fetching\r\n0/10 blobs     0% [",
    ] {
        assert!(written.contains(shown), "{shown:?} is not in {written}");
    }
    let lines = screen(&written, WIDE);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with("imported 'buildkit' from s3://cache/"));
    assert_eq!(lines[1], "");
}

#[test]
fn an_error_is_red_unless_no_color_is_set() {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let program = || import(&server, folder.path());
    let has_line = |written: &str, start: &str| written.lines().any(|line| line.starts_with(start));
    let red = on_terminal(program());
    assert!(has_line(&red, "\x1b[1m\x1b[31merror:\x1b[0m "), "{red}");
    let plain = on_terminal(program().env("NO_COLOR", "1"));
    assert!(has_line(&plain, "error: "), "{plain}");
    let dumb = on_terminal(program().env("TERM", "dumb"));
    assert!(
        lasting(&dumb).starts_with("Ns reading the manifest\r\n"),
        "{dumb}"
    );
    assert!(has_line(&dumb, "error: "), "{dumb}");
}

#[test]
fn a_prune_shows_its_plan_and_asks() {
    let server = Server::start();
    let spec = server.spec("mode=max");
    Program::export(&spec, &fixture("local-max"))
        .run()
        .succeeds();
    server.put(
        "blobs/sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
        "foo",
    );
    server.age_all(Duration::from_secs(10 * 24 * 60 * 60));
    let prune = |answer| {
        let program = Program::new()
            .args(["prune", "--cache-to", &spec])
            .env("TERM", "xterm-256color")
            .env("NO_COLOR", "1");
        lasting(&screen(&answered(program, WIDE, Some(answer)), WIDE).join("\n"))
    };
    let plan = "\
name       written      size  action  reason
buildkit  10 d ago  62.9 KiB  keep    no option selects it

to remove: 0 caches, 1 blob (3 B)
to keep: 1 cache, 10 blobs (62.9 KiB)
Remove this from s3://cache at http://127.0.0.1:PORT? [y/N] ";
    let shown = prune("n\n");
    assert!(shown.contains(plan), "{shown}");
    assert!(
        shown.contains("[y/N] nothing was removed from s3://cache at http://127.0.0.1:PORT"),
        "{shown}"
    );
    assert_eq!(server.keys().len(), 12);
    let shown = prune("y\n");
    assert!(shown.contains(plan), "{shown}");
    assert!(
        shown.contains("removed 0 caches, 1 blob (3 B); "),
        "{shown}"
    );
    assert_eq!(server.keys().len(), 11);
}

/// Compares what is left on terminals of different widths, without colours and with them.
fn shows(args: &[&str], code: i32, expected: [(u16, Expect); 2], coloured: Expect) {
    let shown = |columns, environment: &[(&str, &str)]| {
        let mut program = Program::new().args(args).env("TERM", "xterm-256color");
        for (name, value) in environment {
            program = program.env(name, value);
        }
        let written = answered(program, columns, None);
        steady(&screen(&written, columns).join("\n")).concat()
    };
    Program::new().args(args).run().ends_with(code);
    for (columns, expected) in expected {
        expected.assert_eq(&shown(columns, &[("NO_COLOR", "1")]));
    }
    coloured.assert_eq(&shown(WIDE, &[]));
}

/// Two caches that share a blob, one of them without another blob; and a manifest that is damaged.
fn bucket() -> Server {
    let server = Server::start();
    put_cache(&server, "main", &[3_000_000, 200_000]);
    put_cache(&server, "feature/a-name-that-is-long", &[3_000_000, 5_000]);
    server.put("manifests/broken", r#"{"layers": 1}"#);
    server.remove(&format!("blobs/{}", Digest::of(&noise(2, 5_000))));
    server.age_all(Duration::from_secs(50 * 3600));
    server
}

#[test]
fn ls_fits_its_table_to_the_terminal() {
    let server = bucket();
    shows(
        &["ls", "--cache-from", &server.spec("")],
        0,
        [
            (
                WIDE,
                expect![[r#"
            name                         written  layers      size    unique  oldest blob  missing
            feature/a-name-that-is-long  2 d ago       2  2.87 MiB  4.88 KiB      2 d ago        1
            main                         2 d ago       2  3.05 MiB   195 KiB      2 d ago        0

            2 caches of 3 blobs (3.06 MiB) in s3://cache at http://127.0.0.1:PORT; 5 requests in N s
            unreadable: manifests/broken: reading the cache manifest: invalid type: integer `1`, expected a sequence at line 1 column 12
        "#]],
            ),
            (
                50,
                expect![[r#"
            name            written  layers      size  missing
            feature/a-nam…  2 d ago       2  2.87 MiB        1
            main            2 d ago       2  3.05 MiB        0

            2 caches of 3 blobs (3.06 MiB) in s3://cache at http://127.0.0.1:PORT; 5 requests in N s
            unreadable: manifests/broken: reading the cache manifest: invalid type: integer `1`, expected a sequence at line 1 column 12
        "#]],
            ),
        ],
        expect![[r#"
            name                         written  layers      size    unique  oldest blob  missing
            feature/a-name-that-is-long  2 d ago       2  2.87 MiB  4.88 KiB      2 d ago        1
            main                         2 d ago       2  3.05 MiB   195 KiB      2 d ago        0

            2 caches of 3 blobs (3.06 MiB) in s3://cache at http://127.0.0.1:PORT; 5 requests in N s
            unreadable: manifests/broken: reading the cache manifest: invalid type: integer `1`, expected a sequence at line 1 column 12
        "#]],
    );
}

#[test]
fn inspect_fits_its_tree_to_the_terminal() {
    let server = bucket();
    let spec = server.spec("name=feature/a-name-that-is-long");
    shows(
        &["inspect", "--cache-from", &spec],
        0,
        [
            (
                WIDE,
                expect![[r#"
                    layer                                                                           size  created              shared by  state
                    ├─ sha256:6456fbbef8eef50717f39b1bb1b3c304f757080d7f3b4306e833a9bf2c709a43  2.86 MiB  2026-11-21 20:37:36          1  ok
                    └─ sha256:a7756da8cb767b983df3326bde7f3ab6e6334e38320dabcf8e4dc1264cab5da9  4.88 KiB  2026-11-21 20:37:36          0  MISSING

                    'feature/a-name-that-is-long' in s3://cache/manifests/feature/a-name-that-is-long at http://127.0.0.1:PORT, written 2 d ago; 7 requests in N s
                    2 layers, 2 records, 2 results; 2 blobs (2.87 MiB)
                    mode=min would keep 2 layers, 2 results; 2 blobs (2.87 MiB)
                    shares 1 blob (2.86 MiB) with 'main'; 4.88 KiB in no other cache
                    1 other manifest could not be read, and may share more
                    missing: 1 blob
                "#]],
            ),
            (
                50,
                expect![[r#"
                    layer                                size  state
                    ├─ sha256:6456fbbef8eef50717f3…  2.86 MiB  ok
                    └─ sha256:a7756da8cb767b983df3…  4.88 KiB  MISSING

                    'feature/a-name-that-is-long' in s3://cache/manifests/feature/a-name-that-is-long at http://127.0.0.1:PORT, written 2 d ago; 7 requests in N s
                    2 layers, 2 records, 2 results; 2 blobs (2.87 MiB)
                    mode=min would keep 2 layers, 2 results; 2 blobs (2.87 MiB)
                    shares 1 blob (2.86 MiB) with 'main'; 4.88 KiB in no other cache
                    1 other manifest could not be read, and may share more
                    missing: 1 blob
                "#]],
            ),
        ],
        expect![[r#"
            layer                                                                           size  created              shared by  state
            ├─ sha256:6456fbbef8eef50717f39b1bb1b3c304f757080d7f3b4306e833a9bf2c709a43  2.86 MiB  2026-11-21 20:37:36          1  ok
            └─ sha256:a7756da8cb767b983df3326bde7f3ab6e6334e38320dabcf8e4dc1264cab5da9  4.88 KiB  2026-11-21 20:37:36          0  MISSING

            'feature/a-name-that-is-long' in s3://cache/manifests/feature/a-name-that-is-long at http://127.0.0.1:PORT, written 2 d ago; 7 requests in N s
            2 layers, 2 records, 2 results; 2 blobs (2.87 MiB)
            mode=min would keep 2 layers, 2 results; 2 blobs (2.87 MiB)
            shares 1 blob (2.86 MiB) with 'main'; 4.88 KiB in no other cache
            1 other manifest could not be read, and may share more
            missing: 1 blob
        "#]],
    );
}

#[test]
fn verify_fits_its_table_to_the_terminal() {
    let server = bucket();
    shows(
        &["verify", "--cache-from", &server.spec("")],
        1,
        [
            (
                WIDE,
                expect![[r#"
                    name                         blobs      size  missing  damaged  wrong size  verdict
                    broken                           0       0 B        0        -           0  UNREADABLE
                    feature/a-name-that-is-long      2  2.87 MiB        1        -           0  BROKEN
                    main                             2  3.05 MiB        0        -           0  ok

                    looked for the blobs of 3 caches in s3://cache at http://127.0.0.1:PORT, 3 blobs (3.06 MiB); 7 requests in N s
                    broken is unreadable: reading the cache manifest: invalid type: integer `1`, expected a sequence at line 1 column 12
                    feature/a-name-that-is-long: 1 blob, missing:
                      sha256:a7756da8cb767b983df3326bde7f3ab6e6334e38320dabcf8e4dc1264cab5da9
                    error: 2 of 3 caches in s3://cache at http://127.0.0.1:PORT are not whole; --repair fixes those whose manifests can be read
                "#]],
            ),
            (
                60,
                expect![[r#"
                    name                missing  damaged  wrong size  verdict
                    broken                    0        -           0  UNREADABLE
                    feature/a-name-th…        1        -           0  BROKEN
                    main                      0        -           0  ok

                    looked for the blobs of 3 caches in s3://cache at http://127.0.0.1:PORT, 3 blobs (3.06 MiB); 7 requests in N s
                    broken is unreadable: reading the cache manifest: invalid type: integer `1`, expected a sequence at line 1 column 12
                    feature/a-name-that-is-long: 1 blob, missing:
                      sha256:a7756da8cb767b983df3326bde7f3ab6e6334e38320dabcf8e4dc1264cab5da9
                    error: 2 of 3 caches in s3://cache at http://127.0.0.1:PORT are not whole; --repair fixes those whose manifests can be read
                "#]],
            ),
        ],
        expect![[r#"
            name                         blobs      size  missing  damaged  wrong size  verdict
            broken                           0       0 B        0        -           0  UNREADABLE
            feature/a-name-that-is-long      2  2.87 MiB        1        -           0  BROKEN
            main                             2  3.05 MiB        0        -           0  ok

            looked for the blobs of 3 caches in s3://cache at http://127.0.0.1:PORT, 3 blobs (3.06 MiB); 7 requests in N s
            broken is unreadable: reading the cache manifest: invalid type: integer `1`, expected a sequence at line 1 column 12
            feature/a-name-that-is-long: 1 blob, missing:
              sha256:a7756da8cb767b983df3326bde7f3ab6e6334e38320dabcf8e4dc1264cab5da9
            <1><31>error:<0> 2 of 3 caches in s3://cache at http://127.0.0.1:PORT are not whole; --repair fixes those whose manifests can be read
        "#]],
    );
}
