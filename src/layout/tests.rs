//! The layout against BuildKit's own fixtures, damage, other processes, and hostile layouts.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

use super::*;
use crate::cache::oci::CONTAINERD_NAME;

const SHORT: Duration = Duration::from_millis(150);
pub(super) const LONG: Duration = Duration::from_secs(60);
const WEEK: Duration = Duration::from_secs(7 * 24 * 60 * 60);

pub(super) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// A fixture of its own for a test that reads it, since reading makes and removes a lock file.
pub(super) fn copy_of(name: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    fs::create_dir_all(copy.path().join("blobs/sha256")).unwrap();
    for file in ["oci-layout", "index.json"] {
        fs::copy(fixture(name).join(file), copy.path().join(file)).unwrap();
    }
    for blob in fs::read_dir(fixture(name).join("blobs/sha256")).unwrap() {
        let blob = blob.unwrap();
        let to = copy.path().join("blobs/sha256").join(blob.file_name());
        fs::copy(blob.path(), to).unwrap();
    }
    copy
}

pub(super) fn prepared() -> (TempDir, Layout) {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::open_for_import(dir.path(), LONG).unwrap();
    layout.prepare().unwrap();
    (dir, layout)
}

fn entry_of(bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: IMAGE_MANIFEST.into(),
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        annotations: Default::default(),
        extra: Default::default(),
    }
}

/// A layout whose index has these entries (as JSON), each of them a digest or a whole entry.
fn with_index(entries: &[String]) -> (TempDir, Layout) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
    fs::write(dir.path().join("oci-layout"), OCI_LAYOUT_JSON).unwrap();
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
        entries.join(",")
    );
    fs::write(dir.path().join("index.json"), index).unwrap();
    let layout = Layout::open(dir.path(), LONG).unwrap();
    (dir, layout)
}

/// An entry for the blob `content`, which is put in place too by `put`.
fn entry_json(content: &str, annotations: &str) -> String {
    let digest = Digest::of(content.as_bytes());
    format!(
        r#"{{"mediaType":"{IMAGE_MANIFEST}","digest":"{digest}","size":{},"annotations":{{{annotations}}}}}"#,
        content.len()
    )
}

pub(super) fn put(root: &Path, content: &[u8]) -> Digest {
    let digest = Digest::of(content);
    fs::write(blob_path(root, &digest), content).unwrap();
    digest
}

fn blob_path(root: &Path, digest: &Digest) -> PathBuf {
    root.join("blobs/sha256").join(digest.hex())
}

fn partial_path(root: &Path, digest: &Digest) -> PathBuf {
    root.join(".layercache")
        .join(format!("{}.partial", digest.hex()))
}

#[track_caller]
fn staged(stage: Option<Staged>) -> Staged {
    stage.expect("the blob is not there yet")
}

fn verify(layout: &Layout, digest: &Digest, size: u64) -> Result<bool> {
    layout.verify_blob(digest, size, |_| {})
}

/// Sets a tag without asking for any blob.
fn set_tag(layout: &Layout, tag: &str, entry: &Descriptor) -> Result<()> {
    let tagged = layout.publish_tag(tag, entry, &BTreeMap::new())?;
    assert_eq!(tagged, Tagged::Done);
    Ok(())
}

pub(super) fn set_modified(path: &Path, time: SystemTime) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(time).unwrap();
}

pub(super) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("no error"),
        Err(error) => format!("{error:#}"),
    }
}

