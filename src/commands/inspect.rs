//! Inspect: the layers of one cache, what `mode=min` would keep of it, and what others share.

mod tree;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context as _, Result, anyhow, bail};
use async_trait::async_trait;
use serde::Serialize;

use crate::blocking::blocking;
use crate::bucket::{Bucket, Certainty, Contents};
use crate::cache::digest::Digest;
use crate::cache::{CacheConfig, Time};
use crate::commands::{Context, LOCK_WAIT, PerSpec, Work, for_each_spec, on_layout};
use crate::config::{InspectTask, Origin, S3Config};
use crate::layout::Layout;
use crate::progress::{self, Progress, age, count};
use crate::quote::printable;
use crate::report::table::{Column, Table};
use crate::report::{Details, Outcome, Place, Report};
use crate::store::{Kind, StoreError};

/// How many other caches the summary names.
const NAMED: usize = 5;

/// Shows every cache of the task.
pub async fn run(task: &InspectTask, context: &Context<'_>) -> Outcome {
    match &task.origin {
        Origin::S3(sources) => for_each_spec(&Inspect { task }, sources, context)
            .await
            .into(),
        Origin::Layout(root) => {
            let place = Place::layout("inspect", "inspecting", root);
            let report = Report::new(place, InspectDetails::default());
            on_layout(report, of_layout(task, root, context.progress), context)
                .await
                .into()
        }
    }
}

/// What is in one cache.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectDetails {
    /// The manifest in the layout.
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest: Option<Digest>,
    /// When the manifest on S3 was written, if the store says.
    #[serde(skip_serializing_if = "Option::is_none")]
    written: Option<Time>,
    layers: Vec<InspectedLayer>,
    records: u64,
    results: u64,
    blobs: u64,
    bytes: u64,
    /// Bytes of the blobs that no other cache needs. `None` here and below: the other caches cannot be
    /// listed.
    unique_bytes: Option<u64>,
    /// Whether it also describes an image.
    image: bool,
    /// What `mode=min` would keep.
    min: Min,
    /// The other caches that need some of its blobs, those with the most bytes first.
    shared_with: Option<Vec<Shared>>,
    /// Other manifests that could not be read.
    unreadable: Option<u64>,
    missing: Vec<Digest>,
    wrong_size: Vec<Digest>,
    #[serde(skip)]
    diff_ids: bool,
    #[serde(skip)]
    json: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct InspectedLayer {
    blob: Digest,
    #[serde(rename = "diffID")]
    diff_id: Digest,
    media_type: String,
    size: u64,
    /// `None`: unknown.
    created: Option<Time>,
    /// The layer below, by its place in this list.
    parent: Option<usize>,
    state: State,
    /// How many other caches need the blob. `None`: unknown.
    shared_by: Option<u64>,
}

/// Whether a blob is where its cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum State {
    Ok,
    Missing,
    WrongSize,
}

impl State {
    fn of(size: u64, found: Option<u64>) -> Self {
        match found {
            None => State::Missing,
            Some(found) if found == size => State::Ok,
            Some(_) => State::WrongSize,
        }
    }

    fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Missing => "MISSING",
            State::WrongSize => "WRONG SIZE",
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Min {
    layers: u64,
    results: u64,
    blobs: u64,
    bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Shared {
    name: String,
    blobs: u64,
    bytes: u64,
}

/// What other caches need.
#[derive(Default)]
struct Others {
    caches: Vec<(String, Contents)>,
    unreadable: u64,
}

impl InspectDetails {
    /// `found` has the sizes of the cache's blobs that are there. No `others`: they cannot be listed.
    fn new(
        cache: &CacheConfig,
        found: &BTreeMap<Digest, u64>,
        others: Option<&Others>,
        task: &InspectTask,
    ) -> Result<Self> {
        let contents = Contents::of(cache)?;
        let min = Contents::of(&cache.min())?;
        let mut details = InspectDetails {
            records: contents.records,
            results: contents.results,
            blobs: contents.blobs.len() as u64,
            bytes: contents.bytes(),
            image: contents.image,
            min: Min {
                layers: min.layers,
                results: min.results,
                blobs: min.blobs.len() as u64,
                bytes: min.bytes(),
            },
            unreadable: others.map(|others| others.unreadable),
            diff_ids: task.diff_ids,
            json: task.json,
            ..InspectDetails::default()
        };
        let mut users: HashMap<Digest, u64> =
            contents.blobs.iter().map(|(blob, _)| (*blob, 0)).collect();
        let mut shared_with = Vec::new();
        for (name, other) in others.iter().flat_map(|others| &others.caches) {
            let mut shared = Shared {
                name: name.clone(),
                blobs: 0,
                bytes: 0,
            };
            for (blob, size) in &other.blobs {
                if let Some(users) = users.get_mut(blob) {
                    *users += 1;
                    shared.blobs += 1;
                    shared.bytes += size;
                }
            }
            if shared.blobs > 0 {
                shared_with.push(shared);
            }
        }
        shared_with.sort_by(|a, b| (b.bytes, &a.name).cmp(&(a.bytes, &b.name)));
        let unique = contents.blobs.iter().filter(|(blob, _)| users[blob] == 0);
        details.unique_bytes = others.map(|_| unique.map(|(_, size)| size).sum());
        details.shared_with = others.map(|_| shared_with);
        for (blob, size) in &contents.blobs {
            match State::of(*size, found.get(blob).copied()) {
                State::Ok => {}
                State::Missing => details.missing.push(*blob),
                State::WrongSize => details.wrong_size.push(*blob),
            }
        }
        for layer in &cache.layers {
            let annotations = &layer.annotations;
            details.layers.push(InspectedLayer {
                blob: layer.blob,
                diff_id: annotations.diff_id,
                media_type: annotations.media_type.clone(),
                size: annotations.size,
                created: Some(annotations.created_at).filter(|time| !time.is_unknown()),
                parent: layer.parent,
                state: State::of(annotations.size, found.get(&layer.blob).copied()),
                shared_by: others.map(|_| users[&layer.blob]),
            });
        }
        Ok(details)
    }

    fn tree(&self) -> String {
        let parents: Vec<_> = self.layers.iter().map(|layer| layer.parent).collect();
        let mut columns = vec![
            Column::left("layer").cut(),
            Column::right("size"),
            Column::left("created").left_out(),
            Column::right("shared by").left_out(),
            Column::left("state"),
        ];
        if self.diff_ids {
            columns.push(Column::left("diffID").cut());
        }
        let mut table = Table::new(columns);
        for (at, before) in tree::rows(&parents) {
            let layer = &self.layers[at];
            let created = layer.created.map(|time| date(&time));
            let mut cells = vec![
                format!("{before}{}", layer.blob),
                progress::bytes(layer.size),
                created.unwrap_or_else(|| "-".to_owned()),
                layer.shared_by.map_or("-".to_owned(), |n| n.to_string()),
                layer.state.word().to_owned(),
            ];
            if self.diff_ids {
                cells.push(layer.diff_id.to_string());
            }
            table.row(cells);
        }
        table.text()
    }

    fn sharing(shared_with: &[Shared]) -> String {
        let blobs = |shared: &Shared| {
            let name = printable(&shared.name);
            format!("{} with '{name}'", sized(shared.blobs, shared.bytes))
        };
        let mut names: Vec<String> = shared_with.iter().take(NAMED).map(blobs).collect();
        if let more @ 1.. = shared_with.len().saturating_sub(NAMED) {
            names.push(format!("some with {}", count(more as u64, "more cache")));
        }
        names.join(", ")
    }
}

/// To the second, as people write times.
fn date(time: &Time) -> String {
    let text = time.to_string();
    let end = text.find('.').unwrap_or(text.len());
    text[..end].trim_end_matches('Z').replace('T', " ")
}

fn sized(blobs: u64, bytes: u64) -> String {
    format!("{} ({})", count(blobs, "blob"), progress::bytes(bytes))
}

impl Details for InspectDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let mut text = match self.layers.is_empty() {
            true => String::new(),
            false => self.tree() + "\n\n",
        };
        match &self.manifest {
            Some(manifest) => {
                let _ = write!(text, "{manifest} in {}", place.addresses());
            }
            None => {
                let (names, addresses) = (place.quoted_names(), place.addresses());
                let _ = write!(text, "{names} in {addresses}");
            }
        }
        if let Some(written) = self.written {
            let passed = SystemTime::now().duration_since(written.0.into());
            let _ = write!(text, ", written {} ago", age(passed.unwrap_or_default()));
        }
        let _ = write!(
            text,
            "; {cost}\n{}, {}, {}; {}{}",
            count(self.layers.len() as u64, "layer"),
            count(self.records, "record"),
            count(self.results, "result"),
            sized(self.blobs, self.bytes),
            if self.image {
                ", which also make an image"
            } else {
                ""
            }
        );
        let Min {
            layers,
            results,
            blobs,
            bytes,
        } = self.min;
        let _ = write!(
            text,
            "\nmode=min would keep {}, {}; {}",
            count(layers, "layer"),
            count(results, "result"),
            sized(blobs, bytes)
        );
        if let Some(shared_with @ [_, ..]) = self.shared_with.as_deref() {
            let _ = write!(
                text,
                "\nshares {}; {} in no other cache",
                Self::sharing(shared_with),
                progress::bytes(self.unique_bytes.unwrap_or_default())
            );
        }
        if let Some(unreadable @ 1..) = self.unreadable {
            let _ = write!(
                text,
                "\n{} could not be read, and may share more",
                count(unreadable, "other manifest")
            );
        }
        let layers: HashSet<Digest> = self.layers.iter().map(|layer| layer.blob).collect();
        for (blobs, what) in [(&self.missing, "missing"), (&self.wrong_size, "wrong size")] {
            if !blobs.is_empty() {
                let _ = write!(text, "\n{what}: {}", count(blobs.len() as u64, "blob"));
            }
            // The tree shows the others.
            for blob in blobs.iter().filter(|blob| !layers.contains(blob)) {
                let _ = write!(text, "\n  {blob} of the image");
            }
        }
        text
    }

