//! All objects below a prefix, as a stream of pages. It holds one page of each listing in flight,
//! however many objects there are.
//!
//! A listing takes one round trip for each thousand keys, one after another. A bucket can hold a
//! million blobs, and their digests are spread evenly. So unless the first page is the last, the
//! blobs are listed by the first digit of their digests, in sixteen parallel listings, and the
//! first listing jumps over them.

use std::sync::Arc;

use futures::stream::{BoxStream, Stream, StreamExt};
use tokio::task::JoinSet;

use crate::bucket::Bucket;
use crate::store::{ObjectInfo, Page, Store, StoreResult};

/// The first digits of digests, in order.
const DIGITS: &str = "0123456789abcdef";

/// Parallel listings of blobs.
pub(super) const LISTINGS: usize = DIGITS.len();

/// The last digit of each run: `:` to `` ` `` are between `9` and `a`.
const BEFORE_GAP: [char; 2] = ['9', 'f'];

/// Objects with their keys.
pub type Objects = Vec<(String, ObjectInfo)>;

/// Pages of a listing as they arrive, in no particular order. Each object comes once.
pub type Pages = BoxStream<'static, StoreResult<Objects>>;

impl Bucket {
    /// The objects whose keys begin with `prefix`.
    pub fn objects_below(&self, prefix: &str) -> Pages {
        let digests = self.digests();
        let blobs = digests
            .starts_with(prefix)
            .then(|| self.blobs_in_parallel());
        let aside = blobs.is_some().then_some(digests);
        let listing = Listing::new(&self.store, prefix.to_owned(), aside);
        let first = async move {
            let mut listing = listing;
            match listing.next().await {
                Ok(page) if page.next.is_none() => one(Ok(page.objects)),
                Ok(page) => {
                    let objects = listing.take(page);
                    let rest = one(Ok(objects)).chain(listing.pages());
                    match blobs {
                        Some(blobs) => futures::stream::select(rest, blobs).boxed(),
                        None => rest.boxed(),
                    }
                }
                Err(error) => one(Err(error)),
            }
        };
        futures::stream::once(first).flatten().boxed()
    }

    /// All objects whose keys begin like a blob's, in sixteen parallel listings.
    pub fn blobs_in_parallel(&self) -> Pages {
        futures::stream::iter(self.blob_listings())
            .flatten_unordered(LISTINGS)
            .boxed()
    }

    /// The sixteen listings of blobs. Each lists a page only when polled.
    pub fn blob_listings(&self) -> Vec<Pages> {
        let digests = self.digests();
        let listings = DIGITS.chars().map(|digit| {
            let prefix = format!("{digests}{digit}");
            Listing::new(&self.store, prefix, None).pages().boxed()
        });
        listings.collect()
    }

    /// The objects whose keys begin with `prefix`, without the blobs.
    pub(super) fn all_but_blobs(&self, prefix: &str) -> Pages {
        Listing::new(&self.store, prefix.to_owned(), Some(self.digests()))
            .pages()
            .boxed()
    }

    /// What the keys of all blobs begin with, up to the digits.
    fn digests(&self) -> String {
        format!("{}sha256:", self.blobs())
    }
}

fn one(page: StoreResult<Objects>) -> Pages {
    futures::stream::iter([page]).boxed()
}

/// One listing, page by page.
struct Listing {
    store: Arc<dyn Store>,
    prefix: String,
    /// Blobs that begin like this are listed elsewhere, and left out here.
    aside: Option<String>,
    from: From,
    /// Keys up to this one have been listed.
    passed: Option<String>,
    /// Whether the store lists in order and from where it is told to, so that jumping over keys
    /// loses none.
    can_jump: bool,
}

/// Where the next page begins.
enum From {
    Start,
    Token(String),
    /// After this key.
    After(String),
    End,
}

impl Listing {
    fn new(store: &Arc<dyn Store>, prefix: String, aside: Option<String>) -> Self {
        Listing {
            store: Arc::clone(store),
            prefix,
            aside,
            from: From::Start,
            passed: None,
            can_jump: true,
        }
    }

    /// The pages from here on.
    fn pages(self) -> impl Stream<Item = StoreResult<Objects>> + Send {
        futures::stream::unfold(self, |mut listing| async move {
            if matches!(listing.from, From::End) {
                return None;
            }
            let page = match listing.next().await {
                Ok(page) => Ok(listing.take(page)),
                Err(error) => {
                    listing.from = From::End;
                    Err(error)
                }
            };
            Some((page, listing))
        })
    }

    /// Parsing a page takes about as long as waiting for it. As a task of its own, it does not keep the
    /// other listings waiting.
    async fn next(&self) -> StoreResult<Page> {
        let (store, prefix) = (Arc::clone(&self.store), self.prefix.clone());
        let mut task = JoinSet::new();
        match &self.from {
            From::Start => task.spawn(async move { store.list(&prefix, None).await }),
            From::Token(token) => {
                let token = token.clone();
                task.spawn(async move { store.list(&prefix, Some(&token)).await })
            }
            From::After(key) => {
                let key = key.clone();
                task.spawn(async move { store.list_after(&prefix, &key).await })
            }
            From::End => return Ok(Page::default()),
        };
        match task.join_next().await {
            Some(Ok(page)) => page,
            Some(Err(error)) if error.is_panic() => {
                std::panic::resume_unwind(error.into_panic());
            }
            // The runtime is shutting down, and this task with it.
            _ => std::future::pending().await,
        }
    }

    /// The objects of `page`, which came last, without those that are listed elsewhere.
    fn take(&mut self, mut page: Page) -> Objects {
        let keys = || page.objects.iter().map(|(key, _)| key);
        let is_new = |key: &String| self.passed.as_ref().is_none_or(|passed| key > passed);
        self.can_jump &= keys().is_sorted() && keys().all(is_new);
        let target = match self.can_jump {
            true => keys().next_back().and_then(|key| self.beyond(key)),
            false => None,
        };
        page.objects
            .retain(|(key, _)| is_new(key) && self.digit(key).is_none());
        self.from = match (page.next, target) {
            (None, _) => From::End,
            (Some(_), Some(target)) => {
                self.passed = Some(target.clone());
                From::After(target)
            }
            (Some(token), None) => From::Token(token),
        };
        page.objects
    }

    /// The digit of the listing in which `key` comes, if it is listed elsewhere.
    fn digit(&self, key: &str) -> Option<char> {
        let rest = key.strip_prefix(self.aside.as_ref()?)?;
        rest.chars().next().filter(|c| DIGITS.contains(*c))
    }

    /// The key to go on after, if `key` and those that follow it are listed elsewhere.
    fn beyond(&self, key: &str) -> Option<String> {
        let digit = self.digit(key)?;
        let last = BEFORE_GAP.into_iter().find(|last| digit <= *last)?;
        // No digest continues with `~`, and a key that does comes before the gap.
        let target = format!("{}{last}~", self.aside.as_ref()?);
        Some(target).filter(|target| target.as_str() > key)
    }
}
