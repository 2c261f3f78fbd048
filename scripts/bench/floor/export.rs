//! Reads blobs piece by piece, hashes and sends them, large ones as multipart uploads.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Mutex, OnceLock};

use anyhow::{Context, Result};
use layercache::cache::digest::Hasher;

use super::wire::{Wire, header, read_whole};
use super::{CHUNK, PIECE, at_once};

struct Blob {
    name: String,
    file: File,
    size: u64,
    /// Of a multipart upload.
    upload: OnceLock<String>,
    /// The number and ETag of each part.
    parts: Mutex<Vec<(u64, String)>>,
}

impl Blob {
    fn is_small(&self) -> bool {
        self.size <= PIECE
    }
}

/// A piece of a blob, and which one.
struct Piece<'a> {
    blob: &'a Blob,
    number: u64,
}

/// Lists the bucket at `url`, sends what is in `blobs` to it, and writes an object last.
pub fn run(url: &str, connections: usize, blobs: &Path, authority: Option<&Path>) -> Result<()> {
    let wire = Wire::new(url, authority)?;
    wire.list("blobs/")?;
    let mut files = Vec::new();
    for entry in fs::read_dir(blobs)? {
        let entry = entry?;
        files.push(Blob {
            name: entry.file_name().to_string_lossy().into_owned(),
            file: File::open(entry.path())?,
            size: entry.metadata()?.len(),
            upload: OnceLock::new(),
            parts: Mutex::default(),
        });
    }
    let large: Vec<&Blob> = files.iter().filter(|blob| !blob.is_small()).collect();
    at_once(connections, large.clone(), |blob| begin(&wire, blob))?;
    let mut pieces = Vec::new();
    for blob in &files {
        let numbers = 1..=blob.size.div_ceil(PIECE).max(1);
        pieces.extend(numbers.map(|number| Piece { blob, number }));
    }
    at_once(connections, pieces, |piece| send(&wire, &piece))?;
    at_once(connections, large, |blob| complete(&wire, blob))?;
    wire.call(&format!("PUT /{}/manifest", wire.bucket), "{}")
        .map(drop)
}

fn begin(wire: &Wire, blob: &Blob) -> Result<()> {
    let (_, body) = wire.call(&format!("POST {}?uploads", wire.blob(&blob.name)), "")?;
    let id = body.split_once("<UploadId>");
    let id = id.and_then(|(_, rest)| rest.split_once("</UploadId>"));
    let (id, _) = id.with_context(|| format!("{}: no upload", blob.name))?;
    blob.upload.get_or_init(|| id.to_owned());
    Ok(())
}

fn send(wire: &Wire, piece: &Piece) -> Result<()> {
    let Piece { blob, number } = piece;
    let mut at = (number - 1) * PIECE;
    let end = (at + PIECE).min(blob.size);
    let mut line = format!("PUT {}", wire.blob(&blob.name));
    if let Some(upload) = blob.upload.get() {
        line.push_str(&format!("?partNumber={number}&uploadId={upload}"));
    }
    let mut connection = wire.connection()?;
    let length = format!("content-length: {}\r\n", end - at);
    wire.ask(&mut connection, &line, &length)?;
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; CHUNK];
    while at < end {
        let wanted = buffer.len().min((end - at) as usize);
        blob.file.read_exact_at(&mut buffer[..wanted], at)?;
        hasher.update(&buffer[..wanted]);
        connection.get_mut().write_all(&buffer[..wanted])?;
        at += wanted as u64;
    }
    std::hint::black_box(hasher.digest());
    connection.get_mut().flush()?;
    let (head, _) = read_whole(&mut connection)?;
    wire.keep(connection);
    let etag = header(&head, "etag").context("no ETag")?.to_owned();
    blob.parts.lock().expect("no panic").push((*number, etag));
    Ok(())
}

fn complete(wire: &Wire, blob: &Blob) -> Result<()> {
    let mut parts = std::mem::take(&mut *blob.parts.lock().expect("no panic"));
    parts.sort();
    let parts: String = parts
        .iter()
        .map(|(number, etag)| {
            format!("<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>")
        })
        .collect();
    let upload = blob.upload.get().context("no upload")?;
    let line = format!("POST {}?uploadId={upload}", wire.blob(&blob.name));
    let body = format!("<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>");
    wire.call(&line, &body).map(drop)
}
