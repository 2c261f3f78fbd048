//! What a person reads: all of stdout and stderr, compared with a literal in the test.
//!
//! When a message changes on purpose, `UPDATE_EXPECT=1 cargo test --test it NAME` rewrites the
//! literals; the diff shows what changed for the user.

use expect_test::{Expect, expect};

use crate::program::Run;

impl Run {
    /// Fails unless the run printed exactly this, apart from what [`lasting`] replaces. The result on
    /// stdout has an order of its own.
    #[track_caller]
    pub fn prints(self, stdout: Expect, stderr: Expect) -> Run {
        stdout.assert_eq(&steady(&self.stdout).concat());
        stderr.assert_eq(&lasting(&self.stderr));
        self
    }

    /// Fails unless the run ended with 1, printed nothing on stdout, and exactly this on stderr. Which of
    /// several blobs meets an error first is a matter of timing, so the first digest is replaced.
    #[track_caller]
    pub fn fails_with(mut self, stderr: Expect) -> Run {
        self.stderr = any_digest(&self.stderr, "blobs/sha256:");
        self.ends_with(1).prints(expect![[""]], stderr)
    }

    /// The run with the reason why a name has no address replaced: resolvers differ.
    pub fn whatever_the_resolver_says(mut self) -> Run {
        let start = "failed to lookup address information: ";
        self.stderr = replace(&self.stderr, start, &format!("{start}REASON"), |rest| {
            rest.find(')')
        });
        self
    }

    /// The run without its progress on single blobs: when a run fails, how far the others have come by
    /// then is a matter of timing.
    pub fn without_blobs(mut self) -> Run {
        let problems = ["error: ", "warning: "];
        let keep = |line: &&str| !names_blob(line) || problems.iter().any(|p| line.starts_with(p));
        self.stderr = self.stderr.split_inclusive('\n').filter(keep).collect();
        self
    }
}

/// `text` with what differs from run to run replaced: ports, temporary directories, this checkout's
/// path and seconds. Blobs are moved in parallel, so neighbouring lines about one blob each are sorted,
/// and the number of those done in them is replaced.
pub fn lasting(text: &str) -> String {
    let mut lines = steady(text);
    for line in lines.iter_mut().filter(|line| names_blob(line)) {
        *line = replace(line, "Ns [", "Ns [N", digits);
    }
    for about_blobs in lines.chunk_by_mut(|a, b| names_blob(a) && names_blob(b)) {
        about_blobs.sort();
    }
    lines.concat()
}

/// `text` with the first digest after `before` replaced.
pub fn any_digest(text: &str, before: &str) -> String {
    let (mut replaced, hex) = (text.to_owned(), |c: u8| c.is_ascii_hexdigit());
    let mut ends = text.match_indices(before).map(|(at, _)| at + before.len());
    let is_digest = |at: &usize| text[*at..].bytes().take(64).filter(|c| hex(*c)).count() == 64;
    if let Some(at) = ends.find(is_digest) {
        replaced.replace_range(at..at + 64, "DIGEST");
    }
    replaced
}

/// The lines of `text` in their order, with what differs from run to run replaced.
pub fn steady(text: &str) -> Vec<String> {
    let temporary = std::env::temp_dir().join(".tmp");
    let text = replace(text, &temporary.display().to_string(), "TMP", |rest| {
        // Six characters follow in tempfile's names.
        rest.get(..6).map(str::len)
    });
    let text = text.replace(env!("CARGO_MANIFEST_DIR"), "REPOSITORY");
    let text = replace(&text, "127.0.0.1:", "127.0.0.1:PORT", digits);
    let text = replace(&text, "localhost:", "localhost:PORT", digits);
    text.split_inclusive('\n').map(without_seconds).collect()
}

/// Replaces each `start` and as many bytes after it as `more` says, if it says any.
fn replace(text: &str, start: &str, with: &str, more: impl Fn(&str) -> Option<usize>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(start) {
        out.push_str(&rest[..at]);
        rest = &rest[at + start.len()..];
        match more(rest) {
            Some(length) => {
                out.push_str(with);
                rest = &rest[length..];
            }
            None => out.push_str(start),
        }
    }
    out + rest
}

fn digits(text: &str) -> Option<usize> {
    let count = text.bytes().take_while(u8::is_ascii_digit).count();
    (count > 0).then_some(count)
}

fn names_blob(line: &str) -> bool {
    line.contains("sha256:")
}

/// `in 0.3 s` as `in N s`; the elapsed seconds that progress lines begin with lose their alignment.
fn without_seconds(line: &str) -> String {
    let mut out = String::new();
    let mut rest = match line.trim_start_matches(' ') {
        elapsed if elapsed.starts_with(|c: char| c.is_ascii_digit()) => elapsed,
        _ => line,
    };
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let is_part = |byte: &u8| byte.is_ascii_digit() || *byte == b'.';
        let (number, after) = rest.split_at(rest.bytes().take_while(is_part).count());
        let seconds = ["s", " s"].iter().any(|unit| {
            let next = after.strip_prefix(unit);
            next.is_some_and(|next| !next.starts_with(char::is_alphanumeric))
        });
        out.push_str(match number.contains('.') && seconds {
            true => "N",
            false => number,
        });
        rest = after;
    }
    out + rest
}

#[test]
fn what_differs_from_run_to_run_is_replaced() {
    let temporary = std::env::temp_dir().join(".tmpA1b2C3/cache");
    let text = format!(
        "uploaded sha256:b 1.5 KiB\nuploaded sha256:a 2 B\nwrote {} at http://127.0.0.1:4711/x; \
         21 requests in 0.1 s\n  1.0s [1/2] sent sha256:b\n 12.0s [2/2] sent sha256:a\n",
        temporary.display()
    );
    assert_eq!(
        lasting(&text),
        "uploaded sha256:a 2 B\nuploaded sha256:b 1.5 KiB\nwrote TMP/cache at \
         http://127.0.0.1:PORT/x; 21 requests in N s\nNs [N/2] sent sha256:a\nNs [N/2] sent sha256:b\n"
    );
}
