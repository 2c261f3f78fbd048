//! The simplest of builders: reads every layer of the cache that `layercache serve` names in
//! LAYERCACHE_FROM, four at once, and looks at none of the bytes.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Mutex;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Connections that BuildKit opens to one registry.
const CONNECTIONS: usize = 4;

/// Returns how many layers there are, and their bytes.
pub fn run() -> Result<(usize, u64)> {
    let from = std::env::var("LAYERCACHE_FROM").context("LAYERCACHE_FROM")?;
    let reference = from.split(',').find_map(|field| field.strip_prefix("ref="));
    let (host, path) = reference
        .and_then(|reference| reference.strip_suffix(":latest")?.split_once('/'))
        .context("a reference")?;
    let mut manifest = Vec::new();
    get(host, &format!("/v2/{path}/manifests/latest"))?.read_to_end(&mut manifest)?;
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let layers = manifest["layers"].as_array().context("layers")?;
    let left = Mutex::new(layers.iter());
    let read = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                scope.spawn(|| -> Result<u64> {
                    let mut read = 0;
                    loop {
                        let next = left.lock().expect("no panic").next();
                        let Some(layer) = next else { return Ok(read) };
                        let digest = layer["digest"].as_str().context("a digest")?;
                        let size = layer["size"].as_u64().context("a size")?;
                        let blob = get(host, &format!("/v2/{path}/blobs/{digest}"))?;
                        ensure!(discard(blob)? == size, "{digest} is not whole");
                        read += size;
                    }
                })
            })
            .collect();
        readers
            .into_iter()
            .map(|reader| reader.join().expect("no panic"))
            .sum::<Result<u64>>()
    });
    Ok((layers.len(), read?))
}

/// The body of a response; the server closes after it.
fn get(host: &str, path: &str) -> Result<BufReader<TcpStream>> {
    let mut stream = TcpStream::connect(host)?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    ensure!(line.contains(" 200 "), "{path}: {line}");
    while line != "\r\n" {
        line.clear();
        ensure!(reader.read_line(&mut line)? > 0, "{path}: no body");
    }
    Ok(reader)
}

/// Counts the bytes that arrive. On Linux the kernel discards them, which costs us no CPU time.
fn discard(body: BufReader<TcpStream>) -> Result<u64> {
    let mut read = body.buffer().len() as u64;
    let stream = body.into_inner();
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd as _;
        loop {
            // SAFETY: with MSG_TRUNC, a TCP socket discards the bytes and never uses the buffer.
            let length = unsafe {
                let nothing = std::ptr::null_mut();
                libc::recv(stream.as_raw_fd(), nothing, 1 << 20, libc::MSG_TRUNC)
            };
            match length {
                0 => return Ok(read),
                length if length > 0 => read += length as u64,
                _ => return Err(std::io::Error::last_os_error().into()),
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        read += std::io::copy(&mut &stream, &mut std::io::sink())?;
        Ok(read)
    }
}
