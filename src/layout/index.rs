//! `index.json`: which manifests a layout holds, and under which tags. What we do not change keeps its
//! bytes.

use std::fmt;

use anyhow::{Context, Result, anyhow, bail};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::NamedEntry;
use crate::cache::oci::{CONTAINERD_NAME, Descriptor, IMAGE_INDEX, REF_NAME, from_json};
use crate::config::Selection;
use crate::quote::{first_few, one_line, quoted};

/// Entries that an error lists at most.
const LISTED: usize = 20;

#[derive(Debug)]
pub(super) struct IndexJson {
    /// All fields but `manifests`, in their order; `None` stands where `manifests` was.
    fields: Vec<Option<(String, Box<RawValue>)>>,
    manifests: Vec<Box<RawValue>>,
}

/// A JSON object's fields in their order, the values unparsed.
struct Fields(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;
        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(FieldsVisitor)
    }
}

/// An entry as far as it can be understood.
struct Entry {
    ref_name: Option<String>,
    containerd_name: Option<String>,
    /// Or why it cannot be used: because of a sha512 digest, for example.
    descriptor: Result<Descriptor, String>,
}

impl Entry {
    fn new(raw: &RawValue) -> Self {
        let value: Value = match serde_json::from_str(raw.get()) {
            Ok(value) => value,
            Err(error) => {
                return Entry {
                    ref_name: None,
                    containerd_name: None,
                    descriptor: Err(error.to_string()),
                };
            }
        };
        let annotation =
            |name: &str| Some(value.get("annotations")?.get(name)?.as_str()?.to_owned());
        Entry {
            ref_name: annotation(REF_NAME),
            containerd_name: annotation(CONTAINERD_NAME),
            descriptor: serde_json::from_value(value).map_err(|error| error.to_string()),
        }
    }

    fn label(&self) -> String {
        match self.ref_name.as_ref().or(self.containerd_name.as_ref()) {
            Some(name) => format!("tag {}", quoted(name)),
            None => "an entry without tag".into(),
        }
    }

    /// Whether BuildKit finds it by `tag`: it looks for this name in either annotation.
    fn is_named(&self, tag: &str) -> bool {
        self.ref_name.as_deref() == Some(tag) || self.containerd_name.as_deref() == Some(tag)
    }

    /// Whether `tag` is the tag in its full name, which containerd writes (`docker.io/library/x:latest`).
    /// Only we look for that, if no entry is named `tag`.
    fn is_reference_tagged(&self, tag: &str) -> bool {
        self.containerd_name
            .as_deref()
            .and_then(|name| name.rsplit_once(':'))
            .is_some_and(|(_, last)| last == tag)
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label())?;
        match &self.descriptor {
            Ok(descriptor) => write!(f, " ({})", descriptor.digest),
            Err(reason) => write!(f, " (unusable: {})", one_line(reason)),
        }
    }
}

