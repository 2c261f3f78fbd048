//! Documents that were generated or pushed in this run, by digest: clients ask for them, or name
//! them, next.

use std::collections::VecDeque;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::cache::digest::Digest;

/// Bytes of all documents of one kind together. The latest is kept even if it is larger.
const MOST: usize = 64 << 20;

/// A small blob in memory.
#[derive(Debug, Clone)]
pub struct Document {
    /// Empty if unknown.
    pub media_type: String,
    pub digest: Digest,
    pub bytes: Bytes,
}

/// The latest documents.
#[derive(Default)]
pub struct Kept {
    documents: Mutex<VecDeque<Document>>,
}

impl Kept {
    /// Keeps a document, and drops the oldest ones that no longer fit.
    pub fn keep(&self, document: Document) {
        let mut documents = self.documents.lock();
        documents.retain(|kept| kept.digest != document.digest);
        documents.push_back(document);
        let mut bytes: usize = documents.iter().map(|kept| kept.bytes.len()).sum();
        while bytes > MOST && documents.len() > 1 {
            bytes -= documents.pop_front().map_or(0, |oldest| oldest.bytes.len());
        }
    }

    /// Whether a document fits without pushing out another.
    pub fn has_room(&self, bytes: u64) -> bool {
        let documents = self.documents.lock();
        let kept: usize = documents.iter().map(|kept| kept.bytes.len()).sum();
        kept as u64 + bytes <= MOST as u64
    }

    pub fn get(&self, digest: &Digest) -> Option<Document> {
        let documents = self.documents.lock();
        documents
            .iter()
            .find(|kept| kept.digest == *digest)
            .cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_documents_make_room_and_the_latest_always_stays() {
        let kept = Kept::default();
        let document = |byte: u8, length: usize| {
            let bytes = Bytes::from(vec![byte; length]);
            Document {
                media_type: String::new(),
                digest: Digest::of(&[byte]),
                bytes,
            }
        };
        let there = |byte: u8| kept.get(&Digest::of(&[byte])).is_some();
        kept.keep(document(1, MOST / 2));
        assert!(kept.has_room(MOST as u64 / 2) && !kept.has_room(MOST as u64 / 2 + 1));
        kept.keep(document(2, MOST / 2));
        kept.keep(document(1, MOST / 2));
        kept.keep(document(3, 1));
        assert!(there(1) && !there(2) && there(3));
        kept.keep(document(4, MOST + 1));
        assert!(!there(1) && !there(3) && there(4));
    }
}
