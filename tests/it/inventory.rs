//! What a bucket contains, however large it is and wherever in it the prefixes are.

use std::collections::BTreeMap;

use futures::TryStreamExt;
use layercache::bucket::{Bucket, Certainty, Inventory, Tally};
use layercache::cache::digest::Digest;
use layercache::cli::spec;
use layercache::progress::Progress;
use layercache::s3;

use crate::aftermath::{noise, put_cache};
use crate::program::s3_manifest;
use crate::server::{Fault, Server};

async fn bucket(server: &Server, extra: &str) -> Bucket {
    let config = spec::cache_from(&server.spec(extra), &|_| None)
        .expect("a good spec")
        .config;
    let progress = Progress::silent();
    let store = s3::connect(&config, progress.clone())
        .await
        .expect("nothing is sent yet");
    Bucket::new(store, &config, &progress)
}

/// Puts `many` blobs that no manifest names below `prefix`.
fn put_garbage(server: &Server, prefix: &str, many: usize) {
    for n in 0..many {
        let digest = Digest::of(&n.to_le_bytes());
        server.put(&format!("{prefix}{digest}"), vec![0; 10]);
    }
}

fn names(inventory: &Inventory) -> Vec<&str> {
    let names = inventory.caches.iter().map(|cache| &*cache.named.name);
    names.collect()
}

#[tokio::test]
async fn every_object_is_counted_once_in_one_page_or_in_many() {
    // Every page size makes other pages begin and end within the blobs.
    for page_size in [1000, 50, 7, 1] {
        let server = Server::builder().page_size(page_size).start();
        put_cache(&server, "main", &[100, 200]);
        put_cache(&server, "feature/a;b/c", &[100, 200, 300]);
        server.put("manifests/broken", "{]");
        server.put("manifests/folder/", "");
        put_garbage(&server, "blobs/", 60);
        for other in [
            "a",
            "blobs/sha256",
            "blobs/sha256:",
            "blobs/sha256:0",
            "blobs/sha256:9~",
            "blobs/sha256:9~~",
            "blobs/sha256::",
            "blobs/sha256:A",
            "blobs/sha256:f~",
            "blobs/sha256:g",
            "z",
        ] {
            server.put(other, "123");
        }
        let gone = Digest::of(&noise(3, 300));
        server.remove(&format!("blobs/{gone}"));

        let inventory = bucket(&server, "").await.inventory().await.expect("read");
        assert_eq!(names(&inventory), ["broken", "feature/a;b/c", "main"]);
        let contents = |n: usize| inventory.caches[n].contents.as_ref();
        assert_eq!(
            contents(0).unwrap_err().reason,
            "manifests/broken is damaged: it is not JSON (key must be a string at line 1 column 2) \
             (3 tries)"
        );
        assert_eq!(contents(1).unwrap().blobs.len(), 3);
        assert_eq!(contents(2).unwrap().bytes(), 300);
        let sizes: BTreeMap<Digest, Option<u64>> = inventory
            .blobs
            .iter()
            .map(|(digest, info)| (*digest, info.as_ref().map(|info| info.size)))
            .collect();
        let expected = [(1, 100), (2, 200)].map(|(seed, size)| {
            let digest = Digest::of(&noise(seed, size));
            (digest, Some(size as u64))
        });
        let expected: BTreeMap<_, _> = expected.into_iter().chain([(gone, None)]).collect();
        assert_eq!(sizes, expected, "{page_size} a page");
        let (objects, bytes) = (60, 600);
        assert_eq!(inventory.unreferenced, Tally { objects, bytes });
        let (objects, bytes) = (12, 33);
        assert_eq!(inventory.other, Tally { objects, bytes });
    }
}

#[tokio::test]
async fn blobs_and_manifests_may_share_a_prefix_or_be_within_each_others() {
    for (spec, blobs, manifests) in [
        ("prefix=c/,blobs_prefix=,manifests_prefix=", "c/", "c/"),
        (
            "prefix=c/,blobs_prefix=x/,manifests_prefix=x/",
            "c/x/",
            "c/x/",
        ),
        ("prefix=c/,blobs_prefix=,manifests_prefix=m/", "c/", "c/m/"),
        ("prefix=c/,blobs_prefix=b/,manifests_prefix=", "c/b/", "c/"),
    ] {
        for page_size in [1000, 7] {
            let server = Server::builder().page_size(page_size).start();
            put_garbage(&server, blobs, 40);
            server.put("cache/elsewhere", "not below the prefix");
            // The last one sorts among the blobs where they share a prefix.
            let expected = ["buildkit", "deep/er", "sha256:f-is-a-name"];
            for name in expected {
                let manifest = s3_manifest("max.json");
                server.put(&format!("{manifests}{name}"), manifest);
            }
            let bucket = bucket(&server, spec).await;
            let inventory = bucket.inventory().await.expect("read");
            assert_eq!(names(&inventory), expected, "{spec}, {page_size} a page");
            let (objects, bytes) = (40, 400);
            assert_eq!(inventory.unreferenced, Tally { objects, bytes });
            assert_eq!(inventory.other, Tally::default(), "{spec}");
            assert_eq!(inventory.blobs.len(), 10);
            assert!(inventory.blobs.values().all(Option::is_none));
        }
    }
}