#[track_caller]
pub(super) fn assert_says<T>(result: Result<T>, parts: &[&str]) {
    let message = message(result);
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

// Reading

#[test]
fn every_fixture_reads_back_whole_and_is_left_as_it_was() {
    for name in names(&fixture("")) {
        if name == "s3-manifests" {
            continue;
        }
        let copy = copy_of(&name);
        let layout = Layout::open(copy.path(), LONG).unwrap();
        let entry = layout.select(&Selection::Default).unwrap();
        let by_digest = layout.select(&Selection::Digest(entry.digest)).unwrap();
        assert_eq!(by_digest, entry);
        let manifest = layout.read_document(&entry).unwrap();
        assert_eq!(Digest::of(&manifest), entry.digest);
        for hex in names(&copy.path().join("blobs/sha256")) {
            let digest: Digest = format!("sha256:{hex}").parse().unwrap();
            let size = fs::metadata(blob_path(copy.path(), &digest)).unwrap().len();
            assert!(layout.has_blob(&digest, size));
            assert!(verify(&layout, &digest, size).unwrap());
        }
        assert_eq!(names(copy.path()), ["blobs", "index.json", "oci-layout"]);
    }
}

#[test]
fn the_default_is_the_tag_latest_even_among_others() {
    let (dir, layout) = with_index(&[
        entry_json("one", r#""org.opencontainers.image.ref.name":"latest""#),
        entry_json("two", r#""org.opencontainers.image.ref.name":"v2""#),
    ]);
    let one = put(dir.path(), b"one");
    put(dir.path(), b"two");
    assert_eq!(layout.select(&Selection::Default).unwrap().digest, one);
}

#[test]
fn the_default_is_the_only_entry_whatever_its_tag() {
    let (dir, layout) = with_index(&[entry_json("one", "")]);
    let one = put(dir.path(), b"one");
    assert_eq!(layout.select(&Selection::Default).unwrap().digest, one);
}

#[test]
fn without_latest_several_entries_are_listed_for_the_user_to_choose() {
    let (_dir, layout) = with_index(&[
        entry_json("one", r#""org.opencontainers.image.ref.name":"v1""#),
        entry_json("two", ""),
    ]);
    let two = Digest::of(b"two").to_string();
    assert_says(
        layout.select(&Selection::Default),
        &["index.json", "--tag", r#"tag "v1""#, &two],
    );
    assert_says(
        layout.select(&Selection::Tag("v3".into())),
        &[r#"no tag "v3""#, r#"tag "v1""#, &two],
    );
}

#[test]
fn of_entries_with_the_same_tag_the_last_is_meant() {
    let tag = r#""org.opencontainers.image.ref.name":"latest""#;
    let (dir, layout) = with_index(&[entry_json("old", tag), entry_json("new", tag)]);
    put(dir.path(), b"old");
    let new = put(dir.path(), b"new");
    assert_eq!(layout.select(&Selection::Default).unwrap().digest, new);
}

#[test]
fn a_tag_is_found_in_containerds_name_whole_or_after_its_colon() {
    let name = r#""io.containerd.image.name":"docker.io/library/x:v1""#;
    let (dir, layout) = with_index(&[entry_json("one", name), entry_json("two", "")]);
    let one = put(dir.path(), b"one");
    for tag in ["v1", "docker.io/library/x:v1"] {
        let selected = layout.select(&Selection::Tag(tag.into())).unwrap();
        assert_eq!(selected.digest, one);
    }
    assert_says(
        layout.select(&Selection::Tag("x:v1".into())),
        &["no tag \"x:v1\""],
    );
}

#[test]
fn an_entry_that_cannot_be_understood_leaves_the_others_usable() {
    let tag =
        |tag: &str| format!(r#""annotations":{{"org.opencontainers.image.ref.name":"{tag}"}}"#);
    let (dir, layout) = with_index(&[
        format!(
            r#"{{"mediaType":"m","digest":"sha512:00","size":1,{}}}"#,
            tag("big")
        ),
        "7".into(),
        "null".into(),
        format!(
            r#"{{"mediaType":"m","digest":"sha256:../../x","size":-1,{}}}"#,
            tag("up")
        ),
        "[".repeat(5000) + &"]".repeat(5000),
        entry_json("one", ""),
    ]);
    let one = put(dir.path(), b"one");
    assert_eq!(layout.select(&Selection::Default).unwrap().digest, one);
    assert_says(
        layout.select(&Selection::Tag("big".into())),
        &["tag \"big\" cannot be used", "sha512:00"],
    );
    assert_says(
        layout.select(&Selection::Tag("none".into())),
        &["tag \"big\" (unusable: ", "tag \"up\" (unusable: "],
    );
}

#[test]
fn an_unusable_latest_is_not_replaced_by_what_is_left() {
    let (dir, layout) = with_index(&[
        entry_json("one", ""),
        r#"{"digest":"sha512:0","annotations":{"org.opencontainers.image.ref.name":"latest"}}"#
            .into(),
    ]);
    put(dir.path(), b"one");
    assert_says(
        layout.select(&Selection::Default),
        &["tag \"latest\" cannot be used"],
    );
}

#[test]
fn a_manifest_that_no_entry_names_is_found_by_its_digest() {
    let (dir, layout) = with_index(&[]);
    let manifest = format!(r#"{{"schemaVersion":2,"mediaType":"{IMAGE_MANIFEST}"}}"#);
    let digest = put(dir.path(), manifest.as_bytes());
    let expected = entry_of(manifest.as_bytes());
    let selected = layout.select(&Selection::Digest(digest)).unwrap();
    assert_eq!(selected, expected);

    let layer = put(dir.path(), b"a layer");
    assert_says(
        layout.select(&Selection::Digest(layer)),
        &["is not a manifest"],
    );
    let absent = Digest::of(b"absent");
    assert_says(
        layout.select(&Selection::Digest(absent)),
        &[&absent.to_string(), "neither in", "no manifest at all"],
    );
}

#[test]
fn an_entry_whose_manifest_is_missing_is_named_with_its_tag() {
    let (_dir, layout) = with_index(&[entry_json(
        "gone",
        r#""org.opencontainers.image.ref.name":"latest""#,
    )]);
    let digest = Digest::of(b"gone");
    assert_says(
        layout.select(&Selection::Default),
        &[&format!(
            "index.json names {digest} for tag \"latest\", but the blob is not in the layout"
        )],
    );
}

#[test]
fn what_is_not_a_layout_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    assert_says(Layout::open(&at("absent"), LONG), &["no such directory"]);
    fs::write(at("image.tar"), "x").unwrap();
    assert_says(Layout::open(&at("image.tar"), LONG), &["unpacked first"]);
    assert_says(Layout::open(dir.path(), LONG), &["no file oci-layout"]);
    fs::write(at("oci-layout"), "{").unwrap();
    assert_says(Layout::open(dir.path(), LONG), &["oci-layout says no"]);
    fs::write(at("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
    assert_says(Layout::open(dir.path(), LONG), &["\"2.0.0\"", "1.x"]);
    fs::write(at("oci-layout"), OCI_LAYOUT_JSON).unwrap();
    assert_says(Layout::open(dir.path(), LONG), &["without index.json"]);
    for damaged in [
        "{",
        "[]",
        r#"{"manifests":3}"#,
        r#"{"manifests":[],"manifests":[]}"#,
    ] {
        fs::write(at("index.json"), damaged).unwrap();
        let layout = Layout::open(dir.path(), LONG).unwrap();
        assert_says(layout.select(&Selection::Default), &["index.json"]);
    }
}

#[test]
fn a_blob_that_is_absent_or_cut_short_or_altered_is_told_apart() {
    let (dir, layout) = prepared();
    let digest = Digest::of(b"whole");
    assert_says(layout.open_blob(&digest, 5), &["incomplete"]);
    assert!(!layout.has_blob(&digest, 5));
    assert!(!verify(&layout, &digest, 5).unwrap());

    fs::write(blob_path(dir.path(), &digest), "whol").unwrap();
    assert_says(layout.open_blob(&digest, 5), &["has 4 bytes", "says 5"]);
    assert!(!layout.has_blob(&digest, 5));
    assert!(!verify(&layout, &digest, 5).unwrap());

    fs::write(blob_path(dir.path(), &digest), "whale").unwrap();
    assert_says(layout.read_document(&entry_of(b"whole")), &["hash to"]);
    assert!(layout.has_blob(&digest, 5));
    assert!(!verify(&layout, &digest, 5).unwrap());

    let mut steps = 0;
    layout
        .verify_blob(&digest, 5, |read| steps += read)
        .unwrap();
    assert_eq!(steps, 5);
    let nowhere = Layout::open_for_import(&dir.path().join("nowhere"), LONG).unwrap();
    assert!(!verify(&nowhere, &digest, 5).unwrap());

    fs::write(blob_path(dir.path(), &digest), "whole").unwrap();
    let bytes = layout.read_document(&entry_of(b"whole")).unwrap();
    assert_eq!(bytes, b"whole");
    assert!(verify(&layout, &digest, 5).unwrap());
}

#[test]
fn an_enormous_document_is_refused_before_it_is_read() {
    let (_dir, layout) = prepared();
    let mut entry = entry_of(b"");
    entry.size = u64::MAX;
    assert_says(layout.read_document(&entry), &["more than the 67108864"]);
}

// Harmful layouts

#[test]
fn a_fifo_or_symlink_or_directory_in_place_of_a_file_is_refused_and_never_waited_for() {
    let target = tempfile::NamedTempFile::new().unwrap();
    type Plant = fn(&Path, &Path);
    let plants: [(&str, Plant); 4] = [
        ("a FIFO", |path, _| {
            assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
        }),
        ("a symlink", |path, target| symlink(target, path).unwrap()),
        ("a symlink", |path, _| symlink("/dev/zero", path).unwrap()),
        ("a directory", |path, _| fs::create_dir(path).unwrap()),
    ];
    for (kind, plant) in plants {
        let digest = Digest::of(b"");
        let blob = format!("blobs/sha256/{}", digest.hex());
        for name in ["oci-layout", "index.json", "index.json.lock", &blob] {
            let copy = copy_of("local-min");
            let path = copy.path().join(name);
            let _ = fs::remove_file(&path);
            plant(&path, target.path());
            let layout = Layout {
                root: copy.path().to_owned(),
                lock_wait: SHORT,
            };
            let outcome = Layout::open(copy.path(), SHORT)
                .and_then(|layout| layout.select(&Selection::Default))
                .and_then(|_| layout.open_blob(&digest, 0).map(drop));
            assert_says(outcome, &[name, kind, "refused"]);
            assert!(!layout.has_blob(&digest, 0));
            if name != blob {
                assert_says(
                    set_tag(&layout, "latest", &entry_of(b"x")),
                    &[name, "refused"],
                );
            }
        }
    }
    assert_eq!(fs::read(target.path()).unwrap(), b"");
}

#[test]
fn a_directory_that_leads_out_of_the_layout_is_refused_and_nothing_is_written_there() {
    for name in ["blobs", "blobs/sha256", ".layercache"] {
        let outside = tempfile::tempdir().unwrap();
        let copy = copy_of("local-min");
        let path = copy.path().join(name);
        if path.exists() {
            fs::remove_dir_all(&path).unwrap();
        }
        symlink(outside.path(), &path).unwrap();
        let layout = Layout {
            root: copy.path().to_owned(),
            lock_wait: SHORT,
        };
        let digest = Digest::of(b"new");
        let parts = [name, "a symlink", "refused"];
        assert_says(Layout::open_for_import(copy.path(), SHORT), &parts);
        assert_says(layout.prepare(), &parts);
        assert_says(layout.write_document(&digest, b"new"), &parts);
        let outcome = layout.stage(&digest, 3, || {}).and_then(|stage| {
            let mut blob = staged(stage);
            blob.growing.file.write_all(b"new")?;
            layout.publish(vec![blob])
        });
        assert_says(outcome, &parts);
        layout.tidy();
        assert_eq!(names(outside.path()), [""; 0]);
        if name != ".layercache" {
            assert_says(Layout::open(copy.path(), SHORT), &parts);
        }
    }
}

#[test]
fn a_staging_file_that_is_a_link_to_another_file_is_not_written_through() {
    let (dir, layout) = prepared();
    let digest = Digest::of(b"new");
    let victim = dir.path().join("blobs/victim");
    fs::write(&victim, "precious").unwrap();
    symlink(&victim, partial_path(dir.path(), &digest)).unwrap();
    assert_says(layout.stage(&digest, 3, || {}), &["a symlink", "refused"]);

    fs::remove_file(partial_path(dir.path(), &digest)).unwrap();
    fs::hard_link(&victim, partial_path(dir.path(), &digest)).unwrap();
    let mut blob = staged(layout.stage(&digest, 3, || {}).unwrap());
    blob.growing.file.write_all(b"new").unwrap();
    layout.publish(vec![blob]).unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    assert_eq!(fs::read(blob_path(dir.path(), &digest)).unwrap(), b"new");
}

#[test]
fn a_symlink_or_fifo_under_a_blobs_name_is_replaced_and_not_followed() {
    let (dir, layout) = prepared();
    let digest = Digest::of(b"new");
    let victim = dir.path().join("blobs/victim");
    fs::write(&victim, "old").unwrap();
    symlink(&victim, blob_path(dir.path(), &digest)).unwrap();
    layout.write_document(&digest, b"new").unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"old");
    assert!(verify(&layout, &digest, 3).unwrap());
}

// Where an import may go

#[test]
fn an_import_may_go_into_nothing_or_leftovers_or_a_layout() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    Layout::open_for_import(&at("absent/deep"), LONG).unwrap();
    assert!(!at("absent").exists());
    for leftovers in [
        &[][..],
        &[".layercache"],
        &["blobs", ".layercache", "ingest"],
    ] {
        let root = at(&format!("left-{}", leftovers.len()));
        fs::create_dir(&root).unwrap();
        for name in leftovers {
            fs::create_dir(root.join(name)).unwrap();
        }
        Layout::open_for_import(&root, LONG).unwrap();
        assert_eq!(names(&root).len(), leftovers.len());
    }
    let copy = copy_of("local-max");
    fs::write(copy.path().join("README"), "mine").unwrap();
    Layout::open_for_import(copy.path(), LONG).unwrap();
    symlink(copy.path(), at("link")).unwrap();
    Layout::open_for_import(&at("link"), LONG).unwrap();
}

#[test]
fn an_import_does_not_go_among_files_of_someone_else() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.tex"), "mine").unwrap();
    assert_says(
        Layout::open_for_import(dir.path(), LONG),
        &["is not empty and not an OCI layout"],
    );
    assert_eq!(names(dir.path()), ["thesis.tex"]);
    assert_says(
        Layout::open_for_import(&dir.path().join("thesis.tex"), LONG),
        &["is not a directory"],
    );
    symlink("nowhere", dir.path().join("dangling")).unwrap();
    assert_says(
        Layout::open_for_import(&dir.path().join("dangling"), LONG),
        &["symlink to nothing"],
    );
}

#[test]
fn a_damaged_index_stops_an_import_before_it_begins_and_is_never_overwritten() {
    let copy = copy_of("local-max");
    let index = copy.path().join("index.json");
    fs::write(&index, r#"{"schemaVersion":2,"manif"#).unwrap();
    assert_says(Layout::open_for_import(copy.path(), LONG), &["index.json"]);
    let layout = Layout::open(copy.path(), LONG).unwrap();
    assert_says(set_tag(&layout, "latest", &entry_of(b"x")), &["index.json"]);
    assert_eq!(fs::read(&index).unwrap(), br#"{"schemaVersion":2,"manif"#);
}

#[test]
fn a_place_that_cannot_be_written_is_found_out_by_prepare() {
    // Not by permissions, which do not bind root.
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let root = dir.path().join("file/layout");
    let layout = Layout {
        root,
        lock_wait: SHORT,
    };
    assert_says(
        layout.prepare(),
        &["cannot create directory", "file/layout"],
    );
    let proc = Path::new("/proc/self");
    if proc.is_dir() {
        let layout = Layout {
            root: proc.to_owned(),
            lock_wait: SHORT,
        };
        assert_says(layout.prepare(), &["/proc/self"]);
    }
}

// Blobs

#[test]
fn a_blob_gets_its_name_only_when_published_and_leaves_no_staging() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a/b/layout");
    let layout = Layout::open_for_import(&root, LONG).unwrap();
    layout.prepare().unwrap();
    let contents: Vec<Vec<u8>> = (0..20).map(|n| vec![n; 1000 + usize::from(n)]).collect();
    let mut blobs = Vec::new();
    for content in &contents {
        let digest = Digest::of(content);
        let mut blob = staged(layout.stage(&digest, content.len() as u64, || {}).unwrap());
        assert_eq!((blob.growing.digest, blob.growing.have), (digest, 0));
        blob.growing.file.write_all(content).unwrap();
        blobs.push(blob);
    }
    assert_eq!(names(&root.join("blobs/sha256")), [""; 0]);
    layout.publish(blobs).unwrap();
    for content in &contents {
        let digest = Digest::of(content);
        assert!(verify(&layout, &digest, content.len() as u64).unwrap());
        let mode = fs::metadata(blob_path(&root, &digest)).unwrap().mode();
        assert_eq!(mode & 0o777 & !0o644, 0, "{mode:o}");
    }
    layout.tidy();
    assert_eq!(names(&root), ["blobs"]);
}

#[test]
fn an_interrupted_download_is_resumed_where_it_stopped() {
    let (_dir, layout) = prepared();
    let digest = Digest::of(b"whole");
    let mut first = staged(layout.stage(&digest, 5, || {}).unwrap());
    first.growing.file.write_all(b"who").unwrap();
    drop(first);
    layout.tidy();
    let mut second = staged(layout.stage(&digest, 5, || {}).unwrap());
    assert_eq!(second.growing.have, 3);
    second.growing.file.write_all(b"le").unwrap();
    layout.publish(vec![second]).unwrap();
    assert!(verify(&layout, &digest, 5).unwrap());
}

#[test]
fn left_over_bytes_beyond_the_blobs_size_or_found_wrong_are_discarded() {
    let (dir, layout) = prepared();
    let digest = Digest::of(b"whole");
    fs::write(partial_path(dir.path(), &digest), "too long").unwrap();
    let mut blob = staged(layout.stage(&digest, 5, || {}).unwrap());
    assert_eq!(blob.growing.have, 0);
    assert_eq!(blob.growing.file.metadata().unwrap().len(), 0);

    blob.growing.file.write_all(b"wrong").unwrap();
    blob.growing.restart().unwrap();
    blob.growing.file.write_all(b"whole").unwrap();
    let mut back = String::new();
    blob.growing.file.rewind().unwrap();
    blob.growing.file.read_to_string(&mut back).unwrap();
    assert_eq!(back, "whole");
}

#[test]
fn an_incomplete_blob_is_not_published() {
    let (dir, layout) = prepared();
    let digest = Digest::of(b"whole");
    let mut blob = staged(layout.stage(&digest, 5, || {}).unwrap());
    blob.growing.file.write_all(b"who").unwrap();
    assert_says(layout.publish(vec![blob]), &["has 3 bytes", "has 5"]);
    assert_eq!(names(&dir.path().join("blobs/sha256")), [""; 0]);
}

#[test]
fn a_blob_of_the_wrong_size_is_replaced_and_one_of_the_right_size_on_request() {
    let (dir, layout) = prepared();
    let digest = Digest::of(b"whole");
    for damage in ["whol", "whale"] {
        fs::write(blob_path(dir.path(), &digest), damage).unwrap();
        if damage.len() == 5 {
            assert!(layout.stage(&digest, 5, || {}).unwrap().is_none());
        }
        let mut blob = staged(layout.stage_replacement(&digest, 5, || {}).unwrap());
        blob.growing.file.write_all(b"whole").unwrap();
        layout.publish(vec![blob]).unwrap();
        assert!(verify(&layout, &digest, 5).unwrap());
    }
    let stage = layout.stage_replacement(&digest, 5, || {}).unwrap();
    assert!(stage.is_none());
    assert_eq!(names(&dir.path().join(".layercache")), [""; 0]);
}

#[test]
fn who_waits_for_a_blob_finds_it_present_once_the_other_has_published_it() {
    let (dir, layout) = prepared();
    let digest = Digest::of(b"whole");
    let mut first = staged(layout.stage(&digest, 5, || {}).unwrap());
    std::thread::scope(|scope| {
        let second = scope.spawn(|| layout.stage(&digest, 5, || {}).unwrap());
        first.growing.file.write_all(b"whole").unwrap();
        layout.publish(vec![first]).unwrap();
        assert!(second.join().unwrap().is_none());
    });
    assert_eq!(names(&dir.path().join(".layercache")), [""; 0]);
}

#[test]
fn a_staging_file_that_another_holds_without_progress_is_given_up() {
    let (dir, layout) = prepared();
    let digest = Digest::of(b"whole");
    let _held = layout.stage(&digest, 5, || {}).unwrap();
    let impatient = Layout {
        lock_wait: SHORT,
        ..layout.clone()
    };
    let path = partial_path(dir.path(), &digest);
    assert_says(
        impatient.stage(&digest, 5, || {}),
        &["another process holds", path.to_str().unwrap()],
    );
}

#[test]
fn a_size_that_no_disk_has_is_refused_when_the_blob_is_staged() {
    let (dir, layout) = prepared();
    let digest = Digest::of(b"x");
    let size = 1 << 62;
    assert_says(
        layout.stage(&digest, size, || {}),
        &[
            "cannot set aside 4611686018427387904 bytes",
            &digest.to_string(),
        ],
    );
    assert_eq!(names(&dir.path().join(".layercache")), [""; 0]);
}

#[test]
fn space_set_aside_does_not_count_as_downloaded() {
    let (_dir, layout) = prepared();
    let digest = Digest::of(b"x");
    let first = staged(layout.stage(&digest, 8 << 20, || {}).unwrap());
    assert_eq!(first.growing.file.metadata().unwrap().len(), 0);
    drop(first);
    assert_eq!(
        staged(layout.stage(&digest, 8 << 20, || {}).unwrap())
            .growing
            .have,
        0
    );
}

#[test]
fn eight_threads_writing_the_same_blobs_leave_each_once_and_whole() {
    let (dir, layout) = prepared();
    let contents: Vec<Vec<u8>> = (0..12).map(|n| vec![n; 5000]).collect();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for content in &contents {
                    let digest = Digest::of(content);
                    if let Some(mut blob) = layout.stage(&digest, 5000, || {}).unwrap() {
                        blob.growing.restart().unwrap();
                        blob.growing.file.write_all(content).unwrap();
                        layout.publish(vec![blob]).unwrap();
                    }
                    // Removes the staging directory under the others' feet.
                    layout.tidy();
                }
            });
        }
    });
    for content in &contents {
        assert!(verify(&layout, &Digest::of(content), 5000).unwrap());
    }
    assert_eq!(names(&dir.path().join("blobs/sha256")).len(), 12);
    assert_eq!(names(dir.path()), ["blobs"]);
}

#[test]
fn tidy_removes_what_is_done_or_abandoned_and_keeps_what_is_in_use_or_not_ours() {
    let (dir, layout) = prepared();
    let staging = dir.path().join(".layercache");
    let done = put(dir.path(), b"done");
    let damaged = put(dir.path(), b"damaged");
    let [resumable, old, held] = [b"resumable", b"abandoned", b"held_____"].map(|b| Digest::of(b));
    for digest in [done, damaged, resumable, old] {
        fs::write(partial_path(dir.path(), &digest), "part").unwrap();
    }
    let earlier = SystemTime::now() - Duration::from_secs(60);
    set_modified(&partial_path(dir.path(), &done), earlier);
    // What was begun later is going to replace it.
    set_modified(
        &dir.path().join("blobs/sha256").join(damaged.hex()),
        earlier,
    );
    let age = SystemTime::now() - WEEK - Duration::from_secs(60);
    set_modified(&partial_path(dir.path(), &old), age);
    fs::write(staging.join("index.json.partial"), "{").unwrap();
    fs::write(staging.join("notes"), "mine").unwrap();
    let in_use = staged(layout.stage(&held, 9, || {}).unwrap());
    in_use.growing.file.set_modified(age).unwrap();

    layout.tidy();

    let mut expected = [
        format!("{}.partial", damaged.hex()),
        format!("{}.partial", resumable.hex()),
        format!("{}.partial", held.hex()),
        "notes".into(),
    ];
    expected.sort();
    assert_eq!(names(&staging), expected);
}

#[test]
fn a_damaged_blob_is_moved_to_where_nothing_reads_it_and_a_good_one_is_not() {
    let (dir, layout) = prepared();
    let good = put(dir.path(), b"good");
    assert_eq!(layout.set_damaged_aside(&good, 4).unwrap(), None);
    let absent = Digest::of(b"absent");
    assert_eq!(layout.set_damaged_aside(&absent, 6).unwrap(), None);
    let nowhere = Layout::open_for_import(&dir.path().join("nowhere"), LONG).unwrap();
    assert_eq!(nowhere.set_damaged_aside(&absent, 6).unwrap(), None);

    let digest = Digest::of(b"whole");
    let aside = dir
        .path()
        .join(format!(".layercache/damaged-{}", digest.hex()));
    for damage in ["whale", "wh"] {
        // What was downloaded of it stays too.
        fs::write(partial_path(dir.path(), &digest), "who").unwrap();
        fs::write(blob_path(dir.path(), &digest), damage).unwrap();
        let moved = layout.set_damaged_aside(&digest, 5).unwrap();
        assert_eq!(moved.as_ref(), Some(&aside));
        assert!(!layout.has_blob(&digest, 5));
        assert_eq!(fs::read_to_string(&aside).unwrap(), damage);
        assert_eq!(
            staged(layout.stage(&digest, 5, || {}).unwrap())
                .growing
                .have,
            3
        );
    }
    assert_eq!(names(&dir.path().join("blobs/sha256")), [good.hex()]);
}

#[test]
fn a_damaged_blob_is_kept_for_a_week_or_until_it_is_back() {
    let (dir, layout) = prepared();
    let [recent, old, back] = [b"recent", b"old___", b"back__"].map(|blob| Digest::of(blob));
    let age = SystemTime::now() - WEEK - Duration::from_secs(60);
    for digest in [recent, old, back] {
        fs::write(blob_path(dir.path(), &digest), "damage").unwrap();
        // When it was written does not matter.
        set_modified(&blob_path(dir.path(), &digest), age);
        layout.set_damaged_aside(&digest, 6).unwrap().unwrap();
    }
    layout.tidy();
    let staging = dir.path().join(".layercache");
    assert_eq!(names(&staging).len(), 3);

    put(dir.path(), b"back__");
    set_modified(&staging.join(format!("damaged-{}", old.hex())), age);
    layout.tidy();
    assert_eq!(names(&staging), [format!("damaged-{}", recent.hex())]);
}

#[test]
fn a_document_is_written_once_and_again_only_if_damaged() {
    let (dir, layout) = prepared();
    let digest = Digest::of(b"{}");
    assert_says(layout.write_document(&digest, b"[]"), &["not written"]);
    layout.write_document(&digest, b"{}").unwrap();
    let path = blob_path(dir.path(), &digest);
    let inode = fs::metadata(&path).unwrap().ino();
    layout.write_document(&digest, b"{}").unwrap();
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);

    for damage in ["{", "[]", ""] {
        fs::write(&path, damage).unwrap();
        layout.write_document(&digest, b"{}").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"{}");
    }
    layout.tidy();
    assert_eq!(names(dir.path()), ["blobs"]);
}

