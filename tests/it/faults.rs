//! Each request of an export and an import fails once, and from each request on all of them fail, in
//! every way that the server and a wrapper around the store know. After each run the test checks what
//! is left behind, and runs the command again if no other run has left the same.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use layercache::cache::CacheConfig;
use layercache::cache::digest::Digest;
use layercache::config::Task;
use layercache::retry::RetryPolicy;
use layercache::store::{
    Connection, Kind, ObjectInfo, Page, Part, Response, Store, StoreError, StoreResult, Upload,
    UploadBody,
};
use layercache::transfer::limits::Limits;
use tempfile::TempDir;

use crate::aftermath::soak;
use crate::inside::{self, Inside};
use crate::program::{copy_of, files, fixture};
use crate::server::{Fault, Server};

/// touch_refresh, unless it is set.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Servers and runs in parallel: most of the time is spent waiting.
const SIDE_BY_SIDE: usize = 6;

/// A run, and where it takes place.
struct Scenario {
    name: &'static str,
    limits: Limits,
    work: Work,
}

enum Work {
    /// A layout, and how to prepare the bucket.
    Export(&'static str, fn(&Server)),
    /// The layout whose export is imported, and the layout that exists before.
    Import(&'static str, Option<&'static str>),
}

pub fn small() -> Limits {
    Limits {
        multipart: 100,
        part: 5000,
        copy: 1000,
        copy_part: 5000,
        piece: 3000,
        ..Limits::default()
    }
}

fn scenarios() -> Vec<Scenario> {
    let scenario = |name, limits, work| Scenario { name, limits, work };
    vec![
        scenario(
            "export",
            Limits::default(),
            Work::Export("local-multiarch", |_| {}),
        ),
        scenario(
            "export in parts",
            small(),
            Work::Export("local-multiarch", |_| {}),
        ),
        scenario(
            "export that refreshes, in parts too",
            small(),
            Work::Export("local-multiarch", |server| {
                put_blobs(server, "local-multiarch");
                server.age_all(Duration::from_secs(48 * 3600));
            }),
        ),
        scenario("import", Limits::default(), Work::Import("local-max", None)),
        scenario(
            "import in pieces over another cache",
            small(),
            Work::Import("local-multiarch", Some("local-min")),
        ),
    ]
}

pub fn put_blobs(server: &Server, layout: &str) {
    for (name, bytes) in files(&fixture(layout)) {
        let hex = name.strip_prefix("blobs/sha256/").unwrap_or_default();
        if let Ok(digest) = format!("sha256:{hex}").parse::<Digest>() {
            server.put(&format!("blobs/{digest}"), bytes);
        }
    }
}

impl Scenario {
    /// Prepares the bucket. Returns the task, and the layout that an import fills.
    fn prepare(&self, server: &Server) -> (Task, Option<TempDir>) {
        server.clear();
        let spec = server.spec("mode=max,retry_max_attempts=4");
        match &self.work {
            Work::Export(layout, ready) => {
                ready(server);
                (inside::export(&spec, &fixture(layout)), None)
            }
            Work::Import(cache, before) => {
                put_blobs(server, cache);
                let manifest = match *cache {
                    "local-max" => "max.json",
                    _ => "multiarch.json",
                };
                server.put("manifests/buildkit", crate::program::s3_manifest(manifest));
                let layout = match before {
                    Some(before) => copy_of(&fixture(before)),
                    None => tempfile::tempdir().expect("a temporary directory"),
                };
                (inside::import(&spec, layout.path()), Some(layout))
            }
        }
    }

