//! A directory of the layout, held open. Names are looked up relative to it and never through a
//! symlink, so that an untrusted layout cannot lead a read or a write out of itself; only regular files
//! are opened, so that a FIFO or a device cannot hang us.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

/// To read a file.
pub(super) const READ: OFlags = OFlags::RDONLY;
/// To write a file; creates it if it is absent, and keeps its contents if not.
pub(super) const WRITE: OFlags = OFlags::RDWR.union(OFlags::CREATE);

const GUARD: OFlags = OFlags::NOFOLLOW
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

#[derive(Debug)]
pub(super) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl Dir {
    /// The layout's own directory. This one may be a symlink: the user named it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Dir {
            fd,
            path: path.to_owned(),
        })
    }

    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The file `name`; a symlink is not followed.
    pub(super) fn stat(&self, name: &str) -> Result<Option<Stat>> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(self.failed("cannot look at", name, error)),
        }
    }

    /// The size of the regular file `name` in bytes; `None` if it is absent or something else.
    pub(super) fn file_size(&self, name: &str) -> Result<Option<u64>> {
        Ok(self
            .stat(name)?
            .filter(|stat| FileType::from_raw_mode(stat.st_mode).is_file())
            .and_then(|stat| u64::try_from(stat.st_size).ok()))
    }

    /// A directory in this one, if it is there.
    pub(super) fn subdir(&self, name: &str) -> Result<Option<Dir>> {
        let Some(stat) = self.stat(name)? else {
            return Ok(None);
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        if !kind.is_dir() {
            bail!(
                "{} is {} where an OCI layout has a directory; refused, because it could lead out of the layout",
                self.path_of(name).display(),
                kind_name(kind)
            );
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Dir {
                fd,
                path: self.path_of(name),
            })),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(self.failed("cannot open", name, error)),
        }
    }

    /// A directory in this one, created if it is absent; and whether it was created.
    pub(super) fn make_subdir(&self, name: &str) -> Result<(Dir, bool)> {
        let mut made = false;
        // Another process's `tidy` may remove an empty directory between our two steps.
        for _ in 0..100 {
            if let Some(dir) = self.subdir(name)? {
                return Ok((dir, made));
            }
            match rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => made = true,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(self.failed("cannot create directory", name, error)),
            }
        }
        bail!(
            "{} keeps being removed by another process",
            self.path_of(name).display()
        )
    }

    /// Opens a regular file. `None`: it is absent or, if it was to be created, this directory has been
    /// removed.
    pub(super) fn open_file(&self, name: &str, flags: OFlags) -> Result<Option<File>> {
        // Before, because merely opening a device can have effects ...
        match self.stat(name)? {
            Some(stat) => self.require_regular(name, FileType::from_raw_mode(stat.st_mode))?,
            None if !flags.contains(OFlags::CREATE) => return Ok(None),
            None => {}
        }
        match rustix::fs::openat(&self.fd, name, flags | GUARD, Mode::from_raw_mode(0o644)) {
            Ok(fd) => {
                // ... and after, because it may have been replaced in between.
                let stat = rustix::fs::fstat(&fd)
                    .map_err(|error| self.failed("cannot look at", name, error))?;
                self.require_regular(name, FileType::from_raw_mode(stat.st_mode))?;
                Ok(Some(File::from(fd)))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(self.failed("cannot open", name, error)),
        }
    }

    fn require_regular(&self, name: &str, kind: FileType) -> Result<()> {
        if !kind.is_file() {
            bail!(
                "{} is {} where an OCI layout has a regular file; refused",
                self.path_of(name).display(),
                kind_name(kind)
            );
        }
        Ok(())
    }

    /// Whether `name` still is the file that is open as `file`. A lock on a file that has been removed or
    /// renamed protects nothing.
    pub(super) fn names(&self, name: &str, file: &File) -> Result<bool> {
        let identity = |file: &File| -> Result<(u64, u64)> {
            let metadata = file
                .metadata()
                .with_context(|| format!("cannot look at {}", self.path_of(name).display()))?;
            Ok((metadata.dev(), metadata.ino()))
        };
        let held = identity(file)?;
        let Some(stat) = self.stat(name)? else {
            return Ok(false);
        };
        // rustix keeps the platform's integer types; on Linux these are u64 already.
        #[allow(clippy::unnecessary_cast)]
        if held == (stat.st_dev as u64, stat.st_ino as u64) {
            return Ok(true);
        }
        // Some network file systems give a file another identity by its name than once it is open. Then
        // two open files can still be compared.
        match self.open_file(name, READ)? {
            Some(named) => Ok(identity(&named)? == held),
            None => Ok(false),
        }
    }

    /// Whether files can be renamed between this directory and `other`, as far as can be known.
    pub(super) fn is_on_mount_of(&self, other: &Dir) -> Result<bool> {
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::StatxFlags;
            let mount = |dir: &Dir| {
                let mask = StatxFlags::MNT_ID;
                let statx = rustix::fs::statx(&dir.fd, "", AtFlags::EMPTY_PATH, mask).ok()?;
                // Before Linux 5.8, it is not filled in.
                (statx.stx_mask & mask.bits() != 0).then_some(statx.stx_mnt_id)
            };
            if let (Some(one), Some(another)) = (mount(self), mount(other)) {
                return Ok(one == another);
            }
        }
        let device = |dir: &Dir| -> Result<_> {
            let stat = rustix::fs::fstat(&dir.fd);
            Ok(stat
                .with_context(|| format!("cannot look at {}", dir.path.display()))?
                .st_dev)
        };
        Ok(device(self)? == device(other)?)
    }

    /// The names in this directory. Invalid UTF-8 becomes replacement characters: no name that we
    /// look for has any.
    pub(super) fn list(&self) -> Result<Vec<String>> {
        let context = || format!("cannot list {}", self.path.display());
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).with_context(context)? {
            let entry = entry.with_context(context)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    pub(super) fn rename(&self, name: &str, to: &Dir, to_name: &str) -> Result<()> {
        rustix::fs::renameat(&self.fd, name, &to.fd, to_name).map_err(|error| {
            let context = match error {
                Errno::XDEV => other_mount(&to.path),
                _ => format!(
                    "cannot rename {} to {}",
                    self.path_of(name).display(),
                    to.path_of(to_name).display()
                ),
            };
            anyhow::Error::new(error).context(context)
        })
    }

    /// Sets the time of the last change of `name` to now, if that is permitted.
    pub(super) fn touch(&self, name: &str) {
        let now = rustix::fs::Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_NOW,
        };
        let times = rustix::fs::Timestamps {
            last_access: now,
            last_modification: now,
        };
        let _ = rustix::fs::utimensat(&self.fd, name, &times, AtFlags::SYMLINK_NOFOLLOW);
    }

    pub(super) fn unlink(&self, name: &str) -> Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.failed("cannot remove", name, error)),
        }
    }

    /// Removes a directory in this one if it is empty.
    pub(super) fn remove_if_empty(&self, name: &str) {
        let _ = rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR);
    }

    /// Makes what was renamed into this directory survive a power cut.
    pub(super) fn sync(&self) -> Result<()> {
        match rustix::fs::fsync(&self.fd) {
            // Some network and FUSE file systems cannot sync a directory.
            Ok(()) | Err(Errno::INVAL | Errno::NOTSUP | Errno::NOSYS) => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("cannot sync {}", self.path.display()))
            }
        }
    }

    /// Makes sure that files can be created in this directory.
    pub(super) fn require_writable(&self) -> Result<()> {
        rustix::fs::accessat(
            &self.fd,
            ".",
            Access::WRITE_OK | Access::EXEC_OK,
            AtFlags::empty(),
        )
        .with_context(|| format!("cannot write into {}", self.path.display()))
    }

    fn failed(&self, what: &str, name: &str, error: Errno) -> anyhow::Error {
        anyhow::Error::new(io::Error::from(error))
            .context(format!("{what} {}", self.path_of(name).display()))
    }
}

/// Why `directory` of a layout cannot be written to.
pub(super) fn other_mount(directory: &Path) -> String {
    format!(
        "{} is on another mount than the rest of the layout, and files cannot be renamed across mounts: \
         mount the whole layout",
        directory.display()
    )
}

/// When a file was last written to; `None` if its file system says something impossible.
pub(super) fn modified(stat: &Stat) -> Option<SystemTime> {
    let seconds = Duration::from_secs(u64::try_from(stat.st_mtime).ok()?);
    UNIX_EPOCH.checked_add(seconds)
}

/// The system's error code at the bottom of an error, if there is one.
pub(super) fn errno(error: &anyhow::Error) -> Option<Errno> {
    let cause = error.root_cause();
    cause
        .downcast_ref::<Errno>()
        .copied()
        .or_else(|| Errno::from_io_error(cause.downcast_ref::<io::Error>()?))
}

fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "a file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symlink",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Unknown => "something unknown",
    }
}
