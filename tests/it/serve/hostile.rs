//! Clients that are wrong, slow, hostile, or many.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use layercache::cache::digest::{Digest, Hasher};
use layercache::cli::spec;
use layercache::progress::Progress;
use layercache::s3::{Timing, connect_with};
use layercache::transfer::download::Downloader;
use layercache::transfer::forward::{Forwarded, Taker, Wanted};
use layercache::transfer::limits::Limits;

use super::Serve;
use super::client::{reply, request};
use crate::aftermath::{assert_store_is_sound, layout_of, noise, put_cache, soak};
use crate::inside::runtime;
use crate::program::{Program, files, fixture};
use crate::server::Server;

const MIB: usize = 1 << 20;

#[test]
fn a_client_that_tries_tls_first_is_told_that_this_is_plain_http() {
    let server = Server::start();
    let serve = Serve::reading(&server.spec(""));
    let mut stream = TcpStream::connect(serve.client("LAYERCACHE_FROM").host).expect("it listens");
    // The beginning of a ClientHello.
    stream
        .write_all(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01])
        .expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("text");
    assert!(
        answer.starts_with("HTTP/1.0 400 Bad Request\r\n"),
        "{answer}"
    );
}

#[test]
fn without_the_secret_nothing_answers() {
    let server = Server::start();
    put_cache(&server, "buildkit", &[100]);
    let serve = Serve::writing(&server.spec(""));
    let client = serve.client("LAYERCACHE_TO");
    let (secret, name) = client.repository.split_once('/').expect("a name");
    let wrong = "0".repeat(secret.len());
    for head in [
        "GET /".to_owned(),
        "GET /v2/buildkit/manifests/latest".to_owned(),
        format!("GET /v2/{wrong}/{name}/manifests/latest"),
        format!("POST /v2/{wrong}/{name}/blobs/uploads/"),
        format!("GET /v2/{}/{name}/manifests/latest", &secret[1..]),
        format!("GET /{wrong}/gha/0/blobs/{}", Digest::of(b"")),
        format!("GET /{secret}/other"),
        "DELETE /v2/".to_owned(),
        "GET /_apis/other".to_owned(),
    ] {
        assert_eq!(
            request(&client.host, &head, &[], &[]).is(404).text(),
            "",
            "{head}"
        );
    }
    let unknown = client.send(
        "GET",
        &format!("/v2/{secret}/other/manifests/latest"),
        &[],
        &[],
    );
    assert_eq!(unknown.is(404).json()["errors"][0]["code"], "NAME_UNKNOWN");
    assert_eq!(server.log().len(), 0);
    let run = serve.stop().succeeds();
    assert!(!run.stderr.contains(secret) && !run.stdout.contains(secret));
}

#[test]
fn heads_that_are_no_http_or_too_large_end_the_connection() {
    let server = Server::start();
    let serve = Serve::reading(&server.spec(""));
    let host = serve.client("LAYERCACHE_FROM").host;
    for head in [
        b"nonsense\r\n\r\n".to_vec(),
        [
            b"GET /v2/ HTTP/1.1\r\nA: ".to_vec(),
            vec![b'a'; 100_000],
            b"\r\n\r\n".to_vec(),
        ]
        .concat(),
        ["GET /v2/ HTTP/1.1\r\n", &"A: b\r\n".repeat(200), "\r\n"]
            .concat()
            .into_bytes(),
    ] {
        let mut stream = TcpStream::connect(&host).expect("it listens");
        let _ = stream.write_all(&head);
        let answer = reply(&mut stream).expect("a response");
        let start = String::from_utf8_lossy(&head[..12]);
        assert!(
            (400..500).contains(&answer.status),
            "{start}: {}",
            answer.status
        );
    }
    request(&host, "GET /v2/", &[], &[]).is(200);
}

#[test]
fn a_client_that_reads_nothing_holds_up_no_other() {
    let server = Server::start();
    put_cache(&server, "buildkit", &[48 * MIB, 47 * MIB, 46 * MIB]);
    let serve = Serve::reading(&server.spec(""));
    let client = serve.client("LAYERCACHE_FROM");
    client.resolve();
    let paths: Vec<_> = [(1, 48 * MIB), (2, 47 * MIB), (3, 46 * MIB)]
        .map(|(seed, size)| format!("blobs/{}", Digest::of(&noise(seed, size))))
        .into();
    // Several on each blob: they ask, and read no more than the head.
    let stalled: Vec<TcpStream> = (0..12)
        .map(|nth| {
            let mut stream = TcpStream::connect(&client.host).expect("it listens");
            let path = format!("/v2/{}/{}", client.repository, paths[nth % paths.len()]);
            let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
            stream.write_all(head.as_bytes()).expect("sent");
            let mut first = [0; 16];
            stream.read_exact(&mut first).expect("a response");
            stream
        })
        .collect();
    let began = Instant::now();
    for path in &paths {
        assert!(client.get(path).is(200).is_whole());
    }
    // Well before any of them is cut off.
    assert!(began.elapsed() < Duration::from_secs(30));
    drop(stalled);
}

/// Takes the last bytes of a blob late. Not a client of the program: which bytes wait for a client depends on
/// the kernel's buffers.
struct Late {
    left: usize,
}

