//! The OCI and Docker JSON documents of a layout, as far as a cache needs them, and JSON exactly as Go
//! writes it.

use std::collections::BTreeMap;
use std::io;

use anyhow::{Context, Result, bail};
use serde::de::IgnoredAny;
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::cache::Time;
use crate::cache::digest::Digest;
use crate::quote::quoted;

pub const IMAGE_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const IMAGE_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const IMAGE_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub const CACHE_CONFIG: &str = "application/vnd.buildkit.cacheconfig.v0";

/// Annotation of an index entry: its tag.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation of an index entry: its full name, which containerd writes and BuildKit looks at first.
pub const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// Annotation of an index entry: when the image was created.
pub const IMAGE_CREATED: &str = "org.opencontainers.image.created";
/// Annotation of a layer: its diffID.
pub const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// Annotation of a layer: when it was created.
pub const CREATED_AT: &str = "buildkit/createdat";

/// A content descriptor. Fields are written in the order of Go's OCI types; those not named here
/// (`platform`, `urls`, …) are kept as they came.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Descriptor {
    #[serde(rename = "mediaType")]
    pub media_type: String,
    pub digest: Digest,
    /// Bytes.
    #[serde(deserialize_with = "size")]
    pub size: u64,
    #[serde(default, deserialize_with = "null_is_default")]
    pub annotations: BTreeMap<String, String>,
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

// By hand: Go has `urls` before the annotations, and everything else that is in `extra` after them.
impl Serialize for Descriptor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const URLS: &str = "urls";
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("mediaType", &self.media_type)?;
        map.serialize_entry("digest", &self.digest)?;
        map.serialize_entry("size", &self.size)?;
        if let Some(urls) = self.extra.get(URLS) {
            map.serialize_entry(URLS, urls)?;
        }
        if !self.annotations.is_empty() {
            map.serialize_entry("annotations", &self.annotations)?;
        }
        for (key, value) in self.extra.iter().filter(|(key, _)| *key != URLS) {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl Descriptor {
    /// One without annotations or other optional fields.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size,
            annotations: BTreeMap::new(),
            extra: serde_json::Map::new(),
        }
    }

    /// What an index entry may take from a descriptor of unknown origin: besides media type, digest and
    /// size, only the platform and the time of creation. Any other annotation could name the entry,
    /// and so take over a tag; `urls` and `data` could replace the blob.
    pub fn unnamed(&self) -> Self {
        let mut entry = Descriptor::new(&self.media_type, self.digest, self.size);
        if let Some(created) = self.annotations.get(IMAGE_CREATED)
            && created.parse::<Time>().is_ok()
        {
            entry
                .annotations
                .insert(IMAGE_CREATED.to_owned(), created.clone());
        }
        if let Some(platform) = self.extra.get(PLATFORM)
            && is_platform(platform)
        {
            entry.extra.insert(PLATFORM.to_owned(), platform.clone());
        }
        entry
    }
}

const PLATFORM: &str = "platform";

/// Whether this has the fields of an OCI platform and nothing else.
fn is_platform(value: &serde_json::Value) -> bool {
    let is_short = |value: &serde_json::Value| value.as_str().is_some_and(|s| s.len() <= 64);
    value.as_object().is_some_and(|fields| {
        fields.iter().all(|(name, value)| match name.as_str() {
            "architecture" | "os" | "os.version" | "variant" => is_short(value),
            "os.features" => value
                .as_array()
                .is_some_and(|features| features.len() <= 16 && features.iter().all(is_short)),
            _ => false,
        })
    })
}

/// An image manifest, OCI or Docker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageManifest {
    #[serde(rename = "schemaVersion")]
    pub schema_version: u32,
    #[serde(
        rename = "mediaType",
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub media_type: String,
    pub config: Descriptor,
    #[serde(default, deserialize_with = "null_is_default")]
    pub layers: Vec<Descriptor>,
}

/// An image index, or a Docker manifest list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageIndex {
    #[serde(rename = "schemaVersion")]
    pub schema_version: u32,
    #[serde(
        rename = "mediaType",
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub media_type: String,
    #[serde(default, deserialize_with = "null_is_default")]
    pub manifests: Vec<Descriptor>,
}

