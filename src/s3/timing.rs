//! How long to wait, for what.

use std::time::Duration;

use crate::retry;

/// The timeouts of a store's requests and the pace of their retries. The defaults are for the
/// network; on loopback, faults can be found out sooner.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// For a TCP connection to come about.
    pub connect: Duration,
    /// For the same with DNS, proxy and TLS: until a request can be sent.
    pub ready: Duration,
    /// No byte either way for so long, and a connection is given up.
    pub idle: Duration,
    /// The same where the store works before it answers: copies, and putting parts together.
    pub idle_at_work: Duration,
    /// From the last byte sent, an answer's headers take no longer than this to be complete, however
    /// they drip. Where the store works before it answers, [`idle_at_work`](Self::idle_at_work) does.
    pub headers: Duration,
    /// An answer in memory takes no longer than this to arrive, however it drips: as long as S3 may
    /// send white space while it puts parts together.
    pub answer: Duration,
    /// A download that brings next to nothing in so much waiting is given up.
    pub patience: Duration,
    /// Where the backoff between tries starts.
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
