//! Whether a layout lies in a build context. There, `COPY . .` copies the cache into the image, and each
//! export of the cache invalidates that step.

use std::fs;
use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern};

use crate::quote::printable;

/// A warning if a directory above `layout` has a Dockerfile and no ignore file that covers the layout.
pub(super) fn warning(layout: &Path) -> Option<String> {
    let real = layout.canonicalize().ok()?;
    let context = real.ancestors().skip(1).find(|directory| {
        directory.join("Dockerfile").is_file()
            && real
                .strip_prefix(directory)
                .is_ok_and(|inside| !is_ignored(directory, inside))
    })?;
    let inside = real.strip_prefix(context).ok()?;
    Some(format!(
        "{} is in a build context: {} has a Dockerfile, and `COPY . .` would copy the cache into the \
         image. Keep the cache elsewhere, or add {} to .dockerignore",
        printable(&layout.display().to_string()),
        printable(&context.display().to_string()),
        printable(&inside.display().to_string()),
    ))
}

/// Whether the ignore file of `context` leaves out what is `inside` it. Docker's rules: patterns are
/// relative to the context, one that matches a directory covers what is below it, and the last match
/// wins.
fn is_ignored(context: &Path, inside: &Path) -> bool {
    let files = ["Dockerfile.dockerignore", ".dockerignore"];
    let read = |file: &&str| fs::read_to_string(context.join(file)).ok();
    let Some(rules) = files.iter().find_map(read) else {
        return false;
    };
    let options = MatchOptions {
        require_literal_separator: true,
        ..MatchOptions::default()
    };
    let mut ignored = false;
    for rule in rules.lines().map(str::trim) {
        if rule.is_empty() || rule.starts_with('#') {
            continue;
        }
        let (pattern, verdict) = match rule.strip_prefix('!') {
            Some(exception) => (exception.trim(), false),
            None => (rule, true),
        };
        // As Go's filepath.Clean: without `./`, and without slashes at either end.
        let clean: PathBuf = Path::new(pattern.trim_start_matches('/'))
            .components()
            .filter(|part| !matches!(part, std::path::Component::CurDir))
            .collect();
        let Ok(pattern) = Pattern::new(&clean.to_string_lossy()) else {
            continue;
        };
        let covers = |path: &Path| pattern.matches_path_with(path, options);
        if inside.ancestors().any(covers) {
            ignored = verdict;
        }
    }
    ignored
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warned(ignore: Option<&str>, layout: &str) -> bool {
        let context = tempfile::tempdir().unwrap();
        fs::write(context.path().join("Dockerfile"), "FROM scratch\n").unwrap();
        if let Some(rules) = ignore {
            fs::write(context.path().join(".dockerignore"), rules).unwrap();
        }
        let layout = context.path().join(layout);
        fs::create_dir_all(&layout).unwrap();
        warning(&layout).is_some()
    }

    #[test]
    fn a_layout_below_a_dockerfile_is_in_a_build_context_unless_it_is_ignored() {
        assert!(warned(None, "cache"));
        assert!(warned(None, "build/cache"));
        for rules in [
            "cache",
            "cache/",
            "/cache",
            "./cache",
            "# comment\n\ncache\r\n",
            "*",
            "**",
            "ca*",
            "c?che",
            "!cache\ncache",
            "**/cache",
        ] {
            assert!(!warned(Some(rules), "cache"), "{rules:?}");
        }
        for rules in [
            "",
            "#cache",
            "cach",
            "*\n!cache",
            "build/cache",
            "cache/blobs",
            "[",
        ] {
            assert!(warned(Some(rules), "cache"), "{rules:?}");
        }
        assert!(!warned(Some("build"), "build/cache"));
        assert!(!warned(Some("**/cache"), "build/cache"));
        assert!(warned(Some("cache"), "build/cache"));
        assert!(warned(Some("*/cache"), "cache"));
    }

    #[test]
    fn without_a_dockerfile_there_is_no_build_context() {
        let directory = tempfile::tempdir().unwrap();
        let layout = directory.path().join("cache");
        fs::create_dir(&layout).unwrap();
        assert_eq!(warning(&layout), None);
    }
}
