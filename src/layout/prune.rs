//! Deletes what `index.json` does not reach. BuildKit never does: its local cache directory only grows.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use super::dir::{Dir, modified};
use super::index::IndexJson;
use super::lock::IndexLock;
use super::{Layout, read_index};
use crate::cache::digest::Digest;

/// How often to begin again when BuildKit removes the lock file that we hold.
const ATTEMPTS: usize = 100;

/// What a prune would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrunePlan {
    /// How old an orphan must be to be deleted: builds and imports write blobs before the index names
    /// them.
    pub grace: Duration,
    /// Entries of `index.json` whose manifest is absent.
    pub dangling: Vec<Dangling>,
    /// Blobs to delete, by digest.
    pub orphans: Vec<Orphan>,
    /// Blobs that nothing reaches either, but that are younger than `grace`. By digest.
    pub recent: Vec<Orphan>,
    /// Blobs that stay because the index reaches them, and their bytes.
    pub kept: (u64, u64),
}

/// An entry of `index.json` whose manifest is absent.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dangling {
    /// Its tag, as a person would call it.
    pub label: String,
    pub digest: Digest,
}

/// A blob that nothing reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// Since it was written.
    pub age: Duration,
}

/// What a prune did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    pub entries: u64,
    pub blobs: u64,
    pub bytes: u64,
}

impl Layout {
    /// Finds what a prune would delete. Changes nothing.
    ///
    /// # Errors
    /// The layout cannot be read, or holds something whose reach is unknown.
    pub fn plan_prune(&self, grace: Duration) -> Result<PrunePlan> {
        let root = self.open_root()?;
        let _lock = IndexLock::shared(&root, self.lock_wait)?;
        let index = read_index(&root)?.unwrap_or_else(IndexJson::empty);
        self.plan(&root, &index, grace)
    }

    /// Carries out a plan under BuildKit's lock: deletes those of its orphans, and removes those of its
    /// entries, that are still to be deleted by then.
    ///
    /// # Errors
    /// As [`Layout::plan_prune`], or the layout cannot be written to. Part of the plan may
    /// be done by then.
    pub fn prune(&self, plan: &PrunePlan) -> Result<Pruned> {
        let root = self.open_root()?;
        let dangling: BTreeSet<&Dangling> = plan.dangling.iter().collect();
        let orphans: BTreeSet<Digest> = plan.orphans.iter().map(|o| o.digest).collect();
        let mut pruned = Pruned::default();
        for _ in 0..ATTEMPTS {
            // BuildKit's exports write blobs without this lock; `grace` is what protects them. Once
            // moby/buildkit#7153 is released, its lock on the store has to be taken here, exclusively.
            let lock = IndexLock::exclusive(&root, self.lock_wait)?;
            let mut index = read_index(&root)?.unwrap_or_else(IndexJson::empty);
            let mut current = self.plan(&root, &index, plan.grace)?;
            current.dangling.retain(|entry| dangling.contains(entry));
            current.orphans.retain(|o| orphans.contains(&o.digest));
            let done = self.carry_out(&root, &lock, &mut index, &current, &mut pruned)?;
            drop(lock);
            if done {
                self.tidy();
                return Ok(pruned);
            }
        }
        bail!(
            "{} keeps being removed by another process",
            root.path_of(super::lock::INDEX_LOCK).display()
        )
    }

    fn plan(&self, root: &Dir, index: &IndexJson, grace: Duration) -> Result<PrunePlan> {
        let reachable = self
            .reachable(index)
            .context("cannot tell what the layout needs, so nothing can be deleted")?;
        let dangling = reachable.dangling.into_iter();
        let mut plan = PrunePlan {
            grace,
            dangling: dangling
                .map(|(label, digest)| Dangling { label, digest })
                .collect(),
            ..PrunePlan::default()
        };
        let Some(blobs) = self.blobs(root)? else {
            return Ok(plan);
        };
        let now = SystemTime::now();
        let mut names = blobs.list()?;
        names.sort_unstable();
        for name in names {
            // Only files named as blobs are blobs.
            let Ok(digest) = format!("sha256:{name}").parse::<Digest>() else {
                continue;
            };
            let Some(size) = blobs.file_size(&name)? else {
                continue;
            };
            if reachable.blobs.contains(&digest) {
                plan.kept.0 += 1;
                plan.kept.1 += size;
                continue;
            }
            let Some(written) = blobs.stat(&name)?.as_ref().and_then(modified) else {
                continue;
            };
            // A time in the future counts as now.
            let age = now.duration_since(written).unwrap_or_default();
            let orphan = Orphan { digest, size, age };
            match age >= grace {
                true => plan.orphans.push(orphan),
                false => plan.recent.push(orphan),
            }
        }
        Ok(plan)
    }

