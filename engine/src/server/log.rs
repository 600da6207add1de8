//! One line for each request: sizes and times, never what was said.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::Body;
use axum::http::{Method, StatusCode};
use axum::response::Response;
use bytes::{Buf, Bytes};
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// What is known of a request when its answer begins.
pub(super) struct AccessRecord {
    pub(super) id: String,
    pub(super) method: Method,
    /// The pattern of the route: paths are the client's words.
    pub(super) route: String,
    pub(super) status: StatusCode,
    pub(super) caller: Option<Arc<str>>,
    pub(super) peer: Option<IpAddr>,
    pub(super) start: Instant,
}

/// Numbers of requests, for people who compare an answer with the log.
pub(super) struct RequestIds;

impl RequestIds {
    pub(super) fn next() -> String {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        format!("req-{:08x}", NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// An answer's body, which writes the line when it has been sent or given up.
pub(super) struct LoggedBody {
    body: Body,
    record: AccessRecord,
    num_bytes: u64,
    is_complete: bool,
}

impl LoggedBody {
    pub(super) fn wrap(response: Response, record: AccessRecord) -> Response {
        response.map(|body| {
            let is_complete = body.is_end_stream();
            Body::new(LoggedBody { body, record, num_bytes: 0, is_complete })
        })
    }
}

impl HttpBody for LoggedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.num_bytes += frame.data_ref().map_or(0, |data| data.remaining() as u64);
                self.is_complete = self.body.is_end_stream();
            }
            Poll::Ready(None) => self.is_complete = true,
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for LoggedBody {
    fn drop(&mut self) {
        let AccessRecord { id, method, route, status, caller, peer, start } = &self.record;
        tracing::info!(
            target: "access",
            id = %id,
            method = %method,
            route = %route,
            status = status.as_u16(),
            bytes = self.num_bytes,
            ms = start.elapsed().as_secs_f64() * 1e3,
            caller = caller.as_deref().unwrap_or("none"),
            client = peer.map(tracing::field::display),
            complete = self.is_complete,
        );
    }
}