/// What a descriptor in `index.json` can refer to.
#[derive(Debug, Clone)]
pub enum AnyManifest {
    Image(ImageManifest),
    Index(ImageIndex),
}

impl AnyManifest {
    /// Makes sure that the descriptor is that of a manifest or an index.
    ///
    /// # Errors
    /// It has another media type.
    pub fn check_type(descriptor: &Descriptor) -> Result<()> {
        let digest = &descriptor.digest;
        match descriptor.media_type.as_str() {
            IMAGE_MANIFEST | DOCKER_MANIFEST | IMAGE_INDEX | DOCKER_LIST => Ok(()),
            "application/vnd.docker.distribution.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v1+prettyjws" => {
                bail!("manifest {digest} is of Docker's schema 1, which is not supported")
            }
            other => bail!(
                "manifest {digest} has the media type {}, which is not supported (expected an image \
                 manifest or an image index, of OCI or Docker)",
                quoted(other)
            ),
        }
    }

    /// Reads the blob that `descriptor` describes.
    ///
    /// # Errors
    /// It is not a manifest or index of schema version 2, or not what its descriptor calls it.
    pub fn parse(descriptor: &Descriptor, bytes: &[u8]) -> Result<Self> {
        Self::check_type(descriptor)?;
        match descriptor.media_type.as_str() {
            IMAGE_MANIFEST | DOCKER_MANIFEST => {
                ImageManifest::parse(descriptor, bytes).map(AnyManifest::Image)
            }
            _ => ImageIndex::parse(descriptor, bytes).map(AnyManifest::Index),
        }
    }
}

impl ImageManifest {
    /// Reads the manifest that `descriptor` describes.
    ///
    /// # Errors
    /// As [`AnyManifest::parse`].
    pub fn parse(descriptor: &Descriptor, bytes: &[u8]) -> Result<Self> {
        let manifest: ImageManifest = object_from_json(bytes)
            .with_context(|| format!("reading manifest {}", descriptor.digest))?;
        check_kind(descriptor, manifest.schema_version, &manifest.media_type)?;
        check_one_kind(&descriptor.digest, bytes, false)?;
        Ok(manifest)
    }
}

impl ImageIndex {
    /// Reads the index that `descriptor` describes.
    ///
    /// # Errors
    /// As [`AnyManifest::parse`].
    pub fn parse(descriptor: &Descriptor, bytes: &[u8]) -> Result<Self> {
        let index: ImageIndex = object_from_json(bytes)
            .with_context(|| format!("reading index {}", descriptor.digest))?;
        check_kind(descriptor, index.schema_version, &index.media_type)?;
        check_one_kind(&descriptor.digest, bytes, true)?;
        Ok(index)
    }
}

fn check_kind(descriptor: &Descriptor, schema_version: u32, media_type: &str) -> Result<()> {
    if schema_version != 2 {
        bail!(
            "reading {}: schema version {schema_version} is not supported (expected 2)",
            descriptor.digest
        );
    }
    // Otherwise it could be stored as one kind and read as the other.
    if !media_type.is_empty() && media_type != descriptor.media_type {
        bail!(
            "reading {}: it calls itself {}, its descriptor {}",
            descriptor.digest,
            quoted(media_type),
            quoted(&descriptor.media_type)
        );
    }
    Ok(())
}

/// A layer's media type by its OCI name, if it is one of Docker's.
pub fn normalise_layer(media_type: &str) -> &str {
    match media_type {
        "application/vnd.docker.image.rootfs.diff.tar" => "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
            "application/vnd.oci.image.layer.v1.tar+gzip"
        }
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
            "application/vnd.oci.image.layer.v1.tar+zstd"
        }
        "application/vnd.docker.image.rootfs.foreign.diff.tar" => {
            "application/vnd.oci.image.layer.nondistributable.v1.tar"
        }
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => {
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        }
        "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd" => {
            "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
        }
        other => other,
    }
}

/// Whether this is a file system's layer: a tar, plain or in a compression that diffIDs can be computed
/// through.
pub fn is_layer(media_type: &str) -> bool {
    let media_type = normalise_layer(media_type);
    let kind = media_type
        .strip_suffix("+gzip")
        .or_else(|| media_type.strip_suffix("+zstd"))
        .unwrap_or(media_type);
    kind == "application/vnd.oci.image.layer.v1.tar" || is_nondistributable(kind)
}

