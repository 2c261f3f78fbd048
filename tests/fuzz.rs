//! Fuzzing: every parser of input from files, the network and the user gets mutations of real documents,
//! not just random bytes. Each test states what must hold for accepted input.
//!
//! It uses proptest, which needs only a stable toolchain. `make fuzz` runs more cases (PROPTEST_CASES).

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use layercache::bucket::{Bucket, Certainty};
use layercache::cache::diff_id;
use layercache::cache::digest::Digest;
use layercache::cache::documents::Documents;
use layercache::cache::{CacheConfig, LayerAnnotations, Time};
use layercache::cli::spec;
use layercache::config;
use layercache::config::Selection;
use layercache::layout::{Layout, Tagged};
use layercache::progress::Progress;
use layercache::retry::RetryPolicy;
use layercache::store::{
    Connection, Kind, ObjectInfo, Page, Part, Response, Store, StoreError, StoreResult, Upload,
    UploadBody,
};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn fixture(path: &str) -> Vec<u8> {
    std::fs::read(fixtures().join(path)).expect("the fixture is there")
}

// Mutations of text.

/// Text that parsers stumble over.
const TOKENS: &[&str] = &[
    "1e400",
    "-1",
    "-0",
    "1.5",
    "18446744073709551615",
    "18446744073709551616",
    "9223372036854775808",
    "-9223372036854775809",
    "null",
    "{}",
    "[",
    "{\"a\":",
    "\\u0000",
    "\\ud800",
    "\u{1b}[31m",
    "\u{202e}",
    "\u{0}",
    "../../etc/passwd",
    "sha256:",
    "\"",
    "\\",
    ",",
    "=",
    "<",
    "</",
    "&lt;",
    "&#0;",
    "&#x110000;",
    "<![CDATA[",
    "]]>",
    "<!--",
    "<Size>",
    "true",
];

