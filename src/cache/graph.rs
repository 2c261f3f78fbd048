//! Walks over the two graphs of a cache: layers with their parents, records with their links. All
//! are iterative and linear: a hostile cache can be as deep as it is long.

use super::{Layer, Record};

fn parent(layers: &[Layer], layer: usize) -> Option<usize> {
    layers.get(layer)?.parent
}

/// A layer whose ancestors include itself.
pub(super) fn circular_parent(layers: &[Layer]) -> Option<usize> {
    // The walk that came by, from 1: a walk that meets itself has found a circle.
    let mut seen_by = vec![0; layers.len()];
    for start in 0..layers.len() {
        let walk = start + 1;
        let mut next = Some(start);
        while let Some(layer) = next {
            match seen_by.get_mut(layer) {
                Some(seen) if *seen == 0 => *seen = walk,
                Some(seen) if *seen == walk => return Some(layer),
                _ => break,
            }
            next = parent(layers, layer);
        }
    }
    None
}

/// For each layer, whether it and all its ancestors are `present`.
pub(super) fn whole(layers: &[Layer], present: impl Fn(&Layer) -> bool) -> Vec<bool> {
    let mut whole = vec![None; layers.len()];
    let mut path = Vec::new();
    for start in 0..layers.len() {
        let mut next = Some(start);
        let above = loop {
            let Some(at) = next else { break true };
            let (Some(layer), Some(state)) = (layers.get(at), whole.get_mut(at)) else {
                break false;
            };
            if let Some(known) = *state {
                break known;
            }
            let here = present(layer);
            *state = Some(false);
            if !here {
                break false;
            }
            path.push(at);
            next = layer.parent;
        };
        for at in path.drain(..) {
            if let Some(state) = whole.get_mut(at) {
                *state = Some(above);
            }
        }
    }
    whole.into_iter().map(|state| state == Some(true)).collect()
}

/// Marks `layer` and its ancestors, up to the first that is marked already: linear over all calls.
pub(super) fn mark_with_ancestors(layers: &[Layer], layer: usize, marks: &mut [bool]) {
    let mut next = Some(layer);
    while let Some(at) = next {
        match marks.get_mut(at) {
            Some(mark) if !*mark => *mark = true,
            _ => break,
        }
        next = parent(layers, at);
    }
}

/// The records in an order in which each comes after all that it links to; or, as the error, a
/// record whose links lead back to itself.
pub(super) fn inputs_first(records: &[Record]) -> Result<Vec<usize>, usize> {
    let links = |record: usize| {
        let inputs = records.get(record).map(|record| record.inputs.as_slice());
        inputs.unwrap_or_default().iter().flatten().map(|i| i.link)
    };
    let mut linked_from = vec![0usize; records.len()];
    for link in (0..records.len()).flat_map(links) {
        if let Some(count) = linked_from.get_mut(link) {
            *count += 1;
        }
    }
    // Takes away, again and again, what nothing links to; circles stay.
    let is_root = |&record: &usize| linked_from.get(record) == Some(&0);
    let mut order: Vec<usize> = (0..records.len()).filter(is_root).collect();
    let mut done = 0;
    while let Some(&record) = order.get(done) {
        done += 1;
        for link in links(record) {
            if let Some(count) = linked_from.get_mut(link) {
                *count -= 1;
                if *count == 0 {
                    order.push(link);
                }
            }
        }
    }
    if order.len() == records.len() {
        order.reverse();
        return Ok(order);
    }

    // What is left is circles and all that they link to. Each of it is linked from within it, so
    // that going back along links for long enough ends up in a circle.
    let left = |record: usize| linked_from.get(record).is_some_and(|&count| count > 0);
    let mut back = vec![0; records.len()];
    let mut at = 0;
    for record in (0..records.len()).filter(|&record| left(record)) {
        for link in links(record) {
            if let Some(from) = back.get_mut(link) {
                *from = record;
            }
        }
        at = record;
    }
    for _ in 0..records.len() {
        at = back.get(at).copied().unwrap_or_default();
    }
    Err(at)
}
