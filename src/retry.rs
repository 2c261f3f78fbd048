//! Whether to retry, and after how long.
//!
//! The scheme is that of the AWS SDKs: exponential backoff with full jitter, a budget of tokens
//! that every request of the run draws its retries from (so that a store in trouble is not hit
//! three times as hard), and in `adaptive` mode a rate limit of our own once the store throttles.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use tokio::time::Instant;

use crate::config::RetryMode;

/// Where the backoff starts.
pub const BASE: Duration = Duration::from_secs(1);
/// Where the backoff stops growing.
const LONGEST_BACKOFF: Duration = Duration::from_secs(20);
/// The longest Retry-After that we honour.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);

const BUDGET: u32 = 500;
const RETRY_COST: u32 = 5;
const TIMEOUT_COST: u32 = 10;

/// A refused connection is tried again for this many times the base, whatever the attempts: a service
/// container may still be starting.
const REFUSED: u32 = 10;

/// Many requests fail alike at once: the same report is not repeated within this time.
const REPORT_STANDS: Duration = Duration::from_secs(5);

/// Shared by every request of a run: clones share one budget.
#[derive(Clone)]
pub struct RetryPolicy(Arc<Policy>);

struct Policy {
    mode: RetryMode,
    max_attempts: u32,
    base: Duration,
    budget: Mutex<u32>,
    rate: Mutex<Rate>,
    report: Box<dyn Fn(&str) + Send + Sync>,
    reported: Mutex<Vec<(Instant, String)>>,
}

/// The tries of one operation.
pub struct Tries {
    policy: RetryPolicy,
    made: u32,
    /// What the last retry cost; returned if it succeeds.
    cost: u32,
    /// When the connection was first refused.
    refused: Option<Instant>,
    /// The run's budget had nothing left for another try.
    over_budget: bool,
}

/// What kind of transient failure a try met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Trouble {
    /// The store asked us to slow down.
    pub throttled: bool,
    /// The store said how long to wait.
    pub retry_after: Option<Duration>,
    /// A timeout; its retry costs the budget double.
    pub timed_out: bool,
    /// The connection was refused; its retry is free, as it puts no load on the store.
    pub refused: bool,
}

impl RetryPolicy {
    /// `max_attempts` counts the first try; the backoff starts at `base`. Each retry is passed to
    /// `report` in words, before the wait.
    pub fn new(
        mode: RetryMode,
        max_attempts: u32,
        base: Duration,
        report: impl Fn(&str) + Send + Sync + 'static,
    ) -> Self {
        RetryPolicy(Arc::new(Policy {
            mode,
            max_attempts: max_attempts.max(1),
            base,
            budget: Mutex::new(BUDGET),
            rate: Mutex::new(Rate::new(Instant::now())),
            report: Box::new(report),
            reported: Mutex::default(),
        }))
    }

    /// Begins an operation.
    pub fn tries(&self) -> Tries {
        Tries {
            policy: self.clone(),
            made: 1,
            cost: 0,
            refused: None,
            over_budget: false,
        }
    }

    /// Takes `cost` from the run's budget, if it is there.
    fn spend(&self, cost: u32) -> bool {
        let mut budget = self.0.budget.lock();
        match budget.checked_sub(cost) {
            Some(left) => {
                *budget = left;
                true
            }
            None => false,
        }
    }

    fn earn(&self, tokens: u32) {
        let mut budget = self.0.budget.lock();
        *budget = budget.saturating_add(tokens).min(BUDGET);
    }

    /// A random time up to the backoff that is due after `made` tries.
    fn backoff(&self, made: u32) -> Duration {
        let doubled = 1u32.checked_shl(made.saturating_sub(1)).unwrap_or(u32::MAX);
        let most = self.0.base.saturating_mul(doubled).min(LONGEST_BACKOFF);
        most.mul_f64(rand::rng().random_range(0.0..=1.0))
    }

    /// Reports `text`, unless the `same` was said a moment ago.
    fn report(&self, same: &str, text: &str) {
        {
            let mut reported = self.0.reported.lock();
            reported.retain(|(at, _)| at.elapsed() < REPORT_STANDS);
            if reported.iter().any(|(_, said)| said == same) {
                return;
            }
            reported.push((Instant::now(), same.to_owned()));
        }
        (self.0.report)(text);
    }
}