impl IndexJson {
    /// An index that names nothing yet, as BuildKit starts one.
    pub(super) fn empty() -> Self {
        let start = format!(r#"{{"schemaVersion":2,"mediaType":"{IMAGE_INDEX}","manifests":[]}}"#);
        Self::parse(start.as_bytes()).expect("this is an index")
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let Fields(all) = from_json(bytes).context("not a JSON object")?;
        let mut fields = Vec::with_capacity(all.len());
        let mut manifests = None;
        for (name, value) in all {
            if name != "manifests" {
                fields.push(Some((name, value)));
                continue;
            }
            let entries: Option<Vec<Box<RawValue>>> =
                serde_json::from_str(value.get()).context("its manifests are not an array")?;
            if manifests.replace(entries.unwrap_or_default()).is_some() {
                bail!("it has its manifests twice");
            }
            fields.push(None);
        }
        if manifests.is_none() {
            fields.push(None);
        }
        Ok(IndexJson {
            fields,
            manifests: manifests.unwrap_or_default(),
        })
    }

    /// Compact JSON, no newline at its end, as BuildKit writes it.
    pub(super) fn to_json(&self) -> Result<Vec<u8>> {
        let mut json = Vec::new();
        for field in &self.fields {
            json.push(if json.is_empty() { b'{' } else { b',' });
            match field {
                Some((name, value)) => {
                    serde_json::to_writer(&mut json, name)?;
                    json.push(b':');
                    json.extend_from_slice(value.get().as_bytes());
                }
                None => {
                    json.extend_from_slice(b"\"manifests\":");
                    serde_json::to_writer(&mut json, &self.manifests)?;
                }
            }
        }
        json.push(b'}');
        Ok(json)
    }

    /// Points `tag` to `entry`, and removes every other entry that is named so under either annotation.
    /// Entries whose full name merely ends in the tag stay: from now on, they do not answer to it.
    /// False if nothing has changed.
    pub(super) fn set_tag(&mut self, tag: &str, entry: &Descriptor) -> Result<bool> {
        let mut entry = entry.clone();
        entry.annotations.remove(CONTAINERD_NAME);
        entry.annotations.insert(REF_NAME.into(), tag.into());
        let entry = serde_json::value::to_raw_value(&entry)
            .with_context(|| format!("cannot write the index entry of tag {}", quoted(tag)))?;
        let is_named = |raw: &RawValue| Entry::new(raw).is_named(tag);
        let mut named = self.manifests.iter().filter(|raw| is_named(raw));
        if let (Some(only), None) = (named.next(), named.next())
            && only.get() == entry.get()
        {
            return Ok(false);
        }
        self.manifests.retain(|raw| !is_named(raw));
        self.manifests.push(entry);
        Ok(true)
    }

    /// The entry that `selection` means, and what to call it; `None` for a digest that no entry has.
    pub(super) fn select(&self, selection: &Selection) -> Result<Option<(Descriptor, String)>> {
        let entries: Vec<Entry> = self.manifests.iter().map(|raw| Entry::new(raw)).collect();
        match selection {
            Selection::Tag(tag) => match find_tag(&entries, tag)? {
                Some(found) => Ok(Some(found)),
                None => bail!("no tag {}: {}", quoted(tag), listed(&entries)),
            },
            Selection::Digest(digest) => Ok(usable(&entries)
                .rfind(|(descriptor, _)| descriptor.digest == *digest)
                .map(|(descriptor, entry)| (descriptor.clone(), entry.label()))),
            Selection::Default => {
                if let Some(found) = find_tag(&entries, "latest")? {
                    return Ok(Some(found));
                }
                let Some((last, entry)) = usable(&entries).next_back() else {
                    bail!("no manifest to choose: {}", listed(&entries));
                };
                if usable(&entries).any(|(other, _)| other.digest != last.digest) {
                    bail!(
                        "no tag \"latest\", and more than one manifest to choose from (--tag or --digest \
                         says which): {}",
                        listed(&entries)
                    );
                }
                Ok(Some((last.clone(), entry.label())))
            }
        }
    }

    /// Each entry: what to call it, and its descriptor or why it cannot be used.
    pub(super) fn entries(&self) -> Vec<(String, Result<Descriptor, String>)> {
        let entries = self.manifests.iter().map(|raw| Entry::new(raw));
        entries
            .map(|entry| (entry.label(), entry.descriptor.map_err(|e| one_line(&e))))
            .collect()
    }

    pub(super) fn named(&self) -> Vec<NamedEntry> {
        let entries = self.manifests.iter().map(|raw| Entry::new(raw));
        entries
            .map(|entry| {
                let name = entry.ref_name.or(entry.containerd_name);
                (name, entry.descriptor.map_err(|error| one_line(&error)))
            })
            .collect()
    }

    /// Removes those entries; returns how many.
    pub(super) fn remove(&mut self, is_meant: impl Fn(&Descriptor) -> bool) -> u64 {
        let before = self.manifests.len();
        self.manifests.retain(|raw| {
            !Entry::new(raw)
                .descriptor
                .is_ok_and(|found| is_meant(&found))
        });
        (before - self.manifests.len()) as u64
    }

    /// The entries, as part of an error message.
    pub(super) fn listing(&self) -> String {
        listed(
            &self
                .manifests
                .iter()
                .map(|raw| Entry::new(raw))
                .collect::<Vec<_>>(),
        )
    }
}

fn usable(entries: &[Entry]) -> impl DoubleEndedIterator<Item = (&Descriptor, &Entry)> {
    entries
        .iter()
        .filter_map(|entry| Some((entry.descriptor.as_ref().ok()?, entry)))
}

/// The last entry of this tag: the one written last. If it cannot be used, an older one of the same
/// name will not do.
fn find_tag(entries: &[Entry], tag: &str) -> Result<Option<(Descriptor, String)>> {
    let found = entries
        .iter()
        .rfind(|entry| entry.is_named(tag))
        .or_else(|| entries.iter().rfind(|entry| entry.is_reference_tagged(tag)));
    match found {
        None => Ok(None),
        Some(entry) => match &entry.descriptor {
            Ok(descriptor) => Ok(Some((descriptor.clone(), format!("tag {}", quoted(tag))))),
            Err(reason) => Err(anyhow!(
                "the entry of tag {} cannot be used: {}",
                quoted(tag),
                one_line(reason)
            )),
        },
    }
}

fn listed(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return "it names no manifest at all".into();
    }
    format!("it has {}", first_few(entries, LISTED))
}
