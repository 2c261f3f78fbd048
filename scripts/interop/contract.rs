//! The contract: what layercache needs of a store, each point tried with the program itself, or
//! with the library where the program has no command or option for it yet.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use futures::TryStreamExt as _;
use layercache::transfer::limits::Limits;

use crate::peer::{A_SECOND, BUCKET, Peer, SENT_AGAIN, blobs_sent, layers};
use crate::recorder::Exchange;

/// Everything that clients and servers have been seen to encode differently.
const UNUSUAL_PREFIX: &str = "a b+c%25d/ü&=(x)!*'~@$:?#[]/";
const UNUSUAL: &str = "prefix=a b+c%25d/ü&=(x)!*'~@$:?#[]/,name=main:1 ü+%2F";

/// A promise, and how it is tried.
pub struct Point {
    pub name: &'static str,
    /// What there is to add to "ok"; empty if nothing.
    pub check: fn(&Peer) -> Result<&'static str>,
}

/// In the order in which they run: later ones use what earlier ones stored.
pub const POINTS: &[Point] = &[
    point("export", export),
    point("import", import),
    point("nothing sent twice", nothing_sent_twice),
    point("parts of 5.25 MiB", small_parts),
    point("parts of 64 MiB", large_parts),
    point("ranged reads", ranged_reads),
    point("refresh", refresh),
    point("refresh, multipart object", refresh_multipart),
    point("refresh in parts", refresh_in_parts),
    point("1,100 blobs", many_blobs),
    point("listing", listing),
    point("unfinished uploads", unfinished_uploads),
    point("delete", delete),
    point("delete in a batch", delete_batch),
    point("unusual keys", unusual_keys),
    point("refresh, unusual keys", refresh_unusual_keys),
    point("listing, unusual keys", list_unusual_keys),
    point("keys with //", double_slash),
    point("copy", copy),
    point("verify", verify),
    point("prune", prune),
    point("no cache yet", no_cache),
    point("no bucket", no_bucket),
    point("unknown key", unknown_key),
    point("wrong secret", wrong_secret),
];

const fn point(name: &'static str, check: fn(&Peer) -> Result<&'static str>) -> Point {
    Point { name, check }
}

fn export(peer: &Peer) -> Result<&'static str> {
    let layout = &peer.layouts.real;
    peer.export(layout, "prefix=real/")?;
    let store = peer.store("prefix=real/")?;
    for (digest, size) in layers(layout)? {
        let found = peer
            .runtime
            .block_on(store.head(&format!("real/blobs/{digest}")));
        let found = found?.with_context(|| format!("{digest} is not there"))?;
        ensure!(
            found.size == size,
            "{digest} has {} bytes, not {size}",
            found.size
        );
    }
    Ok("")
}

fn import(peer: &Peer) -> Result<&'static str> {
    peer.import_equals(&peer.layouts.real, "prefix=real/")
}

fn nothing_sent_twice(peer: &Peer) -> Result<&'static str> {
    peer.recorder.recent();
    peer.export(&peer.layouts.real, "prefix=real/")?;
    let sent = blobs_sent(&peer.recorder.recent());
    ensure!(sent == 0, "{sent} blobs were sent again");
    Ok("")
}

fn small_parts(peer: &Peer) -> Result<&'static str> {
    peer.recorder.recent();
    peer.export(&peer.layouts.big, "prefix=big/")?;
    parts_had(&peer.recorder.recent(), 5_505_024)?;
    peer.import_equals(&peer.layouts.big, "prefix=big/")
}

fn large_parts(peer: &Peer) -> Result<&'static str> {
    const PART: u64 = 64 << 20;
    let limits = Limits {
        part: PART,
        ..Limits::default()
    };
    peer.recorder.recent();
    peer.export_within(limits, &peer.layouts.huge, "prefix=huge/")?;
    parts_had(&peer.recorder.recent(), PART)?;
    peer.import_equals(&peer.layouts.huge, "prefix=huge/")
}

fn ranged_reads(peer: &Peer) -> Result<&'static str> {
    let store = peer.store("prefix=real/")?;
    let read = |range| async {
        let response = store.get("real/manifests/buildkit", range, None).await?;
        let body = response.context("it is not there")?.body;
        let chunks: Vec<bytes::Bytes> = body.try_collect().await?;
        anyhow::Ok(chunks.concat())
    };
    let whole = peer.runtime.block_on(read(None))?;
    let part = peer.runtime.block_on(read(Some(20..40)))?;
    ensure!(
        part == whole[20..40],
        "20 bytes were asked for, {} others came",
        part.len()
    );
    peer.recorder.recent();
    peer.import_equals(&peer.layouts.big, "prefix=big/")?;
    let exchanges = peer.recorder.recent();
    let ranges = exchanges.iter().filter(|exchange| {
        let response = &exchange.response;
        exchange.operation() == "get-object" && response.header("content-range").is_some()
    });
    ensure!(ranges.count() > 1, "the import did not read in ranges");
    Ok("")
}

