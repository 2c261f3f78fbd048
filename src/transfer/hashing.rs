//! The threads that hash uploads and downloads, each up to two blobs at a time.
//!
//! SHA-256 is one long chain: each step waits for the one before, and a CPU with SHA instructions
//! spends much of its time waiting. Two hashers that are fed in turn overlap their waiting: 1.1 to
//! 1.36 times the bytes per second on one core (docs/performance.md). So a few threads, which can take
//! two blobs each, both bring the bytes (read them, or write them to where they belong) and hash
//! them.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use rustix::buffer::spare_capacity;
use tokio::sync::oneshot;

use crate::cache::digest::Hasher;

/// Bytes of SHA-256's block.
const BLOCK: u64 = 64;

/// Bytes given to one hasher before it is the other's turn. Two blocks: with more, the CPU no longer
/// sees both chains at once.
const TURN: usize = 128;

/// Completes a partial block, so that whole blocks follow, which need no copying. Returns how many
/// bytes that took.
fn fill_block(hasher: &mut Hasher, bytes: &[u8]) -> usize {
    let missing = (BLOCK - hasher.length() % BLOCK) % BLOCK;
    let lead = bytes.len().min(missing as usize);
    hasher.update(&bytes[..lead]);
    lead
}

/// Feeds two hashers in turn until one of them has had all its bytes. Returns how many bytes each
/// has taken.
fn update_both(
    (one, ones): (&mut Hasher, &[u8]),
    (other, others): (&mut Hasher, &[u8]),
) -> (usize, usize) {
    let (lead, other_lead) = (fill_block(one, ones), fill_block(other, others));
    let common = (ones.len() - lead).min(others.len() - other_lead);
    let (end, other_end) = (lead + common, other_lead + common);
    let turns = ones[lead..end]
        .chunks(TURN)
        .zip(others[other_lead..other_end].chunks(TURN));
    for (bytes, other_bytes) in turns {
        one.update(bytes);
        other.update(other_bytes);
    }
    (end, other_end)
}

/// Where bytes to be hashed come from. Called on a thread that may block.
pub trait Feed: Send + 'static {
    /// Brings the next bytes, at most a few hundred KiB, so that they are hashed while in the CPU's
    /// cache. `false`: there are no more.
    ///
    /// # Errors
    /// Any; [`Hashing::run`] returns it.
    fn advance(&mut self) -> Result<bool>;

    /// The bytes that the latest `advance` brought.
    fn bytes(&self) -> &[u8];
}

/// Filled buffers on their way through the hasher.
struct Filled<B> {
    chunks: Vec<B>,
    next: usize,
}

impl<B: AsRef<[u8]> + Send + 'static> Feed for Filled<B> {
    fn advance(&mut self) -> Result<bool> {
        self.next += 1;
        Ok(self.next <= self.chunks.len())
    }

    fn bytes(&self) -> &[u8] {
        match self.next.checked_sub(1) {
            Some(at) => self.chunks.get(at).map_or(&[], AsRef::as_ref),
            None => &[],
        }
    }
}

/// Reads a range of a file, without moving the file's position.
pub struct FileFeed {
    file: Arc<File>,
    rest: Range<u64>,
    buffer: Vec<u8>,
}

impl FileFeed {
    /// Bytes read at a time.
    const STRIDE: u64 = 256 << 10;

    pub fn new(file: Arc<File>, range: Range<u64>) -> Self {
        FileFeed {
            file,
            rest: range,
            buffer: Vec::with_capacity(Self::STRIDE as usize),
        }
    }
}

impl Feed for FileFeed {
    /// If the file is shorter, ends early, without an error.
    fn advance(&mut self) -> Result<bool> {
        let stride = (self.rest.end - self.rest.start).min(Self::STRIDE);
        self.buffer.clear();
        let read = read_into(&mut self.buffer, &self.file, self.rest.start, stride)?;
        self.rest.start += read;
        Ok(read > 0)
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer
    }
}

/// Fills the empty `buffer` with `length` bytes of `file` from `offset` on, fewer only where the file
/// ends. Its capacity is at least `length`. Returns how many.
///
/// # Errors
/// The file cannot be read.
pub fn read_into(
    buffer: &mut Vec<u8>,
    file: &File,
    offset: u64,
    length: u64,
) -> std::io::Result<u64> {
    while (buffer.len() as u64) < length {
        let at = offset + buffer.len() as u64;
        // Without zeroing the buffer first, as the standard library would.
        let read = || rustix::io::pread(file, spare_capacity(buffer), at);
        if rustix::io::retry_on_intr(read)? == 0 {
            break;
        }
    }
    buffer.truncate(length as usize);
    Ok(buffer.len() as u64)
}

