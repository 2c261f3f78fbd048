//! What a terminal shows: the program runs on a pseudo-terminal.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::output::lasting;
use crate::program::{Program, fixture, s3_manifest};
use crate::server::Server;

const COLUMNS: u16 = 250;

/// Runs `program` on a terminal, and returns all that it wrote there.
fn on_terminal(program: Program) -> String {
    answered(program, None)
}

/// Runs `program` on a terminal where `answer` is typed, and returns all that was shown there.
fn answered(program: Program, answer: Option<&str>) -> String {
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    rustix::pty::grantpt(&ours).expect("a terminal");
    rustix::pty::unlockpt(&ours).expect("a terminal");
    let name = rustix::pty::ptsname(&ours, Vec::new()).expect("it has a name");
    let theirs = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty());
    let theirs: OwnedFd = theirs.expect("a terminal can be opened");
    let size = Winsize {
        ws_row: 24,
        ws_col: COLUMNS,
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

/// The lines left on a terminal that was sent `written`.
fn screen(written: &str) -> Vec<String> {
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
                    "A" => row = row.checked_sub(count).expect("no line above the first"),
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
            c => {
                lines[row].push(c);
                assert!(lines[row].len() < COLUMNS.into(), "{:?} fits", lines[row]);
            }
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
    let lines = screen(&written);
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
        lasting(&screen(&answered(program, Some(answer))).join("\n"))
    };
    let plan = "\
name       written      size  action  reason
buildkit  10 d ago  62.9 KiB  keep    no option selects it

to remove: 0 caches, 1 blob (3 B), 0 unfinished uploads
to keep: 1 cache, 10 blobs (62.9 KiB)
Remove this from s3://cache at http://127.0.0.1:PORT? [y/N] ";
    let shown = prune("n\n");
    assert!(shown.contains(plan), "{shown}");
    assert!(
        shown.contains("error: nothing was removed: the answer was no"),
        "{shown}"
    );
    assert_eq!(server.keys().len(), 12);
    let shown = prune("y\n");
    assert!(shown.contains(plan), "{shown}");
    assert!(
        shown.contains("removed 0 caches, 1 blob (3 B), 0 unfinished uploads"),
        "{shown}"
    );
    assert_eq!(server.keys().len(), 11);
}
