//! The OCI and Docker JSON documents that a layout holds, as far as a cache needs them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

pub const IMAGE_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const IMAGE_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const IMAGE_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub const CACHE_CONFIG: &str = "application/vnd.buildkit.cacheconfig.v0";

/// The annotation of an index entry that holds its tag.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The same, as containerd writes it.
pub const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// The annotation of a layer that holds its diffID.
pub const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// The annotation of a layer that holds the time of its making.
pub const CREATED_AT: &str = "buildkit/createdat";

/// A content descriptor. Fields are written in the order Go's OCI types have; those not named here
/// (`platform`, `urls`, …) are kept as they came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    #[serde(rename = "mediaType")]
    pub media_type: String,
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl Descriptor {
    /// The tag of an index entry: its `ref.name`, else containerd's name.
    pub fn tag(&self) -> Option<&str> {
        self.annotations
            .get(REF_NAME)
            .or_else(|| self.annotations.get(CONTAINERD_NAME))
            .map(String::as_str)
    }
}

/// An image manifest, OCI or Docker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    #[serde(rename = "schemaVersion")]
    pub schema_version: u32,
    #[serde(
        rename = "mediaType",
        default,
        skip_serializing_if = "String::is_empty"
    )]
    pub media_type: String,
    pub config: Descriptor,
    #[serde(default)]
    pub layers: Vec<Descriptor>,
}

/// An image index or a Docker manifest list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Index {
    #[serde(rename = "schemaVersion")]
    pub schema_version: u32,
    #[serde(
        rename = "mediaType",
        default,
        skip_serializing_if = "String::is_empty"
    )]
    pub media_type: String,
    #[serde(default)]
    pub manifests: Vec<Descriptor>,
}
