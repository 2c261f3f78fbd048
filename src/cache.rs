//! BuildKit's cache graph as it writes it: layers, records, and what is left of them in `mode=min`
//! or when blobs are gone. Pure: no I/O.

pub mod diff_id;
pub mod digest;
mod graph;
pub mod oci;
#[cfg(test)]
mod tests;
mod time;
mod wire;

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};

use anyhow::{Context, Result};

pub use self::time::{InvalidTime, Time};
use self::wire::Form;
use crate::cache::digest::Digest;

/// A cache manifest (on S3) or cache config (in a layout). Every index in it is within range, no
/// chain of parents and no chain of links runs in a circle: `parse` sees to that.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheConfig {
    pub layers: Vec<Layer>,
    pub records: Vec<Record>,
    /// On S3 only, ours: what it takes to give an image layout back. BuildKit ignores it.
    pub image: Option<Image>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub blob: Digest,
    /// Index into `layers`; `None` is written -1, and an absent one is read as 0.
    pub parent: Option<usize>,
    /// Written on S3, always; in a layout the descriptors hold it.
    pub annotations: Option<LayerAnnotations>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerAnnotations {
    /// Normalised to OCI.
    pub media_type: String,
    pub diff_id: Digest,
    /// Bytes.
    pub size: u64,
    pub created_at: Time,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub results: Vec<LayerResult>,
    pub chains: Vec<ChainResult>,
    /// A cache key. BuildKit writes sha256 digests, but nothing here depends on that.
    pub digest: String,
    pub inputs: Vec<Vec<Input>>,
}

/// A layer with all its ancestors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerResult {
    pub layer: usize,
    pub created_at: Time,
}

/// Just these layers, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainResult {
    pub layers: Vec<usize>,
    pub created_at: Time,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Input {
    pub selector: String,
    /// Index into `records`.
    pub link: usize,
}

/// An image layout that an S3 manifest also describes (the field `layercache`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The entry of `index.json`.
    pub root: crate::cache::oci::Descriptor,
    /// Every blob of it: the root, manifests, configs, layers. In order of digest, none twice.
    pub contents: Vec<Content>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

/// What `without_blobs` took away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dropped {
    pub results: usize,
    pub layers: usize,
}

impl CacheConfig {
    /// Reads S3's form (`annotations` required on every layer).
    pub fn parse_s3(bytes: &[u8]) -> Result<Self> {
        wire::parse(bytes, Form::S3).context("reading the cache manifest")
    }

    /// Reads a layout's config blob (no annotations).
    pub fn parse_local(bytes: &[u8]) -> Result<Self> {
        wire::parse(bytes, Form::Local).context("reading the cache config")
    }

    /// S3's form, byte for byte as Go writes it. Fails if a layer has no annotations.
    pub fn to_s3(&self) -> Result<Vec<u8>> {
        wire::write(self, Form::S3).context("writing the cache manifest")
    }

    /// The layout's form: the same without annotations and `image`.
    pub fn to_local(&self) -> Vec<u8> {
        wire::write(self, Form::Local).expect("the layout's form holds nothing that can fail")
    }

    /// The inline cache of an image (`moby.buildkit.cache.v0`, decoded): `records` over the image's
    /// own layers, given from the bottom up with their annotations. Layers come out sorted.
    pub fn from_inline(records: &[u8], layers: &[(Digest, LayerAnnotations)]) -> Result<Self> {
        let layers = layers
            .iter()
            .enumerate()
            .map(|(at, (blob, annotations))| Layer {
                blob: *blob,
                parent: at.checked_sub(1),
                annotations: Some(annotations.clone()),
            });
        let config = wire::parse_records(records, layers.collect())
            .context("reading the image's inline cache")?;
        Ok(config.sorted())
    }