/// Whether this is a layer that a layout may lack, because it has to be fetched from its vendor.
pub fn is_nondistributable(media_type: &str) -> bool {
    normalise_layer(media_type)
        .starts_with("application/vnd.oci.image.layer.nondistributable.v1.tar")
}

/// Structural characters (`{`, `[` and `,`) that a document may hold. A cache has some eight a layer, so
/// this allows half a million layers. Two bytes of JSON can take a hundred bytes of memory, and a
/// hostile document consists of nothing else.
const MOST_STRUCTURE: usize = 4 << 20;

/// Reads untrusted JSON in bounded memory.
pub(crate) fn from_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T> {
    // Counts those within strings too: names and digests have next to none.
    let structural = |byte: &&u8| matches!(byte, b'{' | b'[' | b',');
    let found = bytes.iter().filter(structural).count();
    if found > MOST_STRUCTURE {
        bail!("it has too many elements (about {found}; at most {MOST_STRUCTURE} are read)");
    }
    Ok(serde_json::from_slice(bytes)?)
}

/// As [`from_json`], but only from an object: serde would read a struct from an array too, which Go,
/// and so BuildKit, refuses.
pub(crate) fn object_from_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T> {
    let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
    if first.is_some_and(|first| *first != b'{') {
        bail!("it is not a JSON object");
    }
    from_json(bytes)
}

/// Refuses a document that could be read as either kind. Otherwise, one without a media type of its own
/// could pass our checks as a manifest that names nothing, and name absent blobs to the next reader.
fn check_one_kind(digest: &Digest, bytes: &[u8], is_index: bool) -> Result<()> {
    #[derive(Deserialize)]
    struct Both {
        config: Option<IgnoredAny>,
        layers: Option<IgnoredAny>,
        manifests: Option<IgnoredAny>,
    }
    let found: Both = object_from_json(bytes)?;
    let is_manifest = found.config.is_some() || found.layers.is_some();
    if is_manifest && (is_index || found.manifests.is_some()) {
        bail!("{digest} could be read as an image manifest and as an image index");
    }
    Ok(())
}

/// `value` as Go's encoding/json writes it: compact, and with `<`, `>`, `&`, U+2028 and U+2029
/// escaped. Fails only if serialising `value` does.
pub fn to_json(value: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, GoFormatter);
    value.serialize(&mut serializer)?;
    Ok(bytes)
}

struct GoFormatter;

impl serde_json::ser::Formatter for GoFormatter {
    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        // Most strings have none: a cache consists of digests and times. 0xe2 begins U+2028 and U+2029.
        if !rest.bytes().any(|b| matches!(b, b'<' | b'>' | b'&' | 0xe2)) {
            return writer.write_all(rest.as_bytes());
        }
        while let Some(at) = rest.find(['<', '>', '&', '\u{2028}', '\u{2029}']) {
            let (plain, special) = rest.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let mut chars = special.chars();
            if let Some(special) = chars.next() {
                write!(writer, "\\u{:04x}", u32::from(special))?;
            }
            rest = chars.as_str();
        }
        writer.write_all(rest.as_bytes())
    }
}

