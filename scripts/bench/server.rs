//! The runner's side of the S3 server: it starts one as a process of its own and asks what it
//! counted. Also the simplest of clients: one connection, one request, nothing checked.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::child;

/// How far away the store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    pub delay_ms: u64,
    /// MiB/s of each connection; 0 is no limit.
    pub rate_mib: u64,
    pub tls: bool,
}

pub struct Server {
    process: Child,
    control: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
    url: String,
    /// The certificate authority's certificate, with TLS.
    authority: Option<PathBuf>,
}

/// The requests of one command.
#[derive(Debug, Clone)]
pub struct Asked {
    pub requests: u64,
    /// The longest chain of requests that waited for each other.
    pub round_trips: u64,
    pub at_once: u64,
    /// How bodies were signed: hashing for that is part of the command's CPU time.
    pub signing: String,
}

impl Server {
    /// Starts a server that has the blobs of the directory `blobs`, and discards them when they are sent.
    pub fn start(network: Network, blobs: &Path) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("serve")
            .arg(blobs)
            .args([network.delay_ms.to_string(), network.rate_mib.to_string()])
            .args(network.tls.then_some("--tls"));
        Server::spawn(command)
    }

    /// Starts a server whose bucket holds so many objects.
    pub fn start_bucket(objects: usize, delay_ms: u64) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("serve-bucket")
            .args([objects.to_string(), delay_ms.to_string()]);
        Server::spawn(command)
    }

    fn spawn(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        child::dies_with_runner(&mut command);
        let mut process = command.spawn().context("starting the server")?;
        let commands = process.stdin.take().context("the server's input")?;
        let answers = process.stdout.take().context("the server's output")?;
        let control = Mutex::new((commands, BufReader::new(answers)));
        let mut server = Server {
            process,
            control,
            url: String::new(),
            authority: None,
        };
        let hello = server.answer()?;
        server.url = hello["url"].as_str().unwrap_or_default().to_owned();
        server.authority = hello["authority"].as_str().map(PathBuf::from);
        Ok(server)
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// The file that clients are to trust.
    pub fn authority(&self) -> Option<&Path> {
        self.authority.as_deref()
    }

    /// Sends a command; returns the server's answer.
    fn control(&self, line: &str) -> Result<Value> {
        let mut control = self.control.lock().map_err(|_| anyhow!("a panic"))?;
        writeln!(control.0, "{line}").context("asking the server")?;
        drop(control);
        self.answer()
    }

    fn answer(&self) -> Result<Value> {
        let mut line = String::new();
        let mut control = self.control.lock().map_err(|_| anyhow!("a panic"))?;
        control.1.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("the server's answer {line:?}"))
    }

    fn connect(&self) -> Result<TcpStream> {
        let address = self.url.strip_prefix("http://");
        let stream = TcpStream::connect(address.context("a single stream is not over TLS")?)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(child::TIMEOUT))?;
        stream.set_write_timeout(Some(child::TIMEOUT))?;
        Ok(stream)
    }

    /// Sends a request's head and `body`, if there is one, then reads the response's head.
    fn request(&self, line: &str, body: Option<&mut File>) -> Result<(u64, BufReader<TcpStream>)> {
        let mut stream = self.connect()?;
        let length = match &body {
            Some(file) => file.metadata()?.len(),
            None => 0,
        };
        write!(
            stream,
            "{line} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
        )?;
        if let Some(file) = body {
            let mut buffer = vec![0; 1 << 20];
            loop {
                let read = file.read(&mut buffer)?;
                if read == 0 {
                    break;
                }
                stream.write_all(&buffer[..read])?;
            }
        }
        let mut answer = BufReader::with_capacity(64 << 10, stream);
        let mut head = String::new();
        answer.read_line(&mut head)?;
        ensure!(head.contains(" 200 "), "{line}: {}", head.trim());
        let mut length = 0;
        loop {
            let mut header = String::new();
            answer.read_line(&mut header)?;
            if header.trim().is_empty() {
                return Ok((length, answer));
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse()?;
            }
        }
    }

    pub fn reset(&self) -> Result<()> {
        self.control("reset").map(drop)
    }

    /// Empties a bucket, and creates it if there is none.
    pub fn clear(&self, bucket: &str) -> Result<()> {
        self.control(&format!("clear {bucket}")).map(drop)
    }

    /// Puts all blobs into `bucket`, as if uploaded at `mtime`, under `prefix` and their hex digits.
    pub fn fill(&self, bucket: &str, prefix: &str, mtime: u64) -> Result<()> {
        self.control(&format!("fill {bucket} {prefix} {mtime}"))
            .map(drop)
    }

    /// How many objects `bucket` holds below `blobs/`, and their bytes.
    pub fn objects(&self, bucket: &str) -> Result<(usize, u64)> {
        let answer = self.control(&format!("objects {bucket}"))?;
        let number = |name: &str| answer[name].as_u64().unwrap_or(0);
        Ok((number("objects") as usize, number("bytes")))
    }

    pub fn asked(&self) -> Result<Asked> {
        let answer = self.control("asked")?;
        let number = |name: &str| answer[name].as_u64().unwrap_or(0);
        Ok(Asked {
            requests: number("requests"),
            round_trips: number("round_trips"),
            at_once: number("at_once"),
            signing: answer["signing"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(kind, count)| format!("{kind} ({count})"))
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    /// Seconds that one PUT of `file` takes over one connection.
    pub fn upload(&self, bucket: &str, key: &str, file: &Path) -> Result<f64> {
        let begun = Instant::now();
        let mut file = File::open(file)?;
        self.request(&format!("PUT /{bucket}/{key}"), Some(&mut file))?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Seconds that one GET takes over one connection; the body is thrown away.
    pub fn download(&self, bucket: &str, key: &str) -> Result<f64> {
        let begun = Instant::now();
        let (length, mut answer) = self.request(&format!("GET /{bucket}/{key}"), None)?;
        let mut buffer = vec![0; 1 << 20];
        let mut left = length;
        while left > 0 {
            let read = answer.read(&mut buffer)? as u64;
            ensure!(
                read > 0,
                "the download broke off {left} bytes before its end"
            );
            left = left.saturating_sub(read);
        }
        Ok(begun.elapsed().as_secs_f64())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
