//! Text from outside (a store, a proxy, a token service, a manifest) made fit for a message: one
//! line, of bounded length, without secrets. A gateway that echoes a request echoes its signature
//! and session token, whole or cut, perhaps encoded.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::quote::one_line;

/// Bytes of outside text that are examined; the rest is never shown.
const LOOKED_AT: usize = 64 << 10;
/// Fragments of a secret of at least this length are masked.
const FRAGMENT: usize = 16;
/// Shorter secrets belong to test servers, and masking them would mangle ordinary messages.
const SHORTEST: usize = 6;
/// How many signatures are remembered. Each serves one request, and this many may be in flight.
const SIGNATURES: usize = 256;
/// What stands in place of a secret.
const MASK: &str = "***";

/// `encodeURIComponent` and most libraries keep these.
const KEEPS_UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// What must not be shown. Clones share it.
#[derive(Clone, Default)]
pub struct Secrets(Arc<Mutex<Known>>);

#[derive(Default)]
struct Known {
    secrets: Vec<String>,
    /// All forms of the secrets, in lower case, that are shorter than a fragment.
    short: Vec<Vec<u8>>,
    /// All fragments of the longer forms, in lower case.
    fragments: HashSet<[u8; FRAGMENT]>,
    signatures: VecDeque<String>,
}

impl Secrets {
    /// Remembers a secret for the rest of the run.
    pub fn add(&self, secret: &str) {
        let mut known = self.known();
        if secret.len() < SHORTEST || known.secrets.iter().any(|other| other == secret) {
            return;
        }
        known.secrets.push(secret.to_owned());
        for form in forms(secret) {
            if form.len() < FRAGMENT {
                known.short.push(form);
            } else {
                known.fragments.extend(fragments(&form));
            }
        }
    }

    /// Remembers a request's signature for some time.
    pub fn add_signature(&self, signature: &str) {
        let mut known = self.known();
        if known.signatures.len() == SIGNATURES {
            known.signatures.pop_front();
        }
        known.signatures.push_back(signature.to_ascii_lowercase());
    }

    /// `text` from outside, made fit for a message: one line of at most [`quote::ONE_LINE`](crate::quote::ONE_LINE) characters,
    /// with nothing in it that a terminal acts on, and `***` in place of secrets and their fragments.
    pub fn outside(&self, text: &str) -> String {
        let text = &text[..floor(text, LOOKED_AT)];
        one_line(&self.masked(text))
    }

    fn masked(&self, text: &str) -> String {
        let lower = text.as_bytes().to_ascii_lowercase();
        let mut secret = vec![false; lower.len()];
        {
            let known = self.known();
            let signed: HashSet<_> = match lower.len() < FRAGMENT {
                true => HashSet::new(),
                false => known
                    .signatures
                    .iter()
                    .flat_map(|signature| fragments(signature.as_bytes()))
                    .collect(),
            };
            for (at, fragment) in fragments(&lower).enumerate() {
                if known.fragments.contains(&fragment) || signed.contains(&fragment) {
                    secret[at..at + FRAGMENT].fill(true);
                }
            }
            for form in &known.short {
                for at in 0..(lower.len() + 1).saturating_sub(form.len()) {
                    if lower[at..].starts_with(form) {
                        secret[at..at + form.len()].fill(true);
                    }
                }
            }
        }
        let mut shown = String::with_capacity(text.len());
        let mut hidden = false;
        for (at, character) in text.char_indices() {
            match (secret[at], hidden) {
                (true, false) => shown.push_str(MASK),
                (true, true) => {}
                (false, _) => shown.push(character),
            }
            hidden = secret[at];
        }
        shown
    }

    /// A panic elsewhere leaves no half-done state in this lock.
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets(redacted)")
    }
}

/// A secret as others may write it, in lower case.
fn forms(secret: &str) -> Vec<Vec<u8>> {
    let percent = |set| utf8_percent_encode(secret, set).to_string();
    let mut forms = vec![
        secret.to_owned(),
        percent(NON_ALPHANUMERIC),
        percent(KEEPS_UNRESERVED),
        // Encoded twice.
        percent(KEEPS_UNRESERVED).replace('%', "%25"),
    ];
    // In base64 its form depends on the bytes before it, and its neighbours show at both ends.
    for before in 0..3usize {
        let bytes = [&[0; 2][..before], secret.as_bytes()].concat();
        let text = STANDARD_NO_PAD.encode(&bytes);
        let (first, last) = ((before * 8).div_ceil(6), bytes.len() * 8 / 6);
        if let Some(own) = text.get(first..last) {
            forms.push(own.to_owned());
            forms.push(own.replace('+', "-").replace('/', "_"));
            forms.push(own.replace('+', "%2b").replace('/', "%2f"));
        }
    }
    forms.sort();
    forms.dedup();
    forms.retain(|form| form.len() >= SHORTEST);
    forms
        .into_iter()
        .map(|form| form.to_ascii_lowercase().into_bytes())
        .collect()
}

