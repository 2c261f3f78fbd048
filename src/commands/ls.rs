//! Ls: the caches of a bucket, and what else is below the prefix.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::time::SystemTime;

use anyhow::Result;
use async_trait::async_trait;
use serde::Serialize;

use crate::bucket::{Bucket, Cache, Contents, Inventory, Tally};
use crate::cache::Time;
use crate::cache::digest::Digest;
use crate::commands::{Context, PerSpec, Work, for_each_spec};
use crate::config::{LsTask, S3Config, Sort};
use crate::progress::{self, Progress, age, count};
use crate::quote::printable;
use crate::report::table::{Column, Table};
use crate::report::{Details, Outcome, Place, Report};

/// Lists the caches of every source of the task.
pub async fn run(task: &LsTask, context: &Context<'_>) -> Outcome {
    let ls = Ls { task };
    for_each_spec(&ls, &task.sources, context).await.into()
}

/// What was found at one source.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LsDetails {
    caches: Vec<Listed>,
    /// Blobs that no cache needs.
    unreferenced: Blobs,
    /// Other objects below the prefix.
    other: Objects,
    unreadable: Vec<Unreadable>,
    /// Distinct blobs of the listed caches.
    #[serde(skip)]
    needed: Tally,
    /// What the names of the listed caches match.
    #[serde(skip)]
    name: Option<String>,
    #[serde(skip)]
    json: bool,
}

/// One cache.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    name: String,
    key: String,
    /// When its manifest was written, if the store says.
    written: Option<Time>,
    layers: u64,
    records: u64,
    results: u64,
    blobs: u64,
    bytes: u64,
    /// Bytes of the blobs that no other cache needs.
    unique_bytes: u64,
    /// When the oldest of its blobs was written or refreshed.
    oldest_blob: Option<Time>,
    /// Blobs that are absent or have another size.
    missing_blobs: u64,
    /// Whether it also describes an image.
    image: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Blobs {
    blobs: u64,
    bytes: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Objects {
    objects: u64,
    bytes: u64,
}

/// A manifest that cannot be read.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Unreadable {
    key: String,
    reason: String,
}

impl Details for LsDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let now = SystemTime::now();
        let mut text = match self.caches.is_empty() {
            true => String::new(),
            false => self.table(now) + "\n\n",
        };
        let address = place.addresses();
        let _ = match &*self.caches {
            [] => match &self.name {
                None => write!(text, "no caches in {address}; {cost}"),
                Some(glob) => {
                    let glob = printable(glob);
                    write!(text, "no cache in {address} matches '{glob}'; {cost}")
                }
            },
            caches => write!(
                text,
                "{} of {} in {address}; {cost}",
                count(caches.len() as u64, "cache"),
                blobs(self.needed.objects, self.needed.bytes)
            ),
        };
        if self.unreferenced.blobs > 0 {
            let Blobs { blobs: n, bytes } = self.unreferenced;
            let _ = write!(text, "\nno cache needs {}", blobs(n, bytes));
        }
        if self.other.objects > 0 {
            let objects = count(self.other.objects, "object");
            let bytes = progress::bytes(self.other.bytes);
            let _ = write!(text, "\nnot part of these caches: {objects} ({bytes})");
        }
        for unreadable in &self.unreadable {
            let _ = write!(text, "\nunreadable: {}", printable(&unreadable.line()));
        }
        text
    }

    fn of_failure(self) -> Self {
        LsDetails::default()
    }

    fn as_json(&self) -> bool {
        self.json
    }
}

impl Unreadable {
    fn line(&self) -> String {
        let Unreadable { key, reason } = self;
        match reason.contains(key) {
            true => reason.clone(),
            false => format!("{key}: {reason}"),
        }
    }
}

fn blobs(n: u64, bytes: u64) -> String {
    format!("{} ({})", count(n, "blob"), progress::bytes(bytes))
}

impl LsDetails {
    fn new(inventory: &Inventory, task: &LsTask) -> Self {
        let mut details = LsDetails {
            unreferenced: Blobs {
                blobs: inventory.unreferenced.objects,
                bytes: inventory.unreferenced.bytes,
            },
            other: Objects {
                objects: inventory.other.objects,
                bytes: inventory.other.bytes,
            },
            name: task.name.as_ref().map(|glob| glob.as_str().to_owned()),
            json: task.json,
            ..LsDetails::default()
        };
        let users = users(&inventory.caches);
        let mut needed = BTreeMap::new();
        for cache in &inventory.caches {
            let matches = |glob: &glob::Pattern| glob.matches(&cache.named.name);
            if !task.name.as_ref().is_none_or(matches) {
                continue;
            }
            match &cache.contents {
                Ok(contents) => {
                    needed.extend(contents.blobs.iter().copied());
                    let listed = Listed::new(cache, contents, inventory, &users);
                    details.caches.push(listed);
                }
                Err(unreadable) => details.unreadable.push(Unreadable {
                    key: cache.named.key.clone(),
                    reason: unreadable.reason.clone(),
                }),
            }
        }
        for size in needed.into_values() {
            details.needed.add(size);
        }
        match task.sort {
            Sort::Name => {}
            Sort::Written => details.caches.sort_by_key(|cache| Reverse(cache.written)),
            Sort::Size => details.caches.sort_by_key(|cache| Reverse(cache.bytes)),
        }
        details
    }

