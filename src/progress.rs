//! What a person or a log sees while the work goes on: an observer, never a participant. The only
//! module that names indicatif.

use std::sync::Arc;

use crate::digest::Digest;

/// How progress is shown: buildx's `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// tty on a terminal, else plain
    Auto,
    /// one line for each thing that happened
    Plain,
    /// bars
    Tty,
    /// errors and warnings only
    Quiet,
    /// one JSON object a line
    Rawjson,
}

/// What is being done with a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    Upload,
    Download,
    Refresh,
    /// Hashing a local blob for its diffID, or for `--verify`.
    Hash,
}

/// Cheap to clone; every clone shows on the same screen.
#[derive(Clone)]
pub struct Progress {
    _inner: Arc<()>,
}

/// One blob in flight. Dropped without `done`, it counts as failed.
pub struct Blob {
    _inner: Arc<()>,
}

impl Progress {
    /// `verbose` adds debug lines to plain output.
    pub fn new(mode: Mode, verbose: bool) -> Self {
        let _ = (mode, verbose);
        todo!()
    }

    /// Shows nothing at all: for tests and benchmarks.
    pub fn silent() -> Self {
        todo!()
    }

    /// A new stage of the work, with what it is expected to move (0, 0 if not known).
    pub fn stage(&self, title: &str, blobs: u64, bytes: u64) {
        let _ = (title, blobs, bytes);
        todo!()
    }

    /// A blob of `bytes` is being worked on.
    pub fn blob(&self, activity: Activity, digest: &Digest, bytes: u64) -> Arc<Blob> {
        let _ = (activity, digest, bytes);
        todo!()
    }

    /// Something worth a line.
    pub fn note(&self, text: &str) {
        let _ = text;
        todo!()
    }

    /// Something worth a line only with --verbose.
    pub fn debug(&self, text: &str) {
        let _ = text;
        todo!()
    }

    /// A warning: shown in every mode, quiet included.
    pub fn warn(&self, text: &str) {
        let _ = text;
        todo!()
    }

    /// Takes the bars away, so that what follows is printed on a clean line. Later calls on this
    /// or any clone are no error.
    pub fn clear(&self) {
        todo!()
    }
}

impl Blob {
    /// So many more bytes are through.
    pub fn advance(&self, bytes: u64) {
        let _ = bytes;
        todo!()
    }

    /// So many bytes were for nothing, and come again.
    pub fn take_back(&self, bytes: u64) {
        let _ = bytes;
        todo!()
    }

    /// Finished.
    pub fn done(&self) {
        todo!()
    }
}
