//! How bytes get into a layout: they are written to a locked file in `.layercache/` and synced;
//! only then does the file get the name that readers look for.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use rustix::io::Errno;

use super::damaged::damaged_blob;
use super::dir::{Dir, READ, modified};
use super::lock::{lock_file, try_lock_file};
use super::{INDEX, Layout, OCI_LAYOUT};
use crate::cache::digest::Digest;
use crate::transfer::download::Growing;

/// The staging directory. Neither BuildKit nor containerd looks into it.
pub(super) const STAGING: &str = ".layercache";

const SUFFIX: &str = ".partial";

/// How often to try to create a staging file.
const ATTEMPTS: usize = 100;

/// Blobs from this size on get their space reserved first. Bytes.
const PREALLOCATED: u64 = 1 << 20;

/// An interrupted download that no run has resumed, or a damaged blob, is deleted after this.
pub(super) const ABANDONED: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Files synced at once.
const SYNCS: usize = 8;

/// Syncing takes threads only if a file takes this long: on fast disks, threads cost more.
const SLOW_SYNC: Duration = Duration::from_micros(200);

/// As many files' time is allowed beside, because another thread may have had the CPU.
const GRACE: u32 = 16;

/// A blob being downloaded into a layout. Its file is locked against other processes. When dropped, it
/// stays for the next run to resume.
#[derive(Debug)]
pub struct Staged {
    pub growing: Growing,
    path: PathBuf,
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
    /// Calls `waiting` before each wait for another process that holds it.
    pub(super) fn take(
        layout: &Layout,
        root: &Dir,
        name: &str,
        mut waiting: impl FnMut(),
    ) -> Result<Held> {
        let name = partial(name);
        for _ in 0..ATTEMPTS {
            let (dir, _) = root.make_subdir(STAGING)?;
            // None: another process tidied the directory away between these two lines.
            if let Some(file) = lock_file(&dir, &name, layout.lock_wait, &mut waiting)? {
                let links = file
                    .metadata()
                    .with_context(|| format!("cannot look at {}", dir.path_of(&name).display()))?
                    .nlink();
                if links > 1 {
                    // It has a name elsewhere too, where we must not write.
                    dir.unlink(&name)?;
                    continue;
                }
                return Ok(Held { dir, name, file });
            }
        }
        bail!(
            "cannot create {}: other processes keep removing its directory, or each new file has a second \
             name (hard link)",
            root.path_of(STAGING).join(name).display()
        )
    }

    pub(super) fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Releases the file; what an earlier run has downloaded stays.
    pub(super) fn release(self) -> Result<()> {
        match self.dir.file_size(&self.name)? {
            Some(0) => self.discard(),
            _ => Ok(()),
        }
    }

    pub(super) fn discard(self) -> Result<()> {
        self.dir.unlink(&self.name)
    }

