//! Content digests. The type guarantees that whatever becomes part of a path or a key is `sha256:` and
//! 64 hex digits.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

use crate::quote::quoted;

/// Bytes that [`Hasher::consume`] reads at a time: they stay in the CPU's cache until hashed.
const BUFFER: usize = 256 << 10;

/// A sha256 digest. Orders as its text does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// Why a text is not a [`Digest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidDigest(String);

impl fmt::Display for InvalidDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is not a digest (expected sha256: and 64 lower-case hex digits)",
            quoted(&self.0)
        )
    }
}

impl std::error::Error for InvalidDigest {}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Digest(Sha256::digest(bytes).into())
    }

    /// The 64 hex digits, without the algorithm: a blob's file name in a layout.
    pub fn hex(&self) -> String {
        let mut hex = String::with_capacity(64);
        for byte in self.0 {
            for nibble in [byte >> 4, byte & 15] {
                hex.push(char::from_digit(nibble.into(), 16).expect("a nibble is below 16"));
            }
        }
        hex
    }

    /// The raw 32 bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Hashes bytes as they arrive.
#[derive(Debug, Clone, Default)]
pub struct Hasher {
    sha: Sha256,
    length: u64,
}

impl Hasher {
    /// Hashes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.sha.update(bytes);
        self.length += bytes.len() as u64;
    }

    /// Bytes hashed so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The digest of the bytes hashed so far.
    pub fn digest(&self) -> Digest {
        Digest(self.sha.clone().finalize().into())
    }

    /// Hashes the rest of `reader`, calling `read` with the number of bytes of each step.
    ///
    /// # Errors
    /// The reader's.
    pub fn consume(&mut self, mut reader: impl Read, mut read: impl FnMut(u64)) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => {
                    self.update(&buffer[..length]);
                    read(length as u64);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let invalid = || InvalidDigest(text.chars().take(101).collect());
        let hex = text.strip_prefix("sha256:").ok_or_else(invalid)?.as_bytes();
        if hex.len() != 64 {
            return Err(invalid());
        }
        let nibble = |c: u8| match c {
            b'0'..=b'9' => Ok(c - b'0'),
            b'a'..=b'f' => Ok(c - b'a' + 10),
            _ => Err(invalid()),
        };
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Digest(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_reads_back_what_it_writes() {
        let digest = Digest::of(b"");
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse(), Ok(digest));
    }

    #[test]
    fn a_hasher_gives_the_digest_of_all_its_pieces() {
        let mut hasher = Hasher::default();
        assert_eq!(hasher.digest(), Digest::of(b""));
        hasher.update(b"one");
        assert_eq!(hasher.digest(), Digest::of(b"one"));
        hasher.write_all(b"two").unwrap();
        let long = [7; BUFFER + 1];
        let mut steps = Vec::new();
        hasher.consume(&long[..], |step| steps.push(step)).unwrap();
        assert_eq!(
            hasher.digest(),
            Digest::of(&[b"onetwo", &long[..]].concat())
        );
        assert_eq!(hasher.length(), 6 + long.len() as u64);
        assert_eq!(steps, [BUFFER as u64, 1]);
    }

    #[test]
    fn whatever_is_not_64_lower_case_hex_digits_is_refused() {
        for text in [
            "",
            "sha256:",
            "sha256:../../etc/passwd",
            "sha512:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855",
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b85",
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b8555",
            "sha256:+3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b85/",
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text:?} was accepted");
        }
    }
}
