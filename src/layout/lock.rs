//! flock(2) locks on files that their holders remove: that of `index.json`, which BuildKit takes too, and
//! those of the staging files.

use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::dir::{Dir, WRITE, errno};

/// BuildKit's name for the lock of `index.json`.
pub(super) const INDEX_LOCK: &str = "index.json.lock";

/// How often in a row the file that we have just locked may have lost its name. Its holder removes
/// it with its lock, so once is common. After a few times we pause; after this many, something is
/// wrong.
const MOST_REPLACED: u32 = 100;

/// Below this many, we try again at once.
const PAUSE_FROM: u32 = 20;

/// How much longer to wait.
struct Patience {
    wait: Duration,
    since: Instant,
    /// How often in a row the file that we locked had lost its name.
    replaced: u32,
}

impl Patience {
    fn new(wait: Duration) -> Self {
        Patience {
            wait,
            since: Instant::now(),
            replaced: 0,
        }
    }

    /// Sleeps for a moment because another process holds the lock; false once the time is up.
    fn pause(&mut self) -> bool {
        self.replaced = 0;
        self.sleep()
    }

    fn sleep(&self) -> bool {
        let left = self.wait.saturating_sub(self.since.elapsed());
        if left.is_zero() {
            return false;
        }
        // Random, so that many waiting processes do not all try at the same moment.
        let pause = Duration::from_millis(rand::random_range(20..=50));
        std::thread::sleep(pause.min(left));
        true
    }

    /// The file that we locked no longer has its name.
    fn replaced(&mut self, dir: &Dir, name: &str) -> Result<()> {
        self.replaced += 1;
        if self.replaced < PAUSE_FROM || (self.replaced < MOST_REPLACED && self.sleep()) {
            return Ok(());
        }
        bail!(
            "cannot lock {}: either other processes keep removing it, or this file system does not tell \
             whether an open file still has its name, as some network file systems do not; keep the \
             layout on a local disk",
            dir.path_of(name).display()
        )
    }
}

fn cannot_lock(dir: &Dir, name: &str, error: std::io::Error) -> anyhow::Error {
    let path = dir.path_of(name);
    let is_unsupported = matches!(
        Errno::from_io_error(&error),
        Some(Errno::NOSYS | Errno::NOTSUP | Errno::NOLCK | Errno::INVAL)
    );
    anyhow!(error).context(if is_unsupported {
        format!(
            "cannot lock {}: this file system has no flock(2), by which BuildKit and layercache keep out \
             of each other's way; keep the layout on a local disk",
            path.display()
        )
    } else {
        format!("cannot lock {}", path.display())
    })
}

/// The lock of `index.json`, held until dropped; the lock file is then removed, as BuildKit does.
#[derive(Debug)]
pub(super) struct IndexLock<'a> {
    root: &'a Dir,
    file: File,
}

impl<'a> IndexLock<'a> {
    /// To read the index. `None` if no lock is possible, because nothing can be written (a
    /// read-only mount, another user's directory) or the file system has no locks: then we have to
    /// read without one.
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
        let mut patience = Patience::new(wait);
        loop {
            // Opened anew each time: its holder removes the file in the end.
            let Some(file) = root.open_file(INDEX_LOCK, flags)? else {
                bail!("cannot create {}: the directory is gone", path.display());
            };
            match try_lock(&file) {
                Ok(()) if root.names(INDEX_LOCK, &file)? => return Ok(IndexLock { root, file }),
                Ok(()) => patience.replaced(root, INDEX_LOCK)?,
                Err(TryLockError::Error(error)) => {
                    return Err(cannot_lock(root, INDEX_LOCK, error));
                }
                Err(TryLockError::WouldBlock) if patience.pause() => {}
                Err(TryLockError::WouldBlock) => bail!(
                    "{} has been locked by another process for more than {wait:?}: a build or another \
                     layercache is using this layout; run again when it has finished",
                    path.display()
                ),
            }
        }
    }

    /// Whether our lock still keeps others out: BuildKit removes the file after releasing its lock,
    /// and so may remove one that we have just locked.
    pub(super) fn holds(&self) -> Result<bool> {
        self.root.names(INDEX_LOCK, &self.file)
    }
}

impl Drop for IndexLock<'_> {
    fn drop(&mut self) {
        // Only an exclusive holder may remove it; of several readers, that is the last.
        if self.file.try_lock().is_ok() && self.holds().unwrap_or(false) {
            let _ = self.root.unlink(INDEX_LOCK);
        }
    }
}

/// Opens (or creates) the file `name` in `dir` and locks it exclusively. Its holder may be downloading for
/// hours, so we give up only when nothing has been written to it for `wait`. Calls `waiting` before
/// each sleep. `None`: `dir` has been removed meanwhile.
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
            Ok(()) => {
                patience.replaced(dir, name)?;
                continue;
            }
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(cannot_lock(dir, name, error)),
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

/// Locks an existing file of `dir` exclusively, unless someone holds it.
pub(super) fn try_lock_file(dir: &Dir, name: &str) -> Result<Option<File>> {
    let Some(file) = dir.open_file(name, OFlags::RDWR)? else {
        return Ok(None);
    };
    Ok((file.try_lock().is_ok() && dir.names(name, &file)?).then_some(file))
}
