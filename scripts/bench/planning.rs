//! How long planning takes.

use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use layercache::cache::{CacheConfig, LayerAnnotations, Time};

use crate::synthetic;

/// Milliseconds from a layout's cache config to the manifest to send, for 10,000 layers and 50,000
/// records: the best of five, in the slower mode.
pub fn milliseconds() -> Result<f64> {
    let config = synthetic::cache_config(10_000, 50_000);
    let plan = |min: bool| -> Result<f64> {
        let begun = Instant::now();
        let mut cache = CacheConfig::parse_local(&config, |_, blob| {
            Ok(LayerAnnotations {
                media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
                diff_id: *blob,
                size: 1,
                created_at: Time(time::OffsetDateTime::UNIX_EPOCH),
            })
        })?;
        if min {
            cache = cache.min();
        }
        std::hint::black_box(cache.blobs()?);
        std::hint::black_box(cache.to_s3()?);
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    };
    let mut worst: f64 = 0.0;
    for min in [false, true] {
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            best = best.min(plan(min)?);
        }
        worst = worst.max(best);
    }
    Ok(worst)
}

/// Milliseconds that planning takes. Measured in a child, since it needs more memory than the runner
/// may have.
pub fn measured() -> Option<f64> {
    let output = Command::new(std::env::current_exe().ok()?)
        .arg("plan")
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then_some(())?;
    text.trim().parse().ok()
}
