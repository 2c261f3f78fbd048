//! The JSON of a cache, field by field as BuildKit writes it, and what is refused in it.

use std::borrow::Cow;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{
    CacheConfig, ChainResult, Content, Image, Input, Layer, LayerAnnotations, LayerResult, Record,
    Time, graph,
};
use crate::cache::digest::Digest;
use crate::cache::oci::{
    Descriptor, from_json, normalise_layer, null_is_default, object_from_json, to_json,
};

/// The version of the field `layercache` that is written, and the only one that is read.
const IMAGE_VERSION: u64 = 1;

// Go's omitempty leaves out 0, "" and empty arrays, and its reader takes an absent or null field for
// these: so every field has a default here.

#[derive(Serialize, Deserialize)]
struct Config<'a> {
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty",
        borrow
    )]
    layers: Vec<WireLayer<'a>>,
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty",
        borrow
    )]
    records: Vec<WireRecord<'a>>,
    #[serde(default, skip_serializing, borrow)]
    layercache: Option<&'a RawValue>,
    #[serde(
        rename = "layercache",
        skip_deserializing,
        skip_serializing_if = "Option::is_none"
    )]
    image: Option<WireImage<'a>>,
}

#[derive(Serialize, Deserialize)]
struct WireLayer<'a> {
    #[serde(default, deserialize_with = "null_is_default", borrow)]
    blob: Text<'a>,
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "is_zero"
    )]
    parent: i64,
    #[serde(default, skip_serializing_if = "Option::is_none", borrow)]
    annotations: Option<WireAnnotations<'a>>,
}

#[derive(Serialize, Deserialize)]
struct WireAnnotations<'a> {
    #[serde(
        rename = "mediaType",
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Text::is_empty",
        borrow
    )]
    media_type: Text<'a>,
    #[serde(
        rename = "diffID",
        default,
        deserialize_with = "null_is_default",
        borrow
    )]
    diff_id: Text<'a>,
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "is_zero"
    )]
    size: i64,
    #[serde(rename = "createdAt", default, deserialize_with = "time")]
    created_at: Time,
}

#[derive(Serialize, Deserialize)]
struct WireRecord<'a> {
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    layers: Vec<WireResult>,
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    chains: Vec<WireChain>,
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Text::is_empty",
        borrow
    )]
    digest: Text<'a>,
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty",
        borrow
    )]
    inputs: Vec<Alternatives<'a>>,
}

#[derive(Serialize, Deserialize)]
struct WireResult {
    #[serde(default, deserialize_with = "null_is_default")]
    layer: i64,
    #[serde(rename = "createdAt", default, deserialize_with = "time")]
    created_at: Time,
}

#[derive(Serialize, Deserialize)]
struct WireChain {
    #[serde(default, deserialize_with = "null_is_default")]
    layers: Vec<i64>,
    #[serde(rename = "createdAt", default, deserialize_with = "time")]
    created_at: Time,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(transparent)]
struct Alternatives<'a>(#[serde(deserialize_with = "null_is_default", borrow)] Vec<WireInput<'a>>);

#[derive(Serialize, Deserialize)]
struct WireInput<'a> {
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Text::is_empty",
        borrow
    )]
    selector: Text<'a>,
    #[serde(default, deserialize_with = "null_is_default")]
    link: i64,
}

#[derive(Serialize)]
struct WireImage<'a> {
    version: u64,
    root: &'a Descriptor,
    contents: Vec<WireContent>,
}

#[derive(Serialize, Deserialize)]
struct WireContent {
    digest: Digest,
    size: i64,
}

/// A string that is borrowed from the document where it holds no escapes.
#[derive(Default, Serialize, Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Text<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn is_zero(number: &i64) -> bool {
    *number == 0
}

fn time<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Time, D::Error> {
    match Option::<Text>::deserialize(deserializer)? {
        None => Ok(Time::UNKNOWN),
        Some(text) => text.0.parse().map_err(serde::de::Error::custom),
    }
}

pub(super) fn parse_s3(bytes: &[u8]) -> Result<CacheConfig> {
    let wire: Config = object_from_json(bytes)?;
    let mut cache = read(&wire, |at, _| {
        annotations(wire.layers[at].annotations.as_ref())
    })?;
    if let Some(image) = wire.layercache {
        cache.image = read_image(image).context("the field \"layercache\"")?;
    }
    Ok(cache)
}

pub(super) fn parse_local(
    bytes: &[u8],
    annotate: impl FnMut(usize, &Digest) -> Result<LayerAnnotations>,
) -> Result<CacheConfig> {
    read(&object_from_json(bytes)?, annotate)
}

