//! The layers of a cache as a tree.
//!
//! If a layer has a single child, the child is listed below it in the same column: most chains of
//! layers are long and do not branch. Lines are drawn only for branches.

/// How deeply nested branches are drawn; deeper ones share a column.
const DEEPEST: usize = 12;

/// The layers in the order in which they are shown, each with the lines of the tree before it.
/// `parents` has each layer's parent; no chain of parents has a cycle.
pub(super) fn rows(parents: &[Option<usize>]) -> Vec<(usize, String)> {
    let mut roots = Vec::new();
    let mut children = vec![Vec::new(); parents.len()];
    for (layer, parent) in parents.iter().enumerate() {
        match parent {
            Some(parent) => children[*parent].push(layer),
            None => roots.push(layer),
        }
    }
    let mut rows = Vec::with_capacity(parents.len());
    // Still to be shown, the next one last: the layer, its prefix, and the prefix of the layers on
    // top of it.
    let mut waiting: Vec<(usize, String, String)> = Vec::new();
    branch(&mut waiting, &roots, "");
    while let Some((layer, before, below)) = waiting.pop() {
        rows.push((layer, before));
        match &*children[layer] {
            [only] => waiting.push((*only, below.clone(), below)),
            branches => branch(&mut waiting, branches, &below),
        }
    }
    rows
}

fn branch(waiting: &mut Vec<(usize, String, String)>, layers: &[usize], below: &str) {
    let is_deep = below.chars().count() >= 3 * DEEPEST;
    for (at, layer) in layers.iter().enumerate().rev() {
        let (corner, line) = match at + 1 == layers.len() {
            _ if is_deep => ("", ""),
            true => ("└─ ", "   "),
            false => ("├─ ", "│  "),
        };
        waiting.push((*layer, format!("{below}{corner}"), format!("{below}{line}")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(parents: &[Option<usize>]) -> String {
        let lines = rows(parents);
        let lines = lines
            .iter()
            .map(|(layer, before)| format!("{before}{layer}"));
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn only_branches_are_drawn() {
        let parents = [
            None,
            Some(0),
            Some(1),
            Some(1),
            Some(2),
            None,
            Some(3),
            Some(3),
        ];
        assert_eq!(
            drawn(&parents),
            "├─ 0\n\
             │  1\n\
             │  ├─ 2\n\
             │  │  4\n\
             │  └─ 3\n\
             │     ├─ 6\n\
             │     └─ 7\n\
             └─ 5"
        );
        assert_eq!(drawn(&[]), "");
    }

    #[test]
    fn a_cache_of_any_shape_is_drawn_in_linear_space() {
        // Each layer has two on top of it, of which one goes on.
        let parents: Vec<_> = (0..100_000_usize)
            .map(|layer| layer.checked_sub(2 - layer % 2))
            .collect();
        let rows = rows(&parents);
        assert_eq!(rows.len(), parents.len());
        assert!(
            rows.iter()
                .all(|(_, before)| before.chars().count() <= 3 * DEEPEST)
        );
    }
}
