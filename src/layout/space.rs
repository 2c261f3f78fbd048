//! The free space on a layout's file system.

use std::path::Path;

use super::Layout;

impl Layout {
    /// Bytes available to us where the layout is or will be. `None` if the file system does not
    /// say.
    pub fn free_space(&self) -> Option<u64> {
        let here = Path::new(".");
        let ancestors = self.root.ancestors().chain([here]);
        let existing = ancestors
            .filter(|path| !path.as_os_str().is_empty())
            .find(|path| path.exists())?;
        let stat = rustix::fs::statvfs(existing).ok()?;
        // Some network file systems report only zeros.
        (stat.f_blocks > 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}