// The index

#[test]
fn a_fresh_layout_is_buildkits_byte_for_byte() {
    for name in [
        "local-max",
        "local-min",
        "local-index",
        "local-docker",
        "local-multiarch",
    ] {
        let original = copy_of(name);
        let entry = Layout::open(original.path(), LONG)
            .unwrap()
            .select(&Selection::Default)
            .unwrap();
        let (dir, layout) = prepared();
        let mut untagged = entry.clone();
        untagged.annotations.clear();
        set_tag(&layout, "latest", &untagged).unwrap();
        layout.tidy();
        for file in ["index.json", "oci-layout"] {
            assert_eq!(
                fs::read_to_string(dir.path().join(file)).unwrap(),
                fs::read_to_string(fixture(name).join(file)).unwrap(),
            );
        }
        assert_eq!(names(dir.path()), ["blobs", "index.json", "oci-layout"]);
    }
}

#[test]
fn setting_a_tag_keeps_every_other_byte_of_the_index() {
    let (dir, layout) = prepared();
    let before = concat!(
        "{ \"extra\": [1.0e5, 12345678901234567890123],\n \"manifests\": [ ",
        r#"{"size":1.50, "digest":"sha512:q"},"#,
        r#"{"annotations":{"org.opencontainers.image.ref.name":"v1"},"old":true},"#,
        r#"{"annotations":{"io.containerd.image.name":"docker.io/library/x:v1"}, "z":{"b":1,"a":2}},"#,
        r#"{"annotations":{"io.containerd.image.name":"v1","org.opencontainers.image.ref.name":"v0"}}"#,
        " ], \"schemaVersion\": 2, \"annotations\":{\"b\":\"\",\"a\":\"\"} }\n",
    );
    fs::write(dir.path().join("index.json"), before).unwrap();
    let mut entry = entry_of(b"x");
    entry.annotations.insert("z".into(), "last".into());
    entry.annotations.insert("a".into(), "first".into());
    set_tag(&layout, "v1", &entry).unwrap();
    let expected = format!(
        concat!(
            r#"{{"extra":[1.0e5, 12345678901234567890123],"manifests":["#,
            r#"{{"size":1.50, "digest":"sha512:q"}},"#,
            r#"{{"annotations":{{"io.containerd.image.name":"docker.io/library/x:v1"}}, "#,
            r#""z":{{"b":1,"a":2}}}},"#,
            r#"{{"mediaType":"{}","digest":"{}","size":1,"annotations":{{"a":"first","#,
            r#""org.opencontainers.image.ref.name":"v1","z":"last"}}}}],"#,
            r#""schemaVersion":2,"annotations":{{"b":"","a":""}}}}"#,
        ),
        IMAGE_MANIFEST,
        Digest::of(b"x"),
    );
    let after = fs::read_to_string(dir.path().join("index.json")).unwrap();
    assert_eq!(after, expected);
}