/// For fields that Go writes as `null` when empty.
pub(crate) fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A size in bytes. Go has int64 there, so more cannot be a size.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let size = i64::deserialize(deserializer)?;
    u64::try_from(size).map_err(|_| serde::de::Error::custom(format!("size {size} is negative")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn every_index_of_the_fixtures_is_written_as_it_was_read() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let mut indexes = 0;
        for folder in std::fs::read_dir(fixtures).unwrap() {
            let path = folder.unwrap().path().join("index.json");
            let Ok(bytes) = std::fs::read(&path) else {
                continue;
            };
            let index: ImageIndex = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(to_json(&index).unwrap(), bytes, "{}", path.display());
            indexes += 1;
        }
        assert_eq!(indexes, 9);
    }

    #[test]
    fn a_descriptor_keeps_what_it_does_not_know() {
        let text = format!(
            r#"{{"mediaType":"m","digest":"{}","size":3,"urls":["https://a/b"],"annotations":{{"a":"1"}},"data":"e30=","platform":{{"os":"linux","architecture":"amd64"}},"artifactType":"t"}}"#,
            Digest::of(b"x")
        );
        let descriptor: Descriptor = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&descriptor).unwrap(), text);
    }

    #[test]
    fn of_a_descriptor_from_elsewhere_only_what_cannot_name_an_entry_is_kept() {
        let digest = Digest::of(b"x");
        let read = |json: &str| -> Descriptor { serde_json::from_str(json).unwrap() };
        let start = format!(r#"{{"mediaType":"m","digest":"{digest}","size":3"#);
        let platform = r#""platform":{"architecture":"arm64","os":"linux","variant":"v8"}"#;
        let good = format!(
            r#"{start},"annotations":{{"org.opencontainers.image.created":"2026-11-21T20:37:38Z"}},{platform}}}"#
        );
        assert_eq!(read(&good).unnamed(), read(&good));
        let hostile = format!(
            r#"{start},"urls":["https://a/b"],"annotations":{{"io.containerd.image.name":"latest",
            "org.opencontainers.image.ref.name":"latest","org.opencontainers.image.created":"latest"}},
            "data":"e30=","platform":{{"os":"linux","name":"latest"}},"artifactType":"t"}}"#
        );
        assert_eq!(read(&hostile).unnamed(), Descriptor::new("m", digest, 3));
        for platform in ["[]", r#"{"os":1}"#, r#"{"os.features":["a",1]}"#] {
            let odd = read(&format!(r#"{start},"platform":{platform}}}"#));
            assert_eq!(odd.unnamed().extra.len(), 0, "{platform}");
        }
    }

    #[test]
    fn null_annotations_are_none_and_are_not_written() {
        let digest = Digest::of(b"x");
        let text =
            format!(r#"{{"mediaType":"m","digest":"{digest}","size":3,"annotations":null}}"#);
        let descriptor: Descriptor = serde_json::from_str(&text).unwrap();
        assert_eq!(descriptor, Descriptor::new("m", digest, 3));
        assert_eq!(
            serde_json::to_string(&descriptor).unwrap(),
            format!(r#"{{"mediaType":"m","digest":"{digest}","size":3}}"#)
        );
    }

    #[test]
    fn sizes_that_are_no_sizes_are_refused() {
        for size in ["-1", "9223372036854775808", "1.5", "\"1\"", "null"] {
            let digest = Digest::of(b"x");
            let text = format!(r#"{{"mediaType":"m","digest":"{digest}","size":{size}}}"#);
            assert!(
                serde_json::from_str::<Descriptor>(&text).is_err(),
                "{size} was accepted"
            );
        }
    }

    #[test]
    fn a_document_that_contradicts_its_descriptor_is_refused() {
        let bytes =
            format!(r#"{{"schemaVersion":2,"mediaType":"{IMAGE_MANIFEST}","manifests":[]}}"#);
        let descriptor = Descriptor::new(IMAGE_INDEX, Digest::of(b""), 0);
        let error = ImageIndex::parse(&descriptor, bytes.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("calls itself"), "{error}");
        let descriptor = Descriptor::new(IMAGE_MANIFEST, Digest::of(b""), 0);
        let error = ImageIndex::parse(&descriptor, br#"{"schemaVersion":1}"#).unwrap_err();
        assert!(error.to_string().contains("schema version 1"), "{error}");
    }

    #[test]
    fn strings_are_escaped_as_go_does() {
        let text = "<a> & \u{2028}\u{2029}é\u{7f}\n\u{1}\u{8}\"\\";
        assert_eq!(
            String::from_utf8(to_json(&text).unwrap()).unwrap(),
            r#""\u003ca\u003e \u0026 \u2028\u2029é"#.to_owned() + "\u{7f}" + r#"\n\u0001\b\"\\""#
        );
    }

    #[test]
    fn only_tars_are_layers() {
        for media_type in [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.docker.image.rootfs.foreign.diff.tar",
        ] {
            assert!(is_layer(media_type), "{media_type}");
        }
        for media_type in [
            "application/vnd.in-toto+json",
            "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "application/wasm",
            "",
        ] {
            assert!(!is_layer(media_type), "{media_type}");
        }
    }
}