#[derive(Debug, Clone)]
enum Edit {
    Flip(Index, u8),
    Cut(Index, usize),
    Repeat(Index, usize),
    Insert(Index, &'static str),
    Deepen(Index, u16),
    End(Index),
}

fn edits(most: usize) -> impl Strategy<Value = Vec<Edit>> {
    let at = any::<Index>;
    let edit = prop_oneof![
        4 => (at(), 1..=255u8).prop_map(|(at, bits)| Edit::Flip(at, bits)),
        2 => (at(), 1..40usize).prop_map(|(at, length)| Edit::Cut(at, length)),
        2 => (at(), 1..200usize).prop_map(|(at, length)| Edit::Repeat(at, length)),
        6 => (at(), prop::sample::select(TOKENS)).prop_map(|(at, token)| Edit::Insert(at, token)),
        1 => (at(), 1..2000u16).prop_map(|(at, depth)| Edit::Deepen(at, depth)),
        1 => at().prop_map(Edit::End),
    ];
    prop::collection::vec(edit, 0..=most)
}

fn edited(mut bytes: Vec<u8>, edits: &[Edit]) -> Vec<u8> {
    for edit in edits {
        let place = |at: &Index, bytes: &Vec<u8>| at.index(bytes.len() + 1);
        match edit {
            Edit::Flip(at, bits) => {
                let at = place(at, &bytes);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= bits;
                }
            }
            Edit::Cut(at, length) => {
                let at = place(at, &bytes);
                let end = bytes.len().min(at + length);
                bytes.drain(at..end);
            }
            Edit::Repeat(at, length) => {
                let at = place(at, &bytes);
                let end = bytes.len().min(at + length);
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            Edit::Insert(at, token) => {
                let at = place(at, &bytes);
                bytes.splice(at..at, token.bytes());
            }
            Edit::Deepen(at, depth) => {
                let at = place(at, &bytes);
                bytes.splice(at..at, "[".repeat((*depth).into()).into_bytes());
            }
            Edit::End(at) => {
                let at = place(at, &bytes);
                bytes.truncate(at);
            }
        }
    }
    bytes
}

// Mutations of JSON's structure.

#[derive(Debug, Clone)]
enum Change {
    /// The node becomes this value.
    Set(Index, usize),
    /// The node becomes a copy of another.
    Copy(Index, Index),
    Remove(Index),
    /// An array's element is repeated; a field is copied under another name.
    Double(Index),
}

fn changes(most: usize) -> impl Strategy<Value = Vec<Change>> {
    let at = any::<Index>;
    let change = prop_oneof![
        4 => (at(), 0..values().len()).prop_map(|(at, value)| Change::Set(at, value)),
        3 => (at(), at()).prop_map(|(at, from)| Change::Copy(at, from)),
        2 => at().prop_map(Change::Remove),
        2 => at().prop_map(Change::Double),
    ];
    prop::collection::vec(change, 0..=most)
}

fn values() -> Vec<Value> {
    let deep = (0..100).fold(json!(0), |inner, _| json!([inner]));
    vec![
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1),
        json!(2),
        json!(7),
        json!(1.5),
        json!(i64::MIN),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(1u64 << 32),
        json!(""),
        json!("../../etc/passwd"),
        json!("/etc/passwd"),
        json!("sha256:../../../etc/passwd"),
        json!("sha512:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        json!("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        json!("sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855"),
        json!("9999-12-31T23:59:60Z"),
        json!("0000-01-01T00:00:00+23:59"),
        json!("2026-11-21T20:37:36.95907618512345Z"),
        json!("\u{1b}]0;title\u{7}\u{202e}\u{0}"),
        json!("x".repeat(5000)),
        json!("e30="),
        json!("W3siZGlnZXN0IjoieCIsImxheWVycyI6W3sibGF5ZXIiOjB9XX1d"),
        json!("application/vnd.oci.image.index.v1+json"),
        json!("application/vnd.oci.image.manifest.v1+json"),
        json!("application/vnd.buildkit.cacheconfig.v0"),
        json!("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
        json!([]),
        json!({}),
        json!([[]]),
        json!([null]),
        json!([-1, 0, 1, 1]),
        json!({"layer": 0}),
        json!([[{"link": 0}], [{"link": 1, "selector": ""}]]),
        deep,
    ]
}

/// The JSON pointers of all nodes but the root.
fn nodes(value: &Value, at: &str, found: &mut Vec<String>) {
    let mut visit = |key: &str, child: &Value| {
        let pointer = format!("{at}/{}", key.replace('~', "~0").replace('/', "~1"));
        found.push(pointer.clone());
        nodes(child, &pointer, found);
    };
    match value {
        Value::Array(items) => {
            for (at, item) in items.iter().enumerate() {
                visit(&at.to_string(), item);
            }
        }
        Value::Object(fields) => {
            for (name, field) in fields {
                visit(name, field);
            }
        }
        _ => {}
    }
}

fn changed(mut value: Value, changes: &[Change]) -> Value {
    for change in changes {
        let mut all = Vec::new();
        nodes(&value, "", &mut all);
        if all.is_empty() {
            break;
        }
        let split = |pointer: &str| {
            let (parent, key) = pointer.rsplit_once('/').expect("a pointer has a slash");
            let key = key.replace("~1", "/").replace("~0", "~");
            (parent.to_owned(), key)
        };
        match change {
            Change::Set(at, index) => {
                if let Some(node) = value.pointer_mut(at.get::<String>(&all)) {
                    *node = values()[*index].clone();
                }
            }
            Change::Copy(at, from) => {
                let copy = value.pointer(from.get::<String>(&all)).cloned();
                if let (Some(node), Some(copy)) = (value.pointer_mut(at.get::<String>(&all)), copy)
                {
                    *node = copy;
                }
            }
            Change::Remove(at) => {
                let (parent, key) = split(at.get::<String>(&all));
                match value.pointer_mut(&parent) {
                    Some(Value::Array(items)) => {
                        items.remove(key.parse().expect("an index"));
                    }
                    Some(Value::Object(fields)) => {
                        fields.shift_remove(&key);
                    }
                    _ => {}
                }
            }
            Change::Double(at) => {
                let (parent, key) = split(at.get::<String>(&all));
                match value.pointer_mut(&parent) {
                    Some(Value::Array(items)) => {
                        let twin = items[key.parse::<usize>().expect("an index")].clone();
                        items.push(twin);
                    }
                    Some(Value::Object(fields)) => {
                        let twin = fields[&key].clone();
                        fields.insert(format!("{key}2"), twin);
                    }
                    _ => {}
                }
            }
        }
    }
    value
}

/// A document from the fixtures, changed in its structure and perhaps in its text.
fn json_like(documents: &'static [Vec<u8>]) -> impl Strategy<Value = Vec<u8>> {
    let text = prop_oneof![3 => Just(Vec::new()), 1 => edits(3)];
    (any::<Index>(), changes(4), text).prop_map(|(which, changes, edits)| {
        let original = which.get(documents);
        let document = serde_json::from_slice(original).expect("the fixture is JSON");
        edited(changed(document, &changes).to_string().into_bytes(), &edits)
    })
}

// The cache.

static S3_MANIFESTS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let mut documents: Vec<Vec<u8>> = ["max", "min", "multiarch"]
        .map(|name| fixture(&format!("s3-manifests/{name}.json")))
        .into();
    // One with the field that restores an image.
    for name in ["image-inline", "image-plain"] {
        documents.push(
            read(&fixtures().join(name))
                .to_s3()
                .expect("it can be written"),
        );
    }
    documents
});