/// As BuildKit looks for a tag in `index.json`: exactly, in containerd's annotation first; the first wins.
fn buildkits_choice(root: &Path, tag: &str) -> Option<String> {
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(root.join("index.json")).unwrap()).unwrap();
    let entries = index["manifests"].as_array().unwrap();
    [
        "io.containerd.image.name",
        "org.opencontainers.image.ref.name",
    ]
    .iter()
    .find_map(|name| {
        entries
            .iter()
            .find(|entry| entry["annotations"][name] == tag)
    })
    .map(|entry| entry["digest"].as_str().unwrap().to_owned())
}

#[test]
fn once_set_a_tag_is_what_we_and_buildkit_find_whoever_had_its_name() {
    for taken in [
        r#""io.containerd.image.name":"latest""#,
        r#""org.opencontainers.image.ref.name":"latest""#,
        r#""io.containerd.image.name":"latest","org.opencontainers.image.ref.name":"v1""#,
        r#""io.containerd.image.name":"docker.io/library/x:latest""#,
    ] {
        let (dir, layout) = with_index(&[entry_json("other", taken)]);
        let new = put(dir.path(), b"new");
        let mut entry = entry_of(b"new");
        // Whatever else the entry brings, it gets one name.
        for name in ["v2", "latest"] {
            let name = name.to_owned();
            entry.annotations.insert(CONTAINERD_NAME.into(), name);
            set_tag(&layout, "latest", &entry).unwrap();
            let selected = layout.select(&Selection::Default).unwrap();
            assert_eq!(selected.digest, new, "{taken}");
            let choice = buildkits_choice(dir.path(), "latest");
            assert_eq!(choice, Some(new.to_string()), "{taken}");
            assert_eq!(buildkits_choice(dir.path(), "v2"), None);
        }
    }
}