/// The threads. Cheap to clone; all clones share them.
#[derive(Clone)]
pub struct Hashing {
    queue: Arc<Mutex<Queue>>,
    most: usize,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Box<dyn Turns>>,
    /// Threads at work or about to be.
    threads: usize,
    /// Of these, the ones that have not looked at `waiting` yet.
    starting: usize,
}

impl Hashing {
    /// Up to one thread per core. Half as many for uploads, whose sending needs cores too, took 0.94 to
    /// 0.99 of the CPU time, but 1.1 to 1.2 times as long.
    pub fn on_every_core() -> Self {
        Hashing::on(cores())
    }

    fn on(most: usize) -> Self {
        Hashing {
            queue: Arc::default(),
            most,
        }
    }

    /// Hashes all that `feed` brings, after what `hasher` has seen, and gives both back.
    ///
    /// # Errors
    /// The feed's.
    pub async fn run<F: Feed>(&self, hasher: Hasher, feed: F) -> Result<(Hasher, F)> {
        let (answer, answered) = oneshot::channel();
        let job = Job {
            feed,
            hasher,
            at: 0,
            answer,
        };
        if self.enqueue(Box::new(job)) {
            start(Arc::clone(&self.queue));
        }
        answered.await.context("a thread that hashes has ended")?
    }

    /// Hashes filled buffers, in their order, after what `hasher` has seen.
    ///
    /// # Errors
    /// A thread that hashes has ended.
    pub async fn run_filled<B: AsRef<[u8]> + Send + 'static>(
        &self,
        hasher: Hasher,
        chunks: Vec<B>,
    ) -> Result<(Vec<B>, Hasher)> {
        let (hasher, filled) = self.run(hasher, Filled { chunks, next: 0 }).await?;
        Ok((filled.chunks, hasher))
    }

    /// Whether to start another thread.
    fn enqueue(&self, job: Box<dyn Turns>) -> bool {
        let mut queue = self.queue.lock();
        queue.waiting.push_back(job);
        let start = queue.threads < self.most;
        queue.threads += usize::from(start);
        queue.starting += usize::from(start);
        start
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

/// One of the threads.
struct Thread {
    queue: Arc<Mutex<Queue>>,
}

impl Thread {
    /// Works until nothing waits.
    fn work(self) {
        self.queue.lock().starting -= 1;
        let (mut one, mut other) = (None, None);
        loop {
            if one.is_none() {
                one = other.take();
            }
            if !self.take_up(&mut one, &mut other) {
                return;
            }
            one = one.and_then(Turns::ready);
            other = other.and_then(Turns::ready);
            match (&mut one, &mut other) {
                (Some(one), Some(other)) => {
                    let (taken, other_taken) = update_both(one.next(), other.next());
                    one.took(taken);
                    other.took(other_taken);
                }
                (Some(alone), None) | (None, Some(alone)) => {
                    let (hasher, bytes) = alone.next();
                    hasher.update(bytes);
                    let taken = bytes.len();
                    alone.took(taken);
                }
                (None, None) => {}
            }
        }
    }

    /// Takes waiting blobs. A second one only if no other thread is coming for it: two cores do
    /// more than one. `false`: there is nothing to do.
    fn take_up(
        &self,
        one: &mut Option<Box<dyn Turns>>,
        other: &mut Option<Box<dyn Turns>>,
    ) -> bool {
        let mut queue = self.queue.lock();
        if one.is_none() {
            *one = queue.waiting.pop_front();
        }
        if other.is_none() && queue.waiting.len() > queue.starting {
            *other = queue.waiting.pop_front();
        }
        // Subtracted here, because whoever adds a waiting blob checks this under the same lock.
        queue.threads -= usize::from(one.is_none());
        one.is_some()
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut queue = self.queue.lock();
            if queue.waiting.is_empty() {
                queue.threads -= 1;
            } else {
                // The waiting blobs are not to blame.
                queue.starting += 1;
                start(Arc::clone(&self.queue));
            }
        }
    }
}

fn start(queue: Arc<Mutex<Queue>>) {
    tokio::task::spawn_blocking(move || Thread { queue }.work());
}

/// A [`Job`], whatever feeds it.
trait Turns: Send {
    /// Makes sure that there are bytes to hash. `None`: the job is done, and its owner knows.
    fn ready(self: Box<Self>) -> Option<Box<dyn Turns>>;

    fn next(&mut self) -> (&mut Hasher, &[u8]);

    /// Records that this many of the bytes have been hashed.
    fn took(&mut self, bytes: usize);
}

struct Job<F> {
    feed: F,
    hasher: Hasher,
    /// How many of the feed's latest bytes have been hashed.
    at: usize,
    answer: oneshot::Sender<Result<(Hasher, F)>>,
}