static CACHE_CONFIGS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let parsed = S3_MANIFESTS
        .iter()
        .map(|manifest| CacheConfig::parse_s3(manifest).expect("the fixture is good"));
    parsed.map(|cache| cache.to_local()).collect()
});

static INLINE_RECORDS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let records = CACHE_CONFIGS.iter().map(|config| {
        let config: Value = serde_json::from_slice(config).expect("JSON");
        let records = config.get("records").cloned().unwrap_or(json!([]));
        records.to_string().into_bytes()
    });
    records.collect()
});

fn read(folder: &Path) -> CacheConfig {
    let layout = Layout::open(folder, Duration::ZERO).expect("a layout");
    let root = layout.select(&Selection::Default).expect("one entry");
    layout
        .read_cache(&root, &Progress::silent())
        .expect("the fixture is good")
}

fn annotations(diff_id: Digest) -> LayerAnnotations {
    LayerAnnotations {
        media_type: "application/vnd.oci.image.layer.v1.tar".into(),
        diff_id,
        size: 1,
        created_at: Time::UNKNOWN,
    }
}

/// What must hold for every accepted cache.
fn check(cache: &CacheConfig, gone: &[Index]) {
    let written = cache.to_s3().expect("it can be written");
    let again = CacheConfig::parse_s3(&written).expect("what we write, we read");
    assert_eq!(&again, cache);
    let mut valid = vec![cache.min(), cache.clone().sorted()];
    if !cache.layers.is_empty() {
        let missing: BTreeSet<Digest> = gone.iter().map(|at| at.get(&cache.layers).blob).collect();
        let (left, _) = cache.without_blobs(&missing);
        assert!(
            left.layers
                .iter()
                .all(|layer| !missing.contains(&layer.blob))
        );
        valid.push(left);
    }
    valid.push(CacheConfig::merged(vec![cache.clone(), cache.clone()]));
    for cache in valid {
        let written = cache.to_s3().expect("it can be written");
        CacheConfig::parse_s3(&written).expect("it is still a valid cache");
        if cache.blobs().is_ok() {
            Documents::of(&cache).expect("it can be written into a layout");
        }
    }
}

proptest! {
    #[test]
    fn cache_manifest_of_s3(
        bytes in json_like(&S3_MANIFESTS),
        gone in prop::collection::vec(any::<Index>(), 0..3),
    ) {
        if let Ok(cache) = CacheConfig::parse_s3(&bytes) {
            check(&cache, &gone);
        }
    }

    #[test]
    fn cache_config_of_a_layout(bytes in json_like(&CACHE_CONFIGS)) {
        let parse = |bytes: &[u8]| CacheConfig::parse_local(bytes, |_, blob| Ok(annotations(*blob)));
        if let Ok(cache) = parse(&bytes) {
            let again = parse(&cache.to_local()).expect("what we write, we read");
            prop_assert_eq!(again, cache);
        }
    }

    #[test]
    fn inline_cache_of_an_image(bytes in json_like(&INLINE_RECORDS), count in 0..12u8) {
        let layers: Vec<(Digest, LayerAnnotations)> = (0..count)
            // Two layers can share a blob.
            .map(|n| (Digest::of(&[n / 2]), annotations(Digest::of(&[n]))))
            .collect();
        if let Ok(cache) = CacheConfig::from_inline(&bytes, &layers) {
            check(&cache, &[]);
        }
    }
}

// A layout.

type Files = BTreeMap<String, Vec<u8>>;