#[test]
fn a_tag_is_set_only_if_all_blobs_are_there_and_stays_otherwise() {
    let copy = copy_of("local-max");
    let layout = Layout::open(copy.path(), LONG).unwrap();
    let before = fs::read(copy.path().join("index.json")).unwrap();
    let whole = put(copy.path(), b"whole");
    let short = Digest::of(b"short");
    fs::write(blob_path(copy.path(), &short), "shor").unwrap();
    let link = Digest::of(b"link");
    symlink(
        blob_path(copy.path(), &whole),
        blob_path(copy.path(), &link),
    )
    .unwrap();
    let absent = Digest::of(b"absent");
    let blobs = BTreeMap::from([(whole, 5), (short, 5), (link, 5), (absent, 6)]);
    let tagged = layout.publish_tag("latest", &entry_of(b"whole"), &blobs);
    let mut gone = vec![(short, 5), (link, 5), (absent, 6)];
    gone.sort();
    assert_eq!(tagged.unwrap(), Tagged::Gone(gone));
    assert_eq!(fs::read(copy.path().join("index.json")).unwrap(), before);
    assert_eq!(names(copy.path()), ["blobs", "index.json", "oci-layout"]);
}

#[test]
fn setting_a_tag_to_what_it_is_writes_nothing() {
    let copy = copy_of("local-max");
    let layout = Layout::open(copy.path(), LONG).unwrap();
    let entry = layout.select(&Selection::Default).unwrap();
    let index = copy.path().join("index.json");
    let before = fs::metadata(&index).unwrap();
    set_tag(&layout, "latest", &entry).unwrap();
    let after = fs::metadata(&index).unwrap();
    assert_eq!(
        (after.ino(), after.mtime(), after.mtime_nsec()),
        (before.ino(), before.mtime(), before.mtime_nsec())
    );
    assert_eq!(names(copy.path()), ["blobs", "index.json", "oci-layout"]);
}

