//! Connections: taken up to a bound, HTTP/1.1 on each, and an end in order.
//!
//! A connection that sends no request head for a while is closed, and one whose client takes nothing for
//! [`UNACKNOWLEDGED_MAX`] too, so neither can hold a place forever. At a shutdown, connections that rest are closed
//! and the others after their request. New ones are taken still, so that a load balancer reads from `/healthz` that
//! it should go elsewhere, and so that an upload can get its last parts; `routes` refuses everything else. When
//! nothing runs any more, or the drain's time is over, the server ends.

mod counted;

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::counted::Counted;
use crate::access::Peer;
use crate::counters::Counters;

/// Connections at once. Each costs some 20 KiB at rest, and up to four file descriptors while it transfers.
const CONNECTIONS_MAX: usize = 4_096;
/// Connections over the bound that get an answer; more are just closed.
const REFUSALS_MAX: usize = 64;
/// How long a client may take for a request's head, and rest between requests.
const HEAD_MAX: Duration = Duration::from_secs(60);
/// The same for a connection that was opened while draining.
const HEAD_MAX_DRAINING: Duration = Duration::from_secs(1);
/// How long a client may leave sent bytes unacknowledged, or its window closed.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(60);
/// Bytes of a request's body that are read at once: uploads come in a few large pieces, not in many small ones.
const READ_MAX_BYTES: usize = 512 << 10;
/// The longest head of a request: a token of 16 KiB and 100 tags fit. Who sends no end of one has no more memory here.
const HEAD_MAX_BYTES: usize = 48 << 10;
/// How long to wait when the system has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// File descriptors to ask the system for; its default of 1,024 is less than the connections need.
const FILES_WANTED: u64 = 65_536;
/// What a connection over the bound gets.
const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
    connection: close\r\ncontent-length: 102\r\n\r\n\
    {\"errors\":[{\"code\":\"TOOMANYREQUESTS\",\"message\":\"too many connections; try again soon\",\"detail\":null}]}";

/// What ends connections.
struct Ends {
    /// No new work.
    draining: CancellationToken,
    /// Everything.
    over: CancellationToken,
}

/// The router, which is told where requests come from.
struct Knowing {
    service: TowerToHyperService<Router>,
    from: Peer,
}

impl Service<Request<Incoming>> for Knowing {
    type Response = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Response;
    type Error = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Error;
    type Future = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(self.from);
        self.service.call(request)
    }
}

/// Serves until the shutdown, and then until nothing runs any more or the drain's time is over.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    counters: Arc<Counters>,
    draining: CancellationToken,
    drain: Duration,
) {
    raise_file_limit();
    let tracker = TaskTracker::new();
    let ends = Arc::new(Ends { draining: draining.clone(), over: CancellationToken::new() });
    let (places, refusals) =
        (Arc::new(Semaphore::new(CONNECTIONS_MAX)), Arc::new(Semaphore::new(REFUSALS_MAX)));
    let accepting = async {
        loop {
            let (stream, from) = match listener.accept().await {
                Ok((stream, from)) => (stream, Peer(from.ip())),
                Err(error) if is_about_one_connection(&error) => continue,
                Err(error) => {
                    tracing::warn!(%error, "can't take a connection; trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            match places.clone().try_acquire_owned() {
                Ok(place) => {
                    let service = Knowing { service: TowerToHyperService::new(router.clone()), from };
                    tracker.spawn(connection(stream, service, ends.clone(), counters.clone(), place));
                }
                Err(_) => {
                    counters.connections_refused.fetch_add(1, Ordering::Relaxed);
                    if let Ok(place) = refusals.clone().try_acquire_owned() {
                        tokio::spawn(refuse(stream, place));
                    }
                }
            }
        }
    };
    let ended = async {
        draining.cancelled().await;
        tracing::info!(open = tracker.len(), "the registry is draining");
        tracker.close();
        if tokio::time::timeout(drain, tracker.wait()).await.is_err() {
            tracing::warn!(open = tracker.len(), "transfers that the drain had no time for are ended");
            ends.over.cancel();
            tracker.wait().await;
        }
    };
    tokio::select! {
        () = accepting => {}
        () = ended => {}
    }
}

async fn connection(
    stream: TcpStream,
    service: Knowing,
    ends: Arc<Ends>,
    counters: Arc<Counters>,
    _place: OwnedSemaphorePermit,
) {
    let late = ends.draining.is_cancelled();
    if let Err(error) = prepare(&stream) {
        tracing::debug!(%error, "a connection ended before it began");
        return;
    }
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(if late { HEAD_MAX_DRAINING } else { HEAD_MAX })
        .keep_alive(!late)
        .max_buf_size(READ_MAX_BYTES)
        .max_header_size(HEAD_MAX_BYTES)
        .serve_connection(TokioIo::new(Counted::new(stream, counters)), service);
    let mut serving = std::pin::pin!(serving);
    let result = tokio::select! {
        result = serving.as_mut() => result,
        () = ends.over.cancelled() => return,
        () = ends.draining.cancelled(), if !late => {
            serving.as_mut().graceful_shutdown();
            tokio::select! {
                result = serving => result,
                () = ends.over.cancelled() => return,
            }
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection broke off");
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let millis = u32::try_from(UNACKNOWLEDGED_MAX.as_millis()).unwrap_or(u32::MAX);
    setsockopt(&stream.as_fd(), sockopt::TcpUserTimeout, &millis)?;
    Ok(())
}

/// Says that there are too many connections, and waits for the client to read it.
async fn refuse(mut stream: TcpStream, _place: OwnedSemaphorePermit) {
    let answering = async {
        stream.writable().await?;
        // A fresh connection has room for it.
        stream.try_write(BUSY)?;
        nix::sys::socket::shutdown(
            std::os::fd::AsRawFd::as_raw_fd(&stream),
            nix::sys::socket::Shutdown::Write,
        )?;
        let mut unread = [0; 4_096];
        while stream.read(&mut unread).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    let _ = tokio::time::timeout(HEAD_MAX_DRAINING, answering).await;
}

fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < FILES_WANTED.min(hard)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, FILES_WANTED.min(hard), hard)
    {
        tracing::warn!(%error, soft, "can't raise the limit on open files");
    }
}
