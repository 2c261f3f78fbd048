//! The benchmark's S3 server, as a process of its own: the server of the tests, told not to verify
//! what it is sent, and a few commands of the runner on standard input. Each is a line of words; each
//! is answered with a line of JSON. When standard input ends, so does the server.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufRead as _, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::bucket;
use crate::s3::{Authority, Logged, Server, Stored, round_trips};
use crate::server::Network;

pub fn run(blobs: &Path, network: Network) -> Result<()> {
    let blobs = map_files(blobs)?;
    let authority = network.tls.then(Authority::new);
    let mut server = Server::builder()
        .unverified(blobs.clone())
        .delay(Duration::from_millis(network.delay_ms))
        .rate(network.rate_mib << 20);
    if let Some(authority) = &authority {
        server = server.tls(authority);
    }
    obey(&server.start(), &blobs, authority.as_ref())
}

/// A server over a bucket that has grown.
pub fn run_bucket(objects: usize, delay: Duration) -> Result<()> {
    let blobs = HashMap::new();
    let server = Server::builder()
        .unverified(blobs.clone())
        .delay(delay)
        .start();
    bucket::fill(&server, objects);
    obey(&server, &blobs, None)
}

/// Performs the runner's commands.
fn obey(
    server: &Server,
    blobs: &HashMap<String, Bytes>,
    authority: Option<&Authority>,
) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let bundle = authority.map(Authority::bundle);
    writeln!(
        out,
        "{}",
        json!({ "url": server.url(), "authority": bundle })
    )?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match words[..] {
            ["reset"] => {
                server.clear_log();
                json!({})
            }
            ["asked"] => asked(server),
            ["clear", bucket] => {
                server.empty(bucket);
                json!({})
            }
            ["objects", bucket] => {
                let mut objects = server.objects_in(bucket);
                objects.retain(|key, _| key.starts_with("blobs/"));
                let bytes: usize = objects.values().map(Bytes::len).sum();
                json!({"objects": objects.len(), "bytes": bytes})
            }
            ["fill", bucket, prefix, mtime] => {
                fill(server, blobs, bucket, prefix, mtime)?;
                json!({})
            }
            _ => bail!("unknown command {line:?}"),
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}

fn asked(server: &Server) -> Value {
    let log = server.log();
    let mut signing: BTreeMap<&str, usize> = BTreeMap::new();
    for logged in &log {
        if matches!(logged.operation, "PutObject" | "UploadPart") {
            *signing.entry(how_signed(logged)).or_default() += 1;
        }
    }
    json!({
        "requests": log.len(),
        "round_trips": round_trips(&log),
        "at_once": server.peak_in_flight(),
        "signing": signing,
    })
}

fn how_signed(logged: &Logged) -> &'static str {
    let hash = logged.headers.get("x-amz-content-sha256");
    match hash.and_then(|value| value.to_str().ok()) {
        None => "none",
        Some("UNSIGNED-PAYLOAD") => "unsigned",
        Some(value) if value.starts_with("STREAMING-UNSIGNED") => "chunks, unsigned",
        Some(value) if value.starts_with("STREAMING-") => "chunks, signed",
        Some(_) => "sha256",
    }
}

/// Puts every blob into `bucket` under `prefix`, as if uploaded at `mtime` (Unix seconds) by a client
/// that records modification times as rclone does.
fn fill(
    server: &Server,
    blobs: &HashMap<String, Bytes>,
    bucket: &str,
    prefix: &str,
    mtime: &str,
) -> Result<()> {
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(mtime.parse()?);
    for (number, (hex, body)) in blobs.iter().enumerate() {
        let object = Stored {
            modified,
            metadata: BTreeMap::from([("mtime".to_owned(), mtime.to_owned())]),
            // As in the server's own: of the form that is no MD5.
            ..Stored::with_etag(format!("{number:032x}-1"), body.clone())
        };
        server.insert(bucket, &format!("{prefix}{hex}"), object);
    }
    Ok(())
}

/// Maps each file of `dir` that is named by a digest's hex digits.
fn map_files(dir: &Path) -> Result<HashMap<String, Bytes>> {
    let mut files = HashMap::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.len() != 64 || entry.metadata()?.len() == 0 {
            continue;
        }
        let file = File::open(entry.path())?;
        // SAFETY: the runner never changes or cuts a layout's files while a server serves them.
        let map = unsafe { memmap2::MmapOptions::new().populate().map(&file) };
        files.insert(name, Bytes::from_owner(map.context("mapping a blob")?));
    }
    Ok(files)
}