    /// Several caches as one (the platforms of an image): equal layers and equal records once, in
    /// BuildKit's order. What is equal but for its time keeps that of the first. `image` is dropped
    /// unless there is one part only.
    pub fn merged(parts: Vec<CacheConfig>) -> Self {
        if let [_] = parts.as_slice() {
            return parts.into_iter().next().unwrap_or_default();
        }
        let mut whole = CacheConfig::default();
        let mut layers = HashMap::new();
        let mut records = HashMap::new();
        for part in parts {
            let layer_map = whole.take_layers(part.layers, &mut layers);
            whole.take_records(part.records, &layer_map, &mut records);
        }
        whole.sort_records();
        whole.sorted()
    }

    /// Adds layers that are not there yet (by blob and parent); says where each one is now.
    fn take_layers(
        &mut self,
        layers: Vec<Layer>,
        known: &mut HashMap<(Digest, Option<usize>), usize>,
    ) -> Vec<usize> {
        let mut map = vec![None; layers.len()];
        let mut path = Vec::new();
        for start in 0..layers.len() {
            // Up to an ancestor that is placed, then down again, placing.
            let mut next = Some(start);
            while let Some(at) = next.filter(|&at| map.get(at) == Some(&None)) {
                path.push(at);
                next = layers.get(at).and_then(|layer| layer.parent);
            }
            let mut parent = next.and_then(|at| map.get(at).copied().flatten());
            while let Some(at) = path.pop() {
                let (Some(layer), Some(place)) = (layers.get(at), map.get_mut(at)) else {
                    continue;
                };
                let index = *known.entry((layer.blob, parent)).or_insert_with(|| {
                    self.layers.push(Layer {
                        parent,
                        ..layer.clone()
                    });
                    self.layers.len() - 1
                });
                *place = Some(index);
                parent = Some(index);
            }
        }
        map.into_iter().map(Option::unwrap_or_default).collect()
    }

    /// Adds records that are not there yet (by digest and inputs), and to those that are the
    /// results that they lack.
    fn take_records(
        &mut self,
        records: Vec<Record>,
        layer_map: &[usize],
        known: &mut HashMap<(String, Vec<Vec<Input>>), usize>,
    ) {
        let order = graph::inputs_first(&records).unwrap_or_default();
        let mut places: Vec<Option<usize>> = vec![None; records.len()];
        let mut records: Vec<Option<Record>> = records.into_iter().map(Some).collect();
        for at in order {
            let Some(mut record) = records.get_mut(at).and_then(Option::take) else {
                continue;
            };
            for alternatives in &mut record.inputs {
                alternatives.retain_mut(|input| {
                    let place = places.get(input.link).copied().flatten();
                    input.link = place.unwrap_or_default();
                    place.is_some()
                });
                alternatives.sort_by(|a, b| (a.link, &a.selector).cmp(&(b.link, &b.selector)));
            }
            let moved = |layer: usize| layer_map.get(layer).copied();
            record.results.retain_mut(|result| {
                let place = moved(result.layer);
                result.layer = place.unwrap_or_default();
                place.is_some()
            });
            for chain in &mut record.chains {
                chain.layers = chain.layers.iter().copied().filter_map(moved).collect();
            }
            let place = match known.entry((record.digest.clone(), record.inputs.clone())) {
                Entry::Vacant(entry) => {
                    self.records.push(record);
                    *entry.insert(self.records.len() - 1)
                }
                Entry::Occupied(entry) => {
                    if let Some(there) = self.records.get_mut(*entry.get()) {
                        there.add_results(record);
                    }
                    *entry.get()
                }
            };
            if let Some(slot) = places.get_mut(at) {
                *slot = Some(place);
            }
        }
    }

