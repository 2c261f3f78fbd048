//! A client that sends what containerd sends, one request a connection.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;

use layercache::cache::digest::Digest;
use serde_json::Value;

pub const IMAGE_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// containerd's.
const ACCEPT: &str = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*";

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    /// By name in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Reply {
    /// Fails with the body unless this is the status.
    #[track_caller]
    pub fn is(self, status: u16) -> Reply {
        let body = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, status, "{:?} {body:.2000}", self.headers);
        self
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Whether the body is as long as was announced.
    pub fn is_whole(&self) -> bool {
        let announced = self.header("content-length").parse().ok();
        announced == Some(self.body.len())
    }
}

/// Sends one request, and reads the response until the server closes.
pub fn request(host: &str, head: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    try_request(host, head, headers, body).expect("a response")
}

/// The same; `None` if the server closes without a response.
pub fn try_request(host: &str, head: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Reply> {
    let mut stream = TcpStream::connect(host).expect("it listens");
    let mut text = format!("{head} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    let has_length = headers.iter().any(|(name, _)| {
        name.eq_ignore_ascii_case("content-length") || *name == "Transfer-Encoding"
    });
    if !has_length && !head.starts_with("GET") && !head.starts_with("HEAD") {
        text.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    text.push_str("\r\n");
    // It may answer before it has read all, and close.
    let sent = stream.write_all(text.as_bytes());
    let _ = sent.and_then(|()| stream.write_all(body));
    reply(&mut stream)
}

/// Reads a response until the server closes; `None` if there is none.
pub fn reply(stream: &mut TcpStream) -> Option<Reply> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8(bytes[..end].to_vec()).expect("text");
    let mut lines = head.lines();
    let status = lines.next().expect("a status line");
    let headers = lines.map(|line| {
        let (name, value) = line.split_once(':').expect("a header");
        (name.to_lowercase(), value.trim().to_owned())
    });
    Some(Reply {
        status: status
            .split(' ')
            .nth(1)
            .expect("a status")
            .parse()
            .expect("a number"),
        headers: headers.collect(),
        body: bytes[end + 4..].to_vec(),
    })
}

/// A client of one repository.
#[derive(Clone)]
pub struct Client {
    pub host: String,
    /// With the secret.
    pub repository: String,
}

impl Client {
    pub fn new(host: &str, repository: &str) -> Client {
        Client {
            host: host.to_owned(),
            repository: repository.to_owned(),
        }
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let path = match path.starts_with('/') {
            true => path.to_owned(),
            false => format!("/v2/{}/{path}", self.repository),
        };
        let mut all = vec![("User-Agent", "containerd/2.3.0")];
        all.extend(headers);
        let reply = request(&self.host, &format!("{method} {path}"), &all, body);
        assert_eq!(reply.header("content-encoding"), "");
        reply
    }

    pub fn head(&self, path: &str) -> Reply {
        self.send("HEAD", path, &[("Accept", ACCEPT)], &[])
    }

    pub fn get(&self, path: &str) -> Reply {
        let headers = [("Accept", ACCEPT), ("Accept-Encoding", "zstd, gzip")];
        self.send("GET", path, &headers, &[])
    }

    pub fn range(&self, path: &str, range: &str) -> Reply {
        self.send("GET", path, &[("Range", range)], &[])
    }

    /// What an import of a registry cache reads first: the manifest that the tag leads to.
    pub fn resolve(&self) -> (String, Value) {
        let head = self.head("manifests/latest").is(200);
        let digest = head.header("docker-content-digest").to_owned();
        let manifest = self.get(&format!("manifests/{digest}")).is(200);
        assert_eq!(Digest::of(&manifest.body).to_string(), digest);
        for header in ["content-type", "content-length", "docker-content-digest"] {
            assert_eq!(manifest.header(header), head.header(header));
        }
        let length: usize = head.header("content-length").parse().expect("a number");
        assert_eq!(length, manifest.body.len());
        (digest, manifest.json())
    }