#[tokio::test]
async fn a_store_that_ignores_where_a_listing_is_to_begin_is_listed_without_a_gap() {
    let server = Server::builder().page_size(5).ignore_start_after().start();
    put_garbage(&server, "blobs/", 30);
    for n in 0..12 {
        server.put(&format!("blobs/a{n}"), "1");
        server.put(&format!("manifests/{n:02}"), s3_manifest("min.json"));
    }
    let inventory = bucket(&server, "").await.inventory().await.expect("read");
    assert_eq!(inventory.unreferenced.objects, 30);
    assert_eq!(inventory.other.objects, 12);
    assert_eq!(inventory.caches.len(), 12);
}

#[tokio::test]
async fn blobs_are_listed_side_by_side_where_there_are_many() {
    let server = Server::builder().page_size(20).start();
    put_garbage(&server, "blobs/", 2_000);
    put_cache(&server, "main", &[100]);
    let bucket = bucket(&server, "").await;
    server.fail_all(
        "ListObjectsV2",
        Fault::Delay(std::time::Duration::from_millis(50)),
    );
    let inventory = bucket.inventory().await.expect("read");
    assert_eq!(inventory.unreferenced.objects, 2_000);
    assert!(server.peak_in_flight() >= 16);

    // And so they are for an export that has many blobs to look for; each page costs as a dozen HEADs.
    server.clear_log();
    let digests: Vec<Digest> = (0..2_000_u64)
        .map(|n| Digest::of(&n.to_le_bytes()))
        .collect();
    let found = bucket.survey(digests.clone(), Certainty::Known).await;
    assert_eq!(found.expect("read").len(), 2_000);
    assert_eq!(server.count("HeadObject"), 0);
    assert!(server.peak_in_flight() >= 16);

    // For a few, HEADs remain the better way.
    server.clear_log();
    let few = digests[..40].to_vec();
    let found = bucket.survey(few, Certainty::Known).await;
    assert_eq!(found.expect("read").len(), 40);
    assert_eq!(server.count("ListObjectsV2"), 1);
}

#[tokio::test]
async fn a_survey_finds_every_blob_on_a_store_that_lists_in_another_order() {
    for page_size in [1000, 30, 2] {
        let server = Server::builder()
            .page_size(page_size)
            .lists_in_reverse()
            .start();
        put_garbage(&server, "blobs/", 100);
        let bucket = bucket(&server, "").await;
        let digests = (0..120_u64).map(|n| Digest::of(&n.to_le_bytes()));
        let found = bucket.survey(digests, Certainty::Known).await;
        assert_eq!(found.expect("read").len(), 100, "pages of {page_size}");
    }
}

#[tokio::test]
async fn names_come_without_a_listing_of_the_blobs() {
    let server = Server::builder().page_size(10).start();
    put_garbage(&server, "blobs/", 500);
    for n in 0..25 {
        server.put(&format!("manifests/{n:02}"), "not read");
    }
    let bucket = bucket(&server, "").await;
    let names: Vec<String> = bucket
        .names()
        .map_ok(|named| named.name)
        .try_collect()
        .await
        .expect("read");
    assert_eq!(
        names,
        (0..25).map(|n| format!("{n:02}")).collect::<Vec<_>>()
    );
    assert_eq!(server.log().len(), 3);
}

#[tokio::test]
async fn an_inventory_fails_if_a_page_does() {
    let server = Server::builder().page_size(7).start();
    put_garbage(&server, "blobs/", 100);
    put_cache(&server, "main", &[100]);
    let bucket = bucket(&server, "retry_max_attempts=1").await;
    server.fail(|asked| {
        let fails = asked.operation == "ListObjectsV2" && asked.query.contains("sha256%3Ab");
        fails.then_some(Fault::Status(503, "SlowDown"))
    });
    let error = bucket.inventory().await.expect_err("a page is missing");
    assert!(format!("{error:#}").contains("503 SlowDown"), "{error:#}");
}
