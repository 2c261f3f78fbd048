//! Lifecycle rules: those that fit a cache, and what a bucket's own rules do to it. Pure.
//!
//! An export writes the manifest anew and leaves blobs younger than touch_refresh alone. So when a
//! manifest is written, its blobs can be as old as touch_refresh, and they must live that much longer.

mod document;

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

pub use self::document::{Document, Expiration, Rule};
use crate::cache::digest::Digest;
use crate::config::S3Config;

/// Days that a cache stays after its last export, unless the user says otherwise.
const EXPIRE_AFTER: u32 = 14;

/// Days after which an unfinished upload is removed. This program continues its own for one day.
const ABORT_AFTER: u32 = 2;

/// Days after which a version that a refresh or an export has replaced is removed, where the bucket keeps
/// versions.
const REPLACED_AFTER: u32 = 1;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// What one of our rules does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// Deletes objects some days after they were last modified, and replaced versions sooner.
    Expire { days: u32, replaced: Option<u32> },
    /// Aborts multipart uploads this many days after they began.
    Abort(u32),
}

/// One of our rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fitting {
    /// Unique in the bucket, and the same each time: applying it again replaces it.
    pub id: String,
    /// The prefix of the keys that it applies to.
    pub prefix: String,
    action: Action,
}

impl Fitting {
    fn new(what: &str, prefix: String, action: Action) -> Self {
        let digest = Digest::of(prefix.as_bytes()).hex();
        Fitting {
            id: format!("layercache-{what}-{}", &digest[..8]),
            prefix,
            action,
        }
    }

    fn expiring(what: &str, prefix: String, days: u32) -> Self {
        let replaced = Some(REPLACED_AFTER);
        Fitting::new(what, prefix, Action::Expire { days, replaced })
    }

    /// The same for a store that keeps no versions, and refuses rules about them.
    pub fn without_versions(mut self) -> Self {
        if let Action::Expire { replaced, .. } = &mut self.action {
            *replaced = None;
        }
        self
    }
}

/// The rules that fit the caches at `s3`, whose exports refresh blobs older than `touch_refresh`.
/// Manifests go `expire_after` days after the last export.
pub fn fitting(s3: &S3Config, touch_refresh: Duration, expire_after: Option<u32>) -> Vec<Fitting> {
    let expire_after = expire_after.unwrap_or(EXPIRE_AFTER);
    let places = Places::new(s3);
    // An export takes time, and its manifest comes last: hence the extra day.
    let refreshed = u32::try_from(touch_refresh.as_secs().div_ceil(DAY.as_secs()));
    let blob_days = refreshed
        .unwrap_or(u32::MAX)
        .saturating_add(expire_after)
        .saturating_add(1);
    let manifests = match places.manifests_cover_blobs() {
        false => vec![places.manifests.clone()],
        true => s3.names.iter().map(|name| s3.manifest_key(name)).collect(),
    };
    let mut rules: Vec<_> = manifests
        .into_iter()
        .map(|prefix| Fitting::expiring("manifests", prefix, expire_after))
        .collect();
    rules.push(Fitting::expiring("blobs", places.blobs.clone(), blob_days));
    rules.push(Fitting::new(
        "uploads",
        places.blobs,
        Action::Abort(ABORT_AFTER),
    ));
    rules
}

/// Whether manifests share the blobs' prefix, so that only the caches that the spec names can expire.
pub fn only_named_expire(s3: &S3Config) -> bool {
    Places::new(s3).manifests_cover_blobs()
}

/// As `aws s3api put-bucket-lifecycle-configuration` takes them.
pub fn to_json(rules: &[Fitting]) -> Value {
    let rules = rules.iter().map(|rule| {
        let mut json = json!({
            "ID": rule.id,
            "Filter": {"Prefix": rule.prefix},
            "Status": "Enabled",
        });
        match rule.action {
            Action::Expire { days, replaced } => {
                json["Expiration"] = json!({"Days": days});
                if let Some(days) = replaced {
                    json["NoncurrentVersionExpiration"] = json!({"NoncurrentDays": days});
                }
            }
            Action::Abort(days) => {
                json["AbortIncompleteMultipartUpload"] = json!({"DaysAfterInitiation": days});
            }
        }
        json
    });
    json!({"Rules": rules.collect::<Vec<_>>()})
}

/// Where the objects of the caches are, as prefixes of keys.
struct Places {
    blobs: String,
    manifests: String,
}

impl Places {
    fn new(s3: &S3Config) -> Self {
        Places {
            blobs: format!("{}{}sha256:", s3.prefix, s3.blobs_prefix),
            manifests: format!("{}{}", s3.prefix, s3.manifests_prefix),
        }
    }

    fn manifests_cover_blobs(&self) -> bool {
        self.blobs.starts_with(&self.manifests)
    }
}

/// What a rule does to the caches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Judged {
    /// Empty if it has none.
    pub id: String,
    pub prefix: String,
    /// Whether it can break builds.
    pub breaks: bool,
    /// Whether it deletes the caches' objects at some time.
    pub expires: bool,
    /// What it does, one sentence each.
    pub effects: Vec<String>,
}