    /// What the run leaves behind when nothing goes wrong, and its number of requests.
    fn reference(&self, server: &Server, runtime: &tokio::runtime::Runtime) -> Reference {
        let (task, layout) = self.prepare(server);
        let before = layout.as_ref().map(|layout| files(layout.path()));
        let calls = Arc::new(Plan::never());
        let counted = Arc::clone(&calls);
        let mut inside = Inside::fast();
        inside.limits = self.limits;
        inside.wrap = Some(Arc::new(move |store| {
            Arc::new(FaultStore {
                store,
                plan: Arc::clone(&counted),
            })
        }));
        let done = runtime.block_on(inside.run(&task));
        done.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        Reference {
            requests: server.log().len(),
            calls: calls.asked.load(Ordering::SeqCst),
            objects: server.objects(),
            before: before.unwrap_or_default(),
            files: layout
                .map(|layout| files(layout.path()))
                .unwrap_or_default(),
        }
    }
}

struct Reference {
    requests: usize,
    calls: usize,
    objects: BTreeMap<String, Bytes>,
    before: BTreeMap<String, Vec<u8>>,
    files: BTreeMap<String, Vec<u8>>,
}

/// How a run must end.
#[derive(Clone, Copy, PartialEq)]
pub enum End {
    Succeeds,
    Fails,
    Either,
}

/// One run with one fault.
struct Case<'a> {
    scenario: &'a Scenario,
    reference: &'a Reference,
    what: String,
    inside: Inside,
    rule: Option<(Fault, Range<usize>)>,
    end: End,
    /// The fault lasts, so the id of an upload may never have arrived, or aborting it failed as well.
    lasting: bool,
    /// The store starts uploads while it reports them as unsupported, and does not list them: no client
    /// could find them.
    lies: bool,
}

impl Case<'_> {
    fn run(
        &self,
        server: &Server,
        runtime: &tokio::runtime::Runtime,
        states: &States,
    ) -> Result<(), String> {
        let (task, layout) = self.scenario.prepare(server);
        if let Some((fault, hit)) = self.rule.clone() {
            server.fail(move |asked| hit.contains(&asked.index).then(|| fault.clone()));
        }
        let done = runtime.block_on(self.inside.run(&task));
        server.settle();
        match (&done, self.end) {
            (Err(error), End::Succeeds) => return Err(format!("it failed: {error}")),
            (Ok(_), End::Fails) => return Err("it succeeded".into()),
            _ => {}
        }
        let left = |what: &str| {
            let how = match &done {
                Ok(_) => "a run that succeeded".to_owned(),
                Err(error) => format!("a run that failed ({error})"),
            };
            format!("after {how}: {what}")
        };
        self.look_at_bucket(server).map_err(|what| left(&what))?;
        if server.uploads() > 0 && !self.lasting {
            return Err(left("a multipart upload is left"));
        }
        if let Some(layout) = &layout {
            self.look_at_layout(layout.path())
                .map_err(|what| left(&what))?;
        }
        if done.is_ok() && self.end == End::Succeeds {
            self.compare(server, layout.as_ref())
                .map_err(|what| left(&what))?;
        }

        let files = layout.as_ref().map(|layout| files(layout.path()));
        if !states.are_new(self.scenario.name, server, &files.unwrap_or_default()) {
            return Ok(());
        }
        server.reset_faults();
        // An upload without parts could belong to any client, so it is left alone for an hour.
        server.age_uploads(Duration::from_secs(2 * 60 * 60));
        let mut again = Inside::fast();
        again.limits = self.scenario.limits;
        runtime
            .block_on(again.run(&task))
            .map_err(|error| left(&format!("the next run failed: {error}")))?;
        server.settle();
        self.compare(server, layout.as_ref())
            .map_err(|what| left(&format!("after the next run: {what}")))?;
        if server.uploads() > 0 && !self.lies {
            return Err(left("after the next run: a multipart upload is left"));
        }
        Ok(())
    }

    fn look_at_bucket(&self, server: &Server) -> Result<(), String> {
        let objects = server.objects();
        for (key, body) in &objects {
            if let Some(digest) = key.strip_prefix("blobs/") {
                if Digest::of(body).to_string() != digest {
                    return Err(format!("{key} holds other bytes"));
                }
            } else {
                let cache = CacheConfig::parse_s3(body).map_err(|e| format!("{key}: {e:#}"))?;
                for layer in &cache.layers {
                    if !objects.contains_key(&format!("blobs/{}", layer.blob)) {
                        return Err(format!("{key} names {}, which is absent", layer.blob));
                    }
                }
            }
        }
        Ok(())
    }

    fn look_at_layout(&self, root: &Path) -> Result<(), String> {
        let files = files(root);
        let mut blobs = BTreeMap::new();
        for (name, bytes) in &files {
            if let Some(hex) = name.strip_prefix("blobs/sha256/")
                && !hex.is_empty()
            {
                if Digest::of(bytes).hex() != hex {
                    return Err(format!("{name} holds other bytes"));
                }
                blobs.insert(format!("sha256:{hex}"), bytes);
            }
        }
        let index = files.get("index.json");
        // With a blob dropped because of a 404 it is a third one, which must still be complete.
        let known = index == self.reference.before.get("index.json")
            || index == self.reference.files.get("index.json");
        if !known && self.end != End::Either {
            return Err("index.json is neither the old nor the new one".into());
        }
        let Some(index) = index else { return Ok(()) };
        let mut open = vec![index];
        while let Some(document) = open.pop() {
            let json: serde_json::Value =
                serde_json::from_slice(document).map_err(|e| format!("a document: {e}"))?;
            let listed = ["manifests", "layers"]
                .into_iter()
                .filter_map(|list| json[list].as_array())
                .flatten();
            for entry in listed.chain(json.get("config")) {
                let digest = entry["digest"].as_str().unwrap_or_default();
                let Some(bytes) = blobs.get(digest) else {
                    return Err(format!("index.json leads to {digest}, which is absent"));
                };
                if entry["size"] != bytes.len() {
                    return Err(format!("{digest} has another size than is said"));
                }
                let kind = entry["mediaType"].as_str().unwrap_or_default();
                if kind.contains("manifest") || kind.contains("index") {
                    open.push(bytes);
                }
            }
        }
        Ok(())
    }

    /// Compares with the undisturbed run. An earlier import of a reduced cache may have left its own
    /// documents.
    fn compare(&self, server: &Server, layout: Option<&TempDir>) -> Result<(), String> {
        if server.objects() != self.reference.objects {
            return Err("the bucket holds something else than it should".into());
        }
        let Some(layout) = layout else { return Ok(()) };
        let found = files(layout.path());
        for (name, bytes) in &self.reference.files {
            if found.get(name) != Some(bytes) {
                return Err(format!("{name} is not what it should be"));
            }
        }
        let extra = found
            .keys()
            .find(|name| !self.reference.files.contains_key(*name) && !name.starts_with("blobs/"));
        match extra {
            Some(name) => Err(format!("{name} is left")),
            None => Ok(()),
        }
    }
}