static LAYOUTS: LazyLock<Vec<Files>> = LazyLock::new(|| {
    let names = [
        "local-max",
        "local-index",
        "local-docker",
        "local-zstd",
        "local-multiarch",
        "image-plain",
        "image-inline",
        "image-multiarch",
    ];
    let read = names.iter().map(|name| {
        let folder = fixtures().join(name);
        let mut files = Files::new();
        files.insert("index.json".into(), fixture(&format!("{name}/index.json")));
        for entry in std::fs::read_dir(folder.join("blobs/sha256")).expect("it has blobs") {
            let path = entry.expect("an entry").path();
            let hex = path
                .file_name()
                .expect("a name")
                .to_string_lossy()
                .into_owned();
            files.insert(hex, std::fs::read(path).expect("a blob"));
        }
        files
    });
    read.collect()
});

fn put(files: &mut Files, descriptor: &mut Value, document: &[u8]) {
    let digest = Digest::of(document);
    files.insert(digest.hex(), document.to_vec());
    descriptor["digest"] = json!(digest);
    descriptor["size"] = json!(document.len());
}

fn blob_of(files: &Files, descriptor: &Value) -> Option<Value> {
    let hex = descriptor["digest"].as_str()?.strip_prefix("sha256:")?;
    serde_json::from_slice(files.get(hex)?).ok()
}

/// Changes the document with index `at` that the root refers to, the root, and the index, and updates
/// each reference to what changed.
fn rebuilt(
    files: &Files,
    at: Index,
    [below, root, index]: &[Vec<Change>; 3],
    edits: &[Edit],
) -> Files {
    let mut files = files.clone();
    let mut top: Value = serde_json::from_slice(&files["index.json"]).expect("JSON");
    let mut manifest = blob_of(&files, &top["manifests"][0]).expect("the root is there");
    let mut pointers = vec!["/config".to_owned()];
    let entries = manifest["manifests"].as_array().map_or(0, Vec::len);
    pointers.extend((0..entries).map(|entry| format!("/manifests/{entry}")));
    let pointer = at.get(&pointers);
    if let Some(descriptor) = manifest.pointer(pointer)
        && let Some(document) = blob_of(&files, descriptor)
    {
        let document = edited(changed(document, below).to_string().into_bytes(), edits);
        let mut descriptor = descriptor.clone();
        put(&mut files, &mut descriptor, &document);
        *manifest.pointer_mut(pointer).expect("it was there") = descriptor;
    }
    let manifest = changed(manifest, root).to_string().into_bytes();
    let mut entry = top["manifests"][0].clone();
    put(&mut files, &mut entry, &manifest);
    top["manifests"][0] = entry;
    let top = changed(top, index).to_string().into_bytes();
    files.insert("index.json".into(), top);
    files
}

fn write(files: &Files) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let blobs = folder.path().join("blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("a directory can be made");
    let version = r#"{"imageLayoutVersion":"1.0.0"}"#;
    std::fs::write(folder.path().join("oci-layout"), version).expect("a file can be written");
    for (name, bytes) in files {
        let path = match name.as_str() {
            "index.json" => folder.path().join(name),
            hex => blobs.join(hex),
        };
        std::fs::write(path, bytes).expect("a file can be written");
    }
    folder
}

/// For tests that write and sync files in every case.
fn on_disk() -> ProptestConfig {
    let mut config = ProptestConfig::default();
    config.cases = config.cases.div_ceil(10);
    config
}

