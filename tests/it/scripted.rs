//! A listener that stands for a service the credentials come from: it speaks just enough HTTP/1.1,
//! answers as its script says, and keeps what it was asked.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Heard {
    pub method: String,
    /// With the query.
    pub path: String,
    headers: Vec<(String, String)>,
    pub body: String,
}

impl Heard {
    /// A header's value, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(known, _)| known == name);
        found.next().map(|(_, value)| value.as_str())
    }
}

/// Status, content type and body.
pub type Said = (u16, &'static str, String);

pub fn json(body: serde_json::Value) -> Said {
    (200, "application/json", body.to_string())
}

pub fn xml(body: String) -> Said {
    (200, "text/xml", body)
}

pub fn text(body: &str) -> Said {
    (200, "text/plain", body.to_owned())
}

pub fn status(status: u16) -> Said {
    (status, "text/plain", String::new())
}

/// A running fake. Its threads end with the test process.
pub struct Scripted {
    address: SocketAddr,
    heard: Arc<Mutex<Vec<Heard>>>,
}

impl Scripted {
    /// `script` gets each request, and how many came before it.
    pub fn start(script: impl Fn(usize, &Heard) -> Said + Send + Sync + 'static) -> Scripted {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind a port of 127.0.0.1");
        let address = listener.local_addr().expect("the listener's port");
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (log, script) = (heard.clone(), Arc::new(script));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, script) = (log.clone(), script.clone());
                std::thread::spawn(move || {
                    let _ = serve(stream, &log, &*script);
                });
            }
        });
        Scripted { address, heard }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn heard(&self) -> Vec<Heard> {
        lock(&self.heard).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(
    stream: TcpStream,
    log: &Mutex<Vec<Heard>>,
    script: &dyn Fn(usize, &Heard) -> Said,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_whitespace().map(str::to_owned);
        let (method, path) = (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else {
                break;
            };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut heard = Heard {
            method,
            path,
            headers,
            body: String::new(),
        };
        let length = heard
            .header("content-length")
            .and_then(|n| n.parse().ok())
            .unwrap_or(0);
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        heard.body = String::from_utf8_lossy(&body).into_owned();

        let (status, content_type, body) = {
            let mut log = lock(log);
            let said = script(log.len(), &heard);
            log.push(heard);
            said
        };
        write!(
            writer,
            "HTTP/1.1 {status} Scripted\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\
             x-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\r\n{body}",
            body.len()
        )?;
    }
}
