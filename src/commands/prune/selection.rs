//! Which caches stay and which go, and why. Pure.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::bucket::Unreadable;
use crate::cache::digest::Digest;
use crate::config::CacheChoice;
use crate::progress::age;
use crate::progress::bytes;
use crate::store::ObjectInfo;

/// A cache that may go.
#[derive(Debug, Clone)]
pub(super) struct Candidate<'a> {
    pub name: &'a str,
    /// `None`: the store does not say.
    pub written: Option<SystemTime>,
    /// Blobs with their sizes.
    pub blobs: Result<&'a [(Digest, u64)], &'a Unreadable>,
    /// It is one of the spec's; others always stay.
    pub ours: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Action {
    Keep,
    Remove,
}

/// What becomes of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Decision {
    pub action: Action,
    pub reasons: Vec<String>,
    /// Not even `--max-size` may change it.
    fixed: bool,
}

impl Decision {
    fn new(action: Action, fixed: bool, reason: impl Into<String>) -> Self {
        Decision {
            action,
            reasons: vec![reason.into()],
            fixed,
        }
    }
}

/// What becomes of each of `candidates`, and the bytes of the blobs of those that stay.
pub(super) fn decide(
    candidates: &[Candidate],
    choice: &CacheChoice,
    now: SystemTime,
) -> (Vec<Decision>, u64) {
    let count = choice.keep_last.unwrap_or(0);
    let order = last(candidates, count);
    let last: BTreeSet<usize> = order.iter().copied().take(count).collect();
    let tied: BTreeSet<usize> = order.into_iter().skip(count).collect();
    let mut decisions: Vec<Decision> = candidates
        .iter()
        .enumerate()
        .map(|(at, candidate)| {
            let reason = match candidate.written {
                _ if last.contains(&at) => Some(format!("among the last {count}")),
                _ if !tied.contains(&at) => None,
                Some(_) => Some(format!("written in the same second as the last {count}")),
                None => Some("its age is unknown".to_owned()),
            };
            decide_one(candidate, reason, choice, now)
        })
        .collect();
    let rest = fit(candidates, &mut decisions, choice.max_size);
    (decisions, rest)
}

/// The indexes of the `count` caches that were written last, the latest first. One without a date may be
/// the latest. S3's dates are whole seconds, so those written in the same second as the last of them
/// follow.
fn last(candidates: &[Candidate], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len())
        .filter(|&at| candidates[at].ours && candidates[at].blobs.is_ok())
        .collect();
    order.sort_by_key(|&at| {
        let written = candidates[at].written;
        (written.is_some(), Reverse(written), candidates[at].name)
    });
    let earliest = count.checked_sub(1).and_then(|nth| order.get(nth));
    let earliest = earliest.map(|&at| candidates[at].written);
    let is_last = |nth, at: usize| nth < count || earliest == Some(candidates[at].written);
    let last = order.iter().enumerate();
    last.take_while(|&(nth, &at)| is_last(nth, at))
        .map(|(_, &at)| at)
        .collect()
}

fn decide_one(
    candidate: &Candidate,
    among_last: Option<String>,
    choice: &CacheChoice,
    now: SystemTime,
) -> Decision {
    let matches = |globs: &[glob::Pattern]| globs.iter().any(|glob| glob.matches(candidate.name));
    let keep = |reason: &str| Decision::new(Action::Keep, true, reason);
    let named = !choice.name.is_empty() && matches(&choice.name);
    match candidate.blobs {
        // Only who names it can know that it is no cache.
        Err(Unreadable { damaged: true, .. }) if candidate.ours && named => {}
        Err(Unreadable { damaged: true, .. }) if candidate.ours => {
            return keep("its manifest is damaged: --name removes it");
        }
        Err(_) => return keep("its manifest cannot be read"),
        Ok(_) if !candidate.ours => return keep("another spec's, and may need the same blobs"),
        Ok(_) => {}
    }
    if !choice.name.is_empty() && !named {
        return keep("not matched by --name");
    }
    if matches(&choice.keep) {
        return keep("matched by --keep");
    }
    if let Some(reason) = among_last {
        return keep(&reason);
    }
    if let Some(older_than) = choice.older_than {
        // A time in the future is never old.
        let since = candidate.written.map(|then| now.duration_since(then));
        return match since {
            None => keep("its age is unknown"),
            Some(since) if since.as_ref().is_ok_and(|since| *since > older_than) => Decision::new(
                Action::Remove,
                true,
                format!("older than {}", age(older_than)),
            ),
            Some(_) => Decision::new(
                Action::Keep,
                false,
                format!("not older than {}", age(older_than)),
            ),
        };
    }
    if choice.max_size.is_some() {
        return match candidate.written {
            None => keep("its age is unknown"),
            Some(_) => Decision::new(Action::Keep, false, "fits --max-size"),
        };
    }
    // These options say what stays; the rest goes.
    match (choice.keep_last, choice.name.is_empty()) {
        (Some(count), _) => {
            Decision::new(Action::Remove, true, format!("not among the last {count}"))
        }
        (None, false) => Decision::new(Action::Remove, true, "matched by --name"),
        (None, true) => keep("no option selects it"),
    }
}

