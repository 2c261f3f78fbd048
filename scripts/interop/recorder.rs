//! A proxy between layercache and a server that passes every byte on unchanged and keeps what was
//! asked and answered. Signatures stay valid: it leaves the Host header alone.

use std::cell::Cell;
use std::io::{self, BufReader};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use crate::wire::{Head, read_head, read_request_body, read_response_body};

/// A request and its response.
#[derive(Debug, Clone)]
pub struct Exchange {
    pub request: Head,
    pub response: Head,
    /// The first bytes of the response's body.
    pub body: Vec<u8>,
}

impl Exchange {
    pub fn method(&self) -> &str {
        self.request.start().split(' ').next().unwrap_or_default()
    }

    /// Path and query.
    pub fn target(&self) -> &str {
        self.request.start().split(' ').nth(1).unwrap_or_default()
    }

    pub fn succeeded(&self) -> bool {
        matches!(self.response.status(), 200..300) && !self.text().contains("<Error>")
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// What was asked for, by S3's name for it in lower case.
    pub fn operation(&self) -> &'static str {
        let (path, query) = self.target().split_once('?').unwrap_or((self.target(), ""));
        let asked = |name: &str| {
            let names = query
                .split('&')
                .map(|pair| pair.split('=').next().unwrap_or_default());
            names.into_iter().any(|known| known == name)
        };
        let copies = self.request.header("x-amz-copy-source").is_some();
        let on_bucket = !path.trim_matches('/').contains('/');
        match self.method() {
            "POST" if asked("uploads") => "create-multipart-upload",
            "POST" if asked("uploadId") => "complete-multipart-upload",
            "POST" if asked("delete") => "delete-objects",
            "PUT" if asked("partNumber") && copies => "upload-part-copy",
            "PUT" if asked("partNumber") => "upload-part",
            "PUT" if copies => "copy-object",
            "PUT" if on_bucket => "create-bucket",
            "PUT" => "put-object",
            "DELETE" if asked("uploadId") => "abort-multipart-upload",
            "DELETE" => "delete-object",
            "GET" if asked("uploadId") => "list-parts",
            "GET" if asked("uploads") => "list-multipart-uploads",
            "GET" if asked("list-type") => "list-objects-v2",
            "GET" => "get-object",
            "HEAD" if on_bucket => "head-bucket",
            "HEAD" => "head-object",
            _ => "other",
        }
    }
}

pub struct Recorder {
    pub address: SocketAddr,
    exchanges: Arc<Mutex<Vec<Exchange>>>,
    /// How many of them `recent` has returned.
    seen: Cell<usize>,
}

impl Recorder {
    /// Listens on a free port of 127.0.0.1, until the process ends.
    pub fn start(server: SocketAddr) -> io::Result<Recorder> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let exchanges = Arc::new(Mutex::new(Vec::new()));
        let log = exchanges.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let log = log.clone();
                std::thread::spawn(move || {
                    // A broken connection is the client's business: it sees the same.
                    let _ = pass(client, server, &log);
                });
            }
        });
        Ok(Recorder {
            address,
            exchanges,
            seen: Cell::new(0),
        })
    }

    /// What was recorded since the last call.
    pub fn recent(&self) -> Vec<Exchange> {
        let exchanges = self
            .exchanges
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        exchanges[self.seen.replace(exchanges.len())..].to_vec()
    }

    /// All that was recorded, which is then forgotten.
    pub fn drain(&self) -> Vec<Exchange> {
        self.seen.set(0);
        std::mem::take(
            &mut self
                .exchanges
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }
}

fn pass(client: TcpStream, server: SocketAddr, log: &Mutex<Vec<Exchange>>) -> io::Result<()> {
    let server = TcpStream::connect(server)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (sender, requests) = mpsc::channel();
    let (from, to) = (client.try_clone()?, server.try_clone()?);
    // Both ways at once: a server may refuse a request before it has read it to the end.
    let asking = std::thread::spawn(move || {
        let asked = pass_requests(&from, &to, sender);
        let _ = to.shutdown(Shutdown::Write);
        asked
    });
    let answered = pass_responses(&server, &client, requests, log);
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
    let _ = asking.join();
    answered
}

fn pass_requests(
    mut client: &TcpStream,
    mut server: &TcpStream,
    requests: Sender<Head>,
) -> io::Result<()> {
    let mut from = BufReader::new(&mut client);
    while let Some(head) = read_head(&mut from, &mut server)? {
        let _ = requests.send(head.clone());
        read_request_body(&head, &mut from, &mut server)?;
    }
    Ok(())
}

fn pass_responses(
    mut server: &TcpStream,
    mut client: &TcpStream,
    requests: Receiver<Head>,
    log: &Mutex<Vec<Exchange>>,
) -> io::Result<()> {
    let mut from = BufReader::new(&mut server);
    while let Some(response) = read_head(&mut from, &mut client)? {
        if matches!(response.status(), 100..200) {
            continue;
        }
        let Ok(request) = requests.recv() else { break };
        let method = request
            .start()
            .split(' ')
            .next()
            .unwrap_or_default()
            .to_owned();
        let body = read_response_body(&response, &method, &mut from, &mut client)?;
        log.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Exchange {
                request,
                response,
                body,
            });
    }
    Ok(())
}
