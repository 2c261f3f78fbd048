//! A directory of the layout, held open. Every name is looked up relative to it and never through a
//! symlink, so that a layout from elsewhere cannot lead a read or a write out of itself, and only
//! regular files are opened, so that a FIFO or a device in it cannot hang us.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

/// To read a file.
pub(super) const READ: OFlags = OFlags::RDONLY;
/// To write one that may be there already; what is in it stays.
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

    /// What stands under `name`, itself rather than what it points to.
    pub(super) fn stat(&self, name: &str) -> Result<Option<Stat>> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(self.failed("cannot look at", name, error)),
        }
    }

    /// The size of the regular file `name`; `None` for whatever else stands there.
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
                "{} is {} where an OCI layout has a directory; refused, as it could lead out of the layout",
                self.path_of(name).display(),
                called(kind)
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

    /// A directory in this one, made if it is not there; and whether it was made.
    pub(super) fn make_subdir(&self, name: &str) -> Result<(Dir, bool)> {
        let mut made = false;
        // Another process's tidy() may remove an empty directory between our two steps.
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

    /// Opens a regular file. `None`: it is not there or, when it was to be created, this directory
    /// itself has been removed.
    pub(super) fn open_file(&self, name: &str, flags: OFlags) -> Result<Option<File>> {
        // Looked at before it is opened, because opening a device alone can have effects ...
        match self.stat(name)? {
            Some(stat) => self.require_regular(name, FileType::from_raw_mode(stat.st_mode))?,
            None if !flags.contains(OFlags::CREATE) => return Ok(None),
            None => {}
        }
        match rustix::fs::openat(&self.fd, name, flags | GUARD, Mode::from_raw_mode(0o644)) {
            Ok(fd) => {
                // ... and after, because it may have been exchanged in between.
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
                called(kind)
            );
        }
        Ok(())
    }

    /// Whether `name` still stands for the file that is open as `file`. A lock on a file that has
    /// been removed or renamed protects nothing.
    pub(super) fn names(&self, name: &str, file: &File) -> Result<bool> {
        let held = file
            .metadata()
            .with_context(|| format!("cannot look at {}", self.path_of(name).display()))?;
        Ok(self.stat(name)?.is_some_and(|stat| {
            // rustix keeps the platform's integer types; on Linux these are u64 already.
            #[allow(clippy::unnecessary_cast)]
            let found = (stat.st_dev as u64, stat.st_ino as u64);
            found == (held.dev(), held.ino())
        }))
    }

    /// The names in this directory. Those that are not UTF-8 come with replacement characters: no
    /// name we look for has any.
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
        rustix::fs::renameat(&self.fd, name, &to.fd, to_name).with_context(|| {
            format!(
                "cannot rename {} to {}",
                self.path_of(name).display(),
                to.path_of(to_name).display()
            )
        })
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
            // Some network and FUSE filesystems cannot sync a directory, and say so.
            Ok(()) | Err(Errno::INVAL | Errno::NOTSUP | Errno::NOSYS) => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("cannot sync {}", self.path.display()))
            }
        }
    }

    /// An error, unless files can be created in this directory.
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

/// The system's reason at the bottom of an error, if it was one.
pub(super) fn errno(error: &anyhow::Error) -> Option<Errno> {
    let cause = error.root_cause();
    cause
        .downcast_ref::<Errno>()
        .copied()
        .or_else(|| Errno::from_io_error(cause.downcast_ref::<io::Error>()?))
}

fn called(kind: FileType) -> &'static str {
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
