//! What a client must know: the secret in every path, and the tokens of the GitHub protocol. Any
//! process on the machine can reach a loopback port.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::json;

/// A token outlives every build. It is worth nothing once the run has ended.
const LIFETIME: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Clocks of builders differ.
const SKEW: Duration = Duration::from_secs(10 * 60);

/// The random path component of a run. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(redacted)")
    }
}

impl Secret {
    /// 128 random bits, in characters that a repository name allows.
    pub fn random() -> Self {
        Secret(format!("{:032x}", rand::random::<u128>()))
    }

    pub fn text(&self) -> &str {
        &self.0
    }

    /// Whether `claimed` is the secret. Compares in constant time.
    pub fn is(&self, claimed: &str) -> bool {
        same(self.0.as_bytes(), claimed.as_bytes())
    }
}

/// A token for BuildKit's `type=gha`, which reads the scopes in it and does not verify it. We compare it
/// whole. `Debug` does not show it.
#[derive(Clone)]
pub struct Token {
    text: String,
    /// Whether its holder may save entries.
    pub writes: bool,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(redacted)")
    }
}

impl Token {
    /// A token for `scopes`, which an importer reads in this order.
    pub fn mint(scopes: &[&str], writes: bool) -> Self {
        let permission = if writes { 3 } else { 1 };
        let scopes = scopes
            .iter()
            .map(|scope| json!({"Scope": scope, "Permission": permission}));
        let access = serde_json::Value::from_iter(scopes).to_string();
        let now = SystemTime::now();
        let claims = json!({
            "ac": access,
            "exp": seconds(now + LIFETIME),
            "nbf": seconds(now - SKEW),
        });
        let header = json!({"alg": "HS256", "typ": "JWT"});
        let parts = [header.to_string(), claims.to_string()].map(|p| URL_SAFE_NO_PAD.encode(p));
        // Only we verify it, by comparing, so random bytes are as good as a signature.
        let signature = URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>());
        Token {
            text: format!("{}.{}.{signature}", parts[0], parts[1]),
            writes,
        }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether a client knows it.
    pub fn is(&self, claimed: &str) -> bool {
        same(self.text.as_bytes(), claimed.as_bytes())
    }
}

fn seconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// Compares without stopping at the first difference.
fn same(one: &[u8], other: &[u8]) -> bool {
    let differs = |(a, b): (&u8, &u8)| a ^ b;
    one.len() == other.len() && one.iter().zip(other).map(differs).fold(0, |a, b| a | b) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_holds_its_scopes_in_order_as_a_string_of_json() {
        let token = Token::mint(&["branch", "main"], true);
        let parts: Vec<&str> = token.text().split('.').collect();
        let decode = |part: &str| -> serde_json::Value {
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
        };
        assert_eq!(decode(parts[0]), json!({"alg": "HS256", "typ": "JWT"}));
        let claims = decode(parts[1]);
        assert_eq!(
            claims["ac"],
            r#"[{"Scope":"branch","Permission":3},{"Scope":"main","Permission":3}]"#
        );
        let now = seconds(SystemTime::now());
        assert!(claims["exp"].as_u64().unwrap() > now && claims["nbf"].as_u64().unwrap() < now);
        assert_eq!(URL_SAFE_NO_PAD.decode(parts[2]).unwrap().len(), 32);
    }

    #[test]
    fn only_the_whole_secret_and_the_whole_token_are_accepted() {
        let (secret, token) = (Secret::random(), Token::mint(&["main"], false));
        assert!(secret.is(secret.text()) && token.is(token.text()));
        for wrong in ["", &secret.text()[1..], Secret::random().text()] {
            assert!(!secret.is(wrong));
        }
        assert!(!token.is(Token::mint(&["main"], false).text()));
        assert_eq!(
            format!("{secret:?} {token:?}"),
            "Secret(redacted) Token(redacted)"
        );
    }
}