/// Removes the oldest caches until the blobs of the rest fit. Returns their bytes.
fn fit(candidates: &[Candidate], decisions: &mut [Decision], max_size: Option<u64>) -> u64 {
    // How many caches need a blob, and its bytes. Manifests may disagree about them: the most count.
    let mut blobs: HashMap<Digest, (u32, u64)> = HashMap::new();
    for (candidate, decision) in candidates.iter().zip(&*decisions) {
        if decision.action == Action::Keep {
            for (digest, size) in candidate.blobs.into_iter().flatten() {
                let (users, most) = blobs.entry(*digest).or_default();
                *users += 1;
                *most = (*most).max(*size);
            }
        }
    }
    // Wider than any sum of what manifests can say.
    let mut total: u128 = blobs.values().map(|(_, size)| u128::from(*size)).sum();
    let bounded = |total| u64::try_from(total).unwrap_or(u64::MAX);
    let Some(max_size) = max_size else {
        return bounded(total);
    };
    let mut oldest: Vec<usize> = (0..candidates.len())
        .filter(|&at| !decisions[at].fixed)
        .collect();
    oldest.sort_by_key(|&at| (candidates[at].written, candidates[at].name));
    for at in oldest {
        if total <= u128::from(max_size) {
            break;
        }
        for (digest, _) in candidates[at].blobs.into_iter().flatten() {
            let (users, size) = blobs.entry(*digest).or_default();
            *users -= 1;
            if *users == 0 {
                total -= u128::from(*size);
            }
        }
        decisions[at] = Decision::new(
            Action::Remove,
            true,
            format!("over --max-size {}", bytes(max_size)),
        );
    }
    bounded(total)
}

/// What becomes of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// A cache needs it.
    Stays,
    /// No cache needs it, but an export may be about to.
    TooYoung,
    Goes,
}

