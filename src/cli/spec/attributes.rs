//! The text of a spec, split into the attributes that apply in its direction.

use anyhow::{Result, anyhow, bail, ensure};

use super::secrecy::quoted;
use crate::quote;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    To,
    From,
}

/// What `type=s3` means in both directions.
pub(super) const BOTH: &[&str] = &[
    "type",
    "region",
    "bucket",
    "name",
    "prefix",
    "endpoint_url",
    "blobs_prefix",
    "manifests_prefix",
    "use_path_style",
    "access_key_id",
    "secret_access_key",
    "session_token",
    "retry_mode",
    "retry_max_attempts",
    "disable_accept_encoding",
];

/// What only `--cache-to` reads.
pub(super) const TO_ONLY: &[&str] = &[
    "upload_parallelism",
    "touch_refresh",
    "mode",
    "ignore-error",
];

const NOT_RECOMPRESSED: &str = "blobs are moved as they are, never compressed again";
const ONE_FORM: &str = "a cache on S3 has one form only";
const LAYOUT_ARGUMENT: &str = "it belongs to type=local; the layout is an argument of its own";
const CHOSEN_BY_FLAG: &str = "it belongs to type=local; use --tag or --digest";
const REGISTRY: &str = "it belongs to type=registry";
const GITHUB: &str = "it belongs to type=gha";
const AZURE: &str = "it belongs to type=azblob";

/// What buildx and the other backends take, and why it does nothing here.
pub(super) const FOREIGN: &[(&str, &str)] = &[
    ("compression", NOT_RECOMPRESSED),
    ("compression-level", NOT_RECOMPRESSED),
    ("force-compression", NOT_RECOMPRESSED),
    ("oci-mediatypes", ONE_FORM),
    ("oci-artifact", ONE_FORM),
    ("image-manifest", ONE_FORM),
    ("dest", LAYOUT_ARGUMENT),
    ("src", LAYOUT_ARGUMENT),
    ("digest", CHOSEN_BY_FLAG),
    ("tag", CHOSEN_BY_FLAG),
    ("ref", REGISTRY),
    ("registry.insecure", REGISTRY),
    ("scope", GITHUB),
    ("token", GITHUB),
    ("url", GITHUB),
    ("url_v2", GITHUB),
    ("version", GITHUB),
    ("repository", GITHUB),
    ("ghtoken", GITHUB),
    ("timeout", GITHUB),
    ("account", AZURE),
    ("account_name", AZURE),
    ("account_key", AZURE),
    ("account_url", AZURE),
    ("container", AZURE),
];

pub(super) const SECRETS: &[&str] = &["access_key_id", "secret_access_key", "session_token"];

/// The attribute that `text` names, with `-` or `_` between its words. Some only a spec that `writes` has.
pub(crate) fn attribute(text: &str, writes: bool) -> Option<&'static str> {
    let one_form = |name: &str| name.replace('-', "_");
    let of_writing: &[&str] = if writes { TO_ONLY } else { &[] };
    let mut attributes = BOTH.iter().chain(of_writing).copied();
    attributes.find(|name| one_form(name) == one_form(text))
}