    fn table(&self, now: SystemTime) -> String {
        let ago = |time: Option<Time>| match time {
            Some(time) => {
                let passed = now.duration_since(time.0.into()).unwrap_or_default();
                format!("{} ago", age(passed))
            }
            None => "-".to_owned(),
        };
        let mut table = Table::new([
            Column::left("name").cut(),
            Column::right("written"),
            Column::right("layers").left_out(),
            Column::right("size"),
            Column::right("unique").left_out(),
            Column::right("oldest blob").left_out(),
            Column::right("missing"),
        ]);
        for cache in &self.caches {
            table.row([
                cache.name.clone(),
                ago(cache.written),
                cache.layers.to_string(),
                progress::bytes(cache.bytes),
                progress::bytes(cache.unique_bytes),
                ago(cache.oldest_blob),
                cache.missing_blobs.to_string(),
            ]);
        }
        table.text()
    }
}

/// For each blob, how many caches need it.
fn users(caches: &[Cache]) -> HashMap<Digest, usize> {
    let mut users = HashMap::new();
    for contents in caches.iter().flat_map(|cache| &cache.contents) {
        for (digest, _) in &contents.blobs {
            *users.entry(*digest).or_default() += 1;
        }
    }
    users
}

impl Listed {
    fn new(
        cache: &Cache,
        contents: &Contents,
        inventory: &Inventory,
        users: &HashMap<Digest, usize>,
    ) -> Self {
        let time = |time: SystemTime| Time(time.into());
        let mut listed = Listed {
            name: cache.named.name.clone(),
            key: cache.named.key.clone(),
            written: cache.named.info.last_modified.map(time),
            layers: contents.layers,
            records: contents.records,
            results: contents.results,
            blobs: contents.blobs.len() as u64,
            bytes: contents.bytes(),
            unique_bytes: 0,
            oldest_blob: None,
            missing_blobs: 0,
            image: contents.image,
        };
        for (digest, size) in &contents.blobs {
            if users[digest] == 1 {
                listed.unique_bytes += size;
            }
            match &inventory.blobs[digest] {
                Some(info) if info.size == *size => {
                    let times = [listed.oldest_blob, info.last_modified.map(time)];
                    listed.oldest_blob = times.into_iter().flatten().min();
                }
                _ => listed.missing_blobs += 1,
            }
        }
        listed
    }
}

struct Ls<'a> {
    task: &'a LsTask,
}

#[async_trait]
impl PerSpec for Ls<'_> {
    type Spec = S3Config;
    type Details = LsDetails;
    type Ready = ();

    fn s3<'a>(&self, source: &'a S3Config) -> &'a S3Config {
        source
    }

    fn blank(&self, source: &S3Config) -> Report<LsDetails> {
        let place = Place::below("ls", "listing the caches of", source);
        Report::new(place, LsDetails::default())
    }

    async fn prepare(&self, _: &Context<'_>) -> Result<()> {
        Ok(())
    }

    fn work<'a>(
        &'a self,
        (): &'a (),
        _: &'a S3Config,
        bucket: Bucket,
        _: &[Report<LsDetails>],
        context: &'a Context<'_>,
    ) -> Box<dyn Work<LsDetails> + 'a> {
        Box::new(Listing {
            task: self.task,
            bucket,
            progress: context.progress,
        })
    }
}

/// The listing of one source.
struct Listing<'a> {
    task: &'a LsTask,
    bucket: Bucket,
    progress: &'a Progress,
}

#[async_trait]
impl Work<LsDetails> for Listing<'_> {
    async fn run(&mut self, report: &mut Report<LsDetails>) -> Result<()> {
        self.progress.stage("looking at the bucket", 0, 0);
        let inventory = self.bucket.inventory().await?;
        report.details = LsDetails::new(&inventory, self.task);
        Ok(())
    }

    async fn clean_up(&mut self) -> Result<()> {
        Ok(())
    }
}