#[test]
fn an_index_that_others_may_not_read_stays_so() {
    let copy = copy_of("local-max");
    let index = copy.path().join("index.json");
    fs::set_permissions(&index, fs::Permissions::from_mode(0o600)).unwrap();
    let layout = Layout::open(copy.path(), LONG).unwrap();
    set_tag(&layout, "v2", &entry_of(b"x")).unwrap();
    assert_eq!(fs::metadata(&index).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn an_empty_index_is_filled_as_buildkit_does_and_left_over_staging_is_overwritten() {
    let (dir, layout) = prepared();
    fs::write(dir.path().join("index.json"), "").unwrap();
    let left_over = dir.path().join(".layercache/index.json.partial");
    fs::write(left_over, "x".repeat(1000)).unwrap();
    set_tag(&layout, "latest", &entry_of(b"x")).unwrap();
    put(dir.path(), b"x");
    let selected = layout.select(&Selection::Default).unwrap();
    assert_eq!(selected.digest, Digest::of(b"x"));
}

#[test]
fn of_eight_threads_tagging_at_once_no_tag_is_lost() {
    let (dir, layout) = prepared();
    let manifest = put(dir.path(), b"x");
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let layout = &layout;
            scope.spawn(move || {
                for turn in 0..4 {
                    let tag = format!("t{thread}-{turn}");
                    set_tag(layout, &tag, &entry_of(b"x")).unwrap();
                    layout.select(&Selection::Tag(tag)).unwrap();
                    layout.tidy();
                }
            });
        }
    });
    for thread in 0..8 {
        for turn in 0..4 {
            let tag = Selection::Tag(format!("t{thread}-{turn}"));
            assert_eq!(layout.select(&tag).unwrap().digest, manifest);
        }
    }
    assert_eq!(names(dir.path()), ["blobs", "index.json", "oci-layout"]);
}

