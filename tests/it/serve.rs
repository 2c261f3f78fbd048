//! `layercache serve`, with clients that send what builders send.

mod client;
mod command;
mod faults;
mod gha;
mod hostile;
mod others;
mod pull;
mod push;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout};

use client::{Client, Reply};

use crate::program::{Program, Run};

/// A running `layercache serve` without a command.
pub struct Serve {
    child: Option<Child>,
    stdout: BufReader<ChildStdout>,
    pub variables: BTreeMap<String, String>,
}

impl Serve {
    /// Starts it with these arguments, and waits until it listens.
    pub fn start(args: &[&str]) -> Serve {
        Serve::of(Program::new().arg("serve").args(args))
    }

    pub fn reading(spec: &str) -> Serve {
        Serve::start(&["--cache-from", spec])
    }

    pub fn writing(spec: &str) -> Serve {
        Serve::start(&["--cache-to", spec])
    }

    pub fn of(program: Program) -> Serve {
        let mut child = program.spawn();
        let stdout = child.stdout.take().expect("piped");
        let mut serve = Serve {
            child: Some(child),
            stdout: BufReader::new(stdout),
            variables: BTreeMap::new(),
        };
        while !serve.variables.contains_key("LAYERCACHE_REGISTRY") {
            let mut line = String::new();
            serve.stdout.read_line(&mut line).expect("text");
            if line.is_empty() {
                panic!("it did not start: {:?}", serve.wait());
            }
            let (name, value) = line.split_once('=').expect("NAME=VALUE");
            let name = name.strip_prefix("export ").expect("a line to paste");
            let mut value = value.trim_end().to_owned();
            // One source a line.
            while !(value.len() > 1 && value.ends_with('\'')) {
                let mut more = String::new();
                serve.stdout.read_line(&mut more).expect("text");
                value = format!("{value}\n{}", more.trim_end());
            }
            let value = value.trim_matches('\'').to_owned();
            serve.variables.insert(name.to_owned(), value);
        }
        serve
    }

    /// The value of `key` in the variable's first line.
    pub fn attribute(&self, variable: &str, key: &str) -> String {
        let value = &self.variables[variable];
        let line = value.lines().next().expect("a line");
        let start = format!("{key}=");
        let mut fields = line.split(',');
        let field = fields.find_map(|field| field.strip_prefix(&start));
        field
            .unwrap_or_else(|| panic!("{key} in {value}"))
            .to_owned()
    }

    /// The registry client of the cache that the variable names.
    pub fn client(&self, variable: &str) -> Client {
        let reference = self.attribute(variable, "ref");
        let (host, path) = reference.split_once('/').expect("a path");
        let (repository, tag) = path.rsplit_once(':').expect("a tag");
        assert_eq!(tag, "latest");
        Client::new(host, repository)
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("running").id()
    }

    fn wait(&mut self) -> Run {
        use std::io::Read as _;
        let child = self.child.take().expect("running");
        let mut rest = String::new();
        // Read first: it may be much.
        self.stdout.read_to_string(&mut rest).expect("text");
        let mut run = Run::from(child.wait_with_output().expect("it ends"));
        run.stdout = rest;
        run
    }

    /// Ends it as a service manager would.
    pub fn stop(mut self) -> Run {
        self.signal(libc::SIGTERM);
        self.wait()
    }

    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.pid()).expect("a pid");
        // SAFETY: it is our child, and has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
