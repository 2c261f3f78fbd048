//! The documents: what is generated is up to date, each transcript is what the program prints, and each
//! link leads somewhere. `make docs` rewrites what is generated and the transcripts.
//!
//! A transcript is a block of commands and their output below `<!-- transcript -->`. All those of a document
//! are run in order, in a directory beside `cache`, a layout that BuildKit wrote. The server is the
//! tests'; its address is left out of what is shown, as it is for a bucket at AWS.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use expect_test::expect_file;

use crate::output::lasting;
use crate::program::{NO_HOME, Program, copy_of, fixture};
use crate::server::{ACCESS_KEY, SECRET_KEY, Server};

const TRANSCRIPT: &str = "<!-- transcript -->\n```console\n";

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Markdown file at the top of the repository and below the folders that hold its sources: its
/// path, and its text.
fn documents() -> Vec<(PathBuf, String)> {
    let top = std::fs::read_dir(repository()).expect("the repository");
    let mut paths: Vec<_> = top.map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.is_file());
    let mut folders: Vec<PathBuf> = ["docs", "scripts", "src", "tests"]
        .map(|name| repository().join(name))
        .into();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                paths.push(path);
            }
        }
    }
    paths.retain(|path| path.extension().is_some_and(|end| end == "md"));
    paths
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).expect("the document");
            (path, text)
        })
        .collect()
}

fn help(words: &[&str]) -> String {
    let run = Program::new().args(words).arg("--help").run().succeeds();
    let lines = run.stdout.lines().map(str::trim_end);
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn cli_md_is_the_help_of_every_command() {
    let program = help(&[]);
    let (_, listed) = program.split_once("Commands:\n").expect("commands");
    let commands = listed
        .lines()
        .map_while(|line| {
            line.trim_start()
                .split(' ')
                .next()
                .filter(|name| !name.is_empty())
        })
        .filter(|name| *name != "help");
    let mut text = format!(
        "<!-- `make docs` writes this from the program's own help. -->\n# Commands\n\n\
         Global options may stand before or after the command. If a flag is repeated, the last one \
         wins.\n\n```text\n{program}\n```\n"
    );
    for command in commands {
        let help = help(&[command]);
        // What all commands share is above.
        let own = match help.split_once("\nGlobal options:\n") {
            Some((own, rest)) => {
                let after = rest
                    .lines()
                    .skip_while(|line| line.is_empty() || line.starts_with(' '));
                let after: Vec<_> = after.collect();
                format!("{}\n\n{}", own.trim_end(), after.join("\n"))
            }
            None => help,
        };
        text.push_str(&format!(
            "\n## {command}\n\n```text\n{}\n```\n",
            own.trim_end()
        ));
    }
    expect_file!["../../docs/cli.md"].assert_eq(&text);
}

#[test]
fn every_transcript_is_what_the_program_prints() {
    let mut documents = documents();
    documents.retain(|(_, text)| text.contains(TRANSCRIPT));
    assert!(documents.len() > 1, "transcripts are no longer found");
    for (path, text) in documents {
        let printed = with_output(&text);
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            // What differs in each run alone stays as it is.
            if steady(&printed) != steady(&text) {
                std::fs::write(&path, printed).expect("the document can be written");
            }
        } else {
            let name = path.display();
            assert_eq!(steady(&text), steady(&printed), "{name}: run `make docs`");
        }
    }
}

/// A document without what differs from run to run, in JSON too.
fn steady(text: &str) -> String {
    let mut steady = lasting(text);
    for field in ["\"seconds\": ", "\"seconds\":", "\"time\":\""] {
        let parts: Vec<_> = steady.split(field).collect();
        let value = |part: &str| part.find(['"', ',', '}', '\n']).unwrap_or(0);
        let parts = parts.iter().enumerate().map(|(n, part)| match n {
            0 => part,
            _ => &part[value(part)..],
        });
        steady = parts.collect::<Vec<_>>().join(field);
    }
    steady
}