#[async_trait]
impl Taker for Late {
    async fn take(&mut self, chunks: Vec<Bytes>, _: Option<&Hasher>) -> bool {
        self.left -= chunks.iter().map(Bytes::len).sum::<usize>();
        if self.left == 0 {
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
        true
    }
}

#[test]
fn the_last_bytes_may_be_taken_late() {
    let server = Server::start();
    let bytes = noise(1, 5 * MIB);
    let digest = Digest::of(&bytes);
    let key = format!("blobs/{digest}");
    server.put(&key, bytes);
    let spec = spec::cache_to(&server.spec(""), &|_| None).expect("a spec");
    let progress = Progress::silent();
    runtime().block_on(async {
        let connected = connect_with(&spec.config.s3, progress.clone(), Timing::default());
        let store = connected.await.expect("a store");
        let downloader = Downloader::new(store, progress, Limits::default());
        for verified in [true, false] {
            let size = 5 * MIB as u64;
            let wanted = Wanted {
                digest,
                size,
                range: 0..size,
                hasher: verified.then(Hasher::default),
            };
            let mut late = Late { left: 5 * MIB };
            let forwarded = downloader.forward(&key, wanted, &mut late).await;
            assert_eq!(forwarded.expect("no error"), Forwarded::Whole);
            assert_eq!(late.left, 0);
        }
    });
    assert_eq!(server.count("GetObject"), 6);
}

#[test]
fn a_client_that_dies_while_it_sends_leaves_nothing() {
    let server = Server::start();
    let serve = Serve::writing(&server.spec("mode=max"));
    let client = serve.client("LAYERCACHE_TO");
    for size in [1000, 30 * MIB] {
        let digest = Digest::of(&noise(1, size));
        let begun = client.send("POST", "blobs/uploads/", &[], &[]).is(202);
        let location = begun.header("location").to_owned();
        let mut stream = TcpStream::connect(&client.host).expect("it listens");
        let head = format!(
            "PUT {location}?digest={digest} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).expect("sent");
        stream.write_all(&noise(1, size)[..size / 2]).expect("sent");
        if size > MIB {
            while server.count("UploadPart") == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        drop(stream);
    }
    // Its uploads are aborted as soon as that is noticed, not only at the end.
    while server.uploads() > 0 || server.count("AbortMultipartUpload") == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    client.push(&fixture("local-max")).is(201);
    serve.stop().succeeds();
    assert_store_is_sound(&server, "at the end");
    assert_eq!(server.uploads(), 0);
}

#[test]
fn thirty_two_pushes_at_once_all_succeed() {
    let server = Server::start();
    let serve = Serve::writing(&server.spec("mode=max"));
    let client = serve.client("LAYERCACHE_TO");
    let pushes: Vec<_> = (0..32)
        .map(|nth| {
            let client = client.clone();
            std::thread::spawn(move || {
                let size = if nth % 4 == 0 { 7 * MIB } else { 300_000 };
                let bytes = noise(nth + 1, size);
                client.push_blob(&Digest::of(&bytes).to_string(), &bytes);
            })
        })
        .collect();
    for push in pushes {
        push.join().expect("it succeeds");
    }
    assert_eq!(server.keys().len(), 32);
    assert_store_is_sound(&server, "at the end");
    assert_eq!(server.uploads(), 0);
}

/// Many clients read and write for a while, and some of them break off.
#[test]
fn under_load_every_client_gets_what_it_asks_for() {
    let server = Server::start();
    let layout = layout_of(&[9 * MIB, 3 * MIB, 200_000, 100]);
    let spec = server.spec("mode=max");
    Program::export(&spec, layout.path()).run().succeeds();
    let serve = Serve::start(&["--cache-from", &server.spec(""), "--cache-to", &spec]);
    let client = serve.client("LAYERCACHE_FROM");
    let expected = files(layout.path());
    let until = Instant::now() + Duration::from_secs(if soak() { 60 } else { 2 });
    let clients: Vec<_> = (0..8)
        .map(|nth| {
            let (client, root) = (client.clone(), layout.path().to_owned());
            let expected = expected.clone();
            std::thread::spawn(move || {
                while Instant::now() < until {
                    match nth {
                        0 => drop(client.push(&root).is(201)),
                        1 => {
                            // Asks for everything, and goes away.
                            let (_, manifest) = client.resolve();
                            for layer in manifest["layers"].as_array().expect("layers") {
                                let digest = layer["digest"].as_str().expect("a digest");
                                let mut stream =
                                    TcpStream::connect(&client.host).expect("it listens");
                                let path = format!("/v2/{}/blobs/{digest}", client.repository);
                                let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
                                let _ = stream.write_all(head.as_bytes());
                            }
                        }
                        _ => {
                            let (_, blobs) = client.pull();
                            for (digest, bytes) in blobs {
                                let name = format!("blobs/{}", digest.replace(':', "/"));
                                assert!(expected[&name] == bytes, "{digest}");
                            }
                        }
                    }
                }
            })
        })
        .collect();
    for client in clients {
        client.join().expect("every request succeeds");
    }
    let pid = serve.pid();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|peak| peak.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    assert!(peak.is_none_or(|peak| peak < 300 << 10), "{peak:?} KiB");
    serve.stop().succeeds();
    assert_store_is_sound(&server, "at the end");
}