    fn of_failure(self) -> Self {
        InspectDetails::default()
    }

    fn as_json(&self) -> bool {
        self.json
    }
}

/// Inspects a layout's cache.
async fn of_layout(task: &InspectTask, root: &Path, progress: &Progress) -> Result<InspectDetails> {
    progress.stage("reading the layout", 0, 0);
    let (task, root, progress) = (task.clone(), root.to_owned(), progress.clone());
    blocking(move || {
        let layout = Layout::open(&root, LOCK_WAIT).map_err(|error| match root.exists() {
            true => error,
            false => {
                anyhow!("{error:#}; a cache on S3 is named in its spec: --cache-from ...,name=...")
            }
        })?;
        let entry = layout.select(&task.selection)?;
        let cache = layout
            .read_cache(&entry, &progress)
            .with_context(|| format!("reading manifest {}", entry.digest))?;
        let mut found = BTreeMap::new();
        for digest in cache.blobs()?.into_keys() {
            let size = layout.blob_size(&digest)?;
            found.extend(size.map(|size| (digest, size)));
        }
        let mut others = Others::default();
        for (name, descriptor) in layout.entries()? {
            let Ok(other) = descriptor else {
                others.unreadable += 1;
                continue;
            };
            if other.digest == entry.digest {
                continue;
            }
            let read = layout.read_cache(&other, &progress);
            match read.and_then(|cache| Contents::of(&cache)) {
                Ok(contents) => {
                    let name = name.unwrap_or_else(|| other.digest.to_string());
                    others.caches.push((name, contents));
                }
                Err(_) => others.unreadable += 1,
            }
        }
        Ok(InspectDetails {
            manifest: Some(entry.digest),
            ..InspectDetails::new(&cache, &found, Some(&others), &task)?
        })
    })
    .await
}

struct Inspect<'a> {
    task: &'a InspectTask,
}

#[async_trait]
impl PerSpec for Inspect<'_> {
    type Spec = S3Config;
    type Details = InspectDetails;
    type Ready = ();

    fn s3<'a>(&self, source: &'a S3Config) -> &'a S3Config {
        source
    }

    fn blank(&self, source: &S3Config) -> Report<InspectDetails> {
        let place = Place::new("inspect", "inspecting", source, &source.names[..1]);
        Report::new(place, InspectDetails::default())
    }

    async fn prepare(&self, _: &Context<'_>) -> Result<()> {
        Ok(())
    }

    fn work<'a>(
        &'a self,
        (): &'a (),
        source: &'a S3Config,
        bucket: Bucket,
        _: &[Report<InspectDetails>],
        context: &'a Context<'_>,
    ) -> Box<dyn Work<InspectDetails> + 'a> {
        Box::new(Inspection {
            task: self.task,
            name: &source.names[0],
            bucket,
            progress: context.progress,
        })
    }
}

/// The inspection of one cache on S3.
struct Inspection<'a> {
    task: &'a InspectTask,
    name: &'a str,
    bucket: Bucket,
    progress: &'a Progress,
}

#[async_trait]
impl Work<InspectDetails> for Inspection<'_> {
    async fn run(&mut self, report: &mut Report<InspectDetails>) -> Result<()> {
        self.progress.stage("reading the manifest", 0, 0);
        let Some(cache) = self.bucket.manifest(self.name).await? else {
            bail!(
                "there is no cache named '{}'; layercache ls lists those that are there",
                printable(self.name)
            );
        };
        let blobs = cache.blobs()?;
        self.progress.stage("looking for blobs on S3", 0, 0);
        let found = self
            .bucket
            .survey(blobs.into_keys(), Certainty::Known)
            .await?;
        let found = found.into_iter().map(|(blob, info)| (blob, info.size));
        let (others, written) = self.others().await?;
        let found = found.collect();
        report.details = InspectDetails {
            written,
            ..InspectDetails::new(&cache, &found, others.as_ref(), self.task)?
        };
        Ok(())
    }

    async fn clean_up(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Inspection<'_> {
    /// The other caches, if they can be listed, and when this one was written.
    async fn others(&self) -> Result<(Option<Others>, Option<Time>)> {
        self.progress.stage("reading the other manifests", 0, 0);
        let caches = match self.bucket.caches().await {
            Ok(caches) => caches,
            Err(error) if is_denied(&error) => {
                self.progress
                    .warn(&format!("cannot tell what other caches share: {error:#}"));
                return Ok((None, None));
            }
            Err(error) => return Err(error),
        };
        let mut others = Others::default();
        let mut written = None;
        for cache in caches {
            if cache.named.name == self.name {
                written = cache.named.info.last_modified;
                continue;
            }
            match cache.contents {
                Ok(contents) => others.caches.push((cache.named.name, contents)),
                Err(_) => others.unreadable += 1,
            }
        }
        Ok((Some(others), written.map(|time| Time(time.into()))))
    }
}

fn is_denied(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<StoreError>();
    error.is_some_and(|error| error.kind == Kind::Denied)
}