/// Not a test of its own: what each process of the next test does.
#[test]
fn process_that_tags() {
    let (Some(root), Ok(name)) = (
        std::env::var_os("LAYERCACHE_TEST_ROOT"),
        std::env::var("LAYERCACHE_TEST_TAG"),
    ) else {
        return;
    };
    let layout = Layout::open_for_import(Path::new(&root), LONG).unwrap();
    layout.prepare().unwrap();
    for turn in 0..5 {
        layout.write_document(&Digest::of(b"x"), b"x").unwrap();
        set_tag(&layout, &format!("{name}-{turn}"), &entry_of(b"x")).unwrap();
        layout.tidy();
    }
}

#[test]
fn of_four_processes_starting_a_layout_at_once_no_tag_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("layout");
    let children: Vec<_> = (0..4)
        .map(|n| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "layout::tests::process_that_tags"])
                .env("LAYERCACHE_TEST_ROOT", &root)
                .env("LAYERCACHE_TEST_TAG", format!("p{n}"))
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let layout = Layout::open(&root, LONG).unwrap();
    for n in 0..4 {
        for turn in 0..5 {
            let tag = Selection::Tag(format!("p{n}-{turn}"));
            let selected = layout.select(&tag).unwrap();
            assert_eq!(selected.digest, Digest::of(b"x"));
        }
    }
    assert_eq!(names(&root), ["blobs", "index.json", "oci-layout"]);
}

