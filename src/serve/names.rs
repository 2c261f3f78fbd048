//! Maps cache names to repository names: S3 allows nearly everything, registries very little.

use crate::cache::digest::Digest;

/// Bytes of a name. A whole reference has at most 255, with address and secret.
const LONGEST: usize = 128;

/// Digits that distinguish names that look the same once characters are replaced.
const DIGITS: usize = 8;

/// A valid repository name for the cache called `name`: itself if that is valid, else its allowed
/// characters and the start of its digest.
pub fn repository(name: &str) -> String {
    if name.len() <= LONGEST && is_valid(name) {
        return name.to_owned();
    }
    let mut parts: Vec<String> = vec![String::new()];
    for c in name.chars().map(|c| c.to_ascii_lowercase()) {
        match c {
            'a'..='z' | '0'..='9' => parts.last_mut().expect("never empty").push(c),
            _ => parts.push(String::new()),
        }
    }
    parts.retain(|part| !part.is_empty());
    let mut readable = parts.join("-");
    readable.truncate(LONGEST - DIGITS - 1);
    let readable = readable.trim_end_matches('-');
    let digest = Digest::of(name.as_bytes()).hex();
    let digits = &digest[..DIGITS];
    match readable {
        "" => digits.to_owned(),
        readable => format!("{readable}-{digits}"),
    }
}

/// Whether every path component consists of lower-case letters and digits, with single separators
/// between them.
fn is_valid(name: &str) -> bool {
    let component = |part: &str| {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let separators = ['.', '_', '-'];
        part.starts_with(plain)
            && part.ends_with(plain)
            && part.chars().all(|c| plain(c) || separators.contains(&c))
            && !part.contains("..")
            && !part.contains("___")
            && part
                .split(plain)
                .all(|between| matches!(between, "" | "." | "_" | "__") || is_dashes(between))
    };
    // Where a registry's own paths begin.
    let own = ["blobs", "manifests", "tags", "referrers"];
    name.split('/').all(component) && !name.split('/').any(|part| own.contains(&part))
}

fn is_dashes(text: &str) -> bool {
    text.bytes().all(|c| c == b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_that_a_registry_allows_stays_and_any_other_is_told_apart_by_its_digest() {
        for name in ["main", "buildkit", "team/app", "a.b_c__d--e", "1"] {
            assert_eq!(repository(name), name);
        }
        for (name, expected) in [
            ("Main", "main-2ab8c1fa"),
            ("feature/X y", "feature-x-y-cb53b4c0"),
            ("a..b", "a-b-8bb07ad4"),
            ("a/blobs/b", "a-blobs-b-16f8b90a"),
            ("…", "f7ef7b60"),
            ("-a", "a-7b6f0dc0"),
            ("a/", "a-f7ca2c98"),
        ] {
            let found = repository(name);
            let digits = &Digest::of(name.as_bytes()).hex()[..DIGITS];
            assert!(found.ends_with(digits), "{found}");
            assert_eq!(
                found.trim_end_matches(digits),
                expected[..expected.len() - DIGITS].to_owned()
            );
        }
    }

    proptest! {
        #[test]
        fn every_name_becomes_a_valid_one_that_fits(name in ".{1,300}") {
            let repository = repository(&name);
            prop_assert!(is_valid(&repository), "{repository}");
            prop_assert!(repository.len() <= LONGEST);
        }
    }
}