    /// Puts records in BuildKit's order: by digest, then by inputs.
    fn sort_records(&mut self) {
        let mut order: Vec<usize> = (0..self.records.len()).collect();
        let digest = |link: usize| self.records.get(link).map(|r| r.digest.as_str());
        order.sort_by_cached_key(|&at| {
            let record = self.records.get(at);
            let inputs = record
                .map(|record| record.inputs.as_slice())
                .unwrap_or_default();
            let slots: Vec<_> = inputs
                .iter()
                .map(|alternatives| {
                    let inputs = alternatives.iter();
                    let mut keys: Vec<_> = inputs
                        .map(|input| (input.selector.as_str(), digest(input.link)))
                        .collect();
                    // Their order among themselves came from indexes that are about to change.
                    keys.sort_unstable();
                    (alternatives.len(), keys)
                })
                .collect();
            (digest(at), inputs.len(), slots)
        });
        let map = inverse(&order);
        self.records = reordered(std::mem::take(&mut self.records), &order);
        for alternatives in self.records.iter_mut().flat_map(|r| &mut r.inputs) {
            for input in alternatives.iter_mut() {
                input.link = map.get(input.link).copied().unwrap_or_default();
            }
            alternatives.sort_by(|a, b| (a.link, &a.selector).cmp(&(b.link, &b.selector)));
        }
    }

    /// With layers in BuildKit's order, (blob, parent).
    pub fn sorted(mut self) -> Self {
        let mut order: Vec<usize> = (0..self.layers.len()).collect();
        // The parents of this moment count: so it is in BuildKit, where they change only afterwards.
        order.sort_by_key(|&at| self.layers.get(at).map(|layer| (layer.blob, layer.parent)));
        let map = inverse(&order);
        self.layers = reordered(self.layers, &order);
        self.renumber_layers(|layer| map.get(layer).copied());
        self
    }

    /// `mode=min`, by the rule of docs/format.md.
    pub fn min(&self) -> Self {
        let mut is_linked = vec![false; self.records.len()];
        for input in self.records.iter().flat_map(|r| &r.inputs).flatten() {
            if let Some(linked) = is_linked.get_mut(input.link) {
                *linked = true;
            }
        }
        let mut exported = vec![false; self.layers.len()];
        let roots = self.records.iter().zip(&is_linked);
        for record in roots.filter_map(|(record, linked)| (!linked).then_some(record)) {
            for result in &record.results {
                graph::mark_with_ancestors(&self.layers, result.layer, &mut exported);
            }
        }
        let mut blobs: HashSet<Digest> = HashSet::new();
        for (layer, exported) in self.layers.iter().zip(&exported) {
            if *exported {
                blobs.insert(layer.blob);
            }
        }
        let roots = self.records.iter().zip(&is_linked);
        for record in roots.filter_map(|(record, linked)| (!linked).then_some(record)) {
            let chained = record.chains.iter().flat_map(|chain| &chain.layers);
            blobs.extend(chained.filter_map(|&at| Some(self.layers.get(at)?.blob)));
        }

        let mut min = self.clone();
        min.retain_results(|layer| blobs.contains(&layer.blob));
        let needed = min.needed_layers();
        min.retain_layers(&needed);
        min
    }

    /// What stays valid when `missing` blobs are gone: results that need one are dropped, layers
    /// no result needs any more too; every record and link stays. `image` goes as a whole if one of
    /// its contents is missing.
    pub fn without_blobs(&self, missing: &BTreeSet<Digest>) -> (Self, Dropped) {
        let mut left = self.clone();
        if let Some(image) = &self.image
            && image.contents.iter().any(|c| missing.contains(&c.digest))
        {
            left.image = None;
        }
        let present = |layer: &Layer| !missing.contains(&layer.blob);
        if self.layers.iter().all(present) {
            return (left, Dropped::default());
        }

        let needed_before = self.needed_layers();
        let results = left.retain_results(present);
        // Layers that no result ever needed say nothing about results: they stay while they can,
        // with their ancestors.
        let mut unused = vec![false; self.layers.len()];
        let whole = graph::whole(&self.layers, present);
        for (at, (whole, needed)) in whole.iter().zip(&needed_before).enumerate() {
            if *whole && !needed {
                graph::mark_with_ancestors(&self.layers, at, &mut unused);
            }
        }
        let mut keep = left.needed_layers();
        for (keep, unused) in keep.iter_mut().zip(unused) {
            *keep |= unused;
        }
        let layers = left.retain_layers(&keep);
        (left, Dropped { results, layers })
    }

