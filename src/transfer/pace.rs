//! How many connections a transfer uses: more, as long as more make it faster.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// In flight from the start. A connection to S3 carries some 90 MiB/s, so these fill 10 GBit/s.
const FIRST: usize = 20;

/// In flight at most. A transfer's bound on memory usually stops it before.
const MOST: usize = 96;

/// How often the rate is measured: several round trips, so that new connections are up to speed.
const LOOK: Duration = Duration::from_millis(150);

/// A step up that gained less than this was useless.
const WORTH: f64 = 1.05;

/// Measurements ignored after a change, while connections open or close.
const SETTLE: u32 = 1;

/// Measurements between a useless step and the next try: the network may have changed.
const REST: u32 = 30;

/// Decides how many may be in flight. Pure: it is told how fast bytes move.
#[derive(Debug, Clone, PartialEq)]
struct Pace {
    limit: usize,
    most: usize,
    /// Where the latest step up began: the limit and the bytes a second there.
    before: Option<(usize, f64)>,
    /// Looks until the next one that counts.
    rest: u32,
}

impl Pace {
    fn new(first: usize, most: usize) -> Self {
        Pace {
            limit: first.min(most),
            most,
            before: None,
            rest: SETTLE,
        }
    }

    /// Bytes have moved at `rate`; `full` tells whether the limit kept others from moving.
    fn look(&mut self, rate: f64, full: bool) {
        if !full {
            // Something else bounds the rate, so it says nothing about the limit.
            self.before = None;
            return;
        }
        if self.rest > 0 {
            self.rest -= 1;
            return;
        }
        if let Some((limit, before)) = self.before.take()
            && rate < before * WORTH
        {
            self.limit = limit;
            self.rest = REST;
        } else if self.limit < self.most {
            self.before = Some((self.limit, rate));
            self.limit = (self.limit + self.limit.div_ceil(2)).min(self.most);
            self.rest = SETTLE;
        }
    }
}

/// Admits as many as the pace allows, and measures the rate.
pub(super) struct Gate {
    state: Mutex<State>,
    left: Notify,
}

struct State {
    pace: Pace,
    inside: usize,
    /// Since the last look: bytes, and whether anyone had to wait.
    moved: u64,
    full: bool,
    looked: Instant,
}

/// A place inside a [`Gate`], until it is dropped.
pub(super) struct Place<'a>(&'a Gate);

impl Gate {
    /// `most` bounds those inside, however fast they are.
    pub(super) fn new(most: usize) -> Self {
        Gate {
            state: Mutex::new(State {
                pace: Pace::new(FIRST, most.clamp(1, MOST)),
                inside: 0,
                moved: 0,
                full: false,
                looked: Instant::now(),
            }),
            left: Notify::new(),
        }
    }

    /// Waits for a place.
    pub(super) async fn enter(&self) -> Place<'_> {
        loop {
            let left = self.left.notified();
            {
                let mut state = self.state.lock();
                if state.inside < state.pace.limit {
                    state.inside += 1;
                    return Place(self);
                }
                state.full = true;
            }
            left.await;
        }
    }

    /// How many may be inside now, for callers that count for themselves.
    pub(super) fn limit(&self) -> usize {
        self.state.lock().pace.limit
    }

    /// A caller that counts for itself had to wait.
    pub(super) fn note_full(&self) {
        self.state.lock().full = true;
    }

    /// `bytes` have moved.
    pub(super) fn moved(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.moved += bytes;
        let since = state.looked.elapsed();
        if since < LOOK {
            return;
        }
        let rate = state.moved as f64 / since.as_secs_f64();
        let full = state.full;
        let before = state.pace.limit;
        state.pace.look(rate, full);
        (state.moved, state.full, state.looked) = (0, false, Instant::now());
        let more = state.pace.limit > before;
        drop(state);
        if more {
            self.left.notify_waiters();
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.state.lock().inside -= 1;
        self.0.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Measures a line that carries `each` per connection and `all` in total; returns the limit after each
    /// measurement.
    fn on_a_line(each: f64, all: f64, looks: usize) -> Vec<usize> {
        let mut pace = Pace::new(8, 64);
        let look = |_| {
            pace.look((pace.limit as f64 * each).min(all), true);
            pace.limit
        };
        (0..looks).map(look).collect()
    }

    /// A pace that takes the next look seriously.
    fn settled(first: usize, most: usize) -> Pace {
        let mut pace = Pace::new(first, most);
        for _ in 0..SETTLE {
            pace.look(1.0, true);
        }
        pace
    }

    #[test]
    fn connections_are_added_as_long_as_the_line_carries_more() {
        // Every other look is one to settle.
        let limits = [8, 12, 12, 18, 18, 27, 27, 41, 41, 62, 62, 64, 64];
        assert_eq!(on_a_line(90.0, 1e9, 13), limits);
    }

    #[test]
    fn a_step_that_brings_nothing_is_taken_back_and_not_tried_again_soon() {
        let limits = on_a_line(90.0, 90.0 * 14.0, 9 + REST as usize);
        assert_eq!(limits[..8], [8, 12, 12, 18, 18, 27, 27, 18]);
        let resting = &limits[7..8 + REST as usize];
        assert!(resting.iter().all(|&limit| limit == 18));
        assert_eq!(limits[8 + REST as usize], 27);
    }

    #[test]
    fn the_number_stays_where_it_is_while_it_holds_nobody_up() {
        let mut pace = settled(8, 64);
        pace.look(1e6, true);
        for rate in [1e6, 1e9, 1.0] {
            pace.look(rate, false);
        }
        assert_eq!(pace.limit, 12);
        // A rate measured long ago says nothing.
        pace.look(1.0, true);
        pace.look(1.0, true);
        assert_eq!(pace.limit, 18);
    }

    #[test]
    fn a_bound_below_the_first_number_holds_from_the_start() {
        let mut pace = settled(8, 3);
        assert_eq!(pace.limit, 3);
        pace.look(1.0, true);
        assert_eq!(pace.limit, 3);
    }

    #[tokio::test]
    async fn a_task_that_waits_at_a_full_gate_enters_when_another_leaves() {
        let gate = Gate::new(1);
        let place = gate.enter().await;
        let entering = gate.enter();
        tokio::pin!(entering);
        assert!(futures::poll!(&mut entering).is_pending());
        drop(place);
        assert!(futures::poll!(&mut entering).is_ready());
        assert!(gate.state.lock().full);
    }
}
