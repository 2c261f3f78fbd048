//! Waiting for flock(2) locks on files that their holders remove: the lock of `index.json`, which
//! BuildKit shares with us, and those of the staging files.

use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::dir::{Dir, WRITE, errno};

/// BuildKit's name for the lock of `index.json`.
pub(super) const INDEX_LOCK: &str = "index.json.lock";

/// How much longer we wait.
struct Patience {
    wait: Duration,
    since: Instant,
}

impl Patience {
    fn new(wait: Duration) -> Self {
        Patience {
            wait,
            since: Instant::now(),
        }
    }

    /// Sleeps a little; false once the time is up.
    fn pause(&self) -> bool {
        let left = self.wait.saturating_sub(self.since.elapsed());
        if left.is_zero() {
            return false;
        }
        // Jitter, so that many waiting processes do not keep asking all at the same moment.
        let pause = Duration::from_millis(rand::random_range(20..=50));
        std::thread::sleep(pause.min(left));
        true
    }
}

/// The lock of `index.json`, held until dropped; the lock file is then removed, as BuildKit does.
#[derive(Debug)]
pub(super) struct IndexLock<'a> {
    root: &'a Dir,
    file: File,
}

impl<'a> IndexLock<'a> {
    /// To read the index. `None` where no lock can be had because nothing can be written (a
    /// read-only mount, another user's directory) or the filesystem knows no locks: reading is then
    /// still the best that can be done.
    pub(super) fn shared(root: &'a Dir, wait: Duration) -> Result<Option<Self>> {
        match Self::acquire(
            root,
            OFlags::RDONLY | OFlags::CREATE,
            File::try_lock_shared,
            wait,
        ) {
            Ok(lock) => Ok(Some(lock)),
            Err(error) => match errno(&error) {
                Some(
                    Errno::ACCESS
                    | Errno::PERM
                    | Errno::ROFS
                    | Errno::NOSYS
                    | Errno::NOTSUP
                    | Errno::NOLCK,
                ) => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// To change the index.
    pub(super) fn exclusive(root: &'a Dir, wait: Duration) -> Result<Self> {
        Self::acquire(root, WRITE, File::try_lock, wait)
    }

    fn acquire(
        root: &'a Dir,
        flags: OFlags,
        try_lock: fn(&File) -> Result<(), TryLockError>,
        wait: Duration,
    ) -> Result<Self> {
        let path = root.path_of(INDEX_LOCK);
        let patience = Patience::new(wait);
        loop {
            // Opened anew each time: the holder removes the file when it is done.
            let Some(file) = root.open_file(INDEX_LOCK, flags)? else {
                bail!("cannot create {}: the directory is gone", path.display());
            };
            match try_lock(&file) {
                Ok(()) if root.names(INDEX_LOCK, &file)? => return Ok(IndexLock { root, file }),
                Ok(()) => continue,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("cannot lock {}", path.display()));
                }
            }
            if !patience.pause() {
                bail!(
                    "{} has been locked by another process for more than {wait:?}: a build or another \
                     layercache is using this layout; run again when it has finished",
                    path.display()
                );
            }
        }
    }

    /// Whether we are still the only ones: BuildKit removes the file only after it has let go of the
    /// lock, and can so remove one that we have just locked.
    pub(super) fn holds(&self) -> Result<bool> {
        self.root.names(INDEX_LOCK, &self.file)
    }
}

impl Drop for IndexLock<'_> {
    fn drop(&mut self) {
        // Only who holds it exclusively may remove it. Among readers that is the last one.
        if self.file.try_lock().is_ok() && self.holds().unwrap_or(false) {
            let _ = self.root.unlink(INDEX_LOCK);
        }
    }
}

/// Opens (or creates) the file `name` in `dir` and locks it exclusively. Who holds it may be
/// downloading for hours: we give up only when nothing has been written to it for `wait`. Each time
/// before it sleeps, `waiting` is called. `None`: `dir` has been removed meanwhile.
pub(super) fn lock_file(
    dir: &Dir,
    name: &str,
    wait: Duration,
    waiting: &mut impl FnMut(),
) -> Result<Option<File>> {
    let mut patience = Patience::new(wait);
    let mut seen = None;
    loop {
        let Some(file) = dir.open_file(name, WRITE)? else {
            return Ok(None);
        };
        let path = dir.path_of(name);
        match file.try_lock() {
            Ok(()) if dir.names(name, &file)? => return Ok(Some(file)),
            Ok(()) => continue,
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        let now = file
            .metadata()
            .with_context(|| format!("cannot look at {}", path.display()))?;
        let now = (now.ino(), now.size(), now.mtime(), now.mtime_nsec());
        if seen.replace(now) != Some(now) {
            patience = Patience::new(wait);
        }
        waiting();
        if !patience.pause() {
            bail!(
                "another process holds {} and has written nothing to it for {wait:?}: end that process, or \
                 run again when it has finished",
                path.display()
            );
        }
    }
}

/// Locks an existing file of `dir` exclusively if no one holds it.
pub(super) fn try_lock_file(dir: &Dir, name: &str) -> Result<Option<File>> {
    let Some(file) = dir.open_file(name, OFlags::RDWR)? else {
        return Ok(None);
    };
    Ok((file.try_lock().is_ok() && dir.names(name, &file)?).then_some(file))
}