    /// False if the lock was lost.
    fn carry_out(
        &self,
        root: &Dir,
        lock: &IndexLock,
        index: &mut IndexJson,
        plan: &PrunePlan,
        pruned: &mut Pruned,
    ) -> Result<bool> {
        if !plan.dangling.is_empty() {
            let gone: BTreeSet<Digest> = plan.dangling.iter().map(|d| d.digest).collect();
            let removed = index.remove(|descriptor| gone.contains(&descriptor.digest));
            if !self.replace_index(root, lock, index)? {
                return Ok(false);
            }
            pruned.entries += removed;
        }
        let Some(blobs) = self.blobs(root)? else {
            return Ok(true);
        };
        for orphan in &plan.orphans {
            if !lock.holds()? {
                return Ok(false);
            }
            blobs.unlink(&orphan.digest.hex())?;
            pruned.blobs += 1;
            pruned.bytes += orphan.size;
        }
        blobs.sync()?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::cache::oci::{self, Descriptor};
    use crate::config::Selection;
    use crate::layout::tests::{LONG, assert_says, copy_of, names, prepared, put, set_modified};

    const HOUR: Duration = Duration::from_secs(60 * 60);

    fn digests(orphans: &[Orphan]) -> Vec<Digest> {
        orphans.iter().map(|orphan| orphan.digest).collect()
    }

    /// Makes all blobs two hours old.
    fn age(root: &Path) {
        let blobs = root.join("blobs/sha256");
        for name in names(&blobs) {
            set_modified(&blobs.join(name), SystemTime::now() - 2 * HOUR);
        }
    }

    fn entry(root: &Path, media_type: &str, document: &serde_json::Value) -> Descriptor {
        let bytes = document.to_string().into_bytes();
        Descriptor::new(media_type, put(root, &bytes), bytes.len() as u64)
    }

    #[test]
    fn of_every_fixture_nothing_is_an_orphan_and_an_added_blob_is() {
        for name in [
            "local-max",
            "local-min",
            "local-index",
            "local-docker",
            "local-zstd",
            "local-multiarch",
            "image-plain",
            "image-inline",
            "image-multiarch",
        ] {
            let copy = copy_of(name);
            let layout = Layout::open(copy.path(), LONG).unwrap();
            age(copy.path());
            let before = names(&copy.path().join("blobs/sha256"));
            let plan = layout.plan_prune(Duration::ZERO).unwrap();
            let nothing = (plan.orphans.len(), plan.recent.len(), plan.dangling.len());
            assert_eq!(nothing, (0, 0, 0), "{name}");
            assert_eq!(plan.kept.0, before.len() as u64, "{name}");

            let orphan = put(copy.path(), b"orphan");
            age(copy.path());
            let recent = put(copy.path(), b"recent");
            let plan = layout.plan_prune(HOUR).unwrap();
            assert_eq!(digests(&plan.orphans), [orphan]);
            assert_eq!(digests(&plan.recent), [recent]);
            assert!(plan.orphans[0].age >= 2 * HOUR);
            let pruned = layout.prune(&plan).unwrap();
            let expected = Pruned {
                entries: 0,
                blobs: 1,
                bytes: 6,
            };
            assert_eq!(pruned, expected);
            assert!(layout.has_blob(&recent, 6));
            fs::remove_file(copy.path().join("blobs/sha256").join(recent.hex())).unwrap();
            assert_eq!(names(&copy.path().join("blobs/sha256")), before);
            let entry = layout.select(&Selection::Default).unwrap();
            layout.check_complete(&entry).unwrap();
            assert_eq!(names(copy.path()), ["blobs", "index.json", "oci-layout"]);
        }
    }

    #[test]
    fn an_entry_whose_manifest_is_gone_goes_and_what_it_named_is_an_orphan() {
        let copy = copy_of("local-max");
        let layout = Layout::open(copy.path(), LONG).unwrap();
        let kept = names(&copy.path().join("blobs/sha256"));
        let index = fs::read(copy.path().join("index.json")).unwrap();
        let layer = put(copy.path(), b"layer");
        let manifest = entry(
            copy.path(),
            oci::IMAGE_MANIFEST,
            &serde_json::json!({"schemaVersion": 2,
                "config": Descriptor::new(oci::CACHE_CONFIG, Digest::of(b"{}"), 2),
                "layers": [Descriptor::new("m", layer, 5)]}),
        );
        let tagged = layout.publish_tag("old", &manifest, &BTreeMap::new());
        tagged.unwrap();
        age(copy.path());
        assert_eq!(layout.plan_prune(HOUR).unwrap().orphans, []);

        fs::remove_file(copy.path().join("blobs/sha256").join(manifest.digest.hex())).unwrap();
        let plan = layout.plan_prune(HOUR).unwrap();
        let dangling = Dangling {
            label: "tag \"old\"".to_owned(),
            digest: manifest.digest,
        };
        assert_eq!(plan.dangling, [dangling]);
        assert_eq!(digests(&plan.orphans), [layer]);
        layout.prune(&plan).unwrap();
        assert_eq!(names(&copy.path().join("blobs/sha256")), kept);
        assert_eq!(fs::read(copy.path().join("index.json")).unwrap(), index);
        assert_eq!(names(copy.path()), ["blobs", "index.json", "oci-layout"]);
    }

    #[test]
    fn what_has_changed_since_the_plan_was_made_stays() {
        let copy = copy_of("local-max");
        let layout = Layout::open(copy.path(), LONG).unwrap();
        let [renewed, named, unplanned] =
            [b"renewed", b"named__", b"unplann"].map(|blob| Digest::of(blob));
        put(copy.path(), b"renewed");
        let manifest = serde_json::json!({"schemaVersion": 2, "layers": [],
            "config": Descriptor::new(oci::CACHE_CONFIG, named, 7)});
        put(copy.path(), b"named__");
        let entry = entry(copy.path(), oci::IMAGE_MANIFEST, &manifest);
        age(copy.path());
        let plan = layout.plan_prune(HOUR).unwrap();
        assert_eq!(plan.orphans.len(), 3);

        put(copy.path(), b"unplann");
        age(copy.path());
        put(copy.path(), b"renewed");
        layout.publish_tag("new", &entry, &BTreeMap::new()).unwrap();
        assert_eq!(layout.prune(&plan).unwrap(), Pruned::default());
        for digest in [renewed, named, unplanned] {
            assert!(layout.has_blob(&digest, 7), "{digest}");
        }
    }

    #[test]
    fn where_the_reach_of_something_is_unknown_nothing_is_deleted() {
        let unknown = |text: &str, expected: &str| {
            let (dir, layout) = prepared();
            put(dir.path(), b"orphan");
            let digest = put(dir.path(), text.as_bytes());
            age(dir.path());
            let entry = match serde_json::from_str::<serde_json::Value>(text) {
                Ok(value) if value.get("digest").is_some() => text.to_owned(),
                _ => format!(
                    r#"{{"mediaType":"{}","digest":"{digest}","size":{}}}"#,
                    oci::IMAGE_INDEX,
                    text.len()
                ),
            };
            let index = format!(r#"{{"schemaVersion":2,"manifests":[{entry}]}}"#);
            fs::write(dir.path().join("index.json"), index).unwrap();
            let outcome = layout.plan_prune(HOUR);
            assert_says(outcome, &["nothing can be deleted", expected]);
        };
        unknown("{", "reading index");
        unknown(r#"{"schemaVersion":1,"manifests":[]}"#, "schema version 1");
        unknown(
            r#"{"mediaType":"m","digest":"sha512:00","size":1}"#,
            "sha512",
        );
        // Of a kind that may come one day.
        let child = Descriptor::new("application/vnd.x.manifest.v3", Digest::of(b"orphan"), 6);
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [child]});
        unknown(&index.to_string(), "vnd.x.manifest.v3");
    }
}