    /// Reads all that the tag leads to: the blobs by their digests, and the tag's.
    pub fn pull(&self) -> (String, BTreeMap<String, Vec<u8>>) {
        let (root, manifest) = self.resolve();
        let mut blobs = BTreeMap::new();
        let mut unread = vec![manifest];
        blobs.insert(root.clone(), self.get(&format!("manifests/{root}")).body);
        while let Some(manifest) = unread.pop() {
            for child in list(&manifest, "manifests") {
                let body = self.get(&format!("manifests/{child}")).is(200).body;
                unread.push(serde_json::from_slice(&body).expect("a manifest"));
                blobs.insert(child, body);
            }
            let config = manifest["config"]["digest"].as_str().map(str::to_owned);
            for blob in list(&manifest, "layers").into_iter().chain(config) {
                let reply = self.get(&format!("blobs/{blob}")).is(200);
                assert!(reply.is_whole(), "{blob}");
                assert_eq!(Digest::of(&reply.body).to_string(), blob);
                blobs.insert(blob, reply.body);
            }
        }
        (root, blobs)
    }

    /// Sends a blob as containerd does.
    pub fn push_blob(&self, digest: &str, bytes: &[u8]) {
        let head = self.head(&format!("blobs/{digest}"));
        if head.status == 200 {
            assert_eq!(head.header("content-length"), bytes.len().to_string());
            return;
        }
        head.is(404);
        let begun = self.send("POST", "blobs/uploads/", &[], &[]).is(202);
        let location = begun.header("location");
        let put = format!("{location}?digest={digest}");
        let headers = [("Content-Type", "application/octet-stream")];
        let put = self.send("PUT", &put, &headers, bytes).is(201);
        assert_eq!(put.header("docker-content-digest"), digest);
    }

    pub fn put_manifest(&self, reference: &str, media_type: &str, bytes: &[u8]) -> Reply {
        let headers = [("Content-Type", media_type)];
        self.send("PUT", &format!("manifests/{reference}"), &headers, bytes)
    }

    /// Sends what `layout` has, children first, as containerd does.
    pub fn push(&self, layout: &Path) -> Reply {
        let index = std::fs::read(layout.join("index.json")).expect("an index");
        let index: Value = serde_json::from_slice(&index).expect("JSON");
        self.push_manifest(layout, &index["manifests"][0], true)
    }

    fn push_manifest(&self, layout: &Path, root: &Value, tagged: bool) -> Reply {
        let read = |digest: &str| {
            let path = layout.join("blobs").join(digest.replace(':', "/"));
            std::fs::read(path).expect("a blob")
        };
        let digest = root["digest"].as_str().expect("a digest");
        let media_type = root["mediaType"].as_str().expect("a type");
        let bytes = read(digest);
        let manifest: Value = serde_json::from_slice(&bytes).expect("JSON");
        for child in manifest["manifests"].as_array().into_iter().flatten() {
            let media_type = child["mediaType"].as_str().expect("a type");
            if media_type.contains("manifest") || media_type.contains("index") {
                self.push_manifest(layout, child, false).is(201);
            } else {
                let digest = child["digest"].as_str().expect("a digest");
                self.push_blob(digest, &read(digest));
            }
        }
        let config = manifest["config"]["digest"].as_str().map(str::to_owned);
        for blob in list(&manifest, "layers").into_iter().chain(config) {
            self.push_blob(&blob, &read(&blob));
        }
        let reference = if tagged { "latest" } else { digest };
        let head = self.head(&format!("manifests/{reference}"));
        if head.status == 200 && head.header("docker-content-digest") == digest {
            return Reply {
                status: 201,
                ..head
            };
        }
        self.put_manifest(reference, media_type, &bytes)
    }
}

fn list(manifest: &Value, field: &str) -> Vec<String> {
    let entries = manifest[field].as_array().into_iter().flatten();
    entries
        .map(|entry| entry["digest"].as_str().expect("a digest").to_owned())
        .collect()
}
