//! A local cache config of any size, for benchmarks of the parts without I/O.

use std::fmt::Write as _;

use layercache::cache::digest::Digest;

/// `layers` in branches of ten, each the result of one record. The other records have no result, like
/// most of a real cache's. Every record links to the one before it in its branch.
pub fn cache_config(layers: usize, records: usize) -> Vec<u8> {
    const BRANCH: usize = 10;
    let mut out = String::from("{\"layers\":[");
    for at in 0..layers {
        let blob = Digest::of(format!("layer {at}").as_bytes());
        let comma = if at == 0 { "" } else { "," };
        let _ = match at.checked_sub(1) {
            Some(0) => write!(out, "{comma}{{\"blob\":\"{blob}\"}}"),
            Some(parent) if !at.is_multiple_of(BRANCH) => {
                write!(out, "{comma}{{\"blob\":\"{blob}\",\"parent\":{parent}}}")
            }
            _ => write!(out, "{comma}{{\"blob\":\"{blob}\",\"parent\":-1}}"),
        };
    }
    out.push_str("],\"records\":[");
    let per_layer = (records / layers.max(1)).max(1);
    for at in 0..records {
        let comma = if at == 0 { "" } else { "," };
        let _ = write!(out, "{comma}{{");
        if at.is_multiple_of(per_layer) && at / per_layer < layers {
            let layer = at / per_layer;
            let _ = write!(
                out,
                "\"layers\":[{{\"layer\":{layer},\"createdAt\":\"2026-01-02T03:04:05.678901234Z\"}}],"
            );
        }
        let key = Digest::of(format!("record {at}").as_bytes());
        let _ = write!(out, "\"digest\":\"{key}\"");
        if !at.is_multiple_of(per_layer * BRANCH) {
            let _ = write!(
                out,
                ",\"inputs\":[[{{\"selector\":\"{key}\",\"link\":{}}}]]",
                at - 1
            );
        }
        out.push('}');
    }
    out.push_str("]}");
    out.into_bytes()
}