    /// Drops the results that need a layer which is not `present`; says how many.
    fn retain_results(&mut self, present: impl Fn(&Layer) -> bool) -> usize {
        let layers = &self.layers;
        let whole = graph::whole(layers, &present);
        let mut dropped = 0;
        for record in &mut self.records {
            let before = record.results.len() + record.chains.len();
            let is_whole = |layer: usize| whole.get(layer) == Some(&true);
            record.results.retain(|result| is_whole(result.layer));
            let is_present = |&layer: &usize| layers.get(layer).is_some_and(&present);
            record
                .chains
                .retain(|chain| chain.layers.iter().all(is_present));
            dropped += before - record.results.len() - record.chains.len();
        }
        dropped
    }

    fn needed_layers(&self) -> Vec<bool> {
        let mut needed = vec![false; self.layers.len()];
        for result in self.records.iter().flat_map(|record| &record.results) {
            graph::mark_with_ancestors(&self.layers, result.layer, &mut needed);
        }
        let chains = self.records.iter().flat_map(|record| &record.chains);
        for &layer in chains.flat_map(|chain| &chain.layers) {
            if let Some(needed) = needed.get_mut(layer) {
                *needed = true;
            }
        }
        needed
    }

    /// Drops layers and renumbers the rest; says how many it dropped. A layer that only chains need
    /// can lose its parent: it then has none.
    fn retain_layers(&mut self, keep: &[bool]) -> usize {
        let mut map = Vec::with_capacity(keep.len());
        let mut kept = 0;
        for &keep in keep {
            map.push(keep.then_some(kept));
            kept += usize::from(keep);
        }
        let before = self.layers.len();
        let mut keep = keep.iter();
        self.layers.retain(|_| keep.next() == Some(&true));
        self.renumber_layers(|layer| map.get(layer).copied().flatten());
        before - self.layers.len()
    }

    /// `place` gives a layer's new index. Results must be of layers that have one.
    fn renumber_layers(&mut self, place: impl Fn(usize) -> Option<usize>) {
        for layer in &mut self.layers {
            layer.parent = layer.parent.and_then(&place);
        }
        for record in &mut self.records {
            for result in &mut record.results {
                result.layer = place(result.layer).unwrap_or(result.layer);
            }
            for layer in record.chains.iter_mut().flat_map(|chain| &mut chain.layers) {
                *layer = place(*layer).unwrap_or(*layer);
            }
        }
    }
}

impl Record {
    fn add_results(&mut self, other: Record) {
        let results: HashSet<usize> = self.results.iter().map(|result| result.layer).collect();
        let is_new = |result: &LayerResult| !results.contains(&result.layer);
        self.results
            .extend(other.results.into_iter().filter(is_new));
        let chains: HashSet<Vec<usize>> = self.chains.iter().map(|c| c.layers.clone()).collect();
        let is_new = |chain: &ChainResult| !chains.contains(&chain.layers);
        self.chains.extend(other.chains.into_iter().filter(is_new));
    }
}

/// Where each index has gone in `order`.
fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    for (new, &old) in order.iter().enumerate() {
        if let Some(place) = inverse.get_mut(old) {
            *place = new;
        }
    }
    inverse
}

/// `items` in the order of their indexes in `order`, which holds each once.
fn reordered<T>(items: Vec<T>, order: &[usize]) -> Vec<T> {
    let mut items: Vec<Option<T>> = items.into_iter().map(Some).collect();
    let take = |&at: &usize| items.get_mut(at).and_then(Option::take);
    order.iter().filter_map(take).collect()
}
