//! What a refused request still sends.
//!
//! A client that is sending while it is answered, and finds the connection closed, often sees nothing but that. So a
//! refusal is held back until what is on its way has been read and thrown away, within bounds. Only a client that asked
//! for leave to send (`Expect: 100-continue`), and hasn't got it, is answered at once.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::EXPECT;
use bytes::Bytes;
use futures_util::StreamExt as _;
use hyper::body::{Body as _, Frame, SizeHint};

use crate::uploads::CHUNK_MAX_BYTES;

/// How long that may take: a part of 16 MiB comes over 30 Mbit/s meanwhile.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A request's body, as far as it wasn't read.
pub(crate) struct Unread {
    body: Watched,
    expects_leave: bool,
}

/// What of a body was looked at.
struct Inner {
    body: Body,
    asked_for: bool,
}

#[derive(Clone)]
struct Watched(Arc<Mutex<Inner>>);

/// The same request; what it leaves of its body, if it has any, can be discarded later.
pub(crate) fn watch(request: Request) -> (Request, Option<Unread>) {
    if request.body().is_end_stream() {
        return (request, None);
    }
    let (head, body) = request.into_parts();
    let body = Watched(Arc::new(Mutex::new(Inner { body, asked_for: false })));
    let expects_leave = head.headers.contains_key(EXPECT);
    (Request::from_parts(head, Body::new(body.clone())), Some(Unread { body, expects_leave }))
}

impl Unread {
    /// Reads on, for a while, up to the longest part.
    pub(crate) async fn discard(self) {
        let body = {
            let mut inner = self.body.lock();
            if self.expects_leave && !inner.asked_for {
                return;
            }
            std::mem::take(&mut inner.body)
        };
        let mut rest = body.into_data_stream();
        let mut left = CHUNK_MAX_BYTES;
        let reading = async {
            while left > 0 {
                let Some(Ok(chunk)) = rest.next().await else { return };
                left = left.saturating_sub(chunk.len() as u64);
            }
        };
        let _ = tokio::time::timeout(TIMEOUT, reading).await;
    }
}

impl Watched {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl hyper::body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut inner = self.lock();
        inner.asked_for = true;
        Pin::new(&mut inner.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.lock().body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.lock().body.size_hint()
    }
}