proptest! {
    #![proptest_config(on_disk())]

    #[test]
    fn documents_of_a_layout(
        which in any::<Index>(),
        at in any::<Index>(),
        below in changes(3),
        root in changes(2),
        index in prop_oneof![4 => Just(Vec::new()), 1 => changes(2)],
        edits in prop_oneof![4 => Just(Vec::new()), 1 => edits(2)],
    ) {
        let files = rebuilt(which.get(&LAYOUTS), at, &[below, root, index], &edits);
        let folder = write(&files);
        let layout = Layout::open(folder.path(), Duration::ZERO).expect("it has all that a layout has");
        if let Ok(root) = layout.select(&Selection::Default)
            && let Ok(cache) = layout.read_cache(&root, &Progress::silent())
        {
            check(&cache, &[]);
            let _ = layout.check_complete(&root);
        }
    }

    #[test]
    fn index_of_a_layout(
        which in any::<Index>(),
        changes in changes(4),
        edits in edits(3),
        tag in "[a-z\u{1b}\u{202e}/.\\\\]{0,8}",
    ) {
        let mut files = which.get(&LAYOUTS).clone();
        let index: Value = serde_json::from_slice(&files["index.json"]).expect("JSON");
        let index = edited(changed(index, &changes).to_string().into_bytes(), &edits);
        files.insert("index.json".into(), index);
        let folder = write(&files);
        let layout = Layout::open(folder.path(), Duration::ZERO).expect("it has all that a layout has");
        for selection in [Selection::Default, Selection::Tag(tag.clone())] {
            if let Err(error) = layout.select(&selection) {
                let said = format!("{error:#}");
                prop_assert!(said.len() < 20_000, "{} bytes", said.len());
            }
        }
        // Whatever was there: the new tag can be found, or the index is refused and unchanged.
        let before = std::fs::read(folder.path().join("index.json")).expect("the index");
        let root = read(&fixtures().join("local-min"));
        let written = Documents::of(&root).expect("a good cache");
        layout
            .write_document(&written.descriptor.digest, &written.manifest)
            .expect("it can be written");
        let blobs = BTreeMap::from([(written.descriptor.digest, written.descriptor.size)]);
        match layout.publish_tag("fuzz", &written.descriptor, &blobs) {
            Ok(tagged) => {
                prop_assert_eq!(tagged, Tagged::Done);
                let found = layout.select(&Selection::Tag("fuzz".into())).expect("it is there");
                prop_assert_eq!(found.digest, written.descriptor.digest);
            }
            Err(_) => {
                let after = std::fs::read(folder.path().join("index.json")).expect("the index");
                prop_assert_eq!(before, after);
            }
        }
    }
}

// A listing.

/// A store that lists what it was told to, and holds nothing.
struct Lister {
    /// Digests on each page, over and over; the listing ends with them if `ends`.
    pages: Vec<Vec<Digest>>,
    ends: bool,
    calls: AtomicUsize,
    retry: RetryPolicy,
}

fn unsupported<T>() -> StoreResult<T> {
    Err(StoreError {
        kind: Kind::Unsupported,
        status: None,
        code: None,
        message: "not done here".into(),
        located: false,
    })
}

#[async_trait]
impl Store for Lister {
    async fn head(&self, _: &str) -> StoreResult<Option<ObjectInfo>> {
        Ok(None)
    }
    async fn copy(&self, _: (&str, &str), _: &str, _: &ObjectInfo) -> StoreResult<bool> {
        unsupported()
    }
    async fn delete(&self, _: &[String]) -> StoreResult<Vec<StoreResult<()>>> {
        unsupported()
    }
    async fn delete_unchanged(&self, _: &[(String, String)]) -> StoreResult<Vec<StoreResult<()>>> {
        unsupported()
    }
    async fn lifecycle(&self) -> StoreResult<Option<String>> {
        unsupported()
    }
    async fn set_lifecycle(&self, _: &str) -> StoreResult<()> {
        unsupported()
    }
    async fn list(&self, prefix: &str, _: Option<&str>) -> StoreResult<Page> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let page = &self.pages[call % self.pages.len()];
        let base = prefix.strip_suffix("sha256:").unwrap_or(prefix);
        let info = ObjectInfo {
            size: 1,
            last_modified: None,
            etag: None,
            storage_class: None,
        };
        let objects = page
            .iter()
            .map(|digest| (format!("{base}{digest}"), info.clone()));
        Ok(Page {
            objects: objects.collect(),
            next: (!self.ends || call + 1 < self.pages.len()).then(|| call.to_string()),
        })
    }
    async fn get(
        &self,
        _: &str,
        _: Option<Range<u64>>,
        _: Option<&str>,
    ) -> StoreResult<Option<Response>> {
        unsupported()
    }
    async fn put(&self, _: &str, _: Arc<dyn UploadBody>) -> StoreResult<()> {
        unsupported()
    }
    async fn touch(&self, _: &str, _: &ObjectInfo) -> StoreResult<bool> {
        unsupported()
    }
    async fn create_upload(&self, _: &str, _: Option<&ObjectInfo>) -> StoreResult<String> {
        unsupported()
    }
    async fn upload_part(
        &self,
        _: &str,
        _: &str,
        _: u32,
        _: Arc<dyn UploadBody>,
    ) -> StoreResult<String> {
        unsupported()
    }
    async fn copy_part(
        &self,
        _: Option<(&str, &str)>,
        _: &str,
        _: &str,
        _: u32,
        _: Range<u64>,
        _: Option<&str>,
    ) -> StoreResult<String> {
        unsupported()
    }
    async fn complete_upload(&self, _: &str, _: &str, _: &[Part]) -> StoreResult<()> {
        unsupported()
    }
    async fn abort_upload(&self, _: &str, _: &str) -> StoreResult<()> {
        unsupported()
    }
    async fn list_after(&self, _: &str, _: &str) -> StoreResult<Page> {
        unsupported()
    }
    async fn list_uploads(&self, _: &str) -> StoreResult<Vec<Upload>> {
        unsupported()
    }
    async fn list_parts(&self, _: &str, _: &str) -> StoreResult<Vec<Part>> {
        unsupported()
    }
    fn may_hold_unknown_upload(&self, _: &str) -> bool {
        false
    }
    fn outside(&self, text: &str) -> String {
        text.to_owned()
    }
    fn connection(&self) -> Connection {
        Connection {
            url: String::new(),
            path_style: false,
            credentials: None,
            clock_ahead: None,
        }
    }
    fn requests(&self) -> u64 {
        0
    }
    fn retries(&self) -> &RetryPolicy {
        &self.retry
    }
}

