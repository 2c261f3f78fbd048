//! A demonstration without an account or a network: it exports a build cache from an OCI layout to an S3
//! server, imports it into a new layout, compares both byte for byte, and reads the cache as a builder
//! would, through `layercache serve`.
//!
//! `cargo run --example demo -- target/debug/layercache`
//!
//! The server is that of the tests; the program is the real one, run as a user would run it.

#[path = "bench/pull.rs"]
mod pull;
#[path = "../tests/server/mod.rs"]
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use server::{ACCESS_KEY, SECRET_KEY, Server};

const CACHE: &str = "tests/fixtures/local-max";

fn main() -> ExitCode {
    // The builder of the last step.
    let done = match std::env::args().nth(1).as_deref() {
        Some("builder") => build(),
        _ => demonstrate(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe demonstration failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Reads all layers, as a build would that needs every one.
fn build() -> Result<()> {
    let (layers, bytes) = pull::run()?;
    println!(
        "the builder has read {}, {bytes} bytes",
        counted(layers, "layer")
    );
    Ok(())
}

fn demonstrate() -> Result<()> {
    let program = std::env::args_os()
        .nth(1)
        .map(PathBuf::from)
        .context("give the program's path: cargo run --example demo -- target/debug/layercache")?;
    let program = program
        .canonicalize()
        .with_context(|| format!("find the program {}", program.display()))?;
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let original = here.join(CACHE);
    let temporary = tempfile::tempdir().context("make a temporary directory")?;
    let copy = temporary.path().join("imported");
    let server = Server::start();
    let run = |arguments: &[&OsStr]| run(&program, here, temporary.path(), arguments);

    println!(
        "The tests' S3 server listens at {}, with an empty bucket `cache`.",
        server.url()
    );
    println!("It verifies every signature and payload hash. No request leaves this machine.\n");

    println!(
        "1. Send a build cache that BuildKit wrote to a local directory, all of it (mode=max):\n"
    );
    let to = server.spec("mode=max");
    run(&[
        "export".as_ref(),
        "--cache-to".as_ref(),
        to.as_ref(),
        CACHE.as_ref(),
    ])?;
    let objects = server.objects();
    println!(
        "   The bucket now holds {}:",
        counted(objects.len(), "object")
    );
    for (key, body) in &objects {
        println!("   {:>9} bytes  {key}", body.len());
    }
    ensure!(!objects.is_empty(), "the export sent nothing");
    let unfinished = server.uploads();
    ensure!(
        unfinished == 0,
        "the export left {}",
        counted(unfinished, "unfinished multipart upload")
    );

    println!("\n2. Send it again. What is there already is not sent twice:\n");
    server.clear_log();
    run(&[
        "export".as_ref(),
        "--cache-to".as_ref(),
        to.as_ref(),
        CACHE.as_ref(),
    ])?;
    show_requests(&server);
    let sent = written(&server, |key| !key.starts_with("manifests/"));
    ensure!(
        sent.is_empty(),
        "the second export wrote {} again",
        sent.join(", ")
    );
    ensure!(
        server.objects() == objects,
        "the second export changed what the bucket holds"
    );
    match written(&server, |key| key.starts_with("manifests/")).len() {
        0 => println!("   Nothing was sent."),
        _ => println!("   No blob was sent; the small manifest is always written, last."),
    }

    println!("\n3. Fetch it into a new directory:\n");
    server.clear_log();
    let from = server.spec("");
    run(&[
        "import".as_ref(),
        "--cache-from".as_ref(),
        from.as_ref(),
        copy.as_ref(),
    ])?;
    show_requests(&server);

    println!("\n4. Compare the two layouts:\n");
    let compared = compare(&original, &copy)?;
    println!(
        "   {} are the same, byte for byte:",
        counted(compared.len(), "file")
    );
    for (name, size) in &compared {
        println!("   {size:>9} bytes  {name}");
    }
    println!("\nThe cache went to S3 and came back unchanged.");

    println!("\n5. Serve it to a builder, which reads blob by blob what it needs:\n");
    server.clear_log();
    let this = std::env::current_exe().context("find this program")?;
    run(&[
        "serve".as_ref(),
        "--cache-from".as_ref(),
        from.as_ref(),
        "--".as_ref(),
        this.as_ref(),
        "builder".as_ref(),
    ])?;
    show_requests(&server);
    Ok(())
}

/// Runs the program and shows its command line and its output, with the keys as `***`.
fn run(program: &Path, here: &Path, temporary: &Path, arguments: &[&OsStr]) -> Result<()> {
    let this = std::env::current_exe().context("find this program")?;
    let masked = |text: &str| {
        text.replace(ACCESS_KEY, "***")
            .replace(SECRET_KEY, "***")
            .replace(&*temporary.to_string_lossy(), "/tmp/demo")
            .replace(&*this.to_string_lossy(), "a-builder")
    };
    let shown: Vec<String> = arguments
        .iter()
        .map(|a| masked(&a.to_string_lossy()))
        .collect();
    println!(
        "   $ layercache {} {} \\\n       {} \\\n       {}",
        shown[0],
        shown[1],
        shown[2],
        shown[3..].join(" ")
    );

    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(here)
        .stdin(Stdio::null());
    // The user's AWS account must not play a part.
    for (name, _) in
        std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("AWS_"))
    {
        command.env_remove(name);
    }
    let output = command
        .output()
        .with_context(|| format!("run {}", program.display()))?;
    let printed =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    for line in printed.iter().flat_map(|text| text.lines()) {
        println!("   | {}", masked(line));
    }
    println!();
    ensure!(
        output.status.success(),
        "`layercache {}` ended with {}",
        shown[0],
        output.status
    );
    let leaked = printed.iter().any(|text| text.contains(SECRET_KEY));
    ensure!(!leaked, "`layercache {}` printed the secret key", shown[0]);
    Ok(())
}

fn show_requests(server: &Server) {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for logged in server.log() {
        *counts.entry(logged.operation).or_default() += 1;
    }
    let counts: Vec<String> = counts
        .iter()
        .map(|(operation, n)| format!("{n} {operation}"))
        .collect();
    println!("   Requests: {}.", counts.join(", "));
}

/// The keys of the objects that requests in the log create, change or remove.
fn written(server: &Server, of: impl Fn(&str) -> bool) -> Vec<String> {
    let reads = ["GET", "HEAD"];
    let log = server.log().into_iter();
    log.filter(|logged| !reads.contains(&logged.method.as_str()) && of(&logged.key))
        .map(|l| l.key)
        .collect()
}

/// Names and sizes of the identical files: everything that `original`'s tags refer to.
///
/// # Errors
/// If a file differs or is missing, or if `copy` has a file that nothing refers to.
fn compare(original: &Path, copy: &Path) -> Result<Vec<(String, usize)>> {
    let mut same = Vec::new();
    let mut expected = BTreeSet::new();
    let mut differences = Vec::new();
    let mut names = vec!["oci-layout".to_owned(), "index.json".to_owned()];
    while let Some(name) = names.pop() {
        if !expected.insert(name.clone()) {
            continue;
        }
        let bytes = fs::read(original.join(&name))
            .with_context(|| format!("read {name} of the original layout"))?;
        match fs::read(copy.join(&name)) {
            Ok(other) if other == bytes => same.push((name.clone(), bytes.len())),
            Ok(other) => differences.push(format!(
                "{name} differs ({} bytes, then {})",
                bytes.len(),
                other.len()
            )),
            Err(error) => differences.push(format!("{name} was not imported ({error})")),
        }
        // Only the index and manifests refer to other files; a cache config has none of these fields.
        if let Ok(document) = serde_json::from_slice::<Value>(&bytes) {
            names.extend(referred(&document));
        }
    }
    for name in files(copy, copy)?.difference(&expected) {
        differences.push(format!("{name} was imported, and nothing refers to it"));
    }
    if !differences.is_empty() {
        bail!(
            "the imported layout is not the original:\n  {}",
            differences.join("\n  ")
        );
    }
    same.sort();
    Ok(same)
}

fn referred(document: &Value) -> Vec<String> {
    let lists = ["manifests", "layers"]
        .into_iter()
        .filter_map(|field| document.get(field)?.as_array())
        .flatten();
    lists
        .chain(document.get("config"))
        .filter_map(|descriptor| descriptor.get("digest")?.as_str())
        .map(|digest| format!("blobs/{}", digest.replace(':', "/")))
        .collect()
}

fn files(root: &Path, folder: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry
            .with_context(|| format!("list {}", folder.display()))?
            .path();
        if path.is_dir() {
            found.extend(files(root, &path)?);
        } else if let Ok(name) = path.strip_prefix(root) {
            found.insert(name.to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

fn counted(n: usize, what: &str) -> String {
    match n {
        1 => format!("1 {what}"),
        _ => format!("{n} {what}s"),
    }
}
