//! Several caches as one, in the order in which BuildKit writes layers and records.

use std::collections::{HashMap, HashSet};

use super::{CacheConfig, ChainResult, Input, Layer, LayerResult, Record, graph};
use crate::cache::digest::Digest;

/// The new index of each layer, by blob and parent.
type Layers = HashMap<(Digest, Option<usize>), usize>;
/// The new index of each record, by digest and inputs.
type Records = HashMap<(String, Vec<Vec<Input>>), usize>;

impl CacheConfig {
    /// Merges the caches of an image's platforms: equal layers and equal records once, in BuildKit's
    /// order. Where only the times differ, the first part's stay. `image` is dropped unless there is
    /// only one part.
    pub fn merged(mut parts: Vec<CacheConfig>) -> Self {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        let mut whole = CacheConfig::default();
        let (mut layers, mut records) = (Layers::new(), Records::new());
        for part in parts {
            let places = whole.take_layers(&part.layers, &mut layers);
            whole.take_records(part.records, &places, &mut records);
        }
        whole.sort_records();
        whole.sorted()
    }

    /// Adds new layers; returns the index of each.
    fn take_layers(&mut self, layers: &[Layer], known: &mut Layers) -> Vec<usize> {
        let mut places = vec![None; layers.len()];
        let mut path = Vec::new();
        for start in 0..layers.len() {
            // Up to an ancestor that has its index, then down again.
            let mut next = Some(start);
            while let Some(at) = next.filter(|&at| places[at].is_none()) {
                path.push(at);
                next = layers[at].parent;
            }
            let mut parent = next.and_then(|at| places[at]);
            while let Some(at) = path.pop() {
                let place = *known.entry((layers[at].blob, parent)).or_insert_with(|| {
                    self.layers.push(Layer {
                        parent,
                        ..layers[at].clone()
                    });
                    self.layers.len() - 1
                });
                places[at] = Some(place);
                parent = Some(place);
            }
        }
        let placed = places.into_iter().map(|place| place.expect("each has one"));
        placed.collect()
    }

    /// Adds new records, and missing results to existing ones.
    fn take_records(&mut self, mut records: Vec<Record>, layers: &[usize], known: &mut Records) {
        let order = graph::inputs_first(&records).expect("parsing refuses circles of links");
        let mut places = vec![None; records.len()];
        for at in order {
            let mut record = std::mem::take(&mut records[at]);
            for alternatives in &mut record.inputs {
                for input in alternatives.iter_mut() {
                    input.link = places[input.link].expect("inputs come first");
                }
                alternatives.sort_by(|a, b| (a.link, &a.selector).cmp(&(b.link, &b.selector)));
            }
            record.renumber_layers(|layer| layers[layer]);
            let key = (record.digest.clone(), record.inputs.clone());
            let place = *known.entry(key).or_insert(self.records.len());
            match self.records.get_mut(place) {
                Some(there) => there.add_results(record),
                None => self.records.push(record),
            }
            places[at] = Some(place);
        }
    }

    /// Puts records in BuildKit's order: by digest, then by inputs.
    fn sort_records(&mut self) {
        let mut order: Vec<usize> = (0..self.records.len()).collect();
        let digest = |at: usize| self.records[at].digest.as_str();
        order.sort_by_cached_key(|&at| {
            let inputs = &self.records[at].inputs;
            let slots: Vec<_> = inputs
                .iter()
                .map(|alternatives| {
                    let inputs = alternatives.iter();
                    let mut keys: Vec<_> = inputs
                        .map(|input| (input.selector.as_str(), digest(input.link)))
                        .collect();
                    // Their current order comes from indexes that are about to change.
                    keys.sort_unstable();
                    (alternatives.len(), keys)
                })
                .collect();
            (digest(at), inputs.len(), slots)
        });
        let places = inverse(&order);
        self.records = reordered(std::mem::take(&mut self.records), &order);
        for alternatives in self.records.iter_mut().flat_map(|r| &mut r.inputs) {
            for input in alternatives.iter_mut() {
                input.link = places[input.link];
            }
            alternatives.sort_by(|a, b| (a.link, &a.selector).cmp(&(b.link, &b.selector)));
        }
    }

    /// Puts layers in BuildKit's order: by blob, then by parent.
    pub fn sorted(mut self) -> Self {
        let mut order: Vec<usize> = (0..self.layers.len()).collect();
        // By the parents' current indexes: BuildKit also renumbers them only afterwards.
        order.sort_by_key(|&at| (self.layers[at].blob, self.layers[at].parent));
        let places = inverse(&order);
        self.layers = reordered(self.layers, &order);
        for layer in &mut self.layers {
            layer.parent = layer.parent.map(|parent| places[parent]);
        }
        for record in &mut self.records {
            record.renumber_layers(|layer| places[layer]);
        }
        self
    }
}

impl Record {
    /// Replaces each layer's index by its `place`.
    pub(super) fn renumber_layers(&mut self, place: impl Fn(usize) -> usize) {
        for result in &mut self.results {
            result.layer = place(result.layer);
        }
        for layer in self.chains.iter_mut().flat_map(|chain| &mut chain.layers) {
            *layer = place(*layer);
        }
    }

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

/// The position of each index in `order`.
fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    for (new, &old) in order.iter().enumerate() {
        inverse[old] = new;
    }
    inverse
}

/// `items` in the order of their indexes in `order`, which holds each once.
fn reordered<T>(items: Vec<T>, order: &[usize]) -> Vec<T> {
    let mut items: Vec<Option<T>> = items.into_iter().map(Some).collect();
    let take = |&at: &usize| items[at].take().expect("each index is there once");
    order.iter().map(take).collect()
}
