//! The floor under an import: a bare program that fetches the same blobs over the same network, with TLS
//! or without, hashes and writes them. It checks nothing, and hashes each piece by itself, so that pieces need not wait for
//! one another.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use layercache::cache::digest::Hasher;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::child::{self, Cost};
use crate::layouts::Layout;
use crate::server::{Network, Server};

/// Connections on plain loopback, and at a distance, where that many keep all requests in flight.
const THREADS: [usize; 2] = [16, 160];
const PIECE: u64 = 8 << 20;
const BUCKET: &str = "floor";

/// One run of the program, on a layout's blobs.
pub fn measure(server: &Server, network: Network, layout: &Layout, scratch: &Path) -> Result<Cost> {
    let target = scratch.join(BUCKET);
    std::fs::create_dir_all(&target)?;
    server.clear(BUCKET)?;
    server.fill(BUCKET, "blobs/", layout.mtime)?;
    let threads = THREADS[usize::from(network.delay_ms > 0)];
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("floor")
        .arg(format!("{}/{BUCKET}/blobs/", server.url()))
        .arg(layout.blobs())
        .arg(&target)
        .arg(threads.to_string())
        .args(server.authority());
    let cost = child::run(command, &scratch.join("log"))?;
    layout.check_arrived(&target)?;
    std::fs::remove_dir_all(&target)?;
    Ok(cost)
}

/// A connection, whatever it is encrypted with.
trait Stream: Read + Write {}

impl<S: Read + Write> Stream for S {}

type Reader = BufReader<Box<dyn Stream>>;

/// Opens connections to one server.
struct Dialer<'a> {
    host: &'a str,
    /// With TLS.
    tls: Option<Arc<ClientConfig>>,
}

impl<'a> Dialer<'a> {
    fn new(host: &'a str, authority: Option<&Path>) -> Result<Self> {
        let config = |authority: &Path| -> Result<ClientConfig> {
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_file_iter(authority)? {
                roots.add(certificate?)?;
            }
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let config = ClientConfig::builder_with_provider(provider);
            let config = config.with_safe_default_protocol_versions()?;
            Ok(config.with_root_certificates(roots).with_no_client_auth())
        };
        let tls = authority.map(config).transpose()?.map(Arc::new);
        Ok(Dialer { host, tls })
    }

    fn dial(&self) -> Result<Reader> {
        let tcp = TcpStream::connect(self.host)?;
        tcp.set_nodelay(true)?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(tcp),
            Some(config) => {
                let (name, _) = self.host.rsplit_once(':').context("no port")?;
                let name = ServerName::try_from(name.to_owned())?;
                let tls = ClientConnection::new(Arc::clone(config), name)?;
                Box::new(StreamOwned::new(tls, tcp))
            }
        };
        Ok(BufReader::with_capacity(4 << 10, stream))
    }
}

/// A range of a file on the server.
struct Piece<'a> {
    name: &'a str,
    file: &'a File,
    start: u64,
    end: u64,
}

/// Fetches what is in `blobs` from `url` into `target`.
pub fn run(
    url: &str,
    blobs: &Path,
    target: &Path,
    threads: usize,
    authority: Option<&Path>,
) -> Result<()> {
    let (_, address) = url.split_once("://").context("no scheme")?;
    let (host, path) = address.split_once('/').context("no path")?;
    let dialer = Dialer::new(host, authority)?;
    let mut files = Vec::new();
    for entry in std::fs::read_dir(blobs)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let file = File::create(target.join(&name))?;
        files.push((name, file, entry.metadata()?.len()));
    }
    let mut pieces = Vec::new();
    for (name, file, size) in &files {
        let starts = (0..*size).step_by(PIECE as usize);
        pieces.extend(starts.map(|start| Piece {
            name,
            file,
            start,
            end: (start + PIECE).min(*size),
        }));
    }
    let threads = threads.min(pieces.len());
    let pieces = Mutex::new(pieces);
    std::thread::scope(|scope| {
        let work = || -> Result<()> {
            let mut stream = dialer.dial()?;
            let mut buffer = vec![0; 256 << 10];
            loop {
                let piece = pieces.lock().expect("no panic").pop();
                match piece {
                    Some(piece) => fetch(&mut stream, host, path, &piece, &mut buffer)?,
                    None => return Ok(()),
                }
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            thread.join().expect("no panic")?;
        }
        Ok(())
    })
}

fn fetch(
    stream: &mut Reader,
    host: &str,
    path: &str,
    piece: &Piece,
    buffer: &mut [u8],
) -> Result<()> {
    let Piece {
        name, start, end, ..
    } = piece;
    write!(
        stream.get_mut(),
        "GET /{path}{name} HTTP/1.1\r\nhost: {host}\r\nrange: bytes={start}-{}\r\n\r\n",
        end - 1
    )?;
    let mut line = String::new();
    stream.read_line(&mut line)?;
    ensure!(line.contains(" 206 "), "{name}: {line}");
    while line.trim() != "" {
        line.clear();
        stream.read_line(&mut line)?;
    }
    let mut hasher = Hasher::default();
    let mut at = *start;
    while at < *end {
        let wanted = buffer.len().min((end - at) as usize);
        let read = stream.read(&mut buffer[..wanted])?;
        ensure!(read > 0, "{name} broke off");
        hasher.update(&buffer[..read]);
        piece.file.write_all_at(&buffer[..read], at)?;
        at += read as u64;
    }
    std::hint::black_box(hasher.digest());
    Ok(())
}
