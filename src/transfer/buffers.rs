//! One bound on the bytes in flight, however many blobs there are and however large; a pool of buffers,
//! so that chunks need no allocation; and a channel from whoever fills buffers to whoever empties them.

use std::sync::Arc;

use bytes::Bytes;
use futures::channel::mpsc;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Buffers are accounted in units of this many bytes: a semaphore counts in `u32`.
const UNIT: u64 = 4 << 10;

/// Bytes of the largest buffer. Larger reads take several, so that every buffer fits the next taker.
pub const BUFFER: u64 = 256 << 10;

/// Cheap to clone; all clones share the bound.
#[derive(Clone)]
pub struct Buffers {
    budget: Arc<Semaphore>,
    capacity: u32,
    free: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// Room for some bytes, given back when the last clone is dropped.
#[derive(Clone)]
pub struct Room {
    permit: Arc<OwnedSemaphorePermit>,
}

/// A filled buffer that returns to the pool when its last reader is done.
struct Lent {
    bytes: Vec<u8>,
    pool: Buffers,
    _room: Room,
}

impl Room {
    /// Gives back what is more than room for `bytes`, unless there are clones.
    pub fn shrink(&mut self, bytes: u64) {
        if let Some(permit) = Arc::get_mut(&mut self.permit) {
            let more = permit.num_permits().saturating_sub(units(bytes) as usize);
            drop(permit.split(more));
        }
    }

    /// Takes room for `bytes` out of it, or all that is left. `None`: there are clones.
    fn split(&mut self, bytes: u64) -> Option<Room> {
        let permit = Arc::get_mut(&mut self.permit)?;
        let wanted = (units(bytes) as usize).min(permit.num_permits());
        let permit = Arc::new(permit.split(wanted)?);
        Some(Room { permit })
    }
}

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut free = self.pool.free.lock();
        // As many as can be filled at once.
        if (free.len() as u64) < u64::from(self.pool.capacity) * UNIT / BUFFER {
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}

impl Buffers {
    /// A pool that lends at most `budget` bytes at once.
    pub fn new(budget: u64) -> Self {
        let capacity = u32::try_from(budget.div_ceil(UNIT))
            .unwrap_or(u32::MAX >> 3)
            .max(1);
        Buffers {
            budget: Arc::new(Semaphore::new(capacity as usize)),
            capacity,
            free: Arc::default(),
        }
    }

    /// The same pool, with a bound of its own.
    pub fn beside(&self, budget: u64) -> Self {
        Buffers {
            free: Arc::clone(&self.free),
            ..Buffers::new(budget)
        }
    }

    /// Waits for room for `bytes`, in the order of asking. More than the whole bound counts as the
    /// whole bound, so that one huge part is slow and not stuck.
    pub async fn room(&self, bytes: u64) -> Room {
        let units = units(bytes).clamp(1, self.capacity);
        let permit = Arc::clone(&self.budget).acquire_many_owned(units).await;
        Room {
            permit: Arc::new(permit.expect("the budget's semaphore is never closed")),
        }
    }

    /// An empty buffer that can hold `capacity` bytes.
    pub fn take(&self, capacity: usize) -> Vec<u8> {
        let mut free = self.free.lock();
        let fits = free.iter().position(|kept| kept.capacity() >= capacity);
        let reused = fits.map(|fits| free.swap_remove(fits));
        drop(free);
        let mut buffer = reused.unwrap_or_else(|| Vec::with_capacity(capacity));
        buffer.clear();
        buffer
    }

    /// The two ends of a channel for chunks that fit into `room`. It closes with the outlet.
    pub fn outlet(&self, room: Room) -> (Outlet, mpsc::UnboundedReceiver<Bytes>) {
        let (chunks, passed) = mpsc::unbounded();
        let outlet = Outlet {
            pool: self.clone(),
            room,
            chunks,
        };
        (outlet, passed)
    }
}

/// Where chunks go that have been read and hashed.
pub struct Outlet {
    pool: Buffers,
    room: Room,
    chunks: mpsc::UnboundedSender<Bytes>,
}

impl Outlet {
    /// An empty buffer for a chunk of at most `capacity` bytes.
    pub fn take(&self, capacity: usize) -> Vec<u8> {
        self.pool.take(capacity)
    }

    /// Shares a filled buffer; it comes back when the last clone of its bytes is dropped, and with it
    /// its share of the room.
    pub fn lend(&mut self, bytes: Vec<u8>) -> Bytes {
        let share = self.room.split(bytes.len() as u64);
        Bytes::from_owner(Lent {
            bytes,
            pool: self.pool.clone(),
            _room: share.unwrap_or_else(|| self.room.clone()),
        })
    }

    /// Passes a chunk on. It is dropped if nobody waits for it any more.
    pub fn pass(&self, chunk: Bytes) {
        let _ = self.chunks.unbounded_send(chunk);
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn each_buffers_room_comes_back_when_its_last_reader_is_gone() {
        let buffers = Buffers::new(12 << 10);
        let room = buffers.room(12 << 10).await;
        let (mut outlet, mut passed) = buffers.outlet(room);
        for filled in [vec![7; 3], vec![8; 5000]] {
            let chunk = outlet.lend(filled);
            outlet.pass(chunk);
        }
        assert_eq!(buffers.budget.available_permits(), 0);
        let (first, second) = (passed.next().await, passed.next().await);
        drop(first);
        assert_eq!(buffers.budget.available_permits(), 1);
        let clone = second.clone();
        drop(second);
        assert_eq!(buffers.budget.available_permits(), 1);
        drop(clone);
        assert_eq!(buffers.budget.available_permits(), 3);
    }

    #[tokio::test]
    async fn room_that_shrinks_comes_back_in_part() {
        let buffers = Buffers::new(16 << 10);
        let mut room = buffers.room(16 << 10).await;
        room.shrink(5 << 10);
        assert_eq!(buffers.budget.available_permits(), 2);
        room.shrink(16 << 10);
        assert_eq!(buffers.budget.available_permits(), 2);
        let clone = room.clone();
        room.shrink(1);
        assert_eq!(buffers.budget.available_permits(), 2);
        drop((room, clone));
        assert_eq!(buffers.budget.available_permits(), 4);
    }

    #[tokio::test]
    async fn a_part_larger_than_the_bound_gets_the_whole_of_it() {
        let buffers = Buffers::new(8 << 10);
        let _room = buffers.room(u64::MAX).await;
        assert_eq!(buffers.budget.available_permits(), 0);
    }
}
