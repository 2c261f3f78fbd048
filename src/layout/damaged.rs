//! Damaged blobs: moved out of the readers' way, and kept for a while.
//!
//! A damaged file under a blob's name counts as that blob for everyone who does not hash it: BuildKit,
//! and an import without `--verify`. Where no good copy can replace it, it is moved to
//! `.layercache/damaged-<hex>`, where nothing reads it. It is removed when the blob is back in place,
//! or after [`super::staging::ABANDONED`].

use std::path::PathBuf;

use anyhow::Result;

use super::Layout;
use super::staging::Held;
use crate::cache::digest::Digest;

const PREFIX: &str = "damaged-";

impl Layout {
    /// Moves a damaged blob (of another size, or with other bytes) out of the way; returns where to.
    /// `None`: there is no such blob, or a good one. Blocks while another process writes the blob.
    ///
    /// # Errors
    /// The blob cannot be read or moved.
    pub fn set_damaged_aside(&self, digest: &Digest, size: u64) -> Result<Option<PathBuf>> {
        let Some(root) = self.existing_root()? else {
            return Ok(None);
        };
        // A process that replaces the blob holds this lock, so the file that we verify is the one that we move.
        let held = Held::take(self, &root, &digest.hex(), || {})?;
        let moved = match self.blobs(&root)? {
            Some(blobs)
                if blobs.file_size(&digest.hex())?.is_some()
                    && !self.verify_blob(digest, size, |_| {})? =>
            {
                let name = format!("{PREFIX}{}", digest.hex());
                blobs.touch(&digest.hex());
                blobs.rename(&digest.hex(), held.dir(), &name)?;
                blobs.sync()?;
                Some(held.dir().path_of(&name))
            }
            _ => None,
        };
        held.release()?;
        Ok(moved)
    }
}

/// The blob that the file `name` of the staging directory was before it was moved.
pub(super) fn damaged_blob(name: &str) -> Option<Digest> {
    let hex = name.strip_prefix(PREFIX)?;
    format!("sha256:{hex}").parse().ok()
}
