//! The responses of real stores that `tests/stores` holds, replayed to the operations that they answer.

use std::fmt::{Debug, Write as _};
use std::path::{Path, PathBuf};

use expect_test::expect_file;

use super::stores::{described, old};
use super::*;

/// One recorded response, and what it was the response to.
struct Recording {
    /// The operation, and the error's code or status if it failed.
    name: String,
    method: String,
    /// With the query.
    path: String,
    response: Vec<u8>,
}

impl Recording {
    fn read(file: &Path) -> Self {
        let bytes = std::fs::read(file).unwrap();
        let split = |text: &[u8]| {
            let at = text.windows(2).position(|two| two == b"\n\n").unwrap();
            (
                String::from_utf8(text[..at].to_vec()).unwrap(),
                text[at + 2..].to_vec(),
            )
        };
        let (request, rest) = split(&bytes);
        let mut words = request.split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let (head, body) = split(&rest);
        let mut response = Vec::new();
        let mut chunked = false;
        for line in head.lines() {
            let lower = line.to_ascii_lowercase();
            chunked |= lower == "transfer-encoding: chunked";
            // Bodies were decoded, and where the server's address was replaced they changed their length.
            if lower.starts_with("content-length:") && method != "HEAD" {
                continue;
            }
            response.extend(line.as_bytes());
            response.extend(b"\r\n");
        }
        match (&*method, chunked) {
            ("HEAD", _) => response.extend(b"\r\n"),
            (_, true) => {
                response.extend(format!("\r\n{:x}\r\n", body.len()).as_bytes());
                response.extend(&body);
                response.extend(b"\r\n0\r\n\r\n");
            }
            (_, false) => {
                response.extend(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
                response.extend(&body);
            }
        }
        Recording {
            name: file.file_stem().unwrap().to_str().unwrap().to_owned(),
            method,
            path,
            response,
        }
    }

    /// The key that the request named, decoded.
    fn key(&self) -> String {
        let path = self.path.split('?').next().unwrap();
        let key = path.strip_prefix("/cache/").or_else(|| {
            let (_, key) = path.strip_prefix('/')?.split_once('/')?;
            Some(key)
        });
        decoded(key.unwrap_or_default())
    }

    /// A parameter of the request's query, decoded.
    fn parameter(&self, name: &str) -> String {
        let query = self.path.split_once('?').map_or("", |(_, query)| query);
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let value = pairs.find(|(key, _)| *key == name);
        decoded(value.map_or("", |(_, value)| value))
    }

    /// A server that gives this response to each request of the method. A HEAD that an operation sends
    /// to settle the matter finds the object, of 2 bytes; any other request fails like the recorded one,
    /// with a code.
    fn serve(&self) -> Server {
        let (method, response) = (self.method.clone(), self.response.clone());
        let refusal = match self.name.rsplit('-').next() {
            Some("404") => error("404 Not Found", "NoSuchKey"),
            Some("403") => error("403 Forbidden", "AccessDenied"),
            _ => error("400 Bad Request", "InvalidArgument"),
        };
        Server::making(move |request| {
            let reply = match &*request.method {
                asked if asked == method => return response.clone(),
                "HEAD" => described(2, 8),
                _ => refusal.clone(),
            };
            match reply {
                Reply::Answer(response) => response,
                other => unreachable!("{other:?}"),
            }
        })
    }

    /// Performs the operation, and says what came of it in one line.
    async fn replay(&self) -> String {
        let server = self.serve();
        let store = server.store();
        let (key, id) = (self.key(), self.parameter("uploadId"));
        let operation = self.name.trim_end_matches(|c: char| c != '-');
        let is = |name: &str| self.name.starts_with(name) || operation.starts_with(name);
        let ended = if is("abort-multipart-upload") {
            told(store.abort_upload(&key, &id).await)
        } else if is("complete-multipart-upload") {
            told(store.complete_upload(&key, &id, &[etag(1), etag(2)]).await)
        } else if is("copy-object") {
            let info = ObjectInfo { size: 2, ..old() };
            told(store.touch(&key, &info).await)
        } else if is("create-multipart-upload") {
            told(store.create_upload(&key, None).await)
        } else if is("delete-objects") {
            told(store.delete(&["a".to_owned()]).await)
        } else if is("get-object-range") {
            let read = crate::store::read(
                &(Arc::new(store) as Arc<dyn Store>),
                &key,
                Some(20..40),
                Default::default(),
            )
            .await;
            told(read.map(|object| object.map(|object| object.info)))
        } else if is("get-object") {
            let got = store.get(&key, None, None).await;
            told(got.map(|response| response.is_some()))
        } else if is("head-object") {
            told(store.head(&key).await)
        } else if is("list-multipart-uploads") {
            told(store.list_uploads(&self.parameter("prefix")).await)
        } else if is("list-objects-v2") {
            let page = store.list(&self.parameter("prefix"), None).await;
            told(page.map(|page| {
                (
                    page.objects.len(),
                    page.objects.into_iter().next(),
                    page.next,
                )
            }))
        } else if is("list-parts") {
            told(store.list_parts(&key, &id).await)
        } else if is("put-object") {
            told(store.put(&key, Blob::new("hello")).await)
        } else if is("upload-part-copy") {
            told(store.copy_part(None, &key, &id, 3, 0..5, None).await)
        } else {
            panic!("no operation is called {}", self.name)
        };
        let ended = ended.replace(&server.url, "URL");
        let requests = server.requests();
        let sent = requests
            .iter()
            .map(|request| request.split(' ').next().unwrap());
        format!(
            "{} ({}): {ended}",
            self.name,
            sent.collect::<Vec<_>>().join(", ")
        )
    }
}

fn decoded(text: &str) -> String {
    percent_encoding::percent_decode_str(text)
        .decode_utf8()
        .unwrap()
        .into_owned()
}

fn told<T: Debug>(ended: StoreResult<T>) -> String {
    match ended {
        Ok(value) => format!("{value:?}"),
        Err(error) => format!("{:?}: {}", error.kind, error.message),
    }
}

#[tokio::test]
async fn what_real_stores_answered_is_understood() {
    let stores = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stores");
    for store in sorted(&stores).iter().filter(|path| path.is_dir()) {
        let mut outcomes = String::new();
        let recordings = sorted(store).into_iter();
        for file in recordings.filter(|file| file.extension().is_some_and(|end| end == "txt")) {
            let outcome = Recording::read(&file).replay().await;
            writeln!(outcomes, "{outcome}").unwrap();
        }
        expect_file![store.join("understood")].assert_eq(&outcomes);
    }
}

fn sorted(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}