fn refresh(peer: &Peer) -> Result<&'static str> {
    peer.refreshes(&peer.layouts.real, "real/", Limits::default())
}

fn refresh_multipart(peer: &Peer) -> Result<&'static str> {
    peer.refreshes(&peer.layouts.big, "big/", Limits::default())
}

fn refresh_in_parts(peer: &Peer) -> Result<&'static str> {
    let limits = Limits {
        copy: 16 << 20,
        copy_part: 16 << 20,
        ..Limits::default()
    };
    peer.refreshes(&peer.layouts.big, "big/", limits)
}

fn many_blobs(peer: &Peer) -> Result<&'static str> {
    let layout = &peer.layouts.many;
    peer.export(layout, "prefix=many/,upload_parallelism=16")?;
    peer.recorder.recent();
    peer.export(layout, "prefix=many/")?;
    let sent = blobs_sent(&peer.recorder.recent());
    ensure!(sent == 0, "{sent} blobs were sent again");
    peer.import_equals(layout, "prefix=many/")
}

fn listing(peer: &Peer) -> Result<&'static str> {
    let listed = peer.list("many/blobs/")?;
    let digests = layers(&peer.layouts.many)?.into_iter();
    let keys = digests.map(|(digest, _)| format!("many/blobs/{digest}"));
    let missing = keys.filter(|key| !listed.contains(key)).count();
    ensure!(
        missing == 0,
        "{missing} keys were not listed, of {}",
        listed.len()
    );
    ensure!(listed.is_sorted(), "keys were not listed in order");
    Ok("")
}

fn unfinished_uploads(peer: &Peer) -> Result<&'static str> {
    const KEY: &str = "unfinished/blobs/a:b";
    let store = peer.store("prefix=unfinished/")?;
    peer.runtime.block_on(async {
        let id = store.create_upload(KEY, None).await?;
        let part = Arc::new(Zeros(5 << 20));
        let etag = store.upload_part(KEY, &id, 1, part).await?;
        let parts = store.list_parts(KEY, &id).await?;
        let [part] = &parts[..] else {
            bail!("{} parts are listed, not 1", parts.len());
        };
        ensure!(
            (part.number, part.size) == (1, 5 << 20),
            "part {} of {} bytes is listed",
            part.number,
            part.size
        );
        let same = |etag: &str| etag.trim_matches('"').to_owned();
        ensure!(
            same(&part.etag) == same(&etag),
            "the part's ETag is {etag}, listed as {}",
            part.etag
        );
        let listed = store.list_uploads("unfinished/").await?;
        ensure!(
            listed
                .iter()
                .any(|upload| upload.id == id && upload.key == KEY),
            "the upload is not listed"
        );
        store.abort_upload(KEY, &id).await?;
        let listed = store.list_uploads("unfinished/").await?;
        ensure!(listed.is_empty(), "the aborted upload is still listed");
        Ok("")
    })
}

fn delete(peer: &Peer) -> Result<&'static str> {
    let layout = &peer.layouts.real;
    let (digest, _) = layers(layout)?.swap_remove(0);
    peer.deletes(&[format!("real/blobs/{digest}")])?;
    peer.recorder.recent();
    peer.export(layout, "prefix=real/")?;
    let sent = blobs_sent(&peer.recorder.recent());
    ensure!(
        sent == 1,
        "the next export sent {sent} blobs, not the one that was deleted"
    );
    Ok("")
}

fn delete_batch(peer: &Peer) -> Result<&'static str> {
    let digests = layers(&peer.layouts.many)?.into_iter().take(3);
    let keys: Vec<String> = digests
        .map(|(digest, _)| format!("many/blobs/{digest}"))
        .collect();
    peer.deletes(&keys)
}

fn unusual_keys(peer: &Peer) -> Result<&'static str> {
    peer.export(&peer.layouts.real, UNUSUAL)?;
    peer.import_equals(&peer.layouts.real, UNUSUAL)
}

fn refresh_unusual_keys(peer: &Peer) -> Result<&'static str> {
    std::thread::sleep(A_SECOND);
    peer.recorder.recent();
    peer.export(&peer.layouts.real, &format!("{UNUSUAL},touch_refresh=0s"))?;
    let sent = blobs_sent(&peer.recorder.recent());
    peer.import_equals(&peer.layouts.real, UNUSUAL)?;
    Ok(if sent > 0 { SENT_AGAIN } else { "" })
}

fn list_unusual_keys(peer: &Peer) -> Result<&'static str> {
    let listed = peer.list(UNUSUAL_PREFIX)?;
    for (digest, _) in layers(&peer.layouts.real)? {
        let key = format!("{UNUSUAL_PREFIX}blobs/{digest}");
        ensure!(
            listed.contains(&key),
            "{key} was not listed, but {listed:?}"
        );
    }
    Ok("")
}