/// What becomes of a blob. One without a date, or with one in the future, is never old.
pub(super) fn fate(needed: bool, info: &ObjectInfo, grace: Duration, now: SystemTime) -> Fate {
    let age = info
        .last_modified
        .and_then(|then| now.duration_since(then).ok());
    match age {
        _ if needed => Fate::Stays,
        Some(age) if age > grace => Fate::Goes,
        _ => Fate::TooYoung,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn glob(text: &str) -> Vec<glob::Pattern> {
        vec![glob::Pattern::new(text).unwrap()]
    }

    /// Caches by name, age in days (negative: the future) and blobs, each a letter of 10 bytes.
    fn decided(caches: &[(&str, Option<i64>, &str)], choice: &CacheChoice) -> (String, u64) {
        let now = SystemTime::now();
        let blobs: Vec<Vec<_>> = caches
            .iter()
            .map(|(_, _, blobs)| {
                let blobs = blobs.bytes();
                blobs.map(|blob| (Digest::of(&[blob]), 10)).collect()
            })
            .collect();
        let [refused, torn] = [false, true].map(|damaged| Unreadable {
            reason: String::new(),
            damaged,
        });
        let candidates: Vec<_> = caches
            .iter()
            .zip(&blobs)
            .map(|((name, days, letters), blobs)| Candidate {
                name: name.trim_start_matches('*'),
                written: days.map(|days| match u32::try_from(days) {
                    Ok(days) => now - DAY * days,
                    Err(_) => now + DAY * days.unsigned_abs() as u32,
                }),
                blobs: match *letters {
                    "?" => Err(&refused),
                    "!" => Err(&torn),
                    _ => Ok(blobs),
                },
                ours: !name.starts_with('*'),
            })
            .collect();
        let (decisions, rest) = decide(&candidates, choice, now);
        let lines = candidates
            .iter()
            .zip(decisions)
            .map(|(candidate, decision)| {
                let action = match decision.action {
                    Action::Keep => "keep",
                    Action::Remove => "remove",
                };
                format!(
                    "{action} {}: {}",
                    candidate.name,
                    decision.reasons.join(", ")
                )
            });
        (lines.collect::<Vec<_>>().join("\n"), rest)
    }

    #[test]
    fn manifests_may_disagree_about_the_size_of_a_blob() {
        let now = SystemTime::now();
        let blob = Digest::of(b"a");
        let (short, long) = ([(blob, 100)], [(blob, u64::MAX)]);
        let candidate = |name, days, blobs| Candidate {
            name,
            written: Some(now - DAY * days),
            blobs: Ok(blobs),
            ours: true,
        };
        let candidates = [candidate("old", 2, &long), candidate("new", 1, &short)];
        let choice = |max_size| CacheChoice {
            max_size: Some(max_size),
            ..CacheChoice::default()
        };
        let (_, rest) = decide(&candidates, &choice(u64::MAX), now);
        assert_eq!(rest, u64::MAX);
        let (decisions, rest) = decide(&candidates, &choice(1000), now);
        assert_eq!(rest, 0);
        assert!(decisions.iter().all(|one| one.action == Action::Remove));
    }

    const CACHES: [(&str, Option<i64>, &str); 5] = [
        ("main", Some(1), "ab"),
        ("pr-1", Some(40), "ac"),
        ("pr-2", Some(20), "ad"),
        ("release", Some(90), "e"),
        ("*other", Some(99), "f"),
    ];

    #[test]
    fn without_options_every_cache_stays() {
        assert_eq!(
            decided(&CACHES, &CacheChoice::default()),
            (
                "keep main: no option selects it\n\
                 keep pr-1: no option selects it\n\
                 keep pr-2: no option selects it\n\
                 keep release: no option selects it\n\
                 keep other: another spec's, and may need the same blobs"
                    .to_owned(),
                60
            )
        );
        let keep = CacheChoice {
            keep: glob("main"),
            ..CacheChoice::default()
        };
        assert!(!decided(&CACHES, &keep).0.contains("remove"));
    }

    #[test]
    fn old_caches_go_unless_something_keeps_them() {
        let choice = CacheChoice {
            older_than: Some(30 * DAY),
            keep: glob("rel*"),
            ..CacheChoice::default()
        };
        let (decisions, rest) = decided(&CACHES, &choice);
        assert_eq!(
            decisions,
            "keep main: not older than 30 d\n\
             remove pr-1: older than 30 d\n\
             keep pr-2: not older than 30 d\n\
             keep release: matched by --keep\n\
             keep other: another spec's, and may need the same blobs"
        );
        assert_eq!(rest, 50);
        let last = CacheChoice {
            older_than: Some(DAY / 2),
            keep_last: Some(2),
            ..CacheChoice::default()
        };
        assert_eq!(
            decided(&CACHES[..4], &last).0,
            "keep main: among the last 2\n\
             remove pr-1: older than 12 h\n\
             keep pr-2: among the last 2\n\
             remove release: older than 12 h"
        );
    }

    #[test]
    fn of_caches_written_in_the_same_second_none_is_older() {
        let caches = [
            ("a", Some(2), "a"),
            ("b", Some(1), "b"),
            ("c", Some(1), "c"),
        ];
        let last = CacheChoice {
            keep_last: Some(1),
            ..CacheChoice::default()
        };
        assert_eq!(
            decided(&caches, &last).0,
            "remove a: not among the last 1\n\
             keep b: among the last 1\n\
             keep c: written in the same second as the last 1"
        );
    }

    #[test]
    fn what_has_no_date_or_one_in_the_future_is_never_old() {
        let caches = [
            ("undated", None, "a"),
            ("future", Some(-5), "b"),
            ("torn", Some(900), "?"),
        ];
        let choice = CacheChoice {
            older_than: Some(Duration::ZERO),
            ..CacheChoice::default()
        };
        assert_eq!(
            decided(&caches, &choice).0,
            "keep undated: its age is unknown\n\
             keep future: not older than 0 s\n\
             keep torn: its manifest cannot be read"
        );
        let now = SystemTime::now();
        let info = |last_modified| ObjectInfo {
            size: 1,
            last_modified,
            etag: None,
            storage_class: None,
        };
        let fates = [None, Some(now + DAY), Some(now - DAY), Some(now - 3 * DAY)]
            .map(|time| fate(false, &info(time), 2 * DAY, now));
        assert_eq!(
            fates,
            [Fate::TooYoung, Fate::TooYoung, Fate::TooYoung, Fate::Goes]
        );
        assert_eq!(
            fate(true, &info(Some(now - 3 * DAY)), DAY, now),
            Fate::Stays
        );
    }

    #[test]
    fn names_and_numbers_alone_select_what_they_do_not_keep() {
        let named = CacheChoice {
            name: glob("pr-*"),
            ..CacheChoice::default()
        };
        assert_eq!(
            decided(&CACHES[..3], &named).0,
            "keep main: not matched by --name\n\
             remove pr-1: matched by --name\n\
             remove pr-2: matched by --name"
        );
        let last = CacheChoice {
            keep_last: Some(1),
            ..CacheChoice::default()
        };
        assert_eq!(
            decided(&CACHES[..3], &last).0,
            "keep main: among the last 1\n\
             remove pr-1: not among the last 1\n\
             remove pr-2: not among the last 1"
        );
    }

    #[test]
    fn a_damaged_manifest_goes_only_if_it_is_named() {
        let caches = [
            ("torn", Some(9), "!"),
            ("torn-2", Some(9), "!"),
            ("torn-too", Some(1), "!"),
            ("secret", Some(9), "?"),
            ("*torn", Some(9), "!"),
        ];
        let mut choice = CacheChoice {
            older_than: Some(5 * DAY),
            ..CacheChoice::default()
        };
        assert_eq!(
            decided(&caches, &choice).0,
            "keep torn: its manifest is damaged: --name removes it\n\
             keep torn-2: its manifest is damaged: --name removes it\n\
             keep torn-too: its manifest is damaged: --name removes it\n\
             keep secret: its manifest cannot be read\n\
             keep torn: its manifest cannot be read"
        );
        choice.name = [glob("torn*"), glob("secret")].concat();
        choice.keep = glob("torn-2");
        assert_eq!(
            decided(&caches, &choice).0,
            "remove torn: older than 5 d\n\
             keep torn-2: matched by --keep\n\
             keep torn-too: not older than 5 d\n\
             keep secret: its manifest cannot be read\n\
             keep torn: its manifest cannot be read"
        );
    }

    #[test]
    fn the_oldest_go_until_the_unique_bytes_of_the_rest_fit() {
        let fits = |max_size| CacheChoice {
            max_size: Some(max_size),
            keep: glob("release"),
            ..CacheChoice::default()
        };
        let (decisions, rest) = decided(&CACHES, &fits(45));
        assert_eq!(
            decisions,
            "keep main: fits --max-size\n\
             remove pr-1: over --max-size 45 B\n\
             remove pr-2: over --max-size 45 B\n\
             keep release: matched by --keep\n\
             keep other: another spec's, and may need the same blobs"
        );
        // Blob a stays: main needs it.
        assert_eq!(rest, 40);
        assert_eq!(decided(&CACHES, &fits(60)).1, 60);
        // What is kept is kept, even if it does not fit.
        assert_eq!(decided(&CACHES, &fits(0)).1, 20);
    }
}
