//! Runs the real program, and reads what it leaves on disk.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// A finished run.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// Fails with everything that was printed unless the run ended with `code`.
    #[track_caller]
    pub fn ends_with(self, code: i32) -> Run {
        assert_eq!(
            self.code,
            Some(code),
            "stdout:\n{}\nstderr:\n{}",
            self.stdout,
            self.stderr
        );
        self
    }

    #[track_caller]
    pub fn succeeds(self) -> Run {
        self.ends_with(0)
    }

    #[track_caller]
    pub fn says(self, text: &str) -> Run {
        assert!(
            self.stderr.contains(text) || self.stdout.contains(text),
            "{text:?} is not in\nstdout:\n{}\nstderr:\n{}",
            self.stdout,
            self.stderr
        );
        self
    }
}

impl From<Output> for Run {
    fn from(output: Output) -> Run {
        Run {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// A home directory that is absent, and that not even root can create.
pub const NO_HOME: &str = "/proc/nonexistent";

/// The program with its arguments, in an environment without any of the developer's settings.
pub struct Program(Command);

impl Program {
    pub fn new() -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_layercache"));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", NO_HOME)
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .stdin(Stdio::null());
        Program(command)
    }

    pub fn export(spec: &str, layout: &Path) -> Program {
        Program::new()
            .args(["export", "--cache-to", spec])
            .arg(layout)
    }

    pub fn import(spec: &str, layout: &Path) -> Program {
        Program::new()
            .args(["import", "--cache-from", spec])
            .arg(layout)
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Program {
        self.0.arg(arg);
        self
    }

    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Program {
        self.0.args(args);
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Program {
        self.0.env(name, value);
        self
    }

    pub fn run(mut self) -> Run {
        self.0.output().expect("the program starts").into()
    }

    pub fn spawn(mut self) -> Child {
        self.0
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts")
    }
}

impl From<Program> for Command {
    fn from(program: Program) -> Command {
        program.0
    }
}

/// A layout that BuildKit wrote.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// A manifest that BuildKit wrote to S3.
pub fn s3_manifest(name: &str) -> Vec<u8> {
    std::fs::read(fixture("s3-manifests").join(name)).expect("the fixture is there")
}

/// Every file below `root` by its relative path, with its bytes; directories end in `/`.
pub fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(root: &Path, at: &Path, found: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(at).expect("the directory can be read") {
            let path = entry.expect("the entry can be read").path();
            let name = path
                .strip_prefix(root)
                .expect("below the root")
                .display()
                .to_string();
            // Exists while another test exports the same fixture.
            if name == "index.json.lock" {
                continue;
            }
            if path.is_dir() {
                found.insert(format!("{name}/"), Vec::new());
                walk(root, &path, found);
            } else {
                found.insert(name, std::fs::read(&path).expect("the file can be read"));
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(root, root, &mut found);
    found
}

/// A copy of a layout that a test may change.
pub fn copy_of(layout: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a temporary directory");
    for (name, bytes) in files(layout) {
        let path = copy.path().join(&name);
        if name.ends_with('/') {
            std::fs::create_dir_all(path).expect("a directory can be made");
        } else {
            std::fs::create_dir_all(path.parent().expect("it is below the copy"))
                .expect("a directory can be made");
            std::fs::write(path, bytes).expect("a file can be written");
        }
    }
    copy
}
