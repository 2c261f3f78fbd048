//! Each request to S3 that a pull or a push through the endpoint needs fails once, and from each request
//! on all of them fail, in every way that the server knows. A client sees the right bytes or an error,
//! and S3 holds nothing that is wrong.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use layercache::bucket::Bucket;
use layercache::cache::digest::Digest;
use layercache::cli::spec;
use layercache::progress::Progress;
use layercache::s3::{Timing, connect_with};
use layercache::serve::{Endpoint, Served};
use serde_json::Value;

use super::client::{Client, Reply, try_request};
use crate::aftermath::{assert_store_is_sound, soak};
use crate::faults::{End, States, put_blobs, small, wire_faults};
use crate::inside::{self, Inside};
use crate::program::{files, fixture, s3_manifest};
use crate::server::{Fault, Server};

const LAYOUT: &str = "local-min";
const SIDE_BY_SIDE: usize = 6;

#[derive(Clone, Copy, PartialEq)]
enum Work {
    Pull,
    Push,
}

/// Runs `work` with an endpoint in this process.
fn with_endpoint<T: Send + 'static>(
    server: &Server,
    timing: Timing,
    runtime: &tokio::runtime::Runtime,
    work: impl FnOnce(Client) -> T + Send + 'static,
) -> T {
    runtime.block_on(async {
        let spec = server.spec("mode=max,retry_max_attempts=4");
        let target = spec::cache_to(&spec, &|_| None).expect("a spec").config;
        let progress = Progress::silent();
        let store = connect_with(&target.s3, progress.clone(), timing).await;
        let served = Served {
            bucket: Bucket::new(store.expect("a store"), &target.s3, &progress),
            source: true,
            target: Some(target),
        };
        let address = "127.0.0.1:0".parse().expect("an address");
        let endpoint = Endpoint::listen(address, vec![served], &progress, small());
        let endpoint = endpoint.await.expect("it listens");
        let secret = endpoint.serving.secret.text();
        let repository = format!("{secret}/{}", endpoint.serving.repositories[0].name);
        let client = Client::new(&endpoint.serving.address.to_string(), &repository);
        let working = async {
            let done = tokio::task::spawn_blocking(move || work(client));
            done.await.expect("the client does not panic")
        };
        endpoint.run(Box::pin(working)).await
    })
}

fn send(
    client: &Client,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Reply, String> {
    let path = match path.starts_with('/') {
        true => path.to_owned(),
        false => format!("/v2/{}/{path}", client.repository),
    };
    let reply = try_request(&client.host, &format!("{method} {path}"), headers, body);
    let reply = reply.ok_or_else(|| format!("{method} {path}: no response"))?;
    match reply.status {
        200..300 | 404 => Ok(reply),
        status => Err(format!("{method} {path}: {status} {}", reply.text())),
    }
}

fn found(reply: Reply) -> Result<Reply, String> {
    match reply.status {
        404 => Err("it is not there".to_owned()),
        _ => Ok(reply),
    }
}

/// Reads a blob as containerd does: goes on where it broke off.
fn read_blob(client: &Client, digest: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    for _ in 0..4 {
        let range = format!("bytes={}-", bytes.len());
        let headers = [("Range", range.as_str())];
        let headers = if bytes.is_empty() { &[][..] } else { &headers };
        let reply = found(send(
            client,
            "GET",
            &format!("blobs/{digest}"),
            headers,
            &[],
        )?)?;
        bytes.extend_from_slice(&reply.body);
        if reply.is_whole() {
            return Ok(bytes);
        }
    }
    Err("it breaks off again and again".to_owned())
}

fn pull(client: &Client) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let head = found(send(client, "HEAD", "manifests/latest", &[], &[])?)?;
    let digest = head.header("docker-content-digest").to_owned();
    let manifest = found(send(
        client,
        "GET",
        &format!("manifests/{digest}"),
        &[],
        &[],
    )?)?;
    let mut blobs = BTreeMap::new();
    let json: Value = serde_json::from_slice(&manifest.body).map_err(|e| e.to_string())?;
    let layers = json["layers"].as_array().into_iter().flatten();
    for blob in layers.chain(json.get("config")) {
        let digest = blob["digest"].as_str().unwrap_or_default();
        blobs.insert(digest.to_owned(), read_blob(client, digest)?);
    }
    blobs.insert(digest, manifest.body);
    Ok(blobs)
}

fn push(client: &Client, layout: &Path) -> Result<(), String> {
    let files = files(layout);
    let read = |digest: &str| files[&format!("blobs/{}", digest.replace(':', "/"))].clone();
    let index: Value = serde_json::from_slice(&files["index.json"]).map_err(|e| e.to_string())?;
    let root = index["manifests"][0]["digest"].as_str().unwrap_or_default();
    let manifest = read(root);
    let json: Value = serde_json::from_slice(&manifest).map_err(|e| e.to_string())?;
    let layers = json["layers"].as_array().into_iter().flatten();
    for blob in layers.chain(json.get("config")) {
        let digest = blob["digest"].as_str().unwrap_or_default();
        if send(client, "HEAD", &format!("blobs/{digest}"), &[], &[])?.status == 200 {
            continue;
        }
        let begun = found(send(client, "POST", "blobs/uploads/", &[], &[])?)?;
        let put = format!("{}?digest={digest}", begun.header("location"));
        found(send(client, "PUT", &put, &[], &read(digest))?)?;
    }
    let headers = [("Content-Type", super::client::IMAGE_MANIFEST)];
    found(send(
        client,
        "PUT",
        "manifests/latest",
        &headers,
        &manifest,
    )?)?;
    Ok(())
}