impl<F: Feed> Turns for Job<F> {
    fn ready(mut self: Box<Self>) -> Option<Box<dyn Turns>> {
        while self.at == self.feed.bytes().len() {
            if self.answer.is_closed() {
                return None;
            }
            self.at = 0;
            let outcome = match self.feed.advance() {
                Ok(true) => continue,
                Ok(false) => Ok((self.hasher, self.feed)),
                Err(error) => Err(error),
            };
            let _ = self.answer.send(outcome);
            return None;
        }
        Some(self)
    }

    fn next(&mut self) -> (&mut Hasher, &[u8]) {
        (&mut self.hasher, &self.feed.bytes()[self.at..])
    }

    fn took(&mut self, bytes: usize) {
        self.at += bytes;
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;
    use proptest::prelude::*;

    use super::*;
    use crate::cache::digest::Digest;

    /// Chunks, or an error in place of one.
    struct Chunks {
        rest: VecDeque<Option<Vec<u8>>>,
        current: Vec<u8>,
    }

    fn chunks(rest: impl IntoIterator<Item = Option<Vec<u8>>>) -> Chunks {
        Chunks {
            rest: rest.into_iter().collect(),
            current: Vec::new(),
        }
    }

    impl Feed for Chunks {
        fn advance(&mut self) -> Result<bool> {
            self.current.clear();
            match self.rest.pop_front() {
                Some(Some(bytes)) => {
                    self.current = bytes;
                    Ok(true)
                }
                Some(None) => bail!("broken"),
                None => Ok(false),
            }
        }

        fn bytes(&self) -> &[u8] {
            &self.current
        }
    }

    fn blob() -> impl Strategy<Value = Vec<Vec<u8>>> {
        prop::collection::vec(prop::collection::vec(any::<u8>(), 0..700), 0..6)
    }

    proptest! {
        #[test]
        fn every_blob_gets_its_own_digest_however_many_are_hashed_at_once(
            blobs in prop::collection::vec(blob(), 1..12),
            most in 1usize..3,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let hashing = Hashing::on(most);
            let found = runtime.block_on(async {
                let runs = blobs.iter().map(|blob| {
                    hashing.run(Hasher::default(), chunks(blob.iter().cloned().map(Some)))
                });
                futures::future::join_all(runs).await
            });
            for (blob, found) in blobs.iter().zip(found) {
                prop_assert_eq!(found.unwrap().0.digest(), Digest::of(&blob.concat()));
            }
            // They answer before they end.
            while hashing.queue.lock().threads > 0 {
                std::thread::yield_now();
            }
            prop_assert_eq!(hashing.queue.lock().starting, 0);
        }

        #[test]
        fn two_hashers_fed_by_turns_see_what_each_alone_would(
            begun in prop::collection::vec(any::<u8>(), 0..200),
            ones in prop::collection::vec(any::<u8>(), 0..2000),
            others in prop::collection::vec(any::<u8>(), 0..2000),
        ) {
            let (mut one, mut other) = (Hasher::default(), Hasher::default());
            one.update(&begun);
            let (taken, other_taken) = update_both((&mut one, &ones), (&mut other, &others));
            prop_assert!(taken == ones.len() || other_taken == others.len());
            prop_assert_eq!(one.digest(), Digest::of(&[&begun, &ones[..taken]].concat()));
            prop_assert_eq!(other.digest(), Digest::of(&others[..other_taken]));
        }
    }

    #[tokio::test]
    async fn a_feed_that_fails_says_why_and_harms_no_other() {
        let hashing = Hashing::on(1);
        let good = || chunks([Some(vec![1; 5000]), Some(vec![2; 5000])]);
        let bad = chunks([Some(vec![3; 100]), None]);
        let (one, broken, other) = tokio::join!(
            hashing.run(Hasher::default(), good()),
            hashing.run(Hasher::default(), bad),
            hashing.run(Hasher::default(), good()),
        );
        assert_eq!(broken.err().unwrap().to_string(), "broken");
        let digest = Digest::of(&[[1; 5000], [2; 5000]].concat());
        assert_eq!(one.unwrap().0.digest(), digest);
        assert_eq!(other.unwrap().0.digest(), digest);
    }

    struct Panicking;

    impl Feed for Panicking {
        fn advance(&mut self) -> Result<bool> {
            panic!("a feed that panics, for a test");
        }

        fn bytes(&self) -> &[u8] {
            &[]
        }
    }

    #[tokio::test]
    async fn a_thread_that_panics_leaves_no_one_waiting() {
        let hashing = Hashing::on(1);
        let (broken, behind) = tokio::join!(
            hashing.run(Hasher::default(), Panicking),
            hashing.run(Hasher::default(), Panicking),
        );
        assert!(broken.is_err() && behind.is_err());
        let (hasher, _) = hashing
            .run(Hasher::default(), chunks([Some(vec![1])]))
            .await
            .unwrap();
        assert_eq!(hasher.digest(), Digest::of(&[1]));
    }
}
