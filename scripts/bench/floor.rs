//! The floor under an import: a bare program that fetches the same blobs over plain http, hashes and
//! writes them. It checks nothing, and hashes each piece by itself, so that pieces need not wait for
//! one another.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use layercache::cache::digest::Hasher;

use crate::child::{self, Cost};
use crate::layouts::Layout;
use crate::server::Server;

const THREADS: usize = 16;
const PIECE: u64 = 8 << 20;
const BUCKET: &str = "floor";

/// One run of the program, on a layout's blobs.
pub fn measure(server: &Server, layout: &Layout, home: &Path, scratch: &Path) -> Result<Cost> {
    let target = home.join(BUCKET);
    std::fs::create_dir_all(&target)?;
    server.clear(BUCKET)?;
    server.fill(BUCKET, "blobs/", layout.mtime)?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("floor")
        .arg(format!("{}/{BUCKET}/blobs/", server.url()))
        .arg(layout.blobs())
        .arg(&target);
    let cost = child::run(command, &scratch.join("log"))?;
    layout.check_arrived(&target)?;
    std::fs::remove_dir_all(&target)?;
    Ok(cost)
}

/// A range of a file on the server.
struct Piece<'a> {
    name: &'a str,
    file: &'a File,
    start: u64,
    end: u64,
}

/// Fetches what is in `blobs` from `url` into `target`.
pub fn run(url: &str, blobs: &Path, target: &Path) -> Result<()> {
    let address = url.strip_prefix("http://").context("http only")?;
    let (host, path) = address.split_once('/').context("no path")?;
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
    let pieces = Mutex::new(pieces);
    std::thread::scope(|scope| {
        let work = || -> Result<()> {
            let mut stream = BufReader::with_capacity(4 << 10, TcpStream::connect(host)?);
            let mut buffer = vec![0; 256 << 10];
            loop {
                let piece = pieces.lock().expect("no panic").pop();
                match piece {
                    Some(piece) => fetch(&mut stream, host, path, &piece, &mut buffer)?,
                    None => return Ok(()),
                }
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            thread.join().expect("no panic")?;
        }
        Ok(())
    })
}

fn fetch(
    stream: &mut BufReader<TcpStream>,
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