fn fragments(text: &[u8]) -> impl Iterator<Item = [u8; FRAGMENT]> {
    text.windows(FRAGMENT)
        .filter_map(|window| window.try_into().ok())
}

/// The end of the last whole character within `most` bytes.
fn floor(text: &str, most: usize) -> usize {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quote::ONE_LINE;

    const TOKEN: &str = "FwoGZXIvYXdzEJr//////////wEaDPdZ+a/b=c.d-e_f~g";

    fn secrets() -> Secrets {
        let secrets = Secrets::default();
        secrets.add(TOKEN);
        secrets.add("AKIDSHORT");
        secrets
    }

    #[test]
    fn a_secret_is_masked_whole_in_part_and_in_any_case() {
        let secrets = secrets();
        assert_eq!(secrets.outside(&format!("got {TOKEN}!")), "got ***!");
        assert_eq!(
            secrets.outside(&format!("got {}", TOKEN.to_uppercase())),
            "got ***"
        );
        for start in 0..TOKEN.len() - FRAGMENT {
            let part = &TOKEN[start..start + FRAGMENT];
            assert_eq!(secrets.outside(&format!("<{part}>")), "<***>", "{start}");
        }
        assert_eq!(secrets.outside("AKIDSHORT, AKIDSHOR"), "***, AKIDSHOR");
        assert_eq!(secrets.outside("AKID"), "AKID");
    }

    #[test]
    fn a_secret_is_masked_in_the_encodings_that_gateways_use() {
        let secrets = secrets();
        let all = utf8_percent_encode(TOKEN, NON_ALPHANUMERIC).to_string();
        let some = utf8_percent_encode(TOKEN, KEEPS_UNRESERVED).to_string();
        for text in [&all, &all.to_lowercase(), &some, &some.replace('%', "%25")] {
            assert_eq!(secrets.outside(&format!("x={text}&y")), "x=***&y");
        }
        for before in ["", "a", "ab", "abc"] {
            for url in [false, true] {
                let echo = format!("{before}{TOKEN} and more");
                let mut text = STANDARD_NO_PAD.encode(echo);
                if url {
                    text = text.replace('+', "-").replace('/', "_");
                }
                let shown = secrets.outside(&text);
                let left: usize = shown.split(MASK).map(str::len).sum();
                assert!(shown.contains(MASK) && left < 24, "{before}: {shown}");
            }
        }
    }

    #[test]
    fn a_signature_is_masked_while_it_is_of_use() {
        let secrets = Secrets::default();
        let signature = |n: usize| format!("{n:064x}").replace('0', "5");
        for n in 0..=SIGNATURES {
            secrets.add_signature(&signature(n));
        }
        let text = signature(SIGNATURES);
        assert_eq!(secrets.outside(&text.to_uppercase()), MASK);
        assert_eq!(secrets.outside(&text[40..60]), MASK);
        // A digest is not a signature.
        let digest = format!("sha256:{}", "ab12".repeat(16));
        assert_eq!(secrets.outside(&digest), digest);
    }

    #[test]
    fn masking_comes_before_cutting() {
        let secrets = secrets();
        for before in 150..220 {
            let shown = secrets.outside(&format!("{}{TOKEN}", "x".repeat(before)));
            assert!(shown.chars().count() <= ONE_LINE + 1);
            assert!(!shown.contains("Fwo"), "{shown}");
        }
        let shown = secrets.outside(&"é".repeat(1 << 20));
        assert_eq!(shown.chars().count(), ONE_LINE + 1);
        assert!(shown.ends_with('…'));
    }

    #[test]
    fn outside_text_is_one_line_without_anything_that_steers_a_terminal() {
        let text = "a\tb\r\n\u{1b}[31mc\u{85}\u{202e}d\u{2028}f";
        assert_eq!(Secrets::default().outside(text), "a b [31mc d f");
    }
}
