//! An endpoint for builders on this machine: caches on S3 as repositories of a registry, and as
//! scopes of GitHub's cache service. Everything is kept in memory, except uploads whose digest
//! comes last: those wait in temporary files.

mod blobs;
mod connection;
mod flow;
mod gha;
mod kept;
mod names;
mod push;
mod registry;
mod reply;
mod repository;
mod routes;
mod token;
mod uploads;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::blocking::resumed;
use crate::bucket::Bucket;
use crate::config::ExportConfig;
use crate::progress::Progress;
use crate::transfer::limits::Limits;

pub use self::blobs::Traffic;
pub use self::push::Pushed;
pub use self::repository::{Repository, TAG};
pub use self::token::{Secret, Token};

use self::blobs::Blobs;
use self::push::Push;
use self::uploads::Sessions;

/// Connections at once; more wait to be accepted.
const CONNECTIONS: usize = 512;

/// Requests at once that write.
const WRITERS: usize = 64;

/// How long to wait at the end for uploads in flight.
const DRAIN: Duration = Duration::from_secs(5 * 60);

/// How long to wait then for other responses.
const LEAVE: Duration = Duration::from_secs(2);

/// How long a cache may take to look up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a lookup finds. A build can go on without a cache, but not wait for one forever.
async fn in_time<T>(lookup: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| Err(anyhow!("S3 did not answer within {PATIENCE:?}"));
    tokio::time::timeout(PATIENCE, lookup)
        .await
        .unwrap_or_else(late)
}

/// What all connections share.
pub struct Serving {
    pub address: SocketAddr,
    pub secret: Secret,
    pub tokens: Vec<Token>,
    pub repositories: Vec<Arc<Repository>>,
    sending: Sessions<registry::Sending>,
    saving: Sessions<gha::Saving>,
    writers: Arc<Semaphore>,
    progress: Progress,
}

impl Serving {
    /// The rest of a path that begins with the secret.
    fn without_secret<'a>(&self, path: &'a str) -> Option<&'a str> {
        let (secret, rest) = path.split_once('/')?;
        self.secret.is(secret).then_some(rest)
    }

    /// Runs `work` to completion even if the client does not wait for it: the body shows `work`
    /// that the client has gone, and it cleans up. The run does not end before it.
    async fn work<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let writer = Arc::clone(&self.writers).acquire_owned().await?;
        let work = tokio::spawn(async move {
            let done = work.await;
            drop(writer);
            done
        });
        resumed(work.await)
    }
}

/// A cache to be served.
pub struct Served {
    pub bucket: Bucket,
    /// Whether it is a `--cache-from`.
    pub source: bool,
    /// It is the `--cache-to`.
    pub target: Option<ExportConfig>,
}

/// An endpoint that listens.
pub struct Endpoint {
    pub serving: Arc<Serving>,
    listener: TcpListener,
}

impl Endpoint {
    /// Listens at `address`.
    ///
    /// # Errors
    /// The system's.
    pub async fn listen(
        address: SocketAddr,
        caches: Vec<Served>,
        progress: &Progress,
        limits: Limits,
    ) -> Result<Self> {
        let listening = || format!("cannot listen at {address}");
        let listener = TcpListener::bind(address).await.with_context(listening)?;
        let address = listener.local_addr().with_context(listening)?;
        let repositories = repositories(caches, progress, limits);
        let scopes = |wanted: fn(&Repository) -> bool| {
            let wanted = repositories.iter().filter(|found| wanted(found));
            wanted.map(|found| found.name.as_str()).collect::<Vec<_>>()
        };
        let tokens = vec![
            Token::mint(&scopes(|found| found.source), false),
            Token::mint(&scopes(|found| found.push.is_some()), true),
        ];
        Ok(Endpoint {
            serving: Arc::new(Serving {
                address,
                secret: Secret::random(),
                tokens,
                repositories,
                sending: Sessions::default(),
                saving: Sessions::default(),
                writers: Arc::new(Semaphore::new(WRITERS)),
                progress: progress.clone(),
            }),
            listener,
        })
    }

    /// Serves until `done` completes, then until uploads in flight have ended.
    pub async fn run<T>(self, done: BoxFuture<'_, T>) -> T {
        let Endpoint { serving, listener } = self;
        let (close, closing) = watch::channel(false);
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        let mut connections = JoinSet::new();
        let mut accepting = Box::pin(async {
            loop {
                let place = Arc::clone(&places).acquire_owned().await;
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let served =
                            connection::serve(Arc::clone(&serving), stream, closing.clone());
                        connections.spawn(async move {
                            served.await;
                            drop(place);
                        });
                    }
                    // Most likely out of file descriptors; some will be closed soon.
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
                while connections.try_join_next().is_some() {}
            }
        });
        let done = tokio::select! {
            () = &mut accepting => unreachable!("accepting does not end"),
            done = done => done,
        };
        drop(accepting);
        drop(listener);
        let _ = close.send(true);
        let writers = serving.writers.acquire_many(WRITERS as u32);
        if tokio::time::timeout(DRAIN, writers).await.is_err() {
            serving
                .progress
                .warn("uploads that have not ended by now are aborted");
        }
        let ending = async { while connections.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(LEAVE, ending).await;
        connections.shutdown().await;
        for repository in &serving.repositories {
            if let Some(push) = &repository.push {
                push.clean_up().await;
            }
        }
        done
    }
}

fn repositories(caches: Vec<Served>, progress: &Progress, limits: Limits) -> Vec<Arc<Repository>> {
    let mut all: Vec<Arc<Repository>> = Vec::new();
    for cache in caches {
        let wanted = names::repository(&cache.bucket.config().names[0]);
        let mut name = wanted.clone();
        let mut count = 2;
        while all.iter().any(|other| other.name == name) {
            name = format!("{wanted}-{count}");
            count += 1;
        }
        let traffic = Arc::<Traffic>::default();
        let bucket = cache.bucket;
        let blobs = Arc::new(Blobs::new(
            bucket.clone(),
            progress,
            limits,
            Arc::clone(&traffic),
        ));
        let push = cache.target.map(|target| {
            let blobs = Arc::clone(&blobs);
            Arc::new(Push::new(bucket.clone(), &target, progress, limits, blobs))
        });
        all.push(Arc::new(Repository::new(
            name,
            bucket,
            progress,
            (traffic, blobs),
            push,
            cache.source,
        )));
    }
    all
}
