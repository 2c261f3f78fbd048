//! A layer's diffID: the digest of its blob's content, decompressed.

use std::io::{self, BufReader, Read};

use anyhow::{Context, Result};
use flate2::bufread::MultiGzDecoder;

use crate::cache::digest::{Digest, Hasher};

/// Compressed bytes read at a time.
const BUFFER: usize = 128 << 10;

/// The largest window a zstd frame may ask for, as a power of 2: 128 MiB, zstd's own default. It bounds
/// the memory that a hostile frame can take.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Decompresses `blob` (gzip, zstd or neither, by its first bytes) in constant memory, to its end.
///
/// # Errors
/// `blob` cannot be read, is truncated, or has bytes after the compressed data; Go's readers refuse
/// the same.
pub fn compute(mut blob: impl Read) -> Result<Digest> {
    let mut start = Vec::with_capacity(4);
    blob.by_ref()
        .take(4)
        .read_to_end(&mut start)
        .context("reading the blob")?;
    let compression = Compression::of(&start);
    let whole = BufReader::with_capacity(BUFFER, start.as_slice().chain(blob));
    match compression {
        Compression::Gzip => hash(MultiGzDecoder::new(whole)).context("decompressing gzip"),
        Compression::Zstd => {
            let mut decoder =
                zstd::stream::read::Decoder::with_buffer(whole).context("starting zstd")?;
            decoder
                .window_log_max(ZSTD_WINDOW_LOG)
                .context("limiting zstd's window")?;
            hash(decoder).context("decompressing zstd")
        }
        Compression::None => hash(whole).context("reading the blob"),
    }
}

enum Compression {
    Gzip,
    Zstd,
    None,
}

impl Compression {
    fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, 0x08, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            // A skippable frame: seekable zstd can begin with one.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
            _ => Compression::None,
        }
    }
}

fn hash(content: impl Read) -> io::Result<Digest> {
    let mut hasher = Hasher::default();
    hasher.consume(content, |_| {})?;
    Ok(hasher.digest())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression as Level;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::*;

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Level::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(content: &[u8]) -> Vec<u8> {
        zstd::encode_all(content, 3).unwrap()
    }

    const SKIPPABLE: &[u8] = b"\x5e\x2a\x4d\x18\x03\x00\x00\x00abc";

    #[test]
    fn each_compression_gives_the_digest_of_the_content() {
        let content = b"content of a layer".repeat(1000);
        let expected = Digest::of(&content);
        assert_eq!(compute(content.as_slice()).unwrap(), expected);
        assert_eq!(compute(gzip(&content).as_slice()).unwrap(), expected);
        assert_eq!(compute(zstd(&content).as_slice()).unwrap(), expected);
    }

    #[test]
    fn a_blob_shorter_than_any_magic_number_is_plain() {
        for content in [b"".as_slice(), b"\x1f", b"\x1f\x8b", b"\x28\xb5\x2f"] {
            assert_eq!(compute(content).unwrap(), Digest::of(content));
        }
    }

    #[test]
    fn members_and_frames_that_follow_each_other_are_one_content() {
        let expected = Digest::of(b"onetwo");
        let members = [gzip(b"one"), gzip(b"two")].concat();
        assert_eq!(compute(members.as_slice()).unwrap(), expected);
        let frames = [
            SKIPPABLE,
            &zstd(b"one"),
            SKIPPABLE,
            &zstd(b"two"),
            SKIPPABLE,
        ]
        .concat();
        assert_eq!(compute(frames.as_slice()).unwrap(), expected);
    }

    #[test]
    fn a_blob_that_breaks_off_is_an_error() {
        let content: Vec<u8> = (0..50_000u32).flat_map(u32::to_le_bytes).collect();
        for blob in [gzip(&content), zstd(&content)] {
            for length in [5, 20, blob.len() / 2, blob.len() - 1] {
                assert!(compute(&blob[..length]).is_err(), "{length} bytes passed");
            }
        }
    }

    #[test]
    fn bytes_after_the_content_are_an_error() {
        for blob in [gzip(b"one"), zstd(b"one")] {
            for tail in [b"garbage and more garbage".as_slice(), &[0; 512]] {
                assert!(compute([&blob, tail].concat().as_slice()).is_err());
            }
        }
    }

    #[test]
    fn a_zstd_frame_cannot_ask_for_a_window_over_128_mib() {
        // Magic, descriptor (no single segment, no checksum, no size), window descriptor.
        let frame = |window: u8| {
            let mut bytes = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, window];
            bytes.extend([0x01, 0x00, 0x00]); // the last block, raw, empty
            bytes
        };
        let exponent = |log: u8| (log - 10) << 3;
        assert_eq!(
            compute(frame(exponent(27)).as_slice()).unwrap(),
            Digest::of(b"")
        );
        let error = compute(frame(exponent(28)).as_slice()).unwrap_err();
        assert!(
            format!("{error:#}").contains("decompressing zstd"),
            "{error:#}"
        );
    }

    /// A reader that gives a byte at a time, and interruptions between.
    struct Dribble<'a>(&'a [u8], bool);

    impl Read for Dribble<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let length = buffer.len().min(1);
            self.0.read(&mut buffer[..length])
        }
    }

    #[test]
    fn a_reader_may_give_its_bytes_one_by_one() {
        let expected = Digest::of(b"content");
        for blob in [b"content".to_vec(), gzip(b"content")] {
            assert_eq!(compute(Dribble(&blob, false)).unwrap(), expected);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            start in prop::sample::select(vec![&b""[..], b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", SKIPPABLE]),
            rest in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = compute([start, &rest].concat().as_slice());
        }
    }
}
