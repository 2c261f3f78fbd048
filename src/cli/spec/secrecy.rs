//! Keeps credentials out of messages: what may hold one is not shown.

use super::attributes::{BOTH, SECRETS, TO_ONLY};
use super::authority;
use crate::quote;

/// A value for an error, unless it may hold a credential: separated by something other than commas, a
/// spec becomes one value, credentials and all.
pub(super) fn quoted(value: &str) -> String {
    if may_hold_credentials(value) {
        return "the value (not shown: it may hold a credential)".to_owned();
    }
    quote::quoted(value)
}

/// Whether a text that should be something else is a spec, or holds a credential as one does.
/// Directories, too, can have `=`, `@` and commas in their names.
pub(crate) fn is_spec(text: &str) -> bool {
    let text = text.to_lowercase();
    let has_attribute = text.split(',').any(|field| {
        let key = field.split_once('=').map(|(key, _)| key.trim());
        key.is_some_and(|key| BOTH.contains(&key) || TO_ONLY.contains(&key))
    });
    // Wherever it stands: with other separators a spec is one field.
    let has_secret = text.match_indices('=').any(|(at, _)| {
        let before = text.get(..at).unwrap_or_default().trim_end();
        SECRETS.iter().any(|secret| before.ends_with(secret))
    });
    let has_password = text
        .split_once("://")
        .is_some_and(|(_, rest)| authority(rest).contains('@'));
    has_attribute || has_secret || has_password
}

/// Whether a text holds what could be a credential's attribute, or a URL with a password in it.
pub(crate) fn may_hold_credentials(text: &str) -> bool {
    let text = text.to_lowercase();
    ["access_key", "session_token", "key=", "token="]
        .iter()
        .any(|mark| text.contains(mark))
        || text.contains("//") && text.contains('@')
}
