//! SIGINT and SIGTERM: they end the work in order, and the second one ends the process at once.

use std::future::Future;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context, Result};
use tokio::sync::watch;

/// The run was stopped by a signal.
#[derive(Debug)]
pub struct Interrupted {
    /// SIGINT or SIGTERM.
    pub signal: i32,
}

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted: run the command again to finish")
    }
}

impl std::error::Error for Interrupted {}

/// Tells the work that a signal came.
#[derive(Clone)]
pub struct Interrupt {
    signal: watch::Receiver<i32>,
}

impl Interrupt {
    /// One that never comes.
    pub fn never() -> Self {
        Interrupt {
            signal: watch::channel(0).1,
        }
    }

    /// Listens for SIGINT and SIGTERM. The second one does not wait for anything.
    pub fn listen() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        static SEEN: AtomicI32 = AtomicI32::new(0);
        let (sender, receiver) = watch::channel(0);
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        tokio::spawn(async move {
            loop {
                let came = tokio::select! {
                    _ = interrupt.recv() => libc::SIGINT,
                    _ = terminate.recv() => libc::SIGTERM,
                };
                if SEEN.swap(came, Ordering::SeqCst) != 0 {
                    std::process::exit(128 + came);
                }
                let _ = sender.send(came);
            }
        });
        Ok(Interrupt { signal: receiver })
    }

    /// Whether a signal has come.
    pub fn happened(&self) -> bool {
        *self.signal.borrow() != 0
    }

    /// Does `work`, or drops it where it stands when a signal comes.
    ///
    /// # Errors
    /// The work's own, or [`Interrupted`].
    pub async fn or<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut signal = self.signal.clone();
        tokio::select! {
            biased;
            signal = async {
                let came = signal.wait_for(|signal| *signal != 0).await.map(|signal| *signal);
                match came {
                    Ok(signal) => signal,
                    // Nobody is left to send one.
                    Err(_) => std::future::pending().await,
                }
            } => Err(Interrupted { signal }.into()),
            done = work => done,
        }
    }
}
