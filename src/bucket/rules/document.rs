//! The bucket's lifecycle rules as a document: parsed as far as they concern caches, and written
//! back with everything that was not understood.

use anyhow::{Context, Result, bail};
use xml::EventWriter;
use xml::reader::{EventReader, ParserConfig, XmlEvent};
use xml::writer::{EmitterConfig, XmlEvent as Written};

use super::{Action, Fitting};

const NAMESPACE: &str = "http://s3.amazonaws.com/doc/2006-03-01/";
const ROOT: &str = "LifecycleConfiguration";

/// The rules of a bucket.
#[derive(Debug, Clone, Default)]
pub struct Document {
    pub rules: Vec<Rule>,
    /// Each rule as it was read, from its start tag to its end tag.
    texts: Vec<Vec<XmlEvent>>,
}

/// The parts of a rule that matter to caches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// Empty if it has none.
    pub id: String,
    pub enabled: bool,
    /// Empty: all keys.
    pub prefix: String,
    /// It applies only to objects with some tag.
    pub tagged: bool,
    pub expiration: Option<Expiration>,
    /// The storage classes that current objects are moved to.
    pub transitions: Vec<String>,
    /// Days after which replaced versions are deleted.
    pub noncurrent_days: Option<u32>,
    /// Days after which multipart uploads are aborted.
    pub abort_days: Option<u32>,
    /// Its prefix is outside a Filter. S3 refuses a mixture of both forms.
    old_form: bool,
}

/// When a rule deletes current objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expiration {
    /// After they were last modified.
    Days(u32),
    /// All objects, from this date on.
    Date(String),
}

impl Rule {
    /// Days after which the rule deletes current objects.
    pub fn days(&self) -> Option<u32> {
        match self.expiration {
            Some(Expiration::Days(days)) => Some(days),
            _ => None,
        }
    }

    /// Whether it affects objects without tags.
    pub fn is_effective(&self) -> bool {
        self.enabled && !self.tagged
    }

    /// Reads an element below the rule, by its path of names.
    fn add(&mut self, path: &[&str], text: &str) {
        match path {
            ["ID"] => self.id = text.to_owned(),
            ["Status"] => self.enabled = text == "Enabled",
            ["Prefix"] => {
                self.old_form = true;
                self.prefix = text.to_owned();
            }
            ["Filter", "Prefix"] | ["Filter", "And", "Prefix"] => self.prefix = text.to_owned(),
            ["Filter", "Tag", ..] | ["Filter", "And", "Tag", ..] => self.tagged = true,
            ["Expiration", "Days"] => self.expiration = text.parse().ok().map(Expiration::Days),
            ["Expiration", "Date"] => self.expiration = Some(Expiration::Date(text.to_owned())),
            ["Transition", "StorageClass"] => self.transitions.push(text.to_owned()),
            ["NoncurrentVersionExpiration", "NoncurrentDays"] => {
                self.noncurrent_days = text.parse().ok();
            }
            ["AbortIncompleteMultipartUpload", "DaysAfterInitiation"] => {
                self.abort_days = text.parse().ok();
            }
            _ => {}
        }
    }
}

impl Document {
    /// Reads S3's XML.
    ///
    /// # Errors
    /// It is not XML, or not a lifecycle configuration.
    pub fn parse(xml: &str) -> Result<Self> {
        let config = ParserConfig::new().cdata_to_characters(true);
        let mut document = Document::default();
        let mut path: Vec<String> = Vec::new();
        let mut text = String::new();
        for event in EventReader::new_with_config(xml.as_bytes(), config) {
            let event = event.context("reading the lifecycle rules")?;
            match &event {
                XmlEvent::StartElement { name, .. } => {
                    path.push(name.local_name.clone());
                    text.clear();
                    if path.len() == 1 && path[0] != ROOT {
                        bail!("reading the lifecycle rules: they are not below {ROOT}");
                    }
                    if is_rule(&path) {
                        document.rules.push(Rule::default());
                        document.texts.push(Vec::new());
                    }
                }
                XmlEvent::Characters(more) => text.push_str(more),
                XmlEvent::EndElement { .. } => {
                    if path.len() > 2
                        && let Some(rule) = document.rules.last_mut()
                    {
                        let names: Vec<&str> = path[2..].iter().map(String::as_str).collect();
                        rule.add(&names, &text);
                    }
                    text.clear();
                }
                _ => {}
            }
            let ended = matches!(event, XmlEvent::EndElement { .. });
            if path.len() >= 2
                && path[1] == "Rule"
                && let Some(texts) = document.texts.last_mut()
            {
                texts.push(event);
            }
            if ended {
                path.pop();
            }
        }
        Ok(document)
    }

