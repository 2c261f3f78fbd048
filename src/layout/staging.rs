//! How bytes come into a layout: written to a locked file in `.layercache/`, synced, and only then
//! renamed to what readers look for.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

use super::dir::Dir;
use super::lock::{lock_file, try_lock_file};
use super::{INDEX, Layout, OCI_LAYOUT};
use crate::cache::digest::Digest;
use crate::transfer::download::Growing;

/// The staging directory. Nothing of BuildKit or containerd looks into it.
pub(super) const STAGING: &str = ".layercache";

const SUFFIX: &str = ".partial";

/// Blobs from this size on get their space set aside first.
const PREALLOCATED: u64 = 1 << 20;

/// An interrupted download that no one took up for so long is given up.
const ABANDONED: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// So many files are synced at once.
const SYNCS: usize = 8;

/// But only from here on: where syncing takes no time, threads take more.
const SLOW_SYNC: Duration = Duration::from_micros(200);

/// A blob being downloaded into a layout. Its file is locked against other processes; dropped, it
/// stays for the next run to take up.
#[derive(Debug)]
pub struct Staged {
    pub growing: Growing,
    path: PathBuf,
}

/// What `Layout::stage` found.
#[derive(Debug)]
pub enum Stage {
    /// Another process has put the blob in place meanwhile.
    Present,
    Staged(Staged),
}

