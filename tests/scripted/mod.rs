//! A server that replays a script: raw bytes for each request, as slow, broken or endless as the test
//! wants, and a record of what it was asked.
//!
//! It speaks just enough HTTP/1.1 to find the end of a request. Started on a tokio runtime it shares
//! that runtime, and with it a paused clock; anywhere else it has its own.

#![allow(dead_code)] // Two test binaries include this file; neither uses all of it.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// With the query.
    pub path: String,
    /// The request line, the headers and the empty line.
    pub head: String,
    pub body: String,
}

impl Request {
    /// A header's value, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (known, value) = line.split_once(':')?;
            known.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    fn content_length(&self) -> usize {
        let length = self.header("content-length");
        length.and_then(|length| length.parse().ok()).unwrap_or(0)
    }
}

/// What the server does with a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Reads the request, answers, and keeps the connection.
    Answer(Vec<u8>),
    /// Reads the request, answers, and closes.
    AnswerAndClose(Vec<u8>),
    /// Answers as soon as it has read the head, and closes with the body unread.
    AnswerEarly(Vec<u8>),
    /// Reads the request and closes without an answer.
    Close,
    /// Reads the request, performs these acts, and closes.
    Play(Vec<Act>),
}

/// One thing to do on a connection.
#[derive(Clone, Debug)]
pub enum Act {
    Send(Vec<u8>),
    /// Sends the bytes one by one, each after a pause.
    Drip(Vec<u8>, Duration),
    /// Sends the bytes again and again, each time after a pause, until the client hangs up.
    Repeat(Vec<u8>, Duration),
    /// Sends nothing more until the client hangs up.
    Hang,
    /// Closes with a TCP reset.
    Reset,
}

/// A response with the right Content-Length; `headers` are whole lines.
pub fn response(status: &str, headers: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

type Script = dyn Fn(usize, &Request) -> Option<Reply> + Send + Sync;

/// A running server. Dropping it ends what it does, and fails the test if the script was too short.
pub struct Scripted {
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
}

struct Shared {
    script: Box<Script>,
    requests: Mutex<Vec<Request>>,
    connections: AtomicUsize,
    /// Requests that the script had no reply for.
    surplus: Mutex<Vec<Request>>,
}

impl Scripted {
    /// `script` gets the number of requests before this one, and the request.
    pub fn start(script: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::new(Box::new(move |before, request| {
            Some(script(before, request))
        }))
    }

    /// The n-th request gets the n-th reply.
    pub fn replies(replies: Vec<Reply>) -> Self {
        Self::new(Box::new(move |before, _| replies.get(before).cloned()))
    }

    fn new(script: Box<Script>) -> Self {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .expect("bind a port of 127.0.0.1");
        listener
            .set_nonblocking(true)
            .expect("make the listener nonblocking");
        let address = listener.local_addr().expect("the listener's address");
        let shared = Arc::new(Shared {
            script,
            requests: Mutex::default(),
            connections: AtomicUsize::new(0),
            surplus: Mutex::default(),
        });
        let (handle, runtime) = match tokio::runtime::Handle::try_current() {
            Ok(handle) => (handle, None),
            Err(_) => {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .enable_all()
                    .build()
                    .expect("a runtime for the scripted server");
                (runtime.handle().clone(), Some(runtime))
            }
        };
        let accepting = Arc::clone(&shared);
        handle.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("hand the listener to tokio");
            while let Ok((stream, _)) = listener.accept().await {
                accepting.connections.fetch_add(1, Ordering::SeqCst);
                let shared = Arc::clone(&accepting);
                tokio::spawn(async move {
                    let _ = shared.serve(stream).await;
                });
            }
        });
        Self {
            address,
            shared,
            runtime,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn requests(&self) -> Vec<Request> {
        lock(&self.shared.requests).clone()
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        let surplus = lock(&self.shared.surplus);
        if !surplus.is_empty() && !std::thread::panicking() {
            panic!("the script has no reply for {surplus:#?}");
        }
    }
}

impl Shared {
    /// Answers the requests of one connection.
    async fn serve(&self, stream: TcpStream) -> io::Result<()> {
        let _ = stream.set_nodelay(true);
        let mut stream = BufReader::new(stream);
        while let Some(request) = read_head(&mut stream).await? {
            let length = request.content_length();
            let (at, reply) = {
                let mut requests = lock(&self.requests);
                let at = requests.len();
                let reply = (self.script)(at, &request);
                requests.push(request.clone());
                (at, reply)
            };
            let Some(reply) = reply else {
                lock(&self.surplus).push(request);
                return Ok(());
            };
            if let Reply::AnswerEarly(bytes) = reply {
                // Unread bytes make the close a reset.
                return stream.write_all(&bytes).await;
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await?;
            lock(&self.requests)[at].body = String::from_utf8_lossy(&body).into_owned();
            match reply {
                Reply::Answer(bytes) => stream.write_all(&bytes).await?,
                Reply::AnswerAndClose(bytes) => return stream.write_all(&bytes).await,
                Reply::AnswerEarly(_) | Reply::Close => return Ok(()),
                Reply::Play(acts) => return play(stream.into_inner(), acts).await,
            }
        }
        Ok(())
    }
}

/// A request up to the empty line; `None` if the client hung up before it.
async fn read_head(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Request>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_until(b'\n', &mut head).await? == 0 {
            return Ok(None);
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut words = head.split(' ').map(str::to_owned);
    let (method, path) = (words.next(), words.next());
    Ok(Some(Request {
        method: method.unwrap_or_default(),
        path: path.unwrap_or_default(),
        head,
        body: String::new(),
    }))
}

async fn play(mut stream: TcpStream, acts: Vec<Act>) -> io::Result<()> {
    for act in acts {
        match act {
            Act::Send(bytes) => stream.write_all(&bytes).await?,
            Act::Drip(bytes, pause) => {
                for byte in bytes {
                    tokio::time::sleep(pause).await;
                    stream.write_all(&[byte]).await?;
                }
            }
            Act::Repeat(bytes, pause) => loop {
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                stream.write_all(&bytes).await?;
            },
            Act::Hang => while stream.read(&mut [0; 1024]).await? > 0 {},
            Act::Reset => return stream.set_zero_linger(),
        }
    }
    stream.shutdown().await
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
