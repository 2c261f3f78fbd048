//! The floor under an export and an import: a bare program that moves the same blobs over the same
//! network, with TLS or without, and hashes them. It asks once before, and an export writes an object
//! once all are there. It checks nothing, and hashes each piece by itself, so that pieces need not wait
//! for one another.

mod export;
mod import;
mod wire;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use anyhow::Result;

use crate::child::{self, Cost};
use crate::layouts::Layout;
use crate::scenarios::Scenario;
use crate::server::Server;

pub use export::run as export;
pub use import::run as import;

/// Bytes of a blob that are moved by themselves.
const PIECE: u64 = 8 << 20;

/// Bytes read, hashed and written at a time.
const CHUNK: usize = 256 << 10;

const BUCKET: &str = "floor";

/// Connections on plain loopback.
const NEAR: usize = 16;

/// Connections at a distance: large blobs need bandwidth, small ones all requests in flight.
const DISTANT_LARGE: usize = 32;
const DISTANT_SMALL: usize = 160;

/// Blobs below this size are what an export sends few of at once.
const SMALL: u64 = 1 << 20;

/// As many as layercache sends of them at once by default.
const SMALL_UPLOADS: usize = 36;

/// One run of the program that imports a layout's blobs.
pub fn measure_import(
    server: &Server,
    scenario: &Scenario,
    layout: &Layout,
    scratch: &Path,
) -> Result<Cost> {
    let target = scratch.join(BUCKET);
    fs::create_dir_all(&target)?;
    server.clear(BUCKET)?;
    server.fill(BUCKET, "blobs/", layout.mtime)?;
    let mut command = command("floor-import", server, connections(scenario), layout)?;
    command.arg(&target).args(server.authority());
    let cost = child::run(command, &scratch.join("log"))?;
    layout.check_arrived(&target)?;
    fs::remove_dir_all(&target)?;
    Ok(cost)
}

/// One run of the program that exports them.
pub fn measure_export(
    server: &Server,
    scenario: &Scenario,
    layout: &Layout,
    scratch: &Path,
) -> Result<Cost> {
    server.clear(BUCKET)?;
    let connections = match scenario.size < SMALL {
        true => connections(scenario).min(SMALL_UPLOADS),
        false => connections(scenario),
    };
    let mut command = command("floor-export", server, connections, layout)?;
    command.args(server.authority());
    let cost = child::run(command, &scratch.join("log"))?;
    let (objects, bytes) = server.objects(BUCKET)?;
    layout.check(objects, bytes)?;
    Ok(cost)
}

fn connections(scenario: &Scenario) -> usize {
    match scenario.network.delay_ms {
        0 => NEAR,
        _ if scenario.size < SMALL => DISTANT_SMALL,
        _ => DISTANT_LARGE,
    }
}

fn command(name: &str, server: &Server, connections: usize, layout: &Layout) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(name)
        .arg(format!("{}/{BUCKET}", server.url()))
        .arg(connections.to_string())
        .arg(layout.blobs());
    Ok(command)
}

/// Does `work` on all `items`, so many at once.
fn at_once<T: Send>(
    threads: usize,
    items: Vec<T>,
    work: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    let threads = threads.min(items.len());
    let items = Mutex::new(items);
    let next = || items.lock().expect("no panic").pop();
    std::thread::scope(|scope| {
        let work = || -> Result<()> {
            while let Some(item) = next() {
                work(item)?;
            }
            Ok(())
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("no panic"))
    })
}