fn partial(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

/// A file in the staging directory, locked by us.
pub(super) struct Held {
    dir: Dir,
    name: String,
    file: File,
}

impl Held {
    /// Calls `waiting` when another process holds it and there is going to be a wait.
    pub(super) fn take(
        layout: &Layout,
        root: &Dir,
        name: &str,
        mut waiting: impl FnMut(),
    ) -> Result<Held> {
        let name = partial(name);
        loop {
            let (dir, _) = root.make_subdir(STAGING)?;
            // None: another process tidied the directory away between these two lines.
            if let Some(file) = lock_file(&dir, &name, layout.lock_wait, &mut waiting)? {
                let links = file
                    .metadata()
                    .with_context(|| format!("cannot look at {}", dir.path_of(&name).display()))?
                    .nlink();
                if links > 1 {
                    // Also known by a name elsewhere, where we must not write.
                    dir.unlink(&name)?;
                    continue;
                }
                return Ok(Held { dir, name, file });
            }
        }
    }

    pub(super) fn discard(self) -> Result<()> {
        self.dir.unlink(&self.name)
    }

    /// Writes all of a small file and syncs it; with `mode`, gives it those permissions.
    pub(super) fn fill(&mut self, bytes: &[u8], mode: Option<rustix::fs::Mode>) -> Result<()> {
        let mut write = || -> std::io::Result<()> {
            self.file.set_len(0)?;
            self.file.rewind()?;
            self.file.write_all(bytes)?;
            if let Some(mode) = mode {
                rustix::fs::fchmod(&self.file, mode)?;
            }
            self.file.sync_all()
        };
        if let Err(error) = write() {
            let _ = self.dir.unlink(&self.name);
            return Err(error).with_context(|| {
                format!(
                    "cannot write {} ({} bytes)",
                    self.dir.path_of(&self.name).display(),
                    bytes.len()
                )
            });
        }
        Ok(())
    }

    pub(super) fn rename(self, to: &Dir, name: &str) -> Result<()> {
        self.dir.rename(&self.name, to, name)?;
        to.sync()
    }
}

impl Layout {
    /// Opens (or takes up) the staging file of a blob, once no other process holds it. Blocks, as
    /// long as the other one makes progress, after it has called `waiting` (perhaps more than once).
    /// Sets the blob's space aside, so that a full disk shows before the download.
    pub fn stage(&self, digest: &Digest, size: u64, waiting: impl FnMut()) -> Result<Stage> {
        self.stage_unless(digest, size, waiting, || Ok(self.has_blob(digest, size)))
    }

    /// As [`Layout::stage`], for a blob that [`Layout::verify_blob`] found damaged: the file that is
    /// there counts only if it has been replaced by a good one meanwhile.
    pub fn stage_replacement(
        &self,
        digest: &Digest,
        size: u64,
        waiting: impl FnMut(),
    ) -> Result<Stage> {
        self.stage_unless(digest, size, waiting, || self.verify_blob(digest, size))
    }

    fn stage_unless(
        &self,
        digest: &Digest,
        size: u64,
        waiting: impl FnMut(),
        present: impl Fn() -> Result<bool>,
    ) -> Result<Stage> {
        let root = self.open_root()?;
        let mut held = Held::take(self, &root, &digest.hex(), waiting)?;
        // Asked only under the lock: its last holder may have finished the blob.
        if present()? {
            held.discard()?;
            return Ok(Stage::Present);
        }
        let path = held.dir.path_of(&held.name);
        let mut resume = || -> std::io::Result<u64> {
            let mut have = held.file.metadata()?.len();
            if have > size {
                held.file.set_len(0)?;
                have = 0;
            }
            held.file.seek(SeekFrom::Start(have))
        };
        let have = resume().with_context(|| format!("cannot take up {}", path.display()))?;
        let left = size - have;
        if size >= PREALLOCATED
            && left > 0
            && let Err(error) = preallocate(&held.file, have, left)
        {
            if have == 0 {
                let _ = held.discard();
            }
            return Err(error).with_context(|| {
                format!(
                    "cannot set aside {left} bytes for blob {digest} in {}",
                    path.display()
                )
            });
        }
        let growing = Growing {
            digest: *digest,
            size,
            file: Arc::new(held.file),
            have,
        };
        Ok(Stage::Staged(Staged { growing, path }))
    }

    /// Gives verified blobs their names, after syncing their bytes: one call for many, so that the
    /// cost of syncing is shared. Blocks. On an error, some may have their names, the others stay
    /// staged.
    pub fn publish(&self, staged: Vec<Staged>) -> Result<()> {
        if staged.is_empty() {
            return Ok(());
        }
        for blob in &staged {
            let length = blob
                .growing
                .file
                .metadata()
                .with_context(|| format!("cannot look at {}", blob.path.display()))?
                .len();
            if length != blob.growing.size {
                bail!(
                    "{} has {length} bytes, but blob {} has {}: it is not whole",
                    blob.path.display(),
                    blob.growing.digest,
                    blob.growing.size
                );
            }
        }
        sync_files(&staged)?;
        let root = self.open_root()?;
        let (blobs, _) = self.make_blobs(&root)?;
        let (staging, _) = root.make_subdir(STAGING)?;
        let renamed = staged.iter().try_for_each(|blob| {
            let hex = blob.growing.digest.hex();
            let name = partial(&hex);
            if !staging.names(&name, &blob.growing.file)? {
                bail!(
                    "{} has been removed while it was written",
                    blob.path.display()
                );
            }
            staging.rename(&name, &blobs, &hex)
        });
        blobs.sync()?;
        renamed
    }

    /// Gives up a blob of which no byte has come: its file may still hold the space set aside for
    /// it, as much as a manifest cared to claim. Never fails an import.
    pub fn discard_empty(&self, staged: Staged) {
        let discard = || -> Result<()> {
            let name = partial(&staged.growing.digest.hex());
            if staged.growing.file.metadata()?.len() == 0
                && let Some(staging) = self.open_root()?.subdir(STAGING)?
                && staging.names(&name, &staged.growing.file)?
            {
                staging.unlink(&name)?;
            }
            Ok(())
        };
        let _ = discard();
    }

    /// Removes staging files of blobs that are in place, those that hold nothing, those of
    /// interrupted downloads that no one
    /// took up for a week, and the staging directory if nothing is left in it. Never fails an import.
    pub fn tidy(&self) {
        let Ok(root) = self.open_root() else { return };
        if let Ok(Some(staging)) = root.subdir(STAGING) {
            for name in staging.list().unwrap_or_default() {
                // What we cannot remove stays for a later run.
                let _ = self.tidy_file(&root, &staging, &name);
            }
            root.remove_if_empty(STAGING);
        }
    }

    fn tidy_file(&self, root: &Dir, staging: &Dir, name: &str) -> Result<()> {
        let Some(stem) = name.strip_suffix(SUFFIX) else {
            return Ok(());
        };
        let of_index = stem == INDEX || stem == OCI_LAYOUT;
        let digest = format!("sha256:{stem}").parse::<Digest>().ok();
        if !of_index && digest.is_none() {
            return Ok(());
        }
        // Whoever works on it holds the lock.
        let Some(file) = try_lock_file(staging, name)? else {
            return Ok(());
        };
        let in_place = match (digest, self.blobs(root)?) {
            (Some(digest), Some(blobs)) => blobs.file_size(&digest.hex())?.is_some(),
            _ => false,
        };
        let abandoned = SystemTime::now()
            .duration_since(file.metadata()?.modified()?)
            .is_ok_and(|age| age > ABANDONED);
        // Such a file holds nothing to take up, but may hold space that was set aside.
        let empty = file.metadata()?.len() == 0;
        if of_index || in_place || abandoned || empty {
            staging.unlink(name)?;
        }
        Ok(())
    }
}

/// Reserves space without changing the file's length, which says how much was downloaded.
fn preallocate(file: &File, from: u64, length: u64) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::io::Errno;
        // On tmpfs reserving is allocating, page by page: it would hold up the download and be paid
        // for again when writing (a quarter of an import's CPU time, measured).
        let is_tmpfs = |fs: rustix::fs::StatFs| fs.f_type == 0x0102_1994;
        if rustix::fs::fstatfs(file).is_ok_and(is_tmpfs) {
            return Ok(());
        }
        let reserve =
            || rustix::fs::fallocate(file, rustix::fs::FallocateFlags::KEEP_SIZE, from, length);
        // Other errors: a filesystem that cannot reserve will say that it is full when it is.
        if let Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) =
            rustix::io::retry_on_intr(reserve)
        {
            return Err(error.into());
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, from, length);
    Ok(())
}

/// Syncs the files' bytes, several at once, so that a journalling filesystem commits many together.
/// Not one syncfs(2) for all: that would also wait for whatever else is being written to the
/// filesystem, such as the build's own gigabytes, and says nothing of errors before Linux 5.8.
fn sync_files(staged: &[Staged]) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let sync_next = || {
        let Some(blob) = staged.get(next.fetch_add(1, Ordering::Relaxed)) else {
            return false;
        };
        if let Err(error) = blob.growing.file.sync_data() {
            let context = format!("cannot sync {}", blob.path.display());
            let mut failed = failed.lock().unwrap_or_else(|poison| poison.into_inner());
            failed.get_or_insert(anyhow::Error::new(error).context(context));
        }
        true
    };
    let began = Instant::now();
    while began.elapsed() < SLOW_SYNC && sync_next() {}
    std::thread::scope(|scope| {
        let left = staged.len().saturating_sub(next.load(Ordering::Relaxed));
        for _ in 1..left.min(SYNCS) {
            // This thread works too, so one that cannot be started is only missed.
            let _ = std::thread::Builder::new().spawn_scoped(scope, || while sync_next() {});
        }
        while sync_next() {}
    });
    match failed
        .into_inner()
        .unwrap_or_else(|poison| poison.into_inner())
    {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