    /// Writes a whole small file and syncs it. It gets the permissions in `mode`, if the file
    /// system has permissions.
    pub(super) fn fill(&mut self, bytes: &[u8], mode: Option<rustix::fs::Mode>) -> Result<()> {
        let mut write = || -> std::io::Result<()> {
            self.file.set_len(0)?;
            self.file.rewind()?;
            self.file.write_all(bytes)?;
            if let Some(mode) = mode {
                match rustix::fs::fchmod(&self.file, mode) {
                    Ok(()) => {}
                    // vfat and some network mounts have one mode for all files.
                    Err(Errno::PERM | Errno::NOTSUP | Errno::NOSYS) => {}
                    Err(error) => return Err(error.into()),
                }
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
    /// Opens the staging file of a blob, which may hold part of it, once no other process holds it.
    /// Blocks for as long as the other one makes progress, calling `waiting` before each wait. Reserves
    /// the blob's space, so that a full disk shows before the download. `None`: the blob is in place;
    /// the other process has finished it.
    ///
    /// # Errors
    /// The disk is full, the file cannot be written, or the other process has stopped making progress.
    pub fn stage(
        &self,
        digest: &Digest,
        size: u64,
        waiting: impl FnMut(),
    ) -> Result<Option<Staged>> {
        self.stage_unless(digest, size, waiting, || Ok(self.has_blob(digest, size)))
    }

    /// As [`Layout::stage`], for a blob that [`Layout::verify_blob`] found damaged: `None` only if it has
    /// been replaced by a good one meanwhile.
    ///
    /// # Errors
    /// As [`Layout::stage`].
    pub fn stage_replacement(
        &self,
        digest: &Digest,
        size: u64,
        waiting: impl FnMut(),
    ) -> Result<Option<Staged>> {
        self.stage_unless(digest, size, waiting, || {
            self.verify_blob(digest, size, |_| {})
        })
    }

    fn stage_unless(
        &self,
        digest: &Digest,
        size: u64,
        waiting: impl FnMut(),
        present: impl Fn() -> Result<bool>,
    ) -> Result<Option<Staged>> {
        let root = self.open_root()?;
        let mut held = Held::take(self, &root, &digest.hex(), waiting)?;
        // Only under the lock: its last holder may have finished the blob.
        if present()? {
            held.discard()?;
            return Ok(None);
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
        let have = resume().with_context(|| format!("cannot resume {}", path.display()))?;
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
        Ok(Some(Staged { growing, path }))
    }

    /// Syncs verified blobs and gives them their names: many in one call, because they share the cost of
    /// syncing. Blocks.
    ///
    /// # Errors
    /// A blob is incomplete, or cannot be synced or renamed. Some may then have their names; the others
    /// stay staged.
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

    /// Gives up a blob, removing its file if no byte has arrived: it may hold as much reserved space as a
    /// manifest cared to claim. Never fails an import.
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

    /// Removes what no later run can use: staging files that are empty, abandoned, or of blobs in place;
    /// damaged blobs that have been replaced or are old; and the staging directory, if it is empty
    /// then. Never fails an import.
    pub fn tidy(&self) {
        let Ok(root) = self.open_root() else { return };
        if let Ok(Some(staging)) = root.subdir(STAGING) {
            for name in staging.list().unwrap_or_default() {
                // What cannot be removed stays for a later run.
                let _ = self.tidy_file(&root, &staging, &name);
            }
            root.remove_if_empty(STAGING);
        }
    }

    fn tidy_file(&self, root: &Dir, staging: &Dir, name: &str) -> Result<()> {
        let blob = |digest: &Digest| match self.blobs(root)? {
            Some(blobs) => blobs.stat(&digest.hex()),
            None => Ok(None),
        };
        if let Some(digest) = damaged_blob(name) {
            let Some(file) = staging.open_file(name, READ)? else {
                return Ok(());
            };
            if blob(&digest)?.is_some() || is_abandoned(&file)? {
                staging.unlink(name)?;
            }
            return Ok(());
        }
        let Some(stem) = name.strip_suffix(SUFFIX) else {
            return Ok(());
        };
        let digest = format!("sha256:{stem}").parse::<Digest>().ok();
        let of_index = stem == INDEX || stem == OCI_LAYOUT;
        if !of_index && digest.is_none() {
            return Ok(());
        }
        // A run that works on it holds the lock.
        let Some(file) = try_lock_file(staging, name)? else {
            return Ok(());
        };
        // An empty file has nothing to resume, but may hold reserved space.
        let is_useless = match &digest {
            None => true,
            Some(digest) => {
                let partial = file.metadata()?;
                let begun = partial.modified().ok();
                // A blob that was there before is damaged, and this one is about to replace it.
                partial.len() == 0
                    || blob(digest)?.is_some_and(|stat| modified(&stat) >= begun)
                    || is_abandoned(&file)?
            }
        };
        if is_useless {
            staging.unlink(name)?;
        }
        Ok(())
    }
}

fn is_abandoned(file: &File) -> Result<bool> {
    let age = SystemTime::now().duration_since(file.metadata()?.modified()?);
    Ok(age.is_ok_and(|age| age > ABANDONED))
}

/// Reserves space without changing the file's length, which is what has been downloaded.
fn preallocate(file: &File, from: u64, length: u64) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        // On tmpfs, reserving means allocating page by page: it would delay the download and be paid for
        // again when writing (measured: a quarter of an import's CPU time).
        let is_tmpfs = |fs: rustix::fs::StatFs| fs.f_type == 0x0102_1994;
        if rustix::fs::fstatfs(file).is_ok_and(is_tmpfs) {
            return Ok(());
        }
        let reserve =
            || rustix::fs::fallocate(file, rustix::fs::FallocateFlags::KEEP_SIZE, from, length);
        // Not the others: a file system that cannot reserve space reports later that it is full.
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

/// Syncs the files' bytes, several at once, so that a journalling file system commits many together. Not
/// one syncfs(2) for all: that would wait for everything else being written to the file system, such as
/// a build's gigabytes, and reports no errors before Linux 5.8.
fn sync_files(staged: &[Staged]) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = OnceLock::new();
    let sync_next = || {
        let Some(blob) = staged.get(next.fetch_add(1, Ordering::Relaxed)) else {
            return false;
        };
        if let Err(error) = blob.growing.file.sync_data() {
            let context = format!("cannot sync {}", blob.path.display());
            let _ = failed.set(anyhow::Error::new(error).context(context));
        }
        true
    };
    let began = Instant::now();
    let mut allowed = SLOW_SYNC * GRACE;
    while began.elapsed() < allowed && sync_next() {
        allowed += SLOW_SYNC;
    }
    std::thread::scope(|scope| {
        let left = staged.len().saturating_sub(next.load(Ordering::Relaxed));
        for _ in 1..left.min(SYNCS) {
            // This thread works too, so it does not matter if one cannot be started.
            let _ = std::thread::Builder::new().spawn_scoped(scope, || while sync_next() {});
        }
        while sync_next() {}
    });
    failed.into_inner().map_or(Ok(()), Err)
}
