use std::collections::BTreeSet;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::cache::oci::Descriptor;

fn fixture(path: &str) -> Vec<u8> {
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::fs::read(fixtures.join(path)).unwrap()
}

fn s3(name: &str) -> Vec<u8> {
    fixture(&format!("s3-manifests/{name}.json"))
}

fn blob(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn annotations(name: &str) -> LayerAnnotations {
    LayerAnnotations {
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
        diff_id: blob(&format!("{name}, decompressed")),
        size: 7,
        created_at: Time::UNKNOWN,
    }
}

fn layer(name: &str, parent: Option<usize>) -> Layer {
    Layer {
        blob: blob(name),
        parent,
        annotations: annotations(name),
    }
}

/// A record with `layers` results, `chains` results and one slot of links.
fn record(digest: &str, results: &[usize], chains: &[&[usize]], links: &[usize]) -> Record {
    let created_at = Time::UNKNOWN;
    let input = |&link: &usize| Input {
        selector: String::new(),
        link,
    };
    Record {
        results: results
            .iter()
            .map(|&layer| LayerResult { layer, created_at })
            .collect(),
        chains: chains
            .iter()
            .map(|layers| ChainResult {
                layers: layers.to_vec(),
                created_at,
            })
            .collect(),
        digest: digest.to_owned(),
        inputs: if links.is_empty() {
            Vec::new()
        } else {
            vec![links.iter().map(input).collect()]
        },
    }
}

fn config(layers: Vec<Layer>, records: Vec<Record>) -> CacheConfig {
    CacheConfig {
        layers,
        records,
        image: None,
    }
}

/// Reads a layout's form, with annotations that do not matter.
fn local(bytes: &[u8]) -> Result<CacheConfig> {
    CacheConfig::parse_local(bytes, |_, _| Ok(annotations("any")))
}

fn error_of(json: &str) -> String {
    format!("{:#}", CacheConfig::parse_s3(json.as_bytes()).unwrap_err())
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

#[test]
fn buildkits_manifests_are_written_as_they_were_read() {
    for name in ["max", "min", "multiarch"] {
        let bytes = s3(name);
        let config = CacheConfig::parse_s3(&bytes).unwrap();
        assert_eq!(text(config.to_s3().unwrap()), text(bytes), "{name}");
    }
}

#[test]
fn a_layouts_config_is_written_as_it_was_read() {
    let path = "local-max/blobs/sha256/\
                5ac4cf1fdb3b6d244262ee6821bdd9f89fe756fc8e32d352e37f7855a4bfb28c";
    let bytes = fixture(path);
    let config = local(&bytes).unwrap();
    assert_eq!(text(config.to_local()), text(bytes.clone()));
    let from_s3 = CacheConfig::parse_s3(&s3("max")).unwrap();
    assert_eq!(text(from_s3.to_local()), text(bytes));
}

#[test]
fn the_max_cache_reduces_to_the_min_cache_that_buildkit_wrote() {
    let max = CacheConfig::parse_s3(&s3("max")).unwrap();
    assert_eq!(text(max.min().to_s3().unwrap()), text(s3("min")));
}

#[test]
fn an_absent_parent_is_layer_0_and_minus_1_is_none() {
    let json = format!(
        r#"{{"layers":[{{"blob":"{a}","parent":-1}},{{"blob":"{b}"}},{{"blob":"{c}","parent":null}}]}}"#,
        a = blob("a"),
        b = blob("b"),
        c = blob("c"),
    );
    let config = local(json.as_bytes()).unwrap();
    let parents: Vec<_> = config.layers.iter().map(|layer| layer.parent).collect();
    assert_eq!(parents, [None, Some(0), Some(0)]);
    assert_eq!(
        text(config.to_local()),
        json.replace(r#","parent":null"#, "")
    );
}

#[test]
fn what_is_empty_is_left_out() {
    assert_eq!(text(CacheConfig::default().to_s3().unwrap()), "{}");
    let mut odd = layer("a", None);
    odd.annotations = LayerAnnotations {
        media_type: String::new(),
        size: 0,
        ..annotations("a")
    };
    let mut linking = record("", &[], &[&[]], &[0]);
    linking.inputs.push(Vec::new());
    let config = config(vec![odd], vec![record("r", &[], &[], &[]), linking]);
    let expected = format!(
        r#"{{"layers":[{{"blob":"{}","parent":-1,"annotations":{{"diffID":"{}","createdAt":"0001-01-01T00:00:00Z"}}}}],"records":[{{"digest":"r"}},{{"chains":[{{"layers":[],"createdAt":"0001-01-01T00:00:00Z"}}],"inputs":[[{{"link":0}}],[]]}}]}}"#,
        blob("a"),
        blob("a, decompressed"),
    );
    assert_eq!(text(config.to_s3().unwrap()), expected);
    assert_eq!(CacheConfig::parse_s3(expected.as_bytes()).unwrap(), config);
}

#[test]
fn nulls_and_unknown_fields_are_what_go_makes_of_them() {
    let json = format!(
        r#"{{"new":[{{}}],"layers":[{{"blob":"{}","parent":-1,"annotations":{{"diffID":"{}","size":null,"createdAt":null,"x":1}}}}],"records":[{{"layers":null,"chains":null,"digest":null,"inputs":[null]}},{{"chains":[{{"layers":null}}],"inputs":null}}],"layercache":null}}"#,
        blob("a"),
        blob("d"),
    );
    let config = CacheConfig::parse_s3(json.as_bytes()).unwrap();
    assert_eq!(config.layers[0].annotations.size, 0);
    let mut first = record("", &[], &[], &[]);
    first.inputs.push(Vec::new());
    assert_eq!(config.records, [first, record("", &[], &[&[]], &[])]);
    assert_eq!(config.image, None);
    assert_eq!(
        CacheConfig::parse_s3(br#"{"layers":null,"records":null}"#).unwrap(),
        CacheConfig::default()
    );
}

#[test]
fn escapes_are_those_of_go() {
    let config = config(vec![], vec![record("<a>&\u{2028}\\\"é", &[], &[], &[])]);
    assert_eq!(
        text(config.to_local()),
        r#"{"records":[{"digest":"\u003ca\u003e\u0026\u2028\\\"é"}]}"#
    );
    assert_eq!(local(&config.to_local()).unwrap(), config);
}

#[test]
fn dockers_media_types_are_read_as_ocis() {
    for (docker, oci) in [
        ("docker.image.rootfs.diff.tar", "oci.image.layer.v1.tar"),
        (
            "docker.image.rootfs.diff.tar.gzip",
            "oci.image.layer.v1.tar+gzip",
        ),
        (
            "docker.image.rootfs.diff.tar.zstd",
            "oci.image.layer.v1.tar+zstd",
        ),
        (
            "docker.image.rootfs.foreign.diff.tar.gzip",
            "oci.image.layer.nondistributable.v1.tar+gzip",
        ),
    ] {
        let json = text(s3("multiarch")).replace("oci.image.layer.v1.tar+gzip", docker);
        let config = CacheConfig::parse_s3(json.as_bytes()).unwrap();
        let annotations = &config.layers[0].annotations;
        assert_eq!(annotations.media_type, format!("application/vnd.{oci}"));
    }
}

#[test]
fn each_defect_is_named_with_its_place() {
    let (a, b) = (blob("a"), blob("b"));
    let fine = format!(r#""annotations":{{"diffID":"{b}"}}"#);
    for (json, expected) in [
        (
            format!(r#"{{"layers":[{{"blob":"{a}","parent":-1}}]}}"#),
            "it has no annotations",
        ),
        (
            format!(r#"{{"layers":[{{"blob":"{a}","parent":-1,"annotations":{{}}}}]}}"#),
            "it has no diffID",
        ),
        (
            format!(r#"{{"layers":[{{"blob":"{a}","parent":-1,"annotations":{{"diffID":"{b}","size":-5}}}}]}}"#),
            "its size is negative (-5)",
        ),
        (
            format!(r#"{{"layers":[{{"blob":"{a}","parent":-1,"annotations":{{"diffID":"{b}","size":9223372036854775808}}}}]}}"#),
            "9223372036854775808",
        ),
        (
            format!(r#"{{"layers":[{{"blob":"sha256:../x","parent":-1,{fine}}}]}}"#),
            "layer 0: its blob: \"sha256:../x\" is not a digest",
        ),
        (
            format!(r#"{{"layers":[{{"blob":"{a}","parent":1,{fine}}}]}}"#),
            "layer 0: its parent is layer 1: 1 is out of range (there are 1)",
        ),
        (
            format!(r#"{{"layers":[{{"blob":"{a}","parent":-2,{fine}}}]}}"#),
            "layer 0: its parent is layer -2: -2 is out of range",
        ),
        (
            format!(r#"{{"layers":[{{"blob":"{a}",{fine}}}]}}"#),
            "layer 0: its parents run in a circle",
        ),
        (
            r#"{"records":[{"layers":[{"layer":0}]}]}"#.to_owned(),
            "record 0: a result is of layer 0, but there are 0 layers",
        ),
        (
            r#"{"records":[{},{"chains":[{"layers":[-1]}]}]}"#.to_owned(),
            "record 1: a result is of layer -1, which is not there",
        ),
        (
            r#"{"records":[{},{"inputs":[[],[{"link":2}]]}]}"#.to_owned(),
            "record 1: input 1 links to record 2: 2 is out of range (there are 2)",
        ),
        (
            r#"{"records":[{"inputs":[[{"link":1}]]},{"inputs":[[{"link":2}]]},{"inputs":[[{"link":1},{"link":3}]]},{}]}"#.to_owned(),
            "its links run in a circle",
        ),
        (
            r#"{"records":[{"layers":[{"createdAt":"yesterday"}]}]}"#.to_owned(),
            "\"yesterday\" is not a time",
        ),
        (r#"{"records":{}}"#.to_owned(), "reading the cache manifest"),
        ("{} {}".to_owned(), "trailing characters"),
        (String::new(), "EOF"),
    ] {
        let error = error_of(&json);
        assert!(error.contains(expected), "{json}\ngave: {error}");
    }
}

#[test]
fn the_record_named_is_in_the_circle() {
    // 0 links into the circle of 1 and 2, which link out to 3.
    let json = r#"{"records":[{"inputs":[[{"link":1}]]},{"inputs":[[{"link":2}]]},{"inputs":[[{"link":1},{"link":3}]]},{}]}"#;
    let error = error_of(json);
    assert!(
        error.contains("record 1: ") || error.contains("record 2: "),
        "{error}"
    );
}

#[test]
fn depth_is_no_danger() {
    let count = 50_000;
    let layers = (0..count).map(|at: usize| layer("same", at.checked_sub(1)));
    let records = (0..count).map(|at: usize| {
        let links: Vec<usize> = at.checked_sub(1).into_iter().collect();
        record("same", &[at], &[], &links)
    });
    let deep = config(layers.collect(), records.collect());
    let read = CacheConfig::parse_s3(&deep.to_s3().unwrap()).unwrap();
    assert_eq!(read, deep);
    assert_eq!(read.min(), deep);
    let gone = BTreeSet::from([blob("same")]);
    let (left, dropped) = read.without_blobs(&gone);
    assert_eq!((left.layers.len(), left.records.len()), (0, count));
    assert_eq!(
        dropped,
        Dropped {
            results: count,
            layers: count
        }
    );
    assert_eq!(
        CacheConfig::merged(vec![deep.clone(), deep.clone()])
            .layers
            .len(),
        count
    );

    let nested = format!("{{\"x\":{}", "[".repeat(1_000_000));
    assert!(CacheConfig::parse_s3(nested.as_bytes()).is_err());
}

#[test]
fn a_document_that_could_not_be_read_again_is_not_written() {
    let mut document = vec![b'x'; usize::try_from(DOCUMENT_LIMIT).unwrap()];
    check_written("manifest", &document).unwrap();
    document.push(b'x');
    let error = check_written("manifest", &document).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("67108865 bytes, more than the 67108864"),
        "{error}"
    );
}

#[test]
fn annotations_of_a_layout_are_asked_for_only_when_the_rest_is_valid() {
    let (a, b) = (blob("a"), blob("b"));
    let json = |parent: i64, layer: usize| {
        format!(
            r#"{{"layers":[{{"blob":"{a}","parent":-1}},{{"blob":"{b}","parent":{parent}}}],"records":[{{"layers":[{{"layer":{layer}}}]}}]}}"#
        )
    };
    let parse = |json: &str| {
        let mut asked = Vec::new();
        let parsed = CacheConfig::parse_local(json.as_bytes(), |at, blob| {
            asked.push((at, *blob));
            Ok(annotations("any"))
        });
        (parsed.is_ok(), asked)
    };
    assert_eq!(parse(&json(0, 1)), (true, vec![(0, a), (1, b)]));
    assert_eq!(parse(&json(1, 1)), (false, vec![]));
    assert_eq!(parse(&json(0, 2)), (false, vec![]));
}

#[test]
#[should_panic(expected = "a result's layers are kept")]
fn a_broken_invariant_panics_before_another_record_is_published() {
    let mut cache = config(vec![layer("a", None)], vec![record("r", &[0], &[], &[])]);
    cache.retain_layers(&[false]);
}

fn image() -> Image {
    let root = Descriptor::new(crate::cache::oci::IMAGE_MANIFEST, blob("root"), 3);
    let mut contents = vec![
        Content {
            digest: blob("root"),
            size: 3,
        },
        Content {
            digest: blob("layer"),
            size: 9,
        },
    ];
    contents.sort_by_key(|content| content.digest);
    Image { root, contents }
}

#[test]
fn the_image_is_the_last_field_and_reads_back() {
    let mut config = config(vec![], vec![record("r", &[], &[], &[])]);
    config.image = Some(image());
    let (root, other) = (blob("root"), blob("layer"));
    let mut contents = [
        format!(r#"{{"digest":"{root}","size":3}}"#),
        format!(r#"{{"digest":"{other}","size":9}}"#),
    ];
    contents.sort();
    let expected = format!(
        r#"{{"records":[{{"digest":"r"}}],"layercache":{{"version":1,"root":{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{root}","size":3}},"contents":[{}]}}}}"#,
        contents.join(",")
    );
    let bytes = config.to_s3().unwrap();
    assert_eq!(text(bytes.clone()), expected);
    assert_eq!(CacheConfig::parse_s3(&bytes).unwrap(), config);
    assert_eq!(text(config.to_local()), r#"{"records":[{"digest":"r"}]}"#);
}

#[test]
fn an_image_that_cannot_be_given_back_is_an_error() {
    let digest = blob("root");
    let root = format!(r#""root":{{"mediaType":"m","digest":"{digest}","size":3}}"#);
    let entry = format!(r#"{{"digest":"{digest}","size":3}}"#);
    for (image, expected) in [
        (
            r#"{"version":2,"whatever":[]}"#.to_owned(),
            "made by a newer layercache",
        ),
        (r#"{"version":0}"#.to_owned(), "version 0 does not exist"),
        ("{}".to_owned(), "version"),
        ("[]".to_owned(), "the field \"layercache\""),
        (r#"{"version":1}"#.to_owned(), "root"),
        (
            format!(r#"{{"version":1,{root},"contents":[]}}"#),
            "is not in its contents",
        ),
        (
            format!(r#"{{"version":1,{root},"contents":[{entry},{entry}]}}"#),
            "twice",
        ),
        (
            format!(r#"{{"version":1,{root},"contents":[{{"digest":"{digest}","size":-3}}]}}"#),
            "negative (-3)",
        ),
    ] {
        let error = error_of(&format!(r#"{{"layercache":{image}}}"#));
        assert!(error.contains(expected), "{image}\ngave: {error}");
    }
}

#[test]
fn sorting_is_by_blob_and_then_by_the_parent_as_it_was() {
    let mut names = ["x", "y"];
    names.sort_by_key(|name| blob(name));
    let [low, high] = names;
    let unsorted = config(
        vec![
            layer(high, None),
            layer(low, Some(2)),
            layer(high, Some(0)),
            layer(low, Some(0)),
        ],
        vec![record("r", &[2], &[&[3, 0]], &[])],
    );
    let sorted = config(
        vec![
            layer(low, Some(2)),
            layer(low, Some(3)),
            layer(high, None),
            layer(high, Some(2)),
        ],
        vec![record("r", &[3], &[&[0, 2]], &[])],
    );
    assert_eq!(unsorted.sorted(), sorted);
}

#[test]
fn inline_records_count_the_images_own_layers() {
    let layers = ["a", "b", "c"].map(|name| (blob(name), annotations(name)));
    let records = br#"[{"layers":[{"layer":2}],"chains":[{"layers":[0,2]}],"digest":"r"}]"#;
    let config = CacheConfig::from_inline(records, &layers).unwrap();
    let expected = super::tests::config(
        vec![layer("a", None), layer("b", Some(0)), layer("c", Some(1))],
        vec![record("r", &[2], &[&[0, 2]], &[])],
    );
    assert_eq!(config, expected.sorted());

    let error = CacheConfig::from_inline(br#"[{"layers":[{"layer":3}]}]"#, &layers).unwrap_err();
    assert!(format!("{error:#}").contains("layer 3"), "{error:#}");
}

#[test]
fn merging_keeps_what_is_equal_once_and_links_what_differs() {
    let mut names = ["base", "amd64", "arm64"];
    names.sort_by_key(|name| blob(name));
    let platform = |name: &str| {
        config(
            vec![layer("base", None), layer(name, Some(0))],
            vec![
                record("shared", &[0], &[], &[]),
                record(&format!("copy {name}"), &[1], &[], &[0]),
            ],
        )
    };
    let merged = CacheConfig::merged(vec![platform("amd64"), platform("arm64")]);
    let base = names.iter().position(|&name| name == "base").unwrap();
    let at = |name: &str| names.iter().position(|&n| n == name).unwrap();
    let expected = config(
        names
            .iter()
            .map(|&name| layer(name, (name != "base").then_some(base)))
            .collect(),
        vec![
            record("copy amd64", &[at("amd64")], &[], &[2]),
            record("copy arm64", &[at("arm64")], &[], &[2]),
            record("shared", &[base], &[], &[]),
        ],
    );
    assert_eq!(merged, expected);
}

#[test]
fn min_keeps_a_chain_without_the_parents_it_does_not_list() {
    let cache = config(
        vec![layer("a", None), layer("b", Some(0)), layer("c", Some(1))],
        vec![
            record("step", &[0], &[&[1]], &[]),
            record("result", &[], &[&[2], &[1]], &[0]),
        ],
    );
    // b and c are the result's; what the step's `a` needs is not.
    let expected = config(
        vec![layer("b", None), layer("c", Some(0))],
        vec![
            record("step", &[], &[&[0]], &[]),
            record("result", &[], &[&[1], &[0]], &[0]),
        ],
    );
    assert_eq!(cache.min(), expected);
}

#[test]
fn results_go_with_their_blobs_and_with_their_ancestors_blobs() {
    let cache = config(
        vec![
            layer("base", None),
            layer("gone", Some(0)),
            layer("child", Some(1)),
            layer("chained", Some(2)),
            layer("unused", Some(0)),
            layer("unused too", Some(1)),
        ],
        vec![
            record("a", &[0], &[], &[]),
            record("b", &[1, 2], &[&[1, 3], &[3]], &[0]),
        ],
    );
    let (left, dropped) = cache.without_blobs(&BTreeSet::from([blob("gone")]));
    // The last layer's parent is gone, and only its results' chain needs the one before.
    let expected = config(
        vec![
            layer("base", None),
            layer("chained", None),
            layer("unused", Some(0)),
        ],
        vec![record("a", &[0], &[], &[]), record("b", &[], &[&[1]], &[0])],
    );
    assert_eq!(left, expected);
    assert_eq!(
        dropped,
        Dropped {
            results: 3,
            layers: 3
        }
    );
}

#[test]
fn nothing_changes_where_nothing_is_missing() {
    let mut cache = CacheConfig::parse_s3(&s3("max")).unwrap();
    cache.layers.push(layer("unused", None));
    cache.image = Some(image());
    let (left, dropped) = cache.without_blobs(&BTreeSet::from([blob("another cache's")]));
    assert_eq!((left, dropped), (cache, Dropped::default()));
}

#[test]
fn an_image_with_a_blob_missing_is_no_image() {
    let mut cache = CacheConfig::parse_s3(&s3("max")).unwrap();
    let without_image = cache.clone();
    cache.image = Some(image());
    let (left, dropped) = cache.without_blobs(&BTreeSet::from([blob("layer")]));
    assert_eq!((left, dropped), (without_image, Dropped::default()));
}

/// Any valid cache: parents and links point backwards, then everything is shuffled by a rotation.
fn caches() -> impl Strategy<Value = CacheConfig> {
    let names = prop::sample::select(vec!["a", "b", "c", "d", "e", "f"]);
    let layers = prop::collection::vec((names, any::<Option<prop::sample::Index>>()), 1..8);
    let index = any::<prop::sample::Index>;
    let record = (
        prop::collection::vec(index(), 0..3),
        prop::collection::vec(prop::collection::vec(index(), 0..4), 0..2),
        ".{0,3}",
        prop::collection::vec(prop::collection::vec((".{0,2}", index()), 0..3), 0..3),
        0i64..4_000_000_000,
    );
    let records = prop::collection::vec(record, 0..8);
    (layers, records, index(), any::<bool>()).prop_map(|(layers, records, turn, has_image)| {
        let count = layers.len();
        let turn_layers = turn.index(count);
        let place = |at: usize| (at + turn_layers) % count;
        let mut turned: Vec<Layer> = layers
            .iter()
            .enumerate()
            .map(|(at, (name, parent))| {
                let parent = parent.filter(|_| at > 0).map(|p| place(p.index(at)));
                layer(name, parent)
            })
            .collect();
        turned.rotate_right(turn_layers);

        let record_count = records.len();
        let turn_records = turn.index(record_count.max(1));
        let mut turned_records: Vec<Record> = records
            .into_iter()
            .enumerate()
            .map(|(at, (results, chains, digest, inputs, seconds))| {
                let time = ::time::OffsetDateTime::from_unix_timestamp(seconds).unwrap();
                let created_at = Time(time + ::time::Duration::nanoseconds(seconds % 1000));
                let link = |(selector, to): (String, prop::sample::Index)| {
                    let link = (to.index(at.max(1)) + turn_records) % record_count;
                    Input { selector, link }
                };
                Record {
                    results: results
                        .into_iter()
                        .map(|at| LayerResult {
                            layer: at.index(count),
                            created_at,
                        })
                        .collect(),
                    chains: chains
                        .into_iter()
                        .map(|layers| ChainResult {
                            layers: layers.iter().map(|at| at.index(count)).collect(),
                            created_at,
                        })
                        .collect(),
                    digest,
                    inputs: inputs
                        .into_iter()
                        .filter(|_| at > 0)
                        .map(|slot| slot.into_iter().map(link).collect())
                        .collect(),
                }
            })
            .collect();
        turned_records.rotate_right(turn_records);
        CacheConfig {
            layers: turned,
            records: turned_records,
            image: has_image.then(image),
        }
    })
}

proptest! {
    #[test]
    fn a_valid_cache_reads_back_as_it_was_written(cache in caches()) {
        prop_assert_eq!(&CacheConfig::parse_s3(&cache.to_s3().unwrap()).unwrap(), &cache);
        let mut local = cache.clone();
        local.image = None;
        local.layers.iter_mut().for_each(|layer| layer.annotations = annotations("any"));
        prop_assert_eq!(super::tests::local(&cache.to_local()).unwrap(), local);
    }

    #[test]
    fn min_is_valid_and_its_own_min(cache in caches()) {
        let min = cache.min();
        prop_assert_eq!(&CacheConfig::parse_s3(&min.to_s3().unwrap()).unwrap(), &min);
        prop_assert_eq!(min.min(), min);
    }

    #[test]
    fn what_is_left_is_valid_and_names_nothing_missing(
        cache in caches(),
        missing in prop::collection::btree_set(
            prop::sample::select(vec!["a", "b", "c", "d", "e", "f", "layer"]), 0..5),
    ) {
        let missing: BTreeSet<Digest> = missing.into_iter().map(blob).collect();
        let (left, dropped) = cache.without_blobs(&missing);
        prop_assert_eq!(&CacheConfig::parse_s3(&left.to_s3().unwrap()).unwrap(), &left);
        prop_assert!(left.layers.iter().all(|layer| !missing.contains(&layer.blob)));
        let contents = left.image.iter().flat_map(|image| &image.contents);
        prop_assert!(contents.into_iter().all(|content| !missing.contains(&content.digest)));
        let links = |cache: &CacheConfig| -> Vec<_> {
            let records = cache.records.iter();
            records.map(|record| (record.digest.clone(), record.inputs.clone())).collect()
        };
        prop_assert_eq!(links(&left), links(&cache));
        let results = |cache: &CacheConfig| -> usize {
            cache.records.iter().map(|record| record.results.len() + record.chains.len()).sum()
        };
        prop_assert_eq!(results(&left) + dropped.results, results(&cache));
        prop_assert_eq!(left.layers.len() + dropped.layers, cache.layers.len());
    }

    #[test]
    fn merging_is_valid_and_merging_again_adds_nothing(a in caches(), b in caches()) {
        let merged = CacheConfig::merged(vec![a, b]);
        prop_assert_eq!(&CacheConfig::parse_s3(&merged.to_s3().unwrap()).unwrap(), &merged);
        let again = CacheConfig::merged(vec![merged.clone(), merged.clone()]);
        prop_assert_eq!(again.layers.len(), merged.layers.len());
        prop_assert_eq!(again.records.len(), merged.records.len());
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = CacheConfig::parse_s3(&bytes);
        let _ = CacheConfig::from_inline(&bytes, &[]);
    }

    #[test]
    fn no_change_to_a_manifest_makes_it_panic(
        name in prop::sample::select(vec!["max", "min", "multiarch"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        digits in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 0..6),
    ) {
        let mut bytes = s3(name);
        // Digits first: they make other indexes, and leave it JSON.
        let places: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at].is_ascii_digit()).collect();
        for (at, digit) in digits {
            bytes[places[at.index(places.len())]] = digit;
        }
        for bytes in [bytes.clone(), {
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes
        }] {
            if let Ok(cache) = CacheConfig::parse_s3(&bytes) {
                let again = CacheConfig::parse_s3(&cache.to_s3().unwrap()).unwrap();
                prop_assert_eq!(&again, &cache);
                let _ = (again.min(), again.sorted(), CacheConfig::merged(vec![cache.clone(), cache]));
            }
        }
    }
}
