//! The XML of one page of a listing, read once and fast: a bucket may have thousands of pages.

use std::str;

use quick_xml::Reader;
use quick_xml::events::{BytesRef, Event};

use super::response::is_named;

/// What S3 calls a page.
pub(super) const ROOT: &str = "ListBucketResult";
/// Far deeper than a page is.
const DEPTH: usize = 16;

/// A page as the store wrote it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listing {
    pub(super) encoding_type: Option<String>,
    pub(super) is_truncated: bool,
    pub(super) next_continuation_token: Option<String>,
    pub(super) contents: Vec<Listed>,
}

/// An object on a page.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) key: Option<String>,
    pub(super) size: Option<u64>,
    pub(super) last_modified: Option<String>,
    pub(super) etag: Option<String>,
    pub(super) storage_class: Option<String>,
}

/// Reads a page. `None` if `body` is anything else, malformed, or has a DOCTYPE.
pub(super) fn read(body: &[u8]) -> Option<Listing> {
    let mut reader = Reader::from_str(str::from_utf8(body).ok()?.trim_start());
    reader.config_mut().expand_empty_elements = true;
    let (mut listing, mut object) = (Listing::default(), None);
    let (mut depth, mut text) = (0, String::new());
    // Whether the latest tag began an element, which then has text only.
    let mut begun = false;
    let mut seen_root = false;
    loop {
        match reader.read_event().ok()? {
            Event::Start(tag) => {
                depth += 1;
                let name = tag.local_name();
                match depth {
                    1 if seen_root || !is_named(str::from_utf8(name.as_ref()).ok()?, ROOT) => {
                        return None;
                    }
                    1 => seen_root = true,
                    2 if name.as_ref() == b"Contents" => object = Some(Listed::default()),
                    DEPTH.. => return None,
                    _ => {}
                }
                text.clear();
                begun = true;
            }
            Event::Text(piece) => text.push_str(&piece.xml10_content().ok()?),
            Event::CData(piece) => text.push_str(&piece.xml10_content().ok()?),
            Event::GeneralRef(name) => text.push(character(&name)?),
            Event::End(tag) => {
                let name = tag.local_name();
                let value = || begun.then(|| text.clone());
                match (depth, &mut object) {
                    (2, _) => match name.as_ref() {
                        b"EncodingType" => listing.encoding_type = Some(value()?),
                        b"IsTruncated" => listing.is_truncated = value()?.parse().ok()?,
                        b"NextContinuationToken" => {
                            listing.next_continuation_token = Some(value()?);
                        }
                        b"Contents" => listing.contents.extend(object.take()),
                        _ => {}
                    },
                    (3, Some(object)) => match name.as_ref() {
                        b"Key" => object.key = Some(value()?),
                        b"Size" => object.size = Some(value()?.parse().ok()?),
                        b"LastModified" => object.last_modified = Some(value()?),
                        b"ETag" => object.etag = Some(value()?),
                        b"StorageClass" => object.storage_class = Some(value()?),
                        _ => {}
                    },
                    _ => {}
                }
                depth -= 1;
                begun = false;
                text.clear();
            }
            Event::DocType(_) => return None,
            Event::Eof => return (seen_root && depth == 0).then_some(listing),
            _ => {}
        }
        if depth == 0 && !text.trim().is_empty() {
            return None;
        }
    }
}

/// The character that a reference in a text stands for. XML itself knows five by name.
fn character(reference: &BytesRef<'_>) -> Option<char> {
    if reference.is_char_ref() {
        return reference.resolve_char_ref().ok()?;
    }
    match reference.as_ref() {
        b"amp" => Some('&'),
        b"lt" => Some('<'),
        b"gt" => Some('>'),
        b"quot" => Some('"'),
        b"apos" => Some('\''),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn a_page_is_read_with_all_that_concerns_its_objects() {
        let body = "\n<?xml version=\"1.0\"?><!-- c --><ListBucketResponse xmlns=\"x\"><Name>b</Name>\
            <EncodingType>url</EncodingType><IsTruncated>true</IsTruncated>\
            <Contents><Key>a%2Bb</Key><LastModified>2026-11-21T20:37:36.000Z</LastModified>\
            <ETag>&quot;e&#45;1&quot;</ETag><Size>12</Size><Owner><ID>x</ID></Owner>\
            <StorageClass>STANDARD</StorageClass></Contents>\
            <Contents><s:Key><![CDATA[<&]]> </s:Key><Size>0</Size><ETag/></Contents>\
            <CommonPrefixes><Prefix>p/</Prefix></CommonPrefixes>\
            <NextContinuationToken>t==</NextContinuationToken></ListBucketResponse>\n";
        let first = Listed {
            key: text("a%2Bb"),
            size: Some(12),
            last_modified: text("2026-11-21T20:37:36.000Z"),
            etag: text("\"e-1\""),
            storage_class: text("STANDARD"),
        };
        let second = Listed {
            key: text("<& "),
            size: Some(0),
            etag: text(""),
            ..Listed::default()
        };
        let page = Listing {
            encoding_type: text("url"),
            is_truncated: true,
            next_continuation_token: text("t=="),
            contents: vec![first, second],
        };
        assert_eq!(read(body.as_bytes()), Some(page));
        assert_eq!(
            read(b"<ListBucketResult/>"),
            Some(Listing::default()),
            "an empty page"
        );
    }

    #[test]
    fn what_is_not_a_whole_page_is_not_read() {
        let page = "<ListBucketResult><Contents><Key>k</Key><Size>1</Size></Contents>\
            <IsTruncated>false</IsTruncated></ListBucketResult>";
        assert!(read(page.as_bytes()).is_some());
        for cut in 1..page.len() {
            assert_eq!(read(&page.as_bytes()[..cut]), None, "{}", &page[..cut]);
        }
        let nested = "<a>".repeat(DEPTH) + &"</a>".repeat(DEPTH);
        for (from, to) in [
            (">1<", "><"),
            (">1<", ">-1<"),
            (">1<", "> 1<"),
            (">1<", ">1<a/><"),
            (">k<", ">k<a>k</a><"),
            (">k<", ">&x;<"),
            ("</Size>", "</size>"),
            (">false<", ">no<"),
            ("<Contents>", nested.as_str()),
            ("<ListBucketResult>", "<!DOCTYPE a><ListBucketResult>"),
            ("<ListBucketResult>", "<a/><ListBucketResult>"),
            ("</ListBucketResult>", "</ListBucketResult><a/>"),
            ("<ListBucketResult>", "a<ListBucketResult>"),
            ("</ListBucketResult>", "</ListBucketResult>a"),
            ("ListBucketResult", "Error"),
        ] {
            let changed = page.replace(from, to);
            assert_ne!(changed, page);
            assert_eq!(read(changed.as_bytes()), None, "{changed}");
        }
        assert_eq!(read(b"<ListBucketResult>\xff</ListBucketResult>"), None);
    }
}
