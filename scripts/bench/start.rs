//! How long the program takes to begin.

use std::io::Read as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Result;

use crate::table::median;
use crate::{child, tools};

const RUNS: usize = 30;

/// Seconds that `layercache --version` takes: the median.
pub fn version(layercache: &Path, scratch: &Path) -> Option<f64> {
    let mut walls = Vec::new();
    for _ in 0..RUNS {
        let mut command = Command::new(layercache);
        command.arg("--version");
        tools::clean_environment(&mut command, scratch);
        walls.push(child::run(command, &scratch.join("log")).ok()?.wall);
    }
    Some(median(walls))
}

/// Seconds from before the fork to the first byte that the store receives, of a request over http or a
/// TLS handshake over https: the median.
pub fn first_byte(layercache: &Path, scheme: &str, scratch: &Path) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let mut times = Vec::new();
    for _ in 0..RUNS {
        let mut command = Command::new(layercache);
        tools::clean_environment(&mut command, scratch);
        command
            .args(["import", "--progress", "quiet", "--cache-from"])
            .arg(format!(
                "type=s3,region=us-east-1,bucket=bench,endpoint_url={scheme}://127.0.0.1:{port},\
                 use_path_style=true,access_key_id=x,secret_access_key=y"
            ))
            .arg(scratch.join("started"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        child::dies_with_runner(&mut command);
        let begun = Instant::now();
        let mut child = command.spawn()?;
        let (mut connection, _) = listener.accept()?;
        connection.set_read_timeout(Some(child::TIMEOUT))?;
        connection.read_exact(&mut [0])?;
        times.push(begun.elapsed().as_secs_f64());
        child.kill()?;
        child.wait()?;
    }
    Ok(median(times))
}
