//! A bucket that has grown: what it takes to look at it and to clean it up. The server holds a million
//! small blobs of which caches need a tenth; the rest is garbage, ten days old.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::child;
use crate::layouts;
use crate::s3::{BUCKET, Server, Stored};
use crate::server;
use crate::table::mebibytes;

pub const NAME: &str = "a bucket of 1,000,000 objects, 20 ms a request";
pub const OBJECTS: usize = 1_000_000;
pub const DELAY_MS: u64 = 20;
const NAMED: usize = 100_000;
const CACHES: usize = 100;
/// Blobs of the cache that is exported to it.
const MANY: usize = 3_000;

/// Peak memory that pruning may take, in bytes.
const MEMORY: u64 = 192 << 20;

const AGE: Duration = Duration::from_secs(10 * 24 * 60 * 60);

/// Fills the bucket of the server that this process is.
pub fn fill(server: &Server, objects: usize) {
    let modified = SystemTime::now() - AGE;
    let stored = |number: usize, body: Bytes| Stored {
        modified,
        metadata: BTreeMap::new(),
        ..Stored::with_etag(format!("{number:032x}"), body)
    };
    let digest = |number: usize| format!("sha256:{:x}", Sha256::digest(number.to_le_bytes()));
    for number in 0..objects {
        let key = format!("blobs/{}", digest(number));
        server.insert(BUCKET, &key, stored(number, Bytes::from_static(b"x")));
    }
    let each = NAMED.min(objects) / CACHES;
    let created = "2026-11-21T20:37:36.959076185Z";
    for cache in 0..CACHES {
        let blobs = || (cache * each..(cache + 1) * each).map(digest);
        let layers = blobs().map(|digest| {
            json!({"blob": digest, "parent": -1, "annotations": {"diffID": digest, "size": 1,
                "mediaType": "application/vnd.oci.image.layer.v1.tar", "createdAt": created}})
        });
        let records = blobs().enumerate().map(|(layer, digest)| {
            json!({"digest": digest, "layers": [{"layer": layer, "createdAt": created}]})
        });
        let manifest = json!({"layers": layers.collect::<Vec<_>>(),
            "records": records.collect::<Vec<_>>()});
        let body = manifest.to_string().into();
        server.insert(BUCKET, &format!("manifests/c{cache}"), stored(cache, body));
    }
}

/// Runs each command once, and prints what it took. Layouts and logs go below `scratch`.
pub fn measure(layercache: &Path, server: &server::Server, scratch: &Path) -> Result<()> {
    println!("\n{NAME}, of which {CACHES} caches need {NAMED}");
    let spec = format!(
        "type=s3,region=us-east-1,bucket={BUCKET},endpoint_url={},use_path_style=true,\
         access_key_id=a,secret_access_key=b",
        server.url()
    );
    let layout = scratch.join("many");
    layouts::write(&layout, MANY, 1 << 10, 1_750_000_000)?;
    let layout = layout.to_str().context("a path in UTF-8")?;
    let export: &[&str] = &["export", layout];
    let runs = [
        ("export, cold", export, "--cache-to"),
        ("export, warm", export, "--cache-to"),
        ("ls", &["ls"], "--cache-from"),
        ("prune --dry-run", &["prune", "--dry-run"], "--cache-to"),
        ("prune", &["prune", "--yes"], "--cache-to"),
        ("prune, again", &["prune", "--yes"], "--cache-to"),
    ];
    for (name, words, flag) in runs {
        server.reset()?;
        let mut command = Command::new(layercache);
        command
            .args(words)
            .args([flag, &spec])
            .args(["--progress", "quiet"]);
        let cost = child::run(command, &scratch.join("log"))?;
        let asked = server.asked()?;
        println!(
            "  {name:<16} {:6.2} s  {:6.2} s CPU  {:>9}  {:>6} requests, {} at once",
            cost.wall,
            cost.cpu,
            mebibytes(cost.peak_memory),
            asked.requests,
            asked.at_once
        );
        ensure!(
            cost.peak_memory <= MEMORY,
            "{name} took {}, more than {}",
            mebibytes(cost.peak_memory),
            mebibytes(MEMORY)
        );
    }
    let (left, _) = server.objects(BUCKET)?;
    ensure!(
        left == NAMED + MANY,
        "{left} blobs are left of {} that caches need",
        NAMED + MANY
    );
    Ok(())
}
