//! Work that blocks, kept off the threads that serve connections.

use anyhow::{Result, anyhow};
use tokio::task::JoinError;

/// Runs `work` on a thread that may block, and passes its panic on.
///
/// # Errors
/// The work's own, or that the runtime is shutting down.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    resumed(tokio::task::spawn_blocking(work).await)
}

/// What a task returned. Passes its panic on.
///
/// # Errors
/// The task's own, or that the runtime is shutting down.
pub fn resumed<T>(joined: Result<Result<T>, JoinError>) -> Result<T> {
    match joined {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(anyhow!(error).context("the program is shutting down")),
        },
    }
}
