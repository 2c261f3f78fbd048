//! Whether a failed try is worth another, and after how long.

use std::time::Duration;

use crate::config::RetryMode;

/// Shared by every request of a run.
pub struct RetryPolicy;

/// The tries of one operation.
pub struct Tries<'a> {
    _policy: &'a RetryPolicy,
}

/// What was wrong with a try that may be worth repeating.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trouble {
    /// The store asked us to slow down.
    pub throttled: bool,
    /// The store said how long to wait.
    pub retry_after: Option<Duration>,
}

impl RetryPolicy {
    /// `max_attempts` counts the first try.
    pub fn new(mode: RetryMode, max_attempts: u32) -> Self {
        let _ = (mode, max_attempts);
        todo!()
    }

    /// Begins an operation.
    pub fn tries(&self) -> Tries<'_> {
        todo!()
    }
}

impl Tries<'_> {
    /// Waits until a try may be sent: at once, unless `adaptive` mode is holding requests back.
    pub async fn permit(&mut self) {
        todo!()
    }

    /// A try failed in a way that may pass. Waits, then true; or false at once if the attempts or
    /// the run's budget are used up.
    pub async fn again(&mut self, trouble: Trouble) -> bool {
        let _ = trouble;
        todo!()
    }

    /// The operation came along: gives budget back, and counts attempts from one again.
    pub fn progressed(&mut self) {
        todo!()
    }

    /// Tries made so far.
    pub fn made(&self) -> u32 {
        todo!()
    }
}