proptest! {
    #[test]
    fn pages_of_a_listing(
        pages in prop::collection::vec(prop::collection::vec(any::<u16>(), 0..5), 1..6),
        wanted in prop::collection::btree_set(any::<u16>(), 0..200),
        highest in any::<bool>(),
        ends in any::<bool>(),
    ) {
        let digest = |n: u16| -> Digest {
            let text = format!("sha256:{n:04x}{}", "0".repeat(60));
            text.parse().expect("a digest")
        };
        let mut wanted: BTreeSet<Digest> = wanted.into_iter().map(digest).collect();
        if highest {
            // No page ever reaches it.
            wanted.insert(format!("sha256:{}", "f".repeat(64)).parse().expect("a digest"));
        }
        let store = Arc::new(Lister {
            pages: pages.into_iter().map(|page| page.into_iter().map(digest).collect()).collect(),
            ends,
            calls: AtomicUsize::new(0),
            retry: RetryPolicy::new(config::RetryMode::Standard, 1, Duration::ZERO, |_| {}),
        });
        let spec = "type=s3,region=eu-west-1,bucket=cache";
        let config = spec::cache_from(spec, &|_| None).expect("a good spec").config;
        let bucket = Bucket::new(store.clone(), &config, &Progress::silent());
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let found = runtime
            .block_on(bucket.survey(wanted.iter().copied(), Certainty::Known))
            .expect("nothing fails here");
        prop_assert!(found.keys().all(|digest| wanted.contains(digest)));
        let calls = store.calls.load(Ordering::Relaxed);
        prop_assert!(calls <= 64, "{calls} pages for {} blobs", wanted.len());
    }
}

// Blobs, digests, times.

static COMPRESSED: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let content: Vec<u8> = (0..3000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
    let gzip = |bytes: &[u8]| {
        let level = flate2::Compression::fast();
        let mut encoder = flate2::GzBuilder::new()
            .filename("layer.tar")
            .comment("c")
            .extra(vec![1, 2, 3])
            .write(Vec::new(), level);
        encoder.write_all(bytes).expect("memory takes it");
        encoder.finish().expect("memory takes it")
    };
    let zstd = |level| zstd::encode_all(content.as_slice(), level).expect("memory takes it");
    vec![
        gzip(&content),
        [gzip(&content[..100]), gzip(&content[100..])].concat(),
        zstd(1),
        zstd(19),
        [b"\x5e\x2a\x4d\x18\x03\x00\x00\x00abc".to_vec(), zstd(3)].concat(),
        content.clone(),
    ]
});

/// The limit for a decompression bomb that a mutation happened to make.
struct Little<'a>(&'a [u8]);

impl std::io::Read for Little<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = buffer.len().min(7);
        self.0.read(&mut buffer[..length])
    }
}

