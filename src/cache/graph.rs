//! Walks over the two graphs of a cache: layers with their parents, records with their links. All
//! are iterative and linear: a hostile cache can be as deep as it is long.

use super::{Layer, Record};

/// A layer whose ancestors include itself. Every index in `parents` is within range.
pub(super) fn circular_parent(parents: &[Option<usize>]) -> Option<usize> {
    // The walk that visited each layer, from 1: a walk that meets itself has found a circle.
    let mut seen_by = vec![0; parents.len()];
    for start in 0..parents.len() {
        let walk = start + 1;
        let mut next = Some(start);
        while let Some(layer) = next {
            match seen_by[layer] {
                0 => seen_by[layer] = walk,
                seen if seen == walk => return Some(layer),
                _ => break,
            }
            next = parents[layer];
        }
    }
    None
}

/// For each layer, whether it and all its ancestors are `present`.
pub(super) fn whole(layers: &[Layer], present: impl Fn(&Layer) -> bool) -> Vec<bool> {
    let mut whole: Vec<Option<bool>> = vec![None; layers.len()];
    let mut path = Vec::new();
    for start in 0..layers.len() {
        let mut next = Some(start);
        let above = loop {
            let Some(at) = next else { break true };
            if let Some(known) = whole[at] {
                break known;
            }
            path.push(at);
            if !present(&layers[at]) {
                break false;
            }
            next = layers[at].parent;
        };
        for at in path.drain(..) {
            whole[at] = Some(above);
        }
    }
    whole.into_iter().map(|state| state == Some(true)).collect()
}

/// Marks `layer` and its ancestors, up to the first that is already marked: linear over all calls.
pub(super) fn mark_with_ancestors(layers: &[Layer], layer: usize, marks: &mut [bool]) {
    let mut next = Some(layer);
    while let Some(at) = next.filter(|&at| !marks[at]) {
        marks[at] = true;
        next = layers[at].parent;
    }
}

/// The records in an order in which each comes after all that it links to; or, as the error, a
/// record whose links lead back to itself.
pub(super) fn inputs_first(records: &[Record]) -> Result<Vec<usize>, usize> {
    let links = |record: usize| records[record].inputs.iter().flatten().map(|i| i.link);
    let mut linked_from = vec![0usize; records.len()];
    for link in (0..records.len()).flat_map(links) {
        linked_from[link] += 1;
    }
    // Repeatedly removes what nothing links to; circles remain.
    let mut order: Vec<usize> = (0..records.len())
        .filter(|&record| linked_from[record] == 0)
        .collect();
    let mut done = 0;
    while let Some(&record) = order.get(done) {
        done += 1;
        for link in links(record) {
            linked_from[link] -= 1;
            if linked_from[link] == 0 {
                order.push(link);
            }
        }
    }
    if order.len() == records.len() {
        order.reverse();
        return Ok(order);
    }

    // What remains is circles and everything they link to. Each record is linked from another one that
    // remains, so following links backwards leads into a circle.
    let mut back = vec![0; records.len()];
    let mut at = 0;
    for record in (0..records.len()).filter(|&record| linked_from[record] > 0) {
        for link in links(record) {
            back[link] = record;
        }
        at = record;
    }
    for _ in 0..records.len() {
        at = back[at];
    }
    Err(at)
}
