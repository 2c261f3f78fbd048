//! The first connection to a store, begun before the first request needs it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tower_service::Service;

/// The server may be about to close an older one.
const FRESH: Duration = Duration::from_secs(5);

/// A connector whose first connection is ready or in progress.
#[derive(Clone)]
pub(super) struct Early<C: Service<Uri>> {
    connector: C,
    first: Arc<Mutex<Option<First<C>>>>,
}

struct First<C: Service<Uri>> {
    begun: Instant,
    connecting: JoinHandle<Result<C::Response, C::Error>>,
}

impl<C> Early<C>
where
    C: Service<Uri> + Clone + Send + 'static,
    C::Response: Send,
    C::Error: Send,
    C::Future: Send,
{
    /// Connects to `to` in the background.
    pub(super) fn begin(connector: C, to: Uri) -> Self {
        let mut first = connector.clone();
        let connecting = tokio::spawn(async move {
            std::future::poll_fn(|cx| first.poll_ready(cx)).await?;
            first.call(to).await
        });
        let begun = Instant::now();
        Early {
            connector,
            first: Arc::new(Mutex::new(Some(First { begun, connecting }))),
        }
    }
}

impl<C> Service<Uri> for Early<C>
where
    C: Service<Uri> + Clone + Send + 'static,
    C::Response: Send,
    C::Error: Send,
    C::Future: Send,
{
    type Response = C::Response;
    type Error = C::Error;
    type Future = Pin<Box<dyn Future<Output = Result<C::Response, C::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), C::Error>> {
        self.connector.poll_ready(cx)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let first = self.first.lock().take();
        match first.filter(|first| first.begun.elapsed() < FRESH) {
            None => Box::pin(self.connector.call(to)),
            // If it fails, so does the request, which is retried like any other.
            Some(first) => {
                let mut connector = self.connector.clone();
                Box::pin(async move {
                    match first.connecting.await {
                        Ok(connected) => connected,
                        Err(_) => connector.call(to).await,
                    }
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Connections are their own numbers; the third one fails.
    #[derive(Clone, Default)]
    struct Counted(Arc<AtomicU32>);

    impl Service<Uri> for Counted {
        type Response = u32;
        type Error = &'static str;
        type Future = std::future::Ready<Result<u32, &'static str>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Uri) -> Self::Future {
            let number = self.0.fetch_add(1, Ordering::SeqCst) + 1;
            std::future::ready(match number {
                3 => Err("refused"),
                number => Ok(number),
            })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_connection_is_begun_unasked_and_used_once_while_it_is_fresh() {
        let to = || Uri::from_static("http://127.0.0.1/");
        let counted = Counted::default();
        let mut early = Early::begin(counted.clone(), to());
        tokio::task::yield_now().await;
        assert_eq!(counted.0.load(Ordering::SeqCst), 1);
        let mut clone = early.clone();
        assert_eq!(clone.call(to()).await, Ok(1));
        assert_eq!(early.call(to()).await, Ok(2));

        let mut failing = Early::begin(counted.clone(), to());
        assert_eq!(failing.call(to()).await, Err("refused"));

        let mut stale = Early::begin(counted.clone(), to());
        tokio::time::sleep(FRESH).await;
        assert_eq!(counted.0.load(Ordering::SeqCst), 4);
        assert_eq!(stale.call(to()).await, Ok(5));
    }
}