proptest! {
    #[test]
    fn compressed_blobs(which in any::<Index>(), edits in edits(4), tail in prop::collection::vec(any::<u8>(), 0..8)) {
        let mut bytes = edited(which.get(&COMPRESSED).clone(), &edits);
        bytes.extend(tail);
        let whole = diff_id::compute(bytes.as_slice());
        let little = diff_id::compute(Little(&bytes));
        prop_assert_eq!(whole.ok(), little.ok(), "how the bytes come must not matter");
    }

    #[test]
    fn digests(text in prop_oneof!["sha256:[0-9a-f]{64}", "(sha(256|512):)?[0-9a-fA-F/.]{60,66}", ".{0,80}"]) {
        match text.parse::<Digest>() {
            Ok(digest) => {
                prop_assert_eq!(digest.to_string(), text);
                prop_assert!(digest.hex().bytes().all(|c| c.is_ascii_hexdigit()) && digest.hex().len() == 64);
            }
            Err(error) => {
                prop_assert!(!error.to_string().contains(char::is_control));
            }
        }
    }

    #[test]
    fn times(text in prop_oneof![
        "[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-6][0-9]:[0-6][0-9](\\.[0-9]{0,12})?(Z|[-+][0-2][0-9]:[0-6][0-9])",
        "[-+0-9TZtz:. ]{0,40}",
        ".{0,40}",
    ]) {
        if let Ok(time) = text.parse::<Time>() {
            let written = time.to_string();
            prop_assert_eq!(written.parse::<Time>(), Ok(time), "{} was written {}", text, written);
        }
    }
}

// Specs.

const SECRET: &str = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLE";
const TOKEN: &str = "FwoGZXIvYXdzEBYaDHqaJ0IsessionTOKEN";

fn specs() -> Vec<String> {
    let keys = format!("access_key_id=AKID,secret_access_key={SECRET},session_token={TOKEN}");
    vec![
        format!("type=s3,region=us-east-1,bucket=cache,{keys},mode=max"),
        format!("type=s3,{keys},region=us-east-1,bucket=cache,name=a;b,touch_refresh=1h30m"),
        format!(
            "\"type=s3\",bucket=cache,\"prefix=a,b\",{keys},region=eu-west-1,retry_max_attempts=3"
        ),
        format!(
            "type=s3,bucket=cache,region=eu-west-1,endpoint_url=http://user:{SECRET}@h:1/p,use_path_style=1"
        ),
        format!(
            "type=s3,bucket=cache,region=eu-west-1,endpoint_url=https://h/,{keys},ignore-error=true"
        ),
    ]
}

proptest! {
    #[test]
    fn specs_of_any_kind(which in any::<Index>(), edits in edits(4)) {
        let spec = edited(which.get(&specs()).clone().into_bytes(), &edits);
        let spec = String::from_utf8_lossy(&spec);
        let _ = spec::cache_to(&spec, &|_| None);
        let _ = spec::cache_from(&spec, &|_| None);
    }

    /// At most one typing error: a character lost, doubled or wrong.
    #[test]
    fn specs_with_a_slip_show_no_secret(
        which in any::<Index>(),
        at in any::<Index>(),
        slip in prop::option::of("[a-z,=\":; \n\u{1b}]"),
        replaces in any::<bool>(),
    ) {
        let mut spec: Vec<char> = which.get(&specs()).chars().collect();
        let at = at.index(spec.len());
        if replaces || slip.is_none() {
            spec.remove(at);
        }
        for c in slip.iter().flat_map(|slip| slip.chars()) {
            spec.insert(at, c);
        }
        let spec: String = spec.into_iter().collect();
        let mut said = Vec::new();
        match spec::cache_to(&spec, &|_| None) {
            Ok(parsed) => {
                // What the program shows of an accepted spec.
                said.push(format!("{:?}", parsed.config.s3.credentials));
                said.extend(parsed.warnings);
            }
            Err(error) => said.push(format!("{error:#}")),
        }
        match spec::cache_from(&spec, &|_| None) {
            Ok(parsed) => said.extend(parsed.warnings),
            Err(error) => said.push(format!("{error:#}")),
        }
        // Half a secret is still a secret.
        for secret in [SECRET, TOKEN] {
            for part in [&secret[..12], &secret[12..24], &secret[secret.len() - 12..]] {
                for text in &said {
                    prop_assert!(!text.contains(part), "{spec:?} says {text:?}");
                }
            }
        }
    }
}