impl Tries {
    /// Waits until a try may be sent: at once, unless `adaptive` mode is holding requests back.
    pub async fn permit(&mut self) {
        if self.policy.0.mode != RetryMode::Adaptive {
            return;
        }
        loop {
            let wait = self.policy.0.rate.lock().take(Instant::now());
            if wait.is_zero() {
                return;
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// A try failed because of `why`. Reports it, waits and returns true; or returns false at once if
    /// the attempts or the run's budget are used up.
    pub async fn again(&mut self, trouble: Trouble, why: &str) -> bool {
        if self.policy.0.mode == RetryMode::Adaptive {
            self.policy
                .0
                .rate
                .lock()
                .answered(Instant::now(), trouble.throttled);
        }
        let patience = self.patience(trouble);
        if self.made >= self.policy.0.max_attempts && patience.is_none() {
            return false;
        }
        let cost = match trouble {
            _ if patience.is_some() => 0,
            Trouble {
                timed_out: true, ..
            } => TIMEOUT_COST,
            _ => RETRY_COST,
        };
        self.over_budget = !self.policy.spend(cost);
        if self.over_budget {
            return false;
        }
        self.cost = cost;
        let next = self.made.saturating_add(1);
        let wait = match patience {
            Some(left) => {
                let left = left.as_secs_f64().ceil();
                // The time that is left differs each time.
                self.policy
                    .report(why, &format!("{why}, trying again for up to {left} s"));
                self.policy.backoff(1)
            }
            None => {
                let most = self.policy.0.max_attempts;
                let text = format!("{why}, trying again ({next} of {most})");
                self.policy.report(&text, &text);
                let asked = trouble.retry_after.unwrap_or_default();
                self.policy
                    .backoff(self.made)
                    .max(asked.min(LONGEST_RETRY_AFTER))
            }
        };
        tokio::time::sleep(wait).await;
        self.made = next;
        true
    }

    /// How much longer to retry a refused connection. `None`: it was not refused, the time is up, or the
    /// user wants no retries.
    fn patience(&mut self, trouble: Trouble) -> Option<Duration> {
        if !trouble.refused || self.policy.0.max_attempts == 1 {
            return None;
        }
        let since = *self.refused.get_or_insert_with(Instant::now);
        let left = (self.policy.0.base * REFUSED).checked_sub(since.elapsed())?;
        (!left.is_zero()).then_some(left)
    }

    /// The operation made progress: gives budget back, and counts attempts from one again.
    pub fn progressed(&mut self) {
        self.policy.earn(self.cost.max(1));
        if self.policy.0.mode == RetryMode::Adaptive {
            self.policy.0.rate.lock().answered(Instant::now(), false);
        }
        self.cost = 0;
        self.made = 1;
        self.refused = None;
        self.over_budget = false;
    }

    /// How many tries there were, if more than one, and whether the budget ended them.
    pub fn summary(&self) -> Option<String> {
        let tries = match self.made {
            1 => "1 try".to_owned(),
            made => format!("{made} tries"),
        };
        if self.over_budget {
            let why = "the run's budget of retries is used up";
            return Some(format!("{tries}; {why}"));
        }
        (self.made > 1).then_some(tries)
    }

    /// Tries made so far, the one under way included.
    pub fn made(&self) -> u32 {
        self.made
    }
}

/// How far the rate falls when the store throttles.
const BETA: f64 = 0.7;
/// How fast it climbs again.
const SCALE: f64 = 0.4;
/// How much the newest half second counts in the measured rate.
const SMOOTH: f64 = 0.8;
/// The rate never falls below this many requests a second.
const SLOWEST: f64 = 0.5;

/// The SDKs' client-side rate limit: a token bucket whose rate follows CUBIC, as TCP's does.
struct Rate {
    start: Instant,
    /// Holds requests back only once the store has throttled.
    engaged: bool,
    tokens: f64,
    per_second: f64,
    capacity: f64,
    refilled: f64,
    measured: f64,
    counted: u32,
    bucket: f64,
    last_max: f64,
    throttled_at: f64,
}

impl Rate {
    fn new(start: Instant) -> Self {
        Rate {
            start,
            engaged: false,
            tokens: 0.0,
            per_second: 0.0,
            capacity: 0.0,
            refilled: 0.0,
            measured: 0.0,
            counted: 0,
            bucket: 0.0,
            last_max: 0.0,
            throttled_at: 0.0,
        }
    }

    fn seconds(&self, now: Instant) -> f64 {
        now.saturating_duration_since(self.start).as_secs_f64()
    }

    /// Takes a token, or says how long until there is one.
    fn take(&mut self, now: Instant) -> Duration {
        if !self.engaged {
            return Duration::ZERO;
        }
        self.refill(self.seconds(now));
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Duration::ZERO;
        }
        let missing = (1.0 - self.tokens) / self.per_second.max(SLOWEST);
        // Rounded up, or the sleeper would wake a moment before its token is there.
        Duration::from_secs_f64(missing) + Duration::from_millis(1)
    }

    fn refill(&mut self, now: f64) {
        let passed = (now - self.refilled).max(0.0);
        self.tokens = (self.tokens + passed * self.per_second).min(self.capacity);
        self.refilled = now;
    }

    /// Adjusts the rate after a response or a failure.
    fn answered(&mut self, now: Instant, throttled: bool) {
        let now = self.seconds(now);
        self.measure(now);
        let rate = if throttled {
            let rate = if self.engaged {
                self.measured.min(self.per_second)
            } else {
                self.measured
            };
            self.last_max = rate;
            self.throttled_at = now;
            self.engaged = true;
            rate * BETA
        } else {
            let window = (self.last_max * (1.0 - BETA) / SCALE).cbrt();
            let passed = now - self.throttled_at;
            SCALE * (passed - window).powi(3) + self.last_max
        };
        if !self.engaged {
            return;
        }
        self.refill(now);
        self.per_second = rate.min(2.0 * self.measured).max(SLOWEST);
        self.capacity = self.per_second.max(1.0);
        self.tokens = self.tokens.min(self.capacity);
    }

    /// Requests a second, smoothed over half seconds.
    fn measure(&mut self, now: f64) {
        let bucket = (now * 2.0).floor() / 2.0;
        self.counted = self.counted.saturating_add(1);
        if bucket > self.bucket {
            let current = f64::from(self.counted) / (bucket - self.bucket);
            self.measured = current * SMOOTH + self.measured * (1.0 - SMOOTH);
            self.counted = 0;
            self.bucket = bucket;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TROUBLE: Trouble = Trouble {
        throttled: false,
        retry_after: None,
        timed_out: false,
        refused: false,
    };

    fn retries(mode: RetryMode, max_attempts: u32) -> RetryPolicy {
        RetryPolicy::new(mode, max_attempts, BASE, |_| {})
    }

    #[tokio::test(start_paused = true)]
    async fn max_attempts_counts_the_first_try() {
        let policy = retries(RetryMode::Standard, 3);
        let mut tries = policy.tries();
        assert!(tries.again(TROUBLE, "why").await);
        assert!(tries.again(TROUBLE, "why").await);
        assert_eq!(tries.made(), 3);
        assert!(!tries.again(TROUBLE, "why").await);
        assert!(
            !retries(RetryMode::Standard, 1)
                .tries()
                .again(TROUBLE, "why")
                .await
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_backoff_doubles_up_to_twenty_seconds() {
        let policy = retries(RetryMode::Standard, 100);
        for (made, most) in [
            (1, 1000),
            (2, 2000),
            (5, 16_000),
            (6, 20_000),
            (33, 20_000),
            (u32::MAX, 20_000),
        ] {
            for _ in 0..50 {
                assert!(policy.backoff(made) <= Duration::from_millis(most));
            }
        }
        // Jitter is full: a hundred waits are neither all short nor all long.
        let waits: Vec<_> = (0..100).map(|_| policy.backoff(5)).collect();
        assert!(waits.iter().any(|wait| *wait < Duration::from_secs(8)));
        assert!(waits.iter().any(|wait| *wait > Duration::from_secs(8)));
    }

    #[tokio::test(start_paused = true)]
    async fn retry_after_is_waited_for_but_no_longer_than_a_minute() {
        let policy = retries(RetryMode::Standard, 10);
        for (asked, waited) in [(7, 7), (60, 60), (86_400, 60)] {
            let mut tries = policy.tries();
            let before = Instant::now();
            assert!(
                tries
                    .again(
                        Trouble {
                            retry_after: Some(Duration::from_secs(asked)),
                            ..TROUBLE
                        },
                        "why"
                    )
                    .await
            );
            assert_eq!(before.elapsed().as_secs(), waited);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_run_s_budget_ends_the_retries_of_all_and_success_refills_it() {
        let policy = retries(RetryMode::Standard, u32::MAX);
        let mut tries = policy.tries();
        for _ in 0..BUDGET / RETRY_COST {
            assert!(tries.again(TROUBLE, "why").await);
        }
        assert!(!tries.again(TROUBLE, "why").await);
        assert!(!policy.tries().again(TROUBLE, "why").await);

        // The retry that worked gives its own cost back.
        tries.progressed();
        assert_eq!(tries.made(), 1);
        assert!(tries.again(TROUBLE, "why").await);
        assert!(!tries.again(TROUBLE, "why").await);

        // A first try that worked gives one token.
        for _ in 0..RETRY_COST {
            policy.tries().progressed();
        }
        assert!(policy.tries().again(TROUBLE, "why").await);
    }

    #[tokio::test(start_paused = true)]
    async fn the_summary_says_how_many_tries_there_were_and_whether_the_budget_ended_them() {
        let policy = retries(RetryMode::Standard, 3);
        let mut tries = policy.tries();
        assert_eq!(tries.summary(), None);
        while tries.again(TROUBLE, "why").await {}
        assert_eq!(tries.summary().as_deref(), Some("3 tries"));

        assert!(policy.spend(BUDGET - 3 * RETRY_COST));
        let over = "the run's budget of retries is used up";
        let mut tries = policy.tries();
        while tries.again(TROUBLE, "why").await {}
        assert_eq!(tries.summary(), Some(format!("2 tries; {over}")));
        let mut late = policy.tries();
        assert!(!late.again(TROUBLE, "why").await);
        assert_eq!(late.summary(), Some(format!("1 try; {over}")));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_connection_is_tried_again_for_ten_seconds_at_no_cost() {
        let refused = Trouble {
            refused: true,
            ..TROUBLE
        };
        let policy = retries(RetryMode::Standard, 2);
        let before = Instant::now();
        let mut tries = policy.tries();
        while tries.again(refused, "why").await {}
        assert!((10..=13).contains(&before.elapsed().as_secs()));
        assert!(tries.made() > 5, "{}", tries.made());
        assert_eq!(*policy.0.budget.lock(), BUDGET);

        let policy = retries(RetryMode::Standard, 1);
        assert!(!policy.tries().again(refused, "why").await);
    }

    #[tokio::test(start_paused = true)]
    async fn each_retry_is_reported_but_not_alike_for_many_requests_at_once() {
        let reports: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = Arc::clone(&reports);
        let policy = RetryPolicy::new(RetryMode::Standard, 3, BASE, move |text| {
            log.lock().push(text.to_owned());
        });
        let why = "no answer from s3.example:443 after 30 s";
        let tries = (0..100).map(|_| async {
            let mut tries = policy.tries();
            while tries.again(TROUBLE, why).await {}
        });
        policy.earn(BUDGET);
        futures::future::join_all(tries.take(40)).await;
        let expected = [
            "no answer from s3.example:443 after 30 s, trying again (2 of 3)",
            "no answer from s3.example:443 after 30 s, trying again (3 of 3)",
        ];
        assert_eq!(*reports.lock(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_connection_is_reported_at_first_and_then_every_five_seconds() {
        let reports: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = Arc::clone(&reports);
        let policy = RetryPolicy::new(RetryMode::Standard, 2, BASE, move |text| {
            log.lock().push(text.to_owned());
        });
        let refused = Trouble {
            refused: true,
            ..TROUBLE
        };
        let mut tries = policy.tries();
        while tries.again(refused, "why").await {}
        let reports = reports.lock();
        assert_eq!(reports[0], "why, trying again for up to 10 s");
        // After the time is up, the attempts count.
        let about_time = reports.iter().filter(|text| text.contains("for up to"));
        assert_eq!(about_time.count(), 2, "{reports:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_timeout_costs_double() {
        let policy = retries(RetryMode::Standard, u32::MAX);
        let mut tries = policy.tries();
        let slow = Trouble {
            timed_out: true,
            ..TROUBLE
        };
        for _ in 0..BUDGET / TIMEOUT_COST {
            assert!(tries.again(slow, "why").await);
        }
        assert!(!tries.again(slow, "why").await);
    }

    #[tokio::test(start_paused = true)]
    async fn adaptive_holds_requests_back_only_after_throttling_and_then_recovers() {
        let policy = retries(RetryMode::Adaptive, 100);
        let mut tries = policy.tries();
        let before = Instant::now();
        for _ in 0..1000 {
            tries.permit().await;
            tries.progressed();
        }
        assert_eq!(before.elapsed(), Duration::ZERO);

        // Twenty requests a second, then the store throttles.
        let base = Duration::from_millis(100);
        let policy = RetryPolicy::new(RetryMode::Adaptive, 100, base, |_| {});
        let mut tries = policy.tries();
        for _ in 0..40 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            tries.permit().await;
            tries.progressed();
        }
        tries
            .again(
                Trouble {
                    throttled: true,
                    ..TROUBLE
                },
                "why",
            )
            .await;
        let limited = policy.0.rate.lock().per_second;
        assert!((SLOWEST..20.0).contains(&limited), "{limited}");
        let before = Instant::now();
        for _ in 0..10 {
            tries.permit().await;
        }
        assert!(before.elapsed() > Duration::from_millis(300));

        // Quiet times let the rate climb past where it was.
        for _ in 0..400 {
            tries.permit().await;
            tries.progressed();
        }
        assert!(policy.0.rate.lock().per_second > limited);
    }

    #[tokio::test(start_paused = true)]
    async fn standard_never_holds_requests_back() {
        let policy = RetryPolicy::new(RetryMode::Standard, 100, Duration::ZERO, |_| {});
        let mut tries = policy.tries();
        let before = Instant::now();
        for _ in 0..20 {
            tries
                .again(
                    Trouble {
                        throttled: true,
                        ..TROUBLE
                    },
                    "why",
                )
                .await;
            tries.permit().await;
        }
        assert_eq!(before.elapsed(), Duration::ZERO);
    }
}