    /// Whether it has each of `ours` as it is.
    pub fn holds(&self, ours: &[Fitting]) -> bool {
        ours.iter().all(|fitting| {
            let same = |rule: &&Rule| rule.id == fitting.id;
            self.rules.iter().find(same).is_some_and(|rule| {
                let (expiration, noncurrent_days, abort_days) = match fitting.action {
                    Action::Expire { days, replaced } => {
                        (Some(Expiration::Days(days)), replaced, None)
                    }
                    Action::Abort(days) => (None, None, Some(days)),
                };
                rule.enabled
                    && rule.prefix == fitting.prefix
                    && rule.expiration == expiration
                    && rule.noncurrent_days == noncurrent_days
                    && rule.abort_days == abort_days
            })
        })
    }

    /// The rules of others: those that `ours` do not replace.
    pub fn others<'a>(&'a self, ours: &'a [Fitting]) -> impl Iterator<Item = &'a Rule> {
        self.rules.iter().filter(|rule| !replaced(rule, ours))
    }

    /// S3's XML for the rules of others as they are, and `ours`.
    ///
    /// # Errors
    /// A rule cannot be written as XML.
    pub fn merged(&self, ours: &[Fitting]) -> Result<String> {
        let config = EmitterConfig::new().write_document_declaration(false);
        let mut xml = Vec::new();
        let mut writer = EventWriter::new_with_config(&mut xml, config);
        let writing = "writing the lifecycle rules";
        let root = Written::start_element(ROOT).default_ns(NAMESPACE);
        writer.write(root).context(writing)?;
        let mut old_form = false;
        for (rule, events) in self.rules.iter().zip(&self.texts) {
            if replaced(rule, ours) {
                continue;
            }
            old_form |= rule.old_form;
            for event in events.iter().filter_map(XmlEvent::as_writer_event) {
                writer.write(event).context(writing)?;
            }
        }
        for rule in ours {
            write_rule(&mut writer, rule, old_form).context(writing)?;
        }
        writer.write(Written::end_element()).context(writing)?;
        String::from_utf8(xml).context(writing)
    }
}

fn is_rule(path: &[String]) -> bool {
    path.len() == 2 && path[1] == "Rule"
}

fn replaced(rule: &Rule, ours: &[Fitting]) -> bool {
    ours.iter().any(|fitting| fitting.id == rule.id)
}

fn write_rule(
    writer: &mut EventWriter<&mut Vec<u8>>,
    rule: &Fitting,
    old_form: bool,
) -> xml::writer::Result<()> {
    let actions = match rule.action {
        Action::Expire { days, replaced } => {
            let versions = "NoncurrentVersionExpiration";
            let replaced = replaced.map(|days| (versions, "NoncurrentDays", days));
            let expiration = ("Expiration", "Days", days);
            std::iter::once(expiration).chain(replaced).collect()
        }
        Action::Abort(days) => vec![(
            "AbortIncompleteMultipartUpload",
            "DaysAfterInitiation",
            days,
        )],
    };
    writer.write(Written::start_element("Rule"))?;
    element(writer, "ID", &rule.id)?;
    if old_form {
        element(writer, "Prefix", &rule.prefix)?;
    } else {
        writer.write(Written::start_element("Filter"))?;
        element(writer, "Prefix", &rule.prefix)?;
        writer.write(Written::end_element())?;
    }
    element(writer, "Status", "Enabled")?;
    for (name, unit, days) in actions {
        writer.write(Written::start_element(name))?;
        element(writer, unit, &days.to_string())?;
        writer.write(Written::end_element())?;
    }
    writer.write(Written::end_element())
}

fn element(
    writer: &mut EventWriter<&mut Vec<u8>>,
    name: &str,
    text: &str,
) -> xml::writer::Result<()> {
    writer.write(Written::start_element(name))?;
    writer.write(Written::characters(text))?;
    writer.write(Written::end_element())
}