/// Reads a bare array of records, over `layers` that are given.
pub(super) fn parse_records(bytes: &[u8], layers: Vec<Layer>) -> Result<CacheConfig> {
    let wire: Option<Vec<WireRecord>> = from_json(bytes)?;
    Ok(CacheConfig {
        records: records(&wire.unwrap_or_default(), layers.len())?,
        layers,
        image: None,
    })
}

/// Asks for annotations last: `annotate` may have to read blobs.
fn read(
    wire: &Config,
    mut annotate: impl FnMut(usize, &Digest) -> Result<LayerAnnotations>,
) -> Result<CacheConfig> {
    let count = wire.layers.len();
    let (mut blobs, mut parents) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for (at, layer) in wire.layers.iter().enumerate() {
        let blob: Digest = layer
            .blob
            .0
            .parse()
            .with_context(|| format!("layer {at}: its blob"))?;
        blobs.push(blob);
        parents.push(match layer.parent {
            -1 => None,
            parent => Some(
                index(parent, count)
                    .with_context(|| format!("layer {at}: its parent is layer {parent}"))?,
            ),
        });
    }
    if let Some(at) = graph::circular_parent(&parents) {
        bail!("layer {at}: its parents run in a circle");
    }
    let records = records(&wire.records, count)?;
    let mut layers = Vec::with_capacity(count);
    for (at, (blob, parent)) in blobs.into_iter().zip(parents).enumerate() {
        layers.push(Layer {
            annotations: annotate(at, &blob).with_context(|| format!("layer {at} ({blob})"))?,
            blob,
            parent,
        });
    }
    Ok(CacheConfig {
        layers,
        records,
        image: None,
    })
}

fn annotations(wire: Option<&WireAnnotations>) -> Result<LayerAnnotations> {
    let Some(wire) = wire else {
        bail!("it has no annotations (BuildKit's own import would refuse it)");
    };
    if wire.diff_id.is_empty() {
        bail!("it has no diffID (BuildKit's own import would refuse it)");
    }
    Ok(LayerAnnotations {
        media_type: normalise_layer(&wire.media_type.0).to_owned(),
        diff_id: wire.diff_id.0.parse().context("its diffID")?,
        size: u64::try_from(wire.size)
            .map_err(|_| anyhow!("its size is negative ({})", wire.size))?,
        created_at: wire.created_at,
    })
}

fn records(wire: &[WireRecord], layers: usize) -> Result<Vec<Record>> {
    let mut records = Vec::with_capacity(wire.len());
    for (at, record) in wire.iter().enumerate() {
        let record = read_record(record, layers, wire.len());
        records.push(record.with_context(|| format!("record {at}"))?);
    }
    if let Err(at) = graph::inputs_first(&records) {
        bail!("record {at}: its links run in a circle");
    }
    Ok(records)
}

/// `layers` and `records` are how many there are.
fn read_record(wire: &WireRecord, layers: usize, records: usize) -> Result<Record> {
    let layer = |number: i64| match usize::try_from(number) {
        Ok(layer) if layer < layers => Ok(layer),
        Ok(layer) => Err(anyhow!(
            "a result is of layer {layer}, but there are {layers} layers"
        )),
        Err(_) => Err(anyhow!("a result is of layer {number}, which is not there")),
    };
    let mut results = Vec::with_capacity(wire.layers.len());
    for result in &wire.layers {
        results.push(LayerResult {
            layer: layer(result.layer)?,
            created_at: result.created_at,
        });
    }
    let mut chains = Vec::with_capacity(wire.chains.len());
    for chain in &wire.chains {
        chains.push(ChainResult {
            layers: chain
                .layers
                .iter()
                .map(|&l| layer(l))
                .collect::<Result<_>>()?,
            created_at: chain.created_at,
        });
    }
    let mut inputs = Vec::with_capacity(wire.inputs.len());
    for (slot, alternatives) in wire.inputs.iter().enumerate() {
        let mut slot_inputs = Vec::with_capacity(alternatives.0.len());
        for input in &alternatives.0 {
            slot_inputs.push(Input {
                selector: input.selector.0.clone().into_owned(),
                link: index(input.link, records)
                    .with_context(|| format!("input {slot} links to record {}", input.link))?,
            });
        }
        inputs.push(slot_inputs);
    }
    Ok(Record {
        results,
        chains,
        digest: wire.digest.0.clone().into_owned(),
        inputs,
    })
}

fn index(number: i64, count: usize) -> Result<usize> {
    usize::try_from(number)
        .ok()
        .filter(|&index| index < count)
        .ok_or_else(|| anyhow!("{number} is out of range (there are {count})"))
}

