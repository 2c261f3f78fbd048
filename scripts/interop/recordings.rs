//! Responses kept as text files, for tests to replay.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::recorder::Exchange;

/// Longer bodies show nothing that shorter ones do not.
const LONGEST: usize = 7 << 10;

/// Requests whose responses differ between servers where they succeed.
const KEPT: &[&str] = &[
    "abort-multipart-upload",
    "complete-multipart-upload",
    "copy-object",
    "create-multipart-upload",
    "delete-objects",
    "get-object-range",
    "list-multipart-uploads",
    "list-objects-v2",
    "list-parts",
    "upload-part-copy",
];

/// The first response of each kind: of an operation that succeeded, and of each error.
#[derive(Default)]
pub struct Recordings(BTreeMap<String, Exchange>);

impl Recordings {
    pub fn add(&mut self, exchanges: &[Exchange]) {
        for exchange in exchanges {
            let operation = match exchange.operation() {
                "get-object" if exchange.response.header("content-range").is_some() => {
                    "get-object-range"
                }
                operation => operation,
            };
            // Of a longer body, only what was kept would be there.
            let length = exchange.response.header("content-length");
            let length = length.and_then(|length| length.parse().ok());
            if exchange.body.len().max(length.unwrap_or(0)) > LONGEST
                || exchange.succeeded() && !KEPT.contains(&operation)
                // A look whether the bucket answers.
                || exchange.target().contains("max-keys=1&")
                // An empty list shows nothing.
                || operation.starts_with("list-")
                    && exchange.succeeded()
                    && !["<Key>", "<Part>"].iter().any(|tag| exchange.text().contains(tag))
            {
                continue;
            }
            let name = match exchange.succeeded() {
                true => operation.to_owned(),
                false => format!("{operation}-{}", error(exchange)),
            };
            self.0.entry(name).or_insert_with(|| exchange.clone());
        }
    }

    /// Writes each as request line, empty line, status line and headers, empty line, body.
    /// `address`, where the server was reached, becomes `127.0.0.1:9000`.
    pub fn write(&self, dir: &Path, address: &str) -> Result<()> {
        if dir.exists() {
            fs::remove_dir_all(dir)?;
        }
        fs::create_dir_all(dir)?;
        for (name, exchange) in &self.0 {
            let headers = exchange.response.0.lines().filter(|line| !is_noise(line));
            let headers: Vec<&str> = headers.collect();
            let (request, body) = (exchange.request.start(), exchange.text());
            let text = format!("{request}\n\n{}\n\n{body}", headers.join("\n"));
            let text = text.replace(address, "127.0.0.1:9000");
            fs::write(dir.join(format!("{name}.txt")), text)?;
        }
        Ok(())
    }
}

/// Whether a header says nothing but which request this was, and when, or is for browsers.
fn is_noise(line: &str) -> bool {
    let name = line.split(':').next().unwrap_or_default().to_lowercase();
    name.starts_with("access-control-")
        || [
            "date",
            "x-amz-date",
            "x-amz-id-2",
            "x-amz-request-id",
            "x-amzn-requestid",
        ]
        .contains(&name.as_str())
}

/// S3's code, or the status where there is none.
fn error(exchange: &Exchange) -> String {
    let text = exchange.text();
    let code = text
        .split_once("<Code>")
        .and_then(|(_, rest)| rest.split_once("</Code>"));
    match code {
        Some((code, _)) => code.to_owned(),
        None => exchange.response.status().to_string(),
    }
}
