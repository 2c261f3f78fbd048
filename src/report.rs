//! What a run did, in numbers: the closing summary and the metadata file.

use serde::Serialize;

/// One spec's outcome.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// `export` or `import`.
    pub command: &'static str,
    pub bucket: String,
    pub names: Vec<String>,
    /// The layout's manifest: chosen on export, written on import.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest: Option<String>,
    /// Under which tag an import was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    pub dry_run: bool,
    /// Import: nothing is stored under the name.
    pub not_found: bool,
    /// Blobs sent or fetched.
    pub transferred: u64,
    /// Blobs that were there already.
    pub present: u64,
    pub refreshed: u64,
    /// Bytes of blobs and manifests sent or fetched.
    pub bytes: u64,
    /// Layers and results that an import left out because blobs were missing.
    pub dropped_layers: u64,
    pub dropped_results: u64,
    /// HTTP requests, retries included.
    pub requests: u64,
    pub seconds: f64,
    /// Set when the export failed under `ignore-error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