#[test]
fn a_lock_held_by_a_build_is_waited_for_and_then_named() {
    let copy = copy_of("local-max");
    let path = copy.path().join("index.json.lock");
    let lock = File::create(&path).unwrap();
    lock.lock().unwrap();
    let impatient = Layout::open(copy.path(), SHORT).unwrap();
    let parts = [path.to_str().unwrap(), "run again"];
    assert_says(impatient.select(&Selection::Default), &parts);
    assert_says(set_tag(&impatient, "latest", &entry_of(b"x")), &parts);
    assert!(path.exists(), "another's lock was removed");

    let patient = Layout::open(copy.path(), LONG).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| patient.select(&Selection::Default).unwrap());
        // As BuildKit ends: lets go, then removes the file.
        lock.unlock().unwrap();
        let _ = fs::remove_file(&path);
        reader.join().unwrap();
    });
    assert!(!path.exists());
}

#[test]
fn readers_share_the_lock_and_the_last_of_them_removes_it() {
    let copy = copy_of("local-max");
    let path = copy.path().join("index.json.lock");
    let root = Dir::open(copy.path()).unwrap();
    let first = IndexLock::shared(&root, SHORT).unwrap().unwrap();
    let second = IndexLock::shared(&root, SHORT).unwrap().unwrap();
    assert!(IndexLock::exclusive(&root, SHORT).is_err());
    drop(first);
    assert!(path.exists());
    assert!(IndexLock::exclusive(&root, SHORT).is_err());
    drop(second);
    assert!(!path.exists());
    drop(IndexLock::exclusive(&root, SHORT).unwrap());
    assert!(!path.exists());
}

#[test]
fn a_lock_whose_file_buildkit_took_away_is_known_to_be_lost() {
    let (dir, _layout) = prepared();
    let path = dir.path().join("index.json.lock");
    let root = Dir::open(dir.path()).unwrap();
    let lock = IndexLock::exclusive(&root, SHORT).unwrap();
    assert!(lock.holds().unwrap());
    fs::remove_file(&path).unwrap();
    assert!(!lock.holds().unwrap());
    let other = IndexLock::exclusive(&root, SHORT).unwrap();
    drop(lock);
    assert!(path.exists(), "the other's lock was removed");
    assert!(other.holds().unwrap());
}

/// Not a test of its own: the next test runs it as a user whom permissions bind.
#[test]
fn user_without_write_permission() {
    let Some(root) = std::env::var_os("LAYERCACHE_TEST_READ_ONLY") else {
        return;
    };
    let root = Path::new(&root);
    let layout = Layout::open(root, SHORT).unwrap();
    let entry = layout.select(&Selection::Default).unwrap();
    layout.read_document(&entry).unwrap();
    assert_says(
        layout.prepare(),
        &["cannot write into", root.to_str().unwrap(), "denied"],
    );
    assert_says(
        set_tag(&layout, "v2", &entry),
        &["index.json.lock", "denied"],
    );
    let below = Layout::open_for_import(&root.join("below"), SHORT).unwrap();
    assert_says(
        below.prepare(),
        &["cannot create directory", "below", "denied"],
    );
}

#[test]
fn a_layout_that_cannot_be_written_is_read_without_lock_and_refuses_an_import_early() {
    let copy = copy_of("local-max");
    let dir = tempfile::tempdir().unwrap();
    // Permissions do not bind root, and another user may not get to where this program stands.
    let program = dir.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(copy.path(), fs::Permissions::from_mode(0o555)).unwrap();
    let mut command = Command::new(program);
    if fs::metadata(dir.path()).unwrap().uid() == 0 {
        command.uid(65534).gid(65534);
    }
    let output = command
        .args(["--exact", "layout::tests::user_without_write_permission"])
        .env("LAYERCACHE_TEST_READ_ONLY", copy.path())
        .current_dir("/")
        .output()
        .unwrap();
    fs::set_permissions(copy.path(), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    assert_eq!(names(copy.path()), ["blobs", "index.json", "oci-layout"]);
}