/// The document with each transcript's commands run, and their output below them.
fn with_output(text: &str) -> String {
    let mut parts = text.split(TRANSCRIPT);
    let mut out = parts.next().expect("a first part").to_owned();
    let terminal = Terminal::new();
    for part in parts {
        let (transcript, rest) = part.split_once("```\n").expect("the transcript ends");
        out.push_str(TRANSCRIPT);
        for line in transcript.lines() {
            if let Some(command) = line.strip_prefix("$ ") {
                out.push_str(&format!("{line}\n{}", terminal.run(command)));
            }
        }
        out.push_str("```\n");
        out.push_str(rest);
    }
    out
}

/// Where the commands of one document run: variables that they export stay.
struct Terminal {
    server: Server,
    directory: tempfile::TempDir,
}

impl Terminal {
    fn new() -> Terminal {
        let directory = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(directory.path().join("app")).expect("a directory");
        std::fs::write(directory.path().join("variables"), "").expect("a file");
        let cache = copy_of(&fixture("local-max"));
        std::fs::rename(cache.path(), directory.path().join("cache")).expect("moved");
        Terminal {
            server: Server::builder().bucket("ci-cache").start(),
            directory,
        }
    }

    fn run(&self, command: &str) -> String {
        let program = Path::new(env!("CARGO_BIN_EXE_layercache"));
        let program = program.parent().expect("a directory").display();
        let path = std::env::var("PATH").unwrap_or_default();
        let script = format!(". ../variables\n{{ {command}\n}} 2>&1\nexport -p > ../variables");
        let output = Command::new("sh")
            .args(["-c", &script])
            .current_dir(self.directory.path().join("app"))
            .env_clear()
            .env("PATH", format!("{program}:{path}"))
            .env("HOME", NO_HOME)
            .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
            .env("AWS_ENDPOINT_URL_S3", self.server.url())
            .output()
            .expect("sh runs");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let url = self.server.url();
        let text = text.replace(&format!(" at {url}"), "");
        let text = text.replace(&format!("      \"endpoint\": \"{url}\",\n"), "");
        text.replace(&format!("\"endpoint\":\"{url}\","), "")
    }
}

/// What a document says outside its blocks of code.
fn prose(text: &str) -> String {
    let mut in_code = false;
    let lines = text.lines().filter(|line| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        !in_code && !is_fence
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The anchors of the headings in `text`, as GitHub makes them.
fn anchors(text: &str) -> HashSet<String> {
    let mut anchors = HashSet::new();
    for line in prose(text).lines() {
        let heading = line.trim_start_matches('#');
        if heading == line {
            continue;
        }
        let heading = heading.trim().to_lowercase();
        let kept = heading
            .chars()
            .filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
        let first = kept.collect::<String>().replace(' ', "-");
        let mut anchor = first.clone();
        let mut repeated = 0;
        while !anchors.insert(anchor.clone()) {
            repeated += 1;
            anchor = format!("{first}-{repeated}");
        }
    }
    anchors
}

#[test]
fn every_link_leads_to_a_file_or_a_heading_that_is_there() {
    let mut followed = 0;
    let mut broken = Vec::new();
    for (path, text) in documents() {
        let folder = path.parent().expect("a directory");
        for link in prose(&text).split("](").skip(1) {
            let link = link.split(')').next().unwrap_or_default();
            if link.contains("://") {
                continue;
            }
            followed += 1;
            let (file, anchor) = match link.split_once('#') {
                Some((file, anchor)) => (file, Some(anchor)),
                None => (link, None),
            };
            let target = match file {
                "" => path.clone(),
                _ => folder.join(file),
            };
            let is_there = match anchor {
                Some(anchor) => std::fs::read_to_string(&target)
                    .is_ok_and(|text| anchors(&text).contains(anchor)),
                None => target.exists(),
            };
            if !is_there {
                broken.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    assert!(followed > 30, "only {followed} links were recognized");
}

#[test]
fn no_document_names_another_repository_and_the_readme_is_short() {
    for (path, text) in documents() {
        assert!(
            !text.contains("LAYERCACHE_REPOSITORY"),
            "{}",
            path.display()
        );
    }
    let readme = std::fs::read_to_string(repository().join("README.md")).expect("the README");
    assert!(readme.lines().count() <= 190, "the README is to stay short");
}