/// What runs have left behind. What the next run makes of that does not depend on how it came about, so
/// each state is continued once; in a soak, each time.
#[derive(Default)]
pub struct States(Mutex<BTreeSet<Digest>>);

impl States {
    /// Whether no run of `scenario` has left the server and the layout like this. Their blobs have been
    /// found to match their names.
    pub fn are_new(
        &self,
        scenario: &str,
        server: &Server,
        layout: &BTreeMap<String, Vec<u8>>,
    ) -> bool {
        let mut state = scenario.as_bytes().to_vec();
        let mut add = |name: &str, bytes: &[u8]| {
            let bytes = match name.starts_with("blobs/") {
                true => b"",
                false => bytes,
            };
            state.extend(format!("\0{name} {} ", bytes.len()).as_bytes());
            state.extend(bytes);
        };
        for (key, body) in server.objects() {
            let age = server.last_modified(&key).map(|time| time.elapsed());
            let is_old = age.is_some_and(|age| age.is_ok_and(|age| age > DAY));
            add(&key, &body);
            add("old", if is_old { b"yes" } else { b"no" });
        }
        for (name, bytes) in layout {
            add(name, bytes);
        }
        let mut states = self.0.lock().expect("no thread panicked");
        // Which parts an upload holds is not looked at.
        states.insert(Digest::of(&state)) || server.uploads() > 0 || soak()
    }
}