fn read_image(wire: &RawValue) -> Result<Option<Image>> {
    #[derive(Deserialize)]
    struct Version {
        version: u64,
    }
    #[derive(Deserialize)]
    struct Versioned {
        root: Descriptor,
        contents: Vec<WireContent>,
    }

    if wire.get() == "null" {
        return Ok(None);
    }
    // The version first: a newer one may hold anything.
    match serde_json::from_str::<Version>(wire.get())?.version {
        IMAGE_VERSION => {}
        version if version > IMAGE_VERSION => bail!(
            "it was made by a newer layercache (version {version}, this one reads {IMAGE_VERSION})"
        ),
        version => bail!("version {version} does not exist"),
    }
    let image: Versioned = serde_json::from_str(wire.get())?;
    let mut contents = Vec::with_capacity(image.contents.len());
    for content in image.contents {
        let size = u64::try_from(content.size).map_err(|_| {
            anyhow!(
                "the size of {} is negative ({})",
                content.digest,
                content.size
            )
        })?;
        contents.push(Content {
            digest: content.digest,
            size,
        });
    }
    contents.sort_by_key(|content| content.digest);
    if let Some([twice, _]) = contents.array_windows().find(|[a, b]| a.digest == b.digest) {
        bail!("{} is in its contents twice", twice.digest);
    }
    let root = Content {
        digest: image.root.digest,
        size: image.root.size,
    };
    if !contents.contains(&root) {
        bail!(
            "its root {} is not in its contents with its size",
            root.digest
        );
    }
    Ok(Some(Image {
        root: image.root.unnamed(),
        contents,
    }))
}

pub(super) fn write_s3(cache: &CacheConfig) -> Result<Vec<u8>> {
    let image = cache.image.as_ref().map(wire_image).transpose()?;
    let mut annotations = Vec::with_capacity(cache.layers.len());
    for layer in &cache.layers {
        let of_layer = &layer.annotations;
        annotations.push(Some(WireAnnotations {
            media_type: Text(of_layer.media_type.as_str().into()),
            diff_id: Text(of_layer.diff_id.to_string().into()),
            size: wire_size(of_layer.size).with_context(|| format!("layer {}", layer.blob))?,
            created_at: of_layer.created_at,
        }));
    }
    Ok(write(cache, annotations, image)?)
}

pub(super) fn write_local(cache: &CacheConfig) -> Vec<u8> {
    let annotations = cache.layers.iter().map(|_| None);
    write(cache, annotations, None).expect("there is nothing that JSON cannot hold")
}

fn write<'a>(
    cache: &'a CacheConfig,
    annotations: impl IntoIterator<Item = Option<WireAnnotations<'a>>>,
    image: Option<WireImage<'a>>,
) -> Result<Vec<u8>, serde_json::Error> {
    let layers = cache.layers.iter().zip(annotations);
    let layers = layers.map(|(layer, annotations)| WireLayer {
        blob: Text(layer.blob.to_string().into()),
        parent: layer.parent.map_or(-1, wire_index),
        annotations,
    });
    to_json(&Config {
        layers: layers.collect(),
        records: cache.records.iter().map(wire_record).collect(),
        layercache: None,
        image,
    })
}

fn wire_record(record: &Record) -> WireRecord<'_> {
    let results = record.results.iter().map(|result| WireResult {
        layer: wire_index(result.layer),
        created_at: result.created_at,
    });
    let chains = record.chains.iter().map(|chain| WireChain {
        layers: chain.layers.iter().map(|&l| wire_index(l)).collect(),
        created_at: chain.created_at,
    });
    let inputs = record.inputs.iter().map(|alternatives| {
        let inputs = alternatives.iter().map(|input| WireInput {
            selector: Text(input.selector.as_str().into()),
            link: wire_index(input.link),
        });
        Alternatives(inputs.collect())
    });
    WireRecord {
        layers: results.collect(),
        chains: chains.collect(),
        digest: Text(record.digest.as_str().into()),
        inputs: inputs.collect(),
    }
}

fn wire_image(image: &Image) -> Result<WireImage<'_>> {
    let mut contents = Vec::with_capacity(image.contents.len());
    for content in &image.contents {
        contents.push(WireContent {
            digest: content.digest,
            size: wire_size(content.size).with_context(|| content.digest.to_string())?,
        });
    }
    Ok(WireImage {
        version: IMAGE_VERSION,
        root: &image.root,
        contents,
    })
}

fn wire_index(index: usize) -> i64 {
    i64::try_from(index).expect("no Vec is that long")
}

fn wire_size(size: u64) -> Result<i64> {
    i64::try_from(size).with_context(|| format!("size {size} is too large"))
}