fn double_slash(peer: &Peer) -> Result<&'static str> {
    peer.export(&peer.layouts.real, "prefix=a//b/")?;
    peer.import_equals(&peer.layouts.real, "prefix=a//b/")
}

fn copy(peer: &Peer) -> Result<&'static str> {
    let (from, to) = (
        peer.spec("prefix=big/"),
        peer.spec("prefix=copied/,mode=max"),
    );
    peer.succeeds(&["copy", "--cache-from", &from, "--cache-to", &to])?;
    peer.import_equals(&peer.layouts.big, "prefix=copied/")
}

fn verify(peer: &Peer) -> Result<&'static str> {
    let spec = peer.spec("prefix=copied/");
    peer.succeeds(&["verify", "--deep", "--cache-from", &spec])?;
    let store = peer.store("")?;
    let keys = peer.list("copied/blobs/")?;
    let key = keys.first().context("no blob was copied")?;
    for deleted in peer
        .runtime
        .block_on(store.delete(std::slice::from_ref(key)))?
    {
        deleted?;
    }
    let broken = peer.succeeds(&["verify", "--cache-from", &spec]);
    ensure!(broken.is_err(), "a cache without its blob is called whole");
    peer.succeeds(&["verify", "--repair", "--cache-from", &spec])?;
    peer.succeeds(&["verify", "--cache-from", &spec])?;
    Ok("")
}

/// Of two caches one is removed, and its blobs stay for the other. Then that one goes, with its blobs.
fn prune(peer: &Peer) -> Result<&'static str> {
    let place = "prefix=pruned/,touch_refresh=1s";
    for name in ["kept", "gone"] {
        peer.export(&peer.layouts.real, &format!("{place},name={name}"))?;
    }
    std::thread::sleep(A_SECOND * 3);
    let spec = peer.spec(place);
    let prune = ["prune", "--yes", "--grace", "1s", "--cache-to", &spec];
    peer.succeeds(&[&prune[..], &["--name", "gone"]].concat())?;
    let manifests = peer.list("pruned/manifests/")?;
    ensure!(
        manifests == ["pruned/manifests/kept"],
        "{manifests:?} are left"
    );
    peer.import_equals(&peer.layouts.real, &format!("{place},name=kept"))?;
    peer.succeeds(&[&prune[..], &["--name", "kept", "--allow-empty"]].concat())?;
    let left = peer.list("pruned/")?;
    ensure!(left.is_empty(), "{left:?} are left");
    Ok("")
}

fn no_cache(peer: &Peer) -> Result<&'static str> {
    let layout = peer.fresh()?;
    let output = peer.output("import", "prefix=real/,name=absent", &layout)?;
    ensure!(
        output.succeeded,
        "the import failed: {}",
        output.last_line()
    );
    ensure!(
        !layout.join("index.json").exists(),
        "something was imported"
    );
    Ok("")
}

fn no_bucket(peer: &Peer) -> Result<&'static str> {
    let spec = peer.spec("").replace(BUCKET, "absent");
    peer.fail(&spec, &["bucket"])
}

fn unknown_key(peer: &Peer) -> Result<&'static str> {
    let spec = peer.spec("prefix=denied/").replace(
        &format!("access_key_id={}", peer.key),
        "access_key_id=AKIAUNKNOWNEXAMPLE",
    );
    peer.fail(&spec, &["key"])
}

fn wrong_secret(peer: &Peer) -> Result<&'static str> {
    let spec = peer.spec("prefix=denied/").replace(
        &format!("secret_access_key={}", peer.secret),
        "secret_access_key=wrong",
    );
    peer.fail(&spec, &["secret", "keys"])
}

/// That an object was sent in several parts of `size`, the last of which may be smaller.
fn parts_had(exchanges: &[Exchange], size: u64) -> Result<()> {
    let mut sizes: Vec<u64> = exchanges
        .iter()
        .filter(|exchange| exchange.operation() == "upload-part")
        .filter_map(|exchange| exchange.request.header("content-length")?.parse().ok())
        .collect();
    sizes.sort();
    ensure!(
        sizes.len() > 1 && sizes[1..].iter().all(|part| *part == size),
        "parts of {sizes:?} bytes were sent"
    );
    Ok(())
}

/// A body of so many zero bytes.
struct Zeros(u64);

impl layercache::store::UploadBody for Zeros {
    fn len(&self) -> u64 {
        self.0
    }

    fn is_empty(&self) -> bool {
        self.0 == 0
    }

    fn sha256(&self) -> Option<layercache::cache::digest::Digest> {
        None
    }

    fn open(&self) -> layercache::store::ByteStream {
        let chunk = bytes::Bytes::from(vec![0; self.0 as usize]);
        Box::pin(futures::stream::iter([Ok(chunk)]))
    }
}