/// Runs all cases, some in parallel, and fails with a list of those that failed.
fn run_all(cases: &[Case<'_>]) {
    let (next, states) = (AtomicUsize::new(0), States::default());
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE {
            scope.spawn(|| {
                let server = Server::builder().min_part(1).start();
                let runtime = inside::runtime();
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(at) else { break };
                    if let Err(why) = case.run(&server, &runtime, &states) {
                        let failure = format!("{}: {}: {why}", case.scenario.name, case.what);
                        failures.lock().expect("no thread panicked").push(failure);
                    }
                }
                runtime.shutdown_background();
            });
        }
    });
    let failures = failures.into_inner().expect("no thread panicked");
    let shown: Vec<&str> = failures.iter().take(40).map(String::as_str).collect();
    let states = states.0.into_inner().expect("no thread panicked");
    println!("{} cases ran and left {} states", cases.len(), states.len());
    assert!(
        failures.is_empty(),
        "{} of {} cases:\n{}",
        failures.len(),
        cases.len(),
        shown.join("\n")
    );
}

fn references() -> Vec<(Scenario, Reference)> {
    let server = Server::builder().min_part(1).start();
    let runtime = inside::runtime();
    scenarios()
        .into_iter()
        .map(|scenario| {
            let reference = scenario.reference(&server, &runtime);
            (scenario, reference)
        })
        .collect()
}

/// A fault of the server, how a run ends that meets it once, and how one ends that meets it from some
/// request to the end.
pub fn wire_faults() -> Vec<(Fault, End, End)> {
    use End::{Either, Fails, Succeeds};
    let tick = Duration::from_millis(30);
    vec![
        (Fault::Status(500, "InternalError"), Succeeds, Fails),
        (Fault::Status(503, "SlowDown"), Succeeds, Fails),
        (Fault::Status(503, "ServiceUnavailable"), Succeeds, Fails),
        (Fault::Status(429, "TooManyRequests"), Succeeds, Fails),
        // A HEAD has no body, so the code that makes it retryable is not visible.
        (Fault::Status(400, "RequestTimeout"), Either, Fails),
        (Fault::StatusEmpty(502), Succeeds, Fails),
        (Fault::StatusEmpty(504), Succeeds, Fails),
        (
            Fault::Throttle {
                retry_after: Some(0),
            },
            Succeeds,
            Fails,
        ),
        (Fault::ErrorIn200("InternalError"), Succeeds, Fails),
        (Fault::ErrorIn200("SlowDown"), Succeeds, Fails),
        // Refusals that a retry would not change.
        (Fault::Status(400, "InvalidRequest"), Either, Fails),
        (Fault::Status(403, "AccessDenied"), Either, Fails),
        (Fault::StatusEmpty(403), Either, Fails),
        (Fault::StatusEmpty(404), Either, Either),
        (Fault::Status(404, "NoSuchBucket"), Either, Fails),
        (
            Fault::Redirect {
                region: "eu-west-1",
            },
            Either,
            Fails,
        ),
        (Fault::EarlyAnswer(403), Either, Fails),
        // No response, or half of one.
        (Fault::EarlyAnswer(503), Succeeds, Fails),
        (Fault::Reset, Succeeds, Fails),
        (Fault::ResetBeforeReading, Succeeds, Fails),
        (Fault::ResetWhileReading(50), Succeeds, Fails),
        (Fault::Hang, Succeeds, Fails),
        (Fault::ApplyThenReset, Succeeds, Fails),
        (
            Fault::ApplyThenStatus(500, "InternalError"),
            Succeeds,
            Fails,
        ),
        (Fault::ResetMidBody(60), Succeeds, Either),
        (Fault::Truncate(60), Succeeds, Either),
        // Wrong responses.
        (Fault::ShortLength, Succeeds, Either),
        (Fault::WrongLength, Succeeds, Either),
        (Fault::FlipByte(7), Succeeds, Either),
        (Fault::BadXml, Succeeds, Fails),
        (Fault::Html200, Succeeds, Fails),
        (Fault::Empty200, Succeeds, Fails),
        (Fault::EndlessBody { length: None }, Succeeds, Fails),
        (
            Fault::EndlessBody {
                length: Some(1 << 40),
            },
            Succeeds,
            Fails,
        ),
        // Slow or odd responses.
        (Fault::SlowDrip { bytes: 1, tick }, Succeeds, Either),
        (Fault::Delay(Duration::from_millis(5)), Succeeds, Succeeds),
        (Fault::NonAsciiHeader, Succeeds, Succeeds),
        (
            Fault::Header("x-amz-delete-marker", "perhaps"),
            Succeeds,
            Succeeds,
        ),
        (
            Fault::Header("x-amz-mp-parts-count", "many"),
            Succeeds,
            Succeeds,
        ),
    ]
}

