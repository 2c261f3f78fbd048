//! The worked example of docs/bucket.md: its commands are run, and print what it says.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use expect_test::expect_file;

use crate::program::{Run, fixture};
use crate::server::Server;

const DAY: Duration = Duration::from_secs(86_400);

/// What happens to the bucket between two commands.
fn happens(server: &Server, what: &str) {
    match what {
        "40 days pass" => server.age_all(40 * DAY),
        "3 hours pass" => server.age_all(DAY / 8),
        "a blob is left behind" => {
            let hex = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae";
            let key = format!("blobs/sha256:{hex}");
            server.put(&key, "foo");
            server.age(&key, 40 * DAY);
        }
        "a blob is lost" => {
            let hex = "710869d00fd0518ebd0f976eefb2bacecf511edf21dcebe7db62cd384cfaeece";
            assert!(server.remove(&format!("blobs/sha256:{hex}")));
        }
        other => panic!("nothing is known of {other:?}"),
    }
}

/// What a command prints, without what differs from run to run.
fn output(server: &Server, directory: &Path, command: &str) -> String {
    let program = Path::new(env!("CARGO_BIN_EXE_layercache"));
    let folder = program.parent().expect("it is in a folder").display();
    let path = std::env::var("PATH").unwrap_or_default();
    let run = Command::new("sh")
        .args(["-c", command])
        .current_dir(directory)
        .env_clear()
        .env("PATH", format!("{folder}:{path}"))
        .env("BUCKET", server.spec(""))
        .env("BUILDKIT_PROGRESS", "quiet")
        .env("HOME", directory)
        .output();
    let run: Run = run.expect("a shell").into();
    let mut text = run.stdout + &run.stderr;
    text = text.replace(&format!(" at {}", server.url()), "");
    text = text.replace("s3://cache", "s3://ci-cache");
    let mut lines: Vec<String> = text.lines().map(without_cost).collect();
    if run.code != Some(0) {
        lines.push(format!(
            "[exit status {}]",
            run.code.expect("it was not killed")
        ));
    }
    lines.join("\n")
}

/// How many requests there were depends on the machine, and so do the seconds.
fn without_cost(line: &str) -> String {
    match line.rsplit_once("; ") {
        Some((line, cost)) if cost.ends_with(" s") => line.to_owned(),
        _ => line.to_owned(),
    }
}

#[test]
fn the_worked_example_prints_what_it_says() {
    let server = Server::start();
    let directory = tempfile::tempdir().expect("a temporary directory");
    for (name, layout) in [("main", "local-max"), ("pr-7", "local-multiarch")] {
        let copy = crate::program::copy_of(&fixture(layout)).keep();
        std::fs::rename(copy, directory.path().join(name)).expect("a directory can be moved");
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/bucket.md");
    let text = std::fs::read_to_string(&file).expect("the document");
    let mut lines = Vec::new();
    let mut in_session = false;
    for line in text.lines() {
        let what = line
            .strip_prefix("<!-- ")
            .and_then(|rest| rest.strip_suffix(" -->"));
        if let Some(what) = what {
            happens(&server, what);
        }
        if !in_session || line.starts_with("$ ") || line == "```" {
            lines.push(line.to_owned());
        }
        match line.strip_prefix("$ ") {
            Some(command) if in_session => {
                lines.push(output(&server, directory.path(), command));
            }
            _ if line.starts_with("```") => in_session = line == "```console",
            _ => {}
        }
    }
    let expected = expect_file![file];
    expected.assert_eq(&(lines.join("\n") + "\n"));
}
