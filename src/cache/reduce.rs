//! What remains of a cache in `mode=min`, or without some of its blobs.

use std::collections::{BTreeSet, HashSet};

use super::{CacheConfig, Layer, Record, graph};
use crate::cache::digest::Digest;

/// What `without_blobs` dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dropped {
    pub results: usize,
    pub layers: usize,
}

impl CacheConfig {
    /// `mode=min`, by the rule of docs/format.md.
    pub fn min(&self) -> Self {
        let mut is_linked = vec![false; self.records.len()];
        for input in self.records.iter().flat_map(|r| &r.inputs).flatten() {
            is_linked[input.link] = true;
        }
        let mut exported = vec![false; self.layers.len()];
        let mut blobs: HashSet<Digest> = HashSet::new();
        for (record, _) in self
            .records
            .iter()
            .zip(&is_linked)
            .filter(|(_, linked)| !**linked)
        {
            for result in &record.results {
                graph::mark_with_ancestors(&self.layers, result.layer, &mut exported);
            }
            let chained = record.chains.iter().flat_map(|chain| &chain.layers);
            blobs.extend(chained.map(|&at| self.layers[at].blob));
        }
        let exported = self.layers.iter().zip(&exported).filter(|(_, e)| **e);
        blobs.extend(exported.map(|(layer, _)| layer.blob));

        let mut min = self.clone();
        min.retain_results(|layer| blobs.contains(&layer.blob));
        let needed = min.needed_layers();
        min.retain_layers(&needed);
        min
    }

    /// What remains valid without the `missing` blobs: drops the results that need one, and the
    /// layers that no result needs any more. All records and links stay. `image` is dropped if any
    /// of its contents is missing.
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
        // Layers that no result ever needed stay if they and their ancestors are present.
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

    /// What remains without records that lead to no result, and layers that no result needs. Merging
    /// several caches can leave such ends.
    pub fn without_dangling(&self) -> Self {
        let mut keep = vec![false; self.records.len()];
        let has_result = |record: &Record| !record.results.is_empty() || !record.chains.is_empty();
        let mut next: Vec<usize> = (0..self.records.len())
            .filter(|&at| has_result(&self.records[at]))
            .collect();
        while let Some(at) = next.pop() {
            if !std::mem::replace(&mut keep[at], true) {
                let inputs = self.records[at].inputs.iter().flatten();
                next.extend(inputs.map(|input| input.link));
            }
        }
        let mut left = self.clone();
        left.retain_records(&keep);
        let needed = left.needed_layers();
        left.retain_layers(&needed);
        left
    }

    /// Drops the records not to `keep`, which none of the others may link to, and renumbers the others.
    fn retain_records(&mut self, keep: &[bool]) {
        let mut places = Vec::with_capacity(keep.len());
        let mut kept = 0;
        for &keep in keep {
            places.push(keep.then_some(kept));
            kept += usize::from(keep);
        }
        let mut keep = keep.iter();
        self.records.retain(|_| keep.next() == Some(&true));
        let inputs = self.records.iter_mut().flat_map(|r| &mut r.inputs);
        for input in inputs.flatten() {
            input.link = places[input.link].expect("what a kept record links to is kept");
        }
    }

    /// Drops the results that need a layer which is not `present`; returns how many.
    fn retain_results(&mut self, present: impl Fn(&Layer) -> bool) -> usize {
        let layers = &self.layers;
        let whole = graph::whole(layers, &present);
        let mut dropped = 0;
        for record in &mut self.records {
            let before = record.results.len() + record.chains.len();
            record.results.retain(|result| whole[result.layer]);
            let is_present = |&layer: &usize| present(&layers[layer]);
            record
                .chains
                .retain(|chain| chain.layers.iter().all(is_present));
            dropped += before - record.results.len() - record.chains.len();
        }
        dropped
    }

    /// For each layer, whether a result needs it.
    fn needed_layers(&self) -> Vec<bool> {
        let mut needed = vec![false; self.layers.len()];
        for result in self.records.iter().flat_map(|record| &record.results) {
            graph::mark_with_ancestors(&self.layers, result.layer, &mut needed);
        }
        let chains = self.records.iter().flat_map(|record| &record.chains);
        for &layer in chains.flat_map(|chain| &chain.layers) {
            needed[layer] = true;
        }
        needed
    }

    /// Drops the layers not to `keep`, which no result may need, and renumbers the others; returns
    /// how many it dropped. A layer that only chains need can lose its parent: it then has none.
    pub(super) fn retain_layers(&mut self, keep: &[bool]) -> usize {
        let mut places = Vec::with_capacity(keep.len());
        let mut kept = 0;
        for &keep in keep {
            places.push(keep.then_some(kept));
            kept += usize::from(keep);
        }
        let before = self.layers.len();
        let mut keep = keep.iter();
        self.layers.retain(|_| keep.next() == Some(&true));
        for layer in &mut self.layers {
            layer.parent = layer.parent.and_then(|parent| places[parent]);
        }
        for record in &mut self.records {
            record.renumber_layers(|layer| places[layer].expect("a result's layers are kept"));
        }
        before - self.layers.len()
    }
}