#[test]
fn whatever_the_server_does_to_one_request_or_to_all_from_one_on_leaves_nothing_wrong() {
    // It matters little with which request a lasting fault starts.
    let step = if soak() { 1 } else { 4 };
    let references = references();
    let mut cases = Vec::new();
    for (scenario, reference) in &references {
        for (fault, once, always) in wire_faults() {
            let silent = matches!(fault, Fault::Hang | Fault::SlowDrip { .. });
            let mut inside = if silent {
                Inside::impatient()
            } else {
                Inside::fast()
            };
            inside.limits = scenario.limits;
            for at in 0..reference.requests {
                for (lasting, hit, end) in
                    [(false, at..at + 1, once), (true, at..usize::MAX, always)]
                {
                    if lasting && at % step != 0 {
                        continue;
                    }
                    cases.push(Case {
                        scenario,
                        reference,
                        what: format!("{fault:?} at request {hit:?}"),
                        inside: inside.clone(),
                        rule: Some((fault.clone(), hit)),
                        end,
                        lasting,
                        lies: false,
                    });
                }
            }
        }
    }
    assert!(cases.len() > 1000, "only {} cases", cases.len());
    run_all(&cases);
}

/// What a store does wrong with one call.
#[derive(Clone, Copy, Debug)]
enum StoreFault {
    Fail(Kind),
    DoneThenFail(Kind),
    /// The object is reported as absent.
    Vanished,
    /// A body fails halfway.
    BodyBreaks,
    /// A body ends halfway, as if it were complete.
    BodyEnds,
    /// A body does not end.
    BodyGoesOn,
    /// A body has other bytes.
    BodyWrong,
    /// An object is reported as larger than it is.
    SizeWrong,
}

/// Which calls go wrong, and how.
struct Plan {
    fault: StoreFault,
    hit: Range<usize>,
    asked: AtomicUsize,
}

impl Plan {
    fn never() -> Plan {
        Plan::new(StoreFault::Vanished, 0..0)
    }

    fn new(fault: StoreFault, hit: Range<usize>) -> Plan {
        Plan {
            fault,
            hit,
            asked: AtomicUsize::new(0),
        }
    }

    fn next(&self) -> Option<StoreFault> {
        let at = self.asked.fetch_add(1, Ordering::SeqCst);
        self.hit.contains(&at).then_some(self.fault)
    }
}

/// A store whose calls go wrong as planned.
struct FaultStore {
    store: Arc<dyn Store>,
    plan: Arc<Plan>,
}

fn error(kind: Kind) -> StoreError {
    StoreError {
        kind,
        status: None,
        code: None,
        message: format!("the test's store was told to fail ({kind:?})"),
        located: false,
    }
}

impl FaultStore {
    async fn call<T>(&self, call: impl Future<Output = StoreResult<T>>) -> StoreResult<T> {
        match self.plan.next() {
            Some(StoreFault::Fail(kind)) => Err(error(kind)),
            Some(StoreFault::DoneThenFail(kind)) => {
                call.await?;
                Err(error(kind))
            }
            _ => call.await,
        }
    }
}