/// Judges the rules that a bucket has by what they do to the caches at `s3`.
pub fn judge(rules: &[Rule], s3: &S3Config, touch_refresh: Duration) -> Vec<Judged> {
    let places = Places::new(s3);
    let covers_blobs = |rule: &Rule| {
        rule.prefix.starts_with(&places.blobs) || places.blobs.starts_with(&rule.prefix)
    };
    let covers_manifests = |rule: &Rule| {
        let mut keys = s3.names.iter().map(|name| s3.manifest_key(name));
        places.manifests.starts_with(&rule.prefix) || keys.all(|key| key.starts_with(&rule.prefix))
    };
    let expires = |covers: &dyn Fn(&Rule) -> bool| {
        let effective = rules
            .iter()
            .filter(|rule| rule.is_effective() && covers(rule));
        effective.filter_map(|rule| rule.days()).min()
    };
    let judgement = Judgement {
        touch_refresh,
        manifests_after: expires(&covers_manifests),
        blobs_after: expires(&covers_blobs),
    };
    let judged = rules.iter().map(|rule| {
        let covered = Covered {
            blobs: covers_blobs(rule),
            manifests: covers_manifests(rule),
        };
        let mut judged = Judged {
            id: rule.id.clone(),
            prefix: rule.prefix.clone(),
            breaks: false,
            expires: false,
            effects: Vec::new(),
        };
        judgement.judge(rule, &covered, &mut judged);
        judged
    });
    judged.collect()
}

/// What a rule applies to.
struct Covered {
    blobs: bool,
    manifests: bool,
}

impl Covered {
    fn what(&self) -> &'static str {
        match (self.blobs, self.manifests) {
            (true, true) => "blobs and manifests",
            (true, false) => "blobs",
            _ => "manifests",
        }
    }
}

/// What judging one rule needs to know about all of them.
struct Judgement {
    touch_refresh: Duration,
    /// Days after which manifests expire, if they do.
    manifests_after: Option<u32>,
    /// The same for blobs.
    blobs_after: Option<u32>,
}

impl Judgement {
    fn judge(&self, rule: &Rule, covered: &Covered, judged: &mut Judged) {
        let unconcerned = match () {
            () if !rule.enabled => Some("it is disabled"),
            () if !covered.blobs && !covered.manifests => Some("it is about other objects"),
            () if rule.tagged => Some("it is about tagged objects, and caches have no tags"),
            () => None,
        };
        if let Some(why) = unconcerned {
            judged.effects.push(why.to_owned());
            return;
        }
        judged.expires = rule.expiration.is_some();
        match &rule.expiration {
            Some(Expiration::Days(days)) => self.judge_expiration(*days, covered, judged),
            Some(Expiration::Date(date)) => {
                judged.breaks = true;
                judged.effects.push(format!(
                    "deletes all {} from {date} on, however young they are",
                    covered.what()
                ));
            }
            None => {}
        }
        for class in &rule.transitions {
            let archive = is_archive(class);
            judged.breaks |= archive;
            judged.effects.push(format!(
                "moves {} to {class}{}",
                covered.what(),
                match archive {
                    true => ", where a build cannot read them",
                    false => ", from where a build can read them",
                }
            ));
        }
        if let Some(days) = rule.noncurrent_days {
            judged.effects.push(format!(
                "deletes versions {days} d after they were replaced"
            ));
        }
        if let Some(days) = rule.abort_days {
            judged.effects.push(format!(
                "aborts multipart uploads {days} d after they began"
            ));
        }
        if judged.effects.is_empty() {
            judged
                .effects
                .push("it deletes and moves no current objects".to_owned());
        }
    }

    fn judge_expiration(&self, days: u32, covered: &Covered, judged: &mut Judged) {
        let mut breaks = |text: String| {
            judged.breaks = true;
            judged.effects.push(text);
        };
        if !covered.blobs {
            match self.blobs_after {
                Some(_) => judged
                    .effects
                    .push(format!("deletes manifests {days} d after the last export")),
                None => breaks(format!(
                    "deletes manifests {days} d after the last export, but no rule deletes their \
                     blobs: builds lose the cache, and its space is not freed"
                )),
            }
            return;
        }
        let refresh = hours(self.touch_refresh);
        if DAY * days <= self.touch_refresh {
            breaks(format!(
                "deletes blobs {days} d after they were written, but exports rely on those younger than \
                 touch_refresh ({refresh})"
            ));
            return;
        }
        // From the last export on, a blob lives for at least this long.
        let safe = DAY * days - self.touch_refresh;
        match self.manifests_after {
            Some(after) if DAY * after <= safe => judged.effects.push(format!(
                "deletes {} {days} d after they were written or refreshed",
                covered.what()
            )),
            Some(after) if after <= days => judged.effects.push(format!(
                "deletes {} {days} d after they were written or refreshed; a cache that is not \
                 exported for {} loses blobs up to {refresh} before its manifest",
                covered.what(),
                hours(safe)
            )),
            Some(after) => breaks(format!(
                "deletes blobs after {days} d, but manifests only after {after} d: a cache that is not \
                 exported for {} names blobs that are gone",
                hours(safe)
            )),
            None => breaks(format!(
                "deletes blobs after {days} d, but no rule deletes manifests: a cache that is not \
                 exported for {} names blobs that are gone",
                hours(safe)
            )),
        }
    }
}

/// Storage classes whose objects must be restored before they can be read.
fn is_archive(class: &str) -> bool {
    matches!(class, "GLACIER" | "DEEP_ARCHIVE")
}

/// In days if it is whole days, else in hours or less.
fn hours(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        s if s % (24 * 60 * 60) == 0 && s > 24 * 60 * 60 => format!("{} d", s / (24 * 60 * 60)),
        s if s % (60 * 60) == 0 => format!("{} h", s / (60 * 60)),
        s if s % 60 == 0 => format!("{} min", s / 60),
        s => format!("{s} s"),
    }
}

#[cfg(test)]
mod tests;
