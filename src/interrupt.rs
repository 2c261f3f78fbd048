//! SIGINT, SIGTERM and SIGHUP. The first one ends the work in order; the second one, and any after the
//! work is done, ends the process at once, whatever it is waiting for.

use std::future::Future;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level};
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

const SIGNALS: [i32; 3] = [SIGINT, SIGTERM, SIGHUP];

/// The run was stopped by a signal.
#[derive(Debug)]
pub struct Interrupted {
    /// Its number.
    pub signal: i32,
}

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted: run the command again to finish")
    }
}

impl std::error::Error for Interrupted {}

/// Handles the signals of one run. Once it is dropped they are ignored: signal-hook does not bring the
/// default action back.
pub struct Signals {
    /// Whether the next signal ends the process.
    armed: Arc<AtomicBool>,
    /// The signal that arrived; 0 for none.
    arrived: Arc<AtomicUsize>,
    /// Readable once one has.
    wake: UnixStream,
    handlers: Vec<SigId>,
}

impl Signals {
    /// Starts to handle signals.
    ///
    /// # Errors
    /// The system's.
    pub fn listen() -> Result<Self> {
        let (wake, waker) = UnixStream::pair().context("preparing for signals")?;
        wake.set_nonblocking(true)
            .context("preparing for signals")?;
        let mut signals = Signals {
            armed: Arc::default(),
            arrived: Arc::default(),
            wake,
            handlers: Vec::new(),
        };
        // A shell ignores SIGINT for background jobs, and nohup ignores SIGHUP: they mean it.
        for signal in SIGNALS.into_iter().filter(|signal| !is_ignored(*signal)) {
            signals
                .handle(signal, &waker)
                .with_context(|| format!("listening for signal {signal}"))?;
        }
        Ok(signals)
    }

    /// The handlers of a signal run in the order of their registration.
    fn handle(&mut self, signal: i32, waker: &UnixStream) -> std::io::Result<()> {
        let (armed, arrived) = (Arc::clone(&self.armed), Arc::clone(&self.arrived));
        let second = flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&armed))?;
        self.handlers.push(second);
        let value = usize::try_from(signal).unwrap_or_default();
        self.handlers
            .push(flag::register_usize(signal, arrived, value)?);
        self.handlers.push(flag::register(signal, armed)?);
        let waker = waker.try_clone()?;
        self.handlers
            .push(low_level::pipe::register(signal, waker)?);
        Ok(())
    }

    /// Tells the work when a signal arrives. To be called on the runtime that does the work.
    ///
    /// # Errors
    /// The system's.
    pub fn interrupt(&self) -> Result<Interrupt> {
        let wake = self.wake.try_clone().context("preparing for signals")?;
        let mut wake = tokio::net::UnixStream::from_std(wake).context("preparing for signals")?;
        let arrived = Arc::clone(&self.arrived);
        let (sender, receiver) = watch::channel(0);
        tokio::spawn(async move {
            let _ = wake.read_u8().await;
            let signal = arrived.load(Ordering::SeqCst);
            let _ = sender.send(i32::try_from(signal).unwrap_or_default());
            // Dropped, the sender would look like the end of all signals.
            sender.closed().await;
        });
        Ok(Interrupt { signal: receiver })
    }

    /// The work is done: the next signal ends the process, even if its output is stuck.
    pub fn work_is_done(&self) {
        self.armed.store(true, Ordering::SeqCst);
    }
}

fn is_ignored(signal: i32) -> bool {
    // SAFETY: with no new action, sigaction only writes the current one to `action`, which is plain data.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            low_level::unregister(handler);
        }
    }
}

/// Tells the work that a signal arrived.
#[derive(Clone)]
pub struct Interrupt {
    signal: watch::Receiver<i32>,
}

impl Interrupt {
    /// A signal that never comes.
    pub fn never() -> Self {
        Interrupt {
            signal: watch::channel(0).1,
        }
    }

    /// Whether a signal has arrived.
    pub fn happened(&self) -> bool {
        *self.signal.borrow() != 0
    }

    /// Waits for a signal; returns its number.
    pub async fn arrives(&self) -> i32 {
        let mut signal = self.signal.clone();
        let arrived = signal.wait_for(|signal| *signal != 0).await;
        match arrived.map(|signal| *signal) {
            Ok(signal) => signal,
            // Nobody is left to send one.
            Err(_) => std::future::pending().await,
        }
    }

    /// Does `work`, or drops it wherever it is when a signal arrives.
    ///
    /// # Errors
    /// The work's own, or [`Interrupted`].
    pub async fn or<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            signal = self.arrives() => Err(Interrupted { signal }.into()),
            done = work => done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_starts_without_a_signal_seen() {
        for _ in 0..2 {
            let signals = Signals::listen().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let interrupt = signals.interrupt().unwrap();
                assert!(!interrupt.happened());
                low_level::raise(SIGHUP).unwrap();
                let stopped = interrupt.or(std::future::pending::<Result<()>>()).await;
                let stopped = stopped.unwrap_err();
                let Interrupted { signal } = stopped.downcast_ref().unwrap();
                assert_eq!(*signal, SIGHUP);
            });
        }
    }
}
