//! Timeouts, and the pace of retries.

use std::time::Duration;

use crate::retry;

/// The defaults suit a network; tests on loopback shorten them.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// For a TCP connection.
    pub connect: Duration,
    /// For a connection with DNS, proxy and TLS.
    pub ready: Duration,
    /// Without a byte in either direction.
    pub idle: Duration,
    /// The same for copies and completions, where the store works before it responds.
    pub idle_at_work: Duration,
    /// From the last byte sent until the response's headers are complete, however they drip. For copies
    /// and completions it is [`idle_at_work`](Self::idle_at_work).
    pub headers: Duration,
    /// For a whole response in memory, however it drips: S3 may send white space for as long while it
    /// assembles parts.
    pub answer: Duration,
    /// A download that brings almost nothing in this much waiting is abandoned.
    pub patience: Duration,
    /// Where the backoff between tries begins.
    pub backoff: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            connect: Duration::from_secs(10),
            ready: Duration::from_secs(20),
            idle: Duration::from_secs(30),
            idle_at_work: Duration::from_secs(300),
            headers: Duration::from_secs(60),
            answer: Duration::from_secs(900),
            patience: Duration::from_secs(60),
            backoff: retry::BASE,
        }
    }
}