struct Case {
    work: Work,
    fault: Fault,
    hit: Range<usize>,
    end: End,
}

fn prepare(server: &Server, work: Work) {
    server.clear();
    if work == Work::Pull {
        put_blobs(server, LAYOUT);
        server.put("manifests/buildkit", s3_manifest("min.json"));
    }
}

/// Does the work; the blobs that a pull got.
fn run(
    server: &Server,
    work: Work,
    timing: Timing,
    runtime: &tokio::runtime::Runtime,
) -> Result<BTreeMap<String, Vec<u8>>, String> {
    with_endpoint(server, timing, runtime, move |client| match work {
        Work::Pull => pull(&client),
        Work::Push => push(&client, &fixture(LAYOUT)).map(|()| BTreeMap::new()),
    })
}

impl Case {
    fn run(
        &self,
        server: &Server,
        runtime: &tokio::runtime::Runtime,
        expected: &BTreeMap<String, Bytes>,
        states: &States,
    ) -> Result<(), String> {
        prepare(server, self.work);
        let (fault, hit) = (self.fault.clone(), self.hit.clone());
        server.fail(move |asked| hit.contains(&asked.index).then(|| fault.clone()));
        let silent = matches!(self.fault, Fault::Hang | Fault::SlowDrip { .. });
        let timing = match silent {
            true => Inside::impatient().timing,
            false => Inside::fast().timing,
        };
        let done = run(server, self.work, timing, runtime);
        server.settle();
        if let (Err(error), End::Succeeds) = (&done, self.end) {
            return Err(format!("it failed: {error}"));
        }
        for (digest, bytes) in done.unwrap_or_default() {
            if Digest::of(&bytes).to_string() != digest {
                return Err(format!("a client got other bytes for {digest}"));
            }
        }
        assert_store_is_sound(server, "after a fault");
        let once = self.hit.len() == 1;
        if once && server.uploads() > 0 {
            return Err("a multipart upload is left".to_owned());
        }
        if self.work == Work::Push && states.are_new("push", server, &BTreeMap::new()) {
            server.reset_faults();
            run(server, self.work, Inside::fast().timing, runtime)
                .map_err(|error| format!("the next push failed: {error}"))?;
            if server.objects() != *expected {
                return Err("after the next push S3 holds something else".to_owned());
            }
        }
        Ok(())
    }
}

#[test]
fn whatever_s3_does_to_one_request_or_to_all_from_one_on_no_client_gets_wrong_bytes() {
    let server = Server::builder().min_part(1).start();
    let runtime = inside::runtime();
    let mut cases = Vec::new();
    let mut expected = BTreeMap::new();
    for work in [Work::Pull, Work::Push] {
        prepare(&server, work);
        server.clear_log();
        let done = run(&server, work, Inside::fast().timing, &runtime);
        done.expect("without faults it succeeds");
        expected = server.objects();
        for (nth, (fault, once, _)) in wire_faults().into_iter().enumerate() {
            // Bytes that have been passed on cannot be taken back: the client sees a wrong digest.
            let end = match fault {
                Fault::FlipByte(_) => End::Either,
                _ => once,
            };
            for at in 0..server.log().len() {
                let hits = [at..at + 1, at..usize::MAX];
                for (hit, end) in hits.into_iter().zip([end, End::Either]) {
                    // Together they meet every request, if not each fault every one.
                    let step = if hit.len() == 1 { 3 } else { 6 };
                    let sampled = (at + nth) % step == 0 || soak();
                    if sampled {
                        cases.push(Case {
                            work,
                            fault: fault.clone(),
                            hit,
                            end,
                        });
                    }
                }
            }
        }
    }
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let states = States::default();
    std::thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE {
            scope.spawn(|| {
                let server = Server::builder().min_part(1).start();
                let runtime = inside::runtime();
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(why) = case.run(&server, &runtime, &expected, &states) {
                        let what = match case.work {
                            Work::Pull => "pull",
                            Work::Push => "push",
                        };
                        let failure = format!("{what}: {:?} at {:?}: {why}", case.fault, case.hit);
                        failures.lock().expect("no thread panicked").push(failure);
                    }
                }
                runtime.shutdown_background();
            });
        }
    });
    let failures = failures.into_inner().expect("no thread panicked");
    println!("{} cases ran", cases.len());
    assert!(
        failures.is_empty(),
        "{} failed:\n{}",
        failures.len(),
        failures[..failures.len().min(40)].join("\n")
    );
}
