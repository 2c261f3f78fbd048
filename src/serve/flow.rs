//! A blob on its way from S3 to one or several clients. The latest bytes stay in memory for clients
//! that are a little behind. A client that is far behind drops out: no client waits long for
//! another.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::cache::digest::Hasher;
use crate::transfer::forward::Taker;

/// Bytes that a single flow holds for its readers, within bounds.
const MOST: u64 = 8 << 20;
const LEAST: u64 = 512 << 10;

/// How long, over the whole flow, readers that are up to date wait for one that is not.
const PATIENCE: Duration = Duration::from_millis(500);

/// How a flow ended.
#[derive(Debug, Clone)]
pub enum End {
    /// Nothing more comes: its last byte was passed on, or no reader was left.
    Whole,
    /// S3 does not have the blob (any more).
    Missing,
    /// Why it broke off.
    Broken(Arc<anyhow::Error>),
}

/// What a reader gets.
pub enum Next {
    Chunk(Bytes),
    End(End),
    /// The next bytes for this reader are no longer held.
    Behind,
}

/// How many flows there are: it decides how much each may hold.
#[derive(Clone)]
pub struct Flows {
    count: Arc<AtomicUsize>,
    held: u64,
}

impl Flows {
    /// Flows that hold `held` bytes together, unless there are very many.
    pub fn new(held: u64) -> Self {
        Flows {
            count: Arc::default(),
            held,
        }
    }
}

/// One flow.
pub struct Flow {
    state: Mutex<State>,
    /// Bytes have arrived, or the end.
    arrived: Notify,
    /// A reader has taken some, or gone away.
    taken: Notify,
    flows: Flows,
}

#[derive(Default)]
struct State {
    /// Where in the blob `chunks` begin and end.
    start: u64,
    end: u64,
    chunks: VecDeque<Bytes>,
    ended: Option<End>,
    /// Where each reader is.
    readers: BTreeMap<u64, u64>,
    next_reader: u64,
    /// The last reader has gone, so nothing more arrives.
    closed: bool,
}

impl State {
    fn slowest(&self) -> Option<u64> {
        self.readers.values().copied().min()
    }
}

impl Flow {
    /// Bytes will arrive from `start` on. There is one reader from the beginning.
    pub fn new(start: u64, flows: &Flows) -> (Arc<Self>, Place) {
        flows.count.fetch_add(1, Ordering::Relaxed);
        let flow = Arc::new(Flow {
            state: Mutex::new(State {
                start,
                end: start,
                ..State::default()
            }),
            arrived: Notify::new(),
            taken: Notify::new(),
            flows: flows.clone(),
        });
        let place = flow.place(&mut flow.state.lock(), start);
        (flow, place)
    }

    /// Adds a reader, if the flow holds or will hold the bytes at `at`.
    pub fn join(self: &Arc<Self>, at: u64) -> Option<Place> {
        let mut state = self.state.lock();
        let broken = matches!(state.ended, Some(End::Missing | End::Broken(_)));
        let fits = state.start <= at && at <= state.end && !state.closed && !broken;
        fits.then(|| self.place(&mut state, at))
    }

    fn place(self: &Arc<Self>, state: &mut State, at: u64) -> Place {
        let id = state.next_reader;
        state.next_reader += 1;
        state.readers.insert(id, at);
        Place {
            flow: Arc::clone(self),
            id,
            at,
        }
    }

    fn held(&self) -> u64 {
        let flows = self.flows.count.load(Ordering::Relaxed).max(1) as u64;
        (self.flows.held / flows).clamp(LEAST, MOST)
    }

    /// Waits until there is room for more. `false`: there is no reader left.
    async fn room(&self, patience: &mut Duration) -> bool {
        loop {
            let taken = self.taken.notified();
            tokio::pin!(taken);
            taken.as_mut().enable();
            let waits_for_one = {
                let mut state = self.state.lock();
                let Some(slowest) = state.slowest() else {
                    state.closed = true;
                    return false;
                };
                let (end, held) = (state.end, self.held());
                let is_behind = |at: u64| end.saturating_sub(at) >= held;
                if !is_behind(slowest) {
                    return true;
                }
                let hungry = state.readers.values().any(|at| *at >= end);
                if hungry && patience.is_zero() {
                    state.readers.retain(|_, at| !is_behind(*at));
                    return true;
                }
                hungry
            };
            let began = Instant::now();
            if waits_for_one {
                let _ = tokio::time::timeout(*patience, taken).await;
                *patience = patience.saturating_sub(began.elapsed());
            } else {
                taken.await;
            }
        }
    }