#[async_trait]
impl Store for FaultStore {
    async fn head(&self, key: &str) -> StoreResult<Option<ObjectInfo>> {
        match self.plan.next() {
            Some(StoreFault::Fail(kind) | StoreFault::DoneThenFail(kind)) => Err(error(kind)),
            Some(StoreFault::Vanished) => Ok(None),
            Some(StoreFault::SizeWrong) => Ok(self.store.head(key).await?.map(|mut info| {
                info.size += 1;
                info
            })),
            _ => self.store.head(key).await,
        }
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        if_match: Option<&str>,
    ) -> StoreResult<Option<Response>> {
        let fault = self.plan.next();
        if let Some(StoreFault::Fail(kind) | StoreFault::DoneThenFail(kind)) = fault {
            return Err(error(kind));
        }
        if let Some(StoreFault::Vanished) = fault {
            return Ok(None);
        }
        let length = range.as_ref().map(|range| range.end - range.start);
        let Some(mut response) = self.store.get(key, range, if_match).await? else {
            return Ok(None);
        };
        let half = (length.or(response.size).unwrap_or(0) / 2) as usize;
        let first_half = |body: layercache::store::ByteStream| {
            body.scan(half, |left, chunk| {
                let chunk = chunk.map(|chunk| chunk.slice(..chunk.len().min(*left)));
                *left -= chunk.as_ref().map_or(0, Bytes::len);
                futures::future::ready(Some(chunk))
            })
        };
        response.body = match fault {
            Some(StoreFault::BodyBreaks) => first_half(response.body)
                .chain(futures::stream::once(async {
                    Err(std::io::ErrorKind::ConnectionReset.into())
                }))
                .boxed(),
            Some(StoreFault::BodyEnds) => first_half(response.body).boxed(),
            Some(StoreFault::BodyGoesOn) => response
                .body
                .chain(futures::stream::repeat_with(|| {
                    Ok(Bytes::from_static(&[b'+'; 64 << 10]))
                }))
                .boxed(),
            Some(StoreFault::BodyWrong) => response
                .body
                .map(|chunk| chunk.map(|chunk| Bytes::from(vec![b'?'; chunk.len()])))
                .boxed(),
            Some(StoreFault::SizeWrong) => {
                response.size = response.size.map(|size| size + 1);
                response.body
            }
            _ => response.body,
        };
        Ok(Some(response))
    }

    async fn put(&self, key: &str, body: Arc<dyn UploadBody>) -> StoreResult<()> {
        self.call(self.store.put(key, body)).await
    }

    async fn touch(&self, key: &str, info: &ObjectInfo) -> StoreResult<bool> {
        match self.plan.next() {
            Some(StoreFault::Fail(kind)) => Err(error(kind)),
            Some(StoreFault::DoneThenFail(kind)) => {
                self.store.touch(key, info).await?;
                Err(error(kind))
            }
            Some(StoreFault::Vanished) => Ok(false),
            _ => self.store.touch(key, info).await,
        }
    }

    async fn copy(&self, from: (&str, &str), key: &str, info: &ObjectInfo) -> StoreResult<bool> {
        self.call(self.store.copy(from, key, info)).await
    }

    async fn delete(&self, keys: &[String]) -> StoreResult<Vec<StoreResult<()>>> {
        self.call(self.store.delete(keys)).await
    }

    async fn delete_unchanged(
        &self,
        objects: &[(String, String)],
    ) -> StoreResult<Vec<StoreResult<()>>> {
        self.call(self.store.delete_unchanged(objects)).await
    }

    async fn lifecycle(&self) -> StoreResult<Option<String>> {
        self.call(self.store.lifecycle()).await
    }

    async fn set_lifecycle(&self, xml: &str) -> StoreResult<()> {
        self.call(self.store.set_lifecycle(xml)).await
    }

    async fn list(&self, prefix: &str, next: Option<&str>) -> StoreResult<Page> {
        self.call(self.store.list(prefix, next)).await
    }

    async fn list_after(&self, prefix: &str, after: &str) -> StoreResult<Page> {
        self.call(self.store.list_after(prefix, after)).await
    }

    async fn create_upload(&self, key: &str, touched: Option<&ObjectInfo>) -> StoreResult<String> {
        self.call(self.store.create_upload(key, touched)).await
    }

