//! Tags: which names are valid, and pointing one to a manifest.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use super::dir::Dir;
use super::index::IndexJson;
use super::lock::{INDEX_LOCK, IndexLock};
use super::staging::Held;
use super::{Layout, OCI_LAYOUT, OCI_LAYOUT_JSON, check_version, read_index};
use crate::cache::digest::Digest;
use crate::cache::oci::Descriptor;

/// How often to try again when BuildKit removes the lock file that we hold.
const ATTEMPTS: usize = 100;

/// What `Layout::publish_tag` did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tagged {
    Done,
    /// The tag is as it was: these blobs are absent, or have another size.
    Gone(Vec<(Digest, u64)>),
}

/// Checks a tag.
///
/// # Errors
/// Why it is not valid.
pub fn check_tag(tag: &str) -> Result<(), &'static str> {
    if tag.is_empty() {
        return Err("a tag is not empty");
    }
    if tag.contains(is_forbidden) {
        return Err("a tag holds no spaces and no control characters");
    }
    Ok(())
}

/// The tag of a cache that is called `name` on S3, where names are not restricted: `-` stands for each
/// character that a tag cannot have.
pub fn tag_of(name: &str) -> String {
    match name {
        "" => "-".to_owned(),
        name => name.replace(is_forbidden, "-"),
    }
}

fn is_forbidden(c: char) -> bool {
    c.is_whitespace() || c.is_control()
}

impl Layout {
    /// Points `tag` to `entry` in `index.json`, atomically and under BuildKit's lock, provided that all
    /// `blobs` (sizes in bytes) are there at that moment. Removes other entries that answer to the
    /// tag; the rest stays byte for byte. Writes `oci-layout` if it is absent.
    ///
    /// # Errors
    /// `entry` is not of a manifest, the index is damaged, the lock cannot be had, or the layout cannot
    /// be written to.
    pub fn publish_tag(
        &self,
        tag: &str,
        entry: &Descriptor,
        blobs: &BTreeMap<Digest, u64>,
    ) -> Result<Tagged> {
        let root = self.open_root()?;
        self.publish_tag_in(&root, tag, entry, blobs)
            .with_context(|| format!("cannot set tag {tag:?} in {}", self.root.display()))
    }

    fn publish_tag_in(
        &self,
        root: &Dir,
        tag: &str,
        entry: &Descriptor,
        blobs: &BTreeMap<Digest, u64>,
    ) -> Result<Tagged> {
        for _ in 0..ATTEMPTS {
            let lock = IndexLock::exclusive(root, self.lock_wait)?;
            // First, because without it most readers see no layout.
            if !check_version(root)? {
                let mut held = Held::take(self, root, OCI_LAYOUT, || {})?;
                held.fill(OCI_LAYOUT_JSON, None)?;
                held.rename(root, OCI_LAYOUT)?;
            }
            let mut index = read_index(root)?.unwrap_or_else(IndexJson::empty);
            let is_changed = index.set_tag(tag, entry)?;
            // BuildKit's `reset=true` deletes what the index does not reach, and holds this lock only
            // while it reads the index (moby/buildkit#7102). What goes between here and the rename
            // can be prevented only by the lock on the whole store that moby/buildkit#7153 proposes:
            // once it is released, `prepare` has to take it shared, until the tag is set.
            let gone = self.gone(blobs)?;
            if !gone.is_empty() {
                return Ok(Tagged::Gone(gone));
            }
            if !is_changed {
                return Ok(Tagged::Done);
            }
            if self.replace_index(root, &lock, &index)? {
                return Ok(Tagged::Done);
            }
        }
        bail!(
            "{} keeps being removed by another process",
            root.path_of(INDEX_LOCK).display()
        )
    }

    /// Those of `blobs` that are not in the layout with their size.
    pub(super) fn gone(&self, blobs: &BTreeMap<Digest, u64>) -> Result<Vec<(Digest, u64)>> {
        let directory = self.blobs(&self.open_root()?)?;
        let mut gone = Vec::new();
        for (&digest, &size) in blobs {
            let found = match &directory {
                Some(directory) => directory.file_size(&digest.hex())?,
                None => None,
            };
            if found != Some(size) {
                gone.push((digest, size));
            }
        }
        Ok(gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_any_text_without_spaces_and_control_characters() {
        for tag in ["latest", "feature/a,b", "docker.io/library/x:v1", "ü"] {
            assert_eq!(check_tag(tag), Ok(()), "{tag:?}");
        }
        for tag in ["", " ", "a b", "a\n", "\u{1b}[1m", "a\u{a0}b"] {
            assert!(check_tag(tag).is_err(), "{tag:?}");
        }
    }

    #[test]
    fn the_tag_of_any_name_is_valid_and_that_of_a_valid_name_is_the_name() {
        assert_eq!(tag_of("feature/a"), "feature/a");
        assert_eq!(tag_of("my cache\t2"), "my-cache-2");
        for name in ["", " ", "\u{1b}[1m", "a\u{2028}b"] {
            assert_eq!(check_tag(&tag_of(name)), Ok(()), "{name:?}");
        }
    }
}
