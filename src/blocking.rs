//! Work that blocks, kept off the threads that serve connections.

use anyhow::{Result, anyhow};

/// Runs `work` on a thread that may block, and passes its panic on.
///
/// # Errors
/// The work's own, or that the runtime is shutting down.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(anyhow!(error).context("the program is shutting down")),
        },
    }
}