    async fn upload_part(
        &self,
        key: &str,
        upload: &str,
        number: u32,
        body: Arc<dyn UploadBody>,
    ) -> StoreResult<String> {
        self.call(self.store.upload_part(key, upload, number, body))
            .await
    }

    async fn copy_part(
        &self,
        from: Option<(&str, &str)>,
        key: &str,
        upload: &str,
        number: u32,
        range: Range<u64>,
        etag: Option<&str>,
    ) -> StoreResult<String> {
        self.call(self.store.copy_part(from, key, upload, number, range, etag))
            .await
    }

    async fn complete_upload(&self, key: &str, upload: &str, parts: &[Part]) -> StoreResult<()> {
        self.call(self.store.complete_upload(key, upload, parts))
            .await
    }

    async fn abort_upload(&self, key: &str, upload: &str) -> StoreResult<()> {
        self.call(self.store.abort_upload(key, upload)).await
    }

    async fn list_uploads(&self, prefix: &str) -> StoreResult<Vec<Upload>> {
        self.call(self.store.list_uploads(prefix)).await
    }

    async fn list_parts(&self, key: &str, upload: &str) -> StoreResult<Vec<Part>> {
        self.call(self.store.list_parts(key, upload)).await
    }

    fn may_hold_unknown_upload(&self, key: &str) -> bool {
        self.store.may_hold_unknown_upload(key)
    }

    fn outside(&self, text: &str) -> String {
        self.store.outside(text)
    }
    fn connection(&self) -> Connection {
        self.store.connection()
    }
    fn requests(&self) -> u64 {
        self.store.requests()
    }

    fn retries(&self) -> &RetryPolicy {
        self.store.retries()
    }
}

#[test]
fn whatever_a_store_does_with_one_call_or_with_all_from_one_on_leaves_nothing_wrong() {
    use StoreFault::{
        BodyBreaks, BodyEnds, BodyGoesOn, BodyWrong, DoneThenFail, Fail, SizeWrong, Vanished,
    };
    let kinds = [
        Kind::Denied,
        Kind::NoBucket,
        Kind::Changed,
        Kind::NoSuchUpload,
        Kind::Unsupported,
        Kind::Unavailable,
        Kind::LocalBody,
        Kind::Nonsense,
        Kind::Other,
    ];
    let bodies = [BodyBreaks, BodyEnds, BodyGoesOn, BodyWrong, SizeWrong];
    let references = references();
    let mut cases = Vec::new();
    for (scenario, reference) in &references {
        let imports = matches!(scenario.work, Work::Import(..));
        let faults = kinds
            .into_iter()
            .flat_map(|kind| [Fail(kind), DoneThenFail(kind)])
            .chain([Vanished])
            .chain(bodies.into_iter().filter(|_| imports));
        for fault in faults {
            for at in 0..reference.calls {
                for (lasting, hit) in [(false, at..at + 1), (true, at..usize::MAX)] {
                    let plan = Arc::new(Plan::new(fault, hit.clone()));
                    let mut inside = Inside::fast();
                    inside.limits = scenario.limits;
                    inside.wrap = Some(Arc::new(move |store| {
                        Arc::new(FaultStore {
                            store,
                            plan: Arc::clone(&plan),
                        })
                    }));
                    let end = match (fault, lasting) {
                        (BodyBreaks | BodyEnds | BodyWrong | SizeWrong, false) => End::Succeeds,
                        (Fail(Kind::Unavailable) | DoneThenFail(Kind::Unavailable), true) => {
                            End::Fails
                        }
                        _ => End::Either,
                    };
                    cases.push(Case {
                        scenario,
                        reference,
                        what: format!("{fault:?} at call {hit:?}"),
                        inside,
                        rule: None,
                        end,
                        lasting,
                        lies: lasting && matches!(fault, DoneThenFail(Kind::Unsupported)),
                    });
                }
            }
        }
    }
    assert!(cases.len() > 1000, "only {} cases", cases.len());
    run_all(&cases);
}