/// The attributes that apply, each once.
pub(super) struct Attributes(Vec<(&'static str, String)>);

impl Attributes {
    /// Splits the spec, and sees to it that only what applies is left.
    pub(super) fn parse(
        spec: &str,
        direction: Direction,
        warnings: &mut Vec<String>,
    ) -> Result<Self> {
        refuse_lookalikes(spec)?;
        let fields = fields(spec)?;
        if let [only] = fields.as_slice()
            && !only.contains('=')
        {
            ensure!(
                !only.trim().is_empty(),
                "the spec is empty (expected type=s3,region=...,bucket=...)"
            );
            bail!(
                "a spec without `=` is an image reference, and type=registry is not supported \
                 (expected type=s3,region=...,bucket=...)"
            );
        }

        let pairs = pairs(fields)?;
        // The type decides what the other keys mean, so it is judged first.
        check_type(&pairs)?;
        let mut found = Attributes(Vec::new());
        let mut ignored: Vec<&'static str> = Vec::new();
        let mut after_secret = false;
        for (index, (key, value)) in pairs.into_iter().enumerate() {
            let own = BOTH.iter().chain(TO_ONLY).copied().find(|own| *own == key);
            let foreign = FOREIGN.iter().find(|(foreign, _)| *foreign == key);
            let (name, reason) = match (own, foreign) {
                (Some(name), _) if direction == Direction::From && TO_ONLY.contains(&name) => {
                    (name, Some("it means something on --cache-to only"))
                }
                (Some(name), _) => (name, None),
                (None, Some((name, reason))) => (*name, Some(*reason)),
                (None, None) => return Err(unknown(&key, index + 1, after_secret)),
            };
            if found.0.iter().any(|(seen, _)| *seen == name) || ignored.contains(&name) {
                bail!("{name}: given twice (field {})", index + 1);
            }
            after_secret = SECRETS.contains(&name);
            match reason {
                Some(reason) => {
                    ignored.push(name);
                    warnings.push(format!("{name}: ignored: {reason}"));
                }
                None => found.0.push((name, value)),
            }
        }
        ensure!(
            found.take("type").is_some(),
            "type: missing (expected type=s3)"
        );
        Ok(found)
    }

    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        let at = self.0.iter().position(|(name, _)| *name == key)?;
        Some(self.0.swap_remove(at).1)
    }

    /// As `take`, with an empty value as none: pipelines pass on variables that are not set.
    pub(super) fn take_filled(&mut self, key: &str) -> Option<String> {
        self.take(key).filter(|value| !value.is_empty())
    }
}

/// The keys, in lower case, and their values.
fn pairs(fields: Vec<String>) -> Result<Vec<(String, String)>> {
    let mut pairs: Vec<(String, String)> = Vec::with_capacity(fields.len());
    for (index, field) in fields.into_iter().enumerate() {
        let position = index + 1;
        let Some((key, value)) = field.split_once('=') else {
            if field.trim().is_empty() {
                bail!("field {position} is empty (is there a comma too many?)");
            }
            bail!(
                "field {position} has no `=` (expected key=value; a field whose value holds a \
                 comma is quoted as a whole: \"key=a,b\")"
            );
        };
        let key = key.trim().to_lowercase();
        ensure!(
            !key.is_empty(),
            "field {position} has no key before its `=`"
        );
        pairs.push((key, value.to_owned()));
    }
    Ok(pairs)
}

fn check_type(pairs: &[(String, String)]) -> Result<()> {
    let mut types = pairs.iter().filter(|(key, _)| key == "type");
    if let Some((_, value)) = types.next()
        && value != "s3"
    {
        let hint = match value.starts_with("s3") && value.contains('=') {
            true => "; fields are separated by commas alone",
            false => "",
        };
        bail!(
            "type: {} is not supported (accepted: s3{hint})",
            quoted(value.as_str())
        );
    }
    Ok(())
}

fn unknown(key: &str, position: usize, after_secret: bool) -> anyhow::Error {
    let near = BOTH
        .iter()
        .chain(TO_ONLY)
        .map(|known| (strsim::jaro_winkler(key, known), *known))
        .filter(|(likeness, _)| *likeness >= 0.85)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let key = key.chars().take(60).collect::<String>();
    let key = quote::printable(&key);
    match near {
        Some((_, known)) => anyhow!("{key}: unknown attribute (did you mean `{known}`?)"),
        // What follows a credential may be the rest of one that holds a comma.
        None if after_secret => anyhow!(
            "field {position}, which follows a credential, has an unknown attribute (a field whose \
             value holds a comma is quoted as a whole: \"key=a,b\")"
        ),
        None => anyhow!(
            "{key}: unknown attribute (accepted: {}; on --cache-to also {})",
            BOTH.join(", "),
            TO_ONLY.join(", ")
        ),
    }
}

/// What people write where a spec belongs.
fn refuse_lookalikes(spec: &str) -> Result<()> {
    let spec = spec.trim();
    if let Some(address) = strip_scheme(spec) {
        let bucket = address.split(['/', ',']).next().unwrap_or_default();
        // `s3://id:secret@bucket` is how some tools take credentials.
        let sane = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let bucket = match !bucket.is_empty() && bucket.chars().all(sane) {
            true => bucket,
            false => "...",
        };
        bail!(
            "an s3:// address is not a spec (expected type=s3,region=...,bucket={bucket}, with \
             prefix=... and name=... for the rest)"
        );
    }
    // `"type=s3` alone is CSV's own quoting, which closes before the next comma.
    let whole = |quote: char| {
        let inside = spec.strip_prefix(quote)?.strip_suffix(quote)?;
        Some(inside.contains(',') && !inside.contains(quote) && inside.contains('='))
    };
    ensure!(
        !spec.starts_with('\'') && whole('"') != Some(true),
        "the spec is still in quotes (remove them: .env files and YAML blocks keep them as part of \
         the value)"
    );
    Ok(())
}

fn strip_scheme(spec: &str) -> Option<&str> {
    let (scheme, rest) = spec.split_once("://")?;
    scheme.eq_ignore_ascii_case("s3").then_some(rest)
}

/// The fields of a spec's one CSV record.
pub(super) fn fields(spec: &str) -> Result<Vec<String>> {
    // `$(cat file)` leaves none, but a variable in YAML often ends in a line break.
    let spec = spec.trim_matches(['\r', '\n']);
    strict_quotes(spec)?;
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .from_reader(spec.as_bytes());
    let mut records = reader.records();
    // The csv crate's errors say where, not what; still, what they say is not ours to vouch for.
    let unreadable = |_| anyhow!("the spec cannot be read as CSV");
    let Some(record) = records.next() else {
        bail!("the spec is empty (expected type=s3,region=...,bucket=...)");
    };
    let record = record.map_err(unreadable)?;
    ensure!(records.next().is_none(), "{}", SECOND_LINE);
    Ok(record.iter().map(str::to_owned).collect())
}

pub(super) const SECOND_LINE: &str = "the spec has a second line (expected one line; repeat the flag, or give the variable one spec \
     a line, for several)";

/// The csv crate takes a stray quote for data and a missing one for the end; Go's reader, and so
/// buildx, refuses both. Go's rules, checked beforehand.
fn strict_quotes(spec: &str) -> Result<()> {
    enum At {
        Start,
        Plain,
        Quoted,
        /// After a quote inside quotes: the end, or the first half of a doubled one.
        Quote,
    }
    let mut at = At::Start;
    let mut position = 1_usize;
    for c in spec.chars() {
        at = match (at, c) {
            (At::Quoted, '"') => At::Quote,
            (At::Quoted, _) => At::Quoted,
            (At::Start, '"') | (At::Quote, '"') => At::Quoted,
            (_, ',') => {
                position += 1;
                At::Start
            }
            (_, '\r' | '\n') => bail!("{SECOND_LINE}"),
            (At::Plain, '"') => bail!(
                "field {position} has a quote in its middle (a quoted field is quoted as a whole, \
                 \"key=a,b\", and a quote inside it doubled)"
            ),
            (At::Quote, _) => bail!(
                "field {position} goes on after its closing quote (a quote inside a quoted field is \
                 doubled)"
            ),
            (At::Start | At::Plain, _) => At::Plain,
        };
    }
    ensure!(
        !matches!(at, At::Quoted),
        "field {position} has no closing quote"
    );
    Ok(())
}
