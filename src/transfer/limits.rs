//! The sizes from which a blob is transferred differently: in parts, in pieces.

use std::ops::Range;

use crate::memory::MEMORY;
use crate::store::Part;
use crate::transfer::buffers::BUFFER;

const MIB: u64 = 1 << 20;

/// S3's limit on the parts of one upload.
const MOST_PARTS: u64 = 10_000;

/// Sizes in bytes. The defaults suit S3; tests use smaller ones.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Blobs of at least this size are uploaded in parts.
    pub multipart: u64,
    /// The smallest part.
    pub part: u64,
    /// The largest object that one CopyObject can copy.
    pub copy: u64,
    /// The smallest part that is copied.
    pub copy_part: u64,
    /// A piece of a download. One stream from S3 carries 85 to 95 MiB/s, so a large blob is fetched
    /// in several pieces at once; a piece stays in memory until the ones before it are written.
    pub piece: u64,
    /// What the process may take in memory, roughly.
    pub memory: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            multipart: 32 * MIB,
            part: marked(5 * MIB),
            copy: 5 << 30,
            copy_part: marked(512 * MIB),
            piece: 2 * MIB,
            memory: MEMORY,
        }
    }
}

/// The smallest size of at least `size` that marks a part as uploaded by this program: a quarter of
/// a MiB more than whole MiB, which no other client is known to use (docs/format.md).
fn marked(size: u64) -> u64 {
    size.saturating_sub(BUFFER).next_multiple_of(MIB) + BUFFER
}

impl Limits {
    /// The part size for a blob of `size` bytes. All parts but the last are equal, as R2 requires.
    /// There are at most 1,000 (Scaleway's limit) as long as that takes parts of at most 8.25 MiB,
    /// and never more than 10,000.
    pub fn part_size(&self, size: u64) -> u64 {
        let few = size.div_ceil(1_000).min(marked(8 * MIB));
        let wanted = few.max(size.div_ceil(MOST_PARTS));
        if wanted <= self.part {
            return self.part;
        }
        marked(wanted)
    }

    /// The part size for an object of `size` bytes that is copied.
    pub fn copy_part_size(&self, size: u64) -> u64 {
        let wanted = size.div_ceil(MOST_PARTS);
        if wanted <= self.copy_part {
            return self.copy_part;
        }
        marked(wanted)
    }

    /// Whether `parts` belong to an upload of a blob of `size` that this program started.
    pub fn started(&self, size: u64, parts: &[Part]) -> bool {
        self.cut(size, parts) || is_cut(self.copy_part_size(size), size, parts)
    }

    /// Whether `parts` are some of those that this program cuts a blob of `size` into.
    pub fn cut(&self, size: u64, parts: &[Part]) -> bool {
        is_cut(self.part_size(size), size, parts)
    }
}

/// Whether `parts` is not empty, and each is a part that cutting `size` bytes every `part` bytes makes.
fn is_cut(part: u64, size: u64, parts: &[Part]) -> bool {
    let last = size.div_ceil(part).max(1);
    let fits = |found: &Part| match u64::from(found.number) {
        number if number < last => found.size == part,
        number if number == last => found.size == size - (last - 1) * part,
        _ => false,
    };
    !parts.is_empty() && parts.iter().all(fits)
}

/// Cuts `size` bytes into half-open ranges of `part` bytes; the last one may be shorter. (BuildKit's
/// own arithmetic runs one byte past the end.)
pub fn ranges(size: u64, part: u64) -> impl ExactSizeIterator<Item = Range<u64>> {
    let count = usize::try_from(size.div_ceil(part)).unwrap_or(usize::MAX);
    (0..count).map(move |index| {
        let start = index as u64 * part;
        start..size.min(start.saturating_add(part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_a_blob_exactly_at_under_and_over_a_part() {
        let cut = |size| ranges(size, 10).collect::<Vec<_>>();
        assert_eq!(cut(0), vec![]);
        assert_eq!(cut(9), vec![0..9]);
        assert_eq!(cut(10), vec![0..10]);
        assert_eq!(cut(11), vec![0..10, 10..11]);
        assert_eq!(cut(20), vec![0..10, 10..20]);
    }

    #[test]
    fn no_blob_has_more_than_ten_thousand_parts_and_every_part_size_marks_its_uploader() {
        let limits = Limits::default();
        let sizes = [
            1,
            5 << 20,
            5 << 30,
            8_400_000_000,
            9 << 30,
            50 << 30,
            100 << 30,
            5 << 40,
        ];
        for size in sizes {
            for part in [limits.part_size(size), limits.copy_part_size(size)] {
                assert!(part >= 5 << 20);
                assert!(size.div_ceil(part) <= 10_000, "{size} in parts of {part}");
                assert_eq!(part % MIB, BUFFER, "{size} in parts of {part}");
            }
        }
        assert_eq!(limits.part_size(1 << 30), (5 << 20) + BUFFER);
        assert_eq!(limits.part_size(9 << 30), (8 << 20) + BUFFER);
    }

    #[test]
    fn an_upload_counts_as_started_here_only_if_all_its_parts_are_cut_as_here() {
        let limits = Limits::default();
        let size = 40 * MIB;
        let part = |number, size| Part {
            number,
            size,
            etag: String::new(),
        };
        let last = size - 7 * limits.part;
        assert!(limits.started(size, &[part(1, limits.part), part(8, last)]));
        assert!(!limits.started(size, &[]));
        assert!(!limits.started(size, &[part(1, 5 * MIB)]));
        assert!(!limits.started(size, &[part(1, limits.part), part(2, 5 * MIB)]));
        assert!(!limits.started(size, &[part(9, 1)]));
    }
}