    /// Adds bytes that have arrived, and drops the oldest.
    fn add(&self, chunks: Vec<Bytes>) {
        let held = self.held();
        let mut state = self.state.lock();
        for chunk in chunks {
            state.end += chunk.len() as u64;
            state.chunks.push_back(chunk);
        }
        let slowest = state.slowest().unwrap_or(state.end);
        while let Some(first) = state.chunks.front() {
            let length = first.len() as u64;
            let rest = state.end - state.start - length;
            // Bytes within bounds may still be read; nobody reads the others, see `room`.
            if rest < held || (state.start + length > slowest && rest < 2 * held) {
                break;
            }
            state.start += length;
            state.chunks.pop_front();
        }
        drop(state);
        self.arrived.notify_waiters();
    }

    /// Nothing more arrives.
    pub fn end(&self, end: End) {
        self.state.lock().ended.get_or_insert(end);
        self.arrived.notify_waiters();
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.flows.count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where a reader is in a flow.
pub struct Place {
    flow: Arc<Flow>,
    id: u64,
    /// Bytes of the blob before the next one.
    pub at: u64,
}

impl Place {
    /// Waits for the next bytes.
    pub async fn next(&mut self) -> Next {
        loop {
            let flow = Arc::clone(&self.flow);
            let arrived = flow.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            if let Some(next) = self.take() {
                return next;
            }
            arrived.await;
        }
    }

    fn take(&mut self) -> Option<Next> {
        let mut state = self.flow.state.lock();
        if self.at < state.start && state.end > state.start {
            return Some(Next::Behind);
        }
        let mut chunk_start = state.start;
        let mut found = None;
        for chunk in &state.chunks {
            let chunk_end = chunk_start + chunk.len() as u64;
            if self.at < chunk_end {
                found = Some(chunk.slice((self.at - chunk_start) as usize..));
                break;
            }
            chunk_start = chunk_end;
        }
        let Some(chunk) = found else {
            return state.ended.clone().map(Next::End);
        };
        self.at += chunk.len() as u64;
        let at = self.at;
        if let Some(place) = state.readers.get_mut(&self.id) {
            *place = at;
        }
        drop(state);
        self.flow.taken.notify_waiters();
        Some(Next::Chunk(chunk))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.flow.state.lock().readers.remove(&self.id);
        self.flow.taken.notify_waiters();
    }
}

/// Fills a flow; keeps nothing of what comes before the first bytes that a reader wants.
pub struct Filling<F> {
    pub flow: Arc<Flow>,
    /// Bytes of the blob before the next chunk.
    pub at: u64,
    /// Called with the bytes of each batch, and the hasher after it.
    pub on_batch: F,
    patience: Duration,
}

impl<F> Filling<F> {
    pub fn new(flow: Arc<Flow>, at: u64, on_batch: F) -> Self {
        Filling {
            flow,
            at,
            on_batch,
            patience: PATIENCE,
        }
    }
}

#[async_trait]
impl<F: Fn(u64, Option<&Hasher>) + Send> Taker for Filling<F> {
    async fn take(&mut self, chunks: Vec<Bytes>, hashed: Option<&Hasher>) -> bool {
        let received = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        (self.on_batch)(received, hashed);
        let start = self.flow.state.lock().start;
        let mut wanted = Vec::with_capacity(chunks.len());
        for mut chunk in chunks {
            let before = start.saturating_sub(self.at).min(chunk.len() as u64);
            self.at += chunk.len() as u64;
            let _ = chunk.split_to(before as usize);
            if !chunk.is_empty() {
                wanted.push(chunk);
            }
        }
        if !self.flow.room(&mut self.patience).await {
            return false;
        }
        self.flow.add(wanted);
        true
    }
}
