//! A socket that is given up when its client says nothing or takes nothing for too long.

use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use crate::server::app::App;
use crate::server::error::ApiError;
use crate::server::metrics::{ConnectionEnd, Rejection};

/// What a connection is at.
#[derive(Debug, Default)]
pub(in crate::server) struct Activity {
    /// Requests.
    num_begun: AtomicU64,
    num_ended: AtomicU64,
    /// The client has taken no data for too long.
    has_stalled: AtomicBool,
}

tokio::task_local! {
    /// The connection whose task this is.
    pub(super) static CONNECTION: Arc<Activity>;
}

/// A request that has not ended.
pub(super) struct ActiveRequest(Arc<Activity>);

impl Activity {
    /// Of the connection that the handler at hand answers on, where there is one.
    pub(in crate::server) fn current() -> Option<Arc<Activity>> {
        CONNECTION.try_with(Arc::clone).ok()
    }

    /// Whether the connection was given up because its client took no data.
    pub(in crate::server) fn has_stalled(&self) -> bool {
        self.has_stalled.load(Ordering::Relaxed)
    }

    pub(super) fn begin(self: &Arc<Activity>) -> ActiveRequest {
        self.num_begun.fetch_add(1, Ordering::Relaxed);
        ActiveRequest(Arc::clone(self))
    }

    fn num_begun(&self) -> u64 {
        self.num_begun.load(Ordering::Relaxed)
    }

    fn is_busy(&self) -> bool {
        self.num_begun() != self.num_ended.load(Ordering::Relaxed)
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.num_ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the connection waits to read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// Nothing that has a time: a request is being answered.
    Answer,
    /// The first byte of the next head.
    NextHead,
    /// The rest of a head, or the first one of the connection.
    Head,
}

pub(super) struct WatchedStream {
    stream: TcpStream,
    app: Arc<App>,
    activity: Arc<Activity>,
    wait: Wait,
    read_timer: Pin<Box<Sleep>>,
    /// Runs while the socket takes no data.
    write_timer: Option<Pin<Box<Sleep>>>,
    /// An answer in place of hyper's own, which has no body.
    substitute: Option<Substitute>,
}

struct Substitute {
    text: String,
    num_written: usize,
}

impl WatchedStream {
    pub(super) fn new(stream: TcpStream, app: Arc<App>, activity: Arc<Activity>) -> WatchedStream {
        let read_timer = Box::pin(tokio::time::sleep(app.options.timeouts.header));
        WatchedStream {
            stream,
            app,
            activity,
            wait: Wait::Head,
            read_timer,
            write_timer: None,
            substitute: None,
        }
    }

    fn wait_for(&mut self, wait: Wait, time: Duration) {
        self.wait = wait;
        self.read_timer.as_mut().reset(Instant::now() + time);
    }

    fn give_up(&self, reason: ConnectionEnd) -> io::Error {
        self.app.metrics.connection_ended(reason);
        io::ErrorKind::TimedOut.into()
    }

    /// Follows what the connection waits for; fails when it has waited too long.
    fn watch_read(&mut self, cx: &mut Context<'_>, has_data: bool) -> io::Result<()> {
        let timeouts = self.app.options.timeouts;
        if self.activity.is_busy() {
            self.wait = Wait::Answer;
            return Ok(());
        }
        match (self.wait, has_data) {
            (Wait::Answer, false) => self.wait_for(Wait::NextHead, timeouts.keep_alive),
            (Wait::Answer | Wait::NextHead, true) => self.wait_for(Wait::Head, timeouts.header),
            (Wait::NextHead, false) | (Wait::Head, _) => {}
        }
        match self.read_timer.as_mut().poll(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => Err(self.give_up(match self.wait {
                Wait::NextHead => ConnectionEnd::KeepAliveTimeout,
                Wait::Head | Wait::Answer => ConnectionEnd::HeaderTimeout,
            })),
        }
    }

    /// Follows how long the socket takes no data.
    fn watch_write<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.write_timer = None;
            return written;
        }
        let time = self.app.options.timeouts.write;
        let timer = self.write_timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(time)));
        match timer.as_mut().poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                self.activity.has_stalled.store(true, Ordering::Relaxed);
                Poll::Ready(Err(self.give_up(ConnectionEnd::WriteTimeout)))
            }
        }
    }

    fn write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.substitute.is_none()
            && !self.activity.is_busy()
            && let Some((status, text)) = substitute(bytes)
        {
            match status {
                "400" => self.app.metrics.connection_ended(ConnectionEnd::Malformed),
                _ => self.app.metrics.rejected(Rejection::TooLarge),
            }
            self.substitute = Some(Substitute { text, num_written: 0 });
        }
        let Some(substitute) = &mut self.substitute else {
            let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
            return self.watch_write(cx, written);
        };
        while substitute.num_written < substitute.text.len() {
            let rest = &substitute.text.as_bytes()[substitute.num_written..];
            match Pin::new(&mut self.stream).poll_write(cx, rest) {
                Poll::Ready(Ok(num)) => substitute.num_written += num,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return self.watch_write(cx, Poll::Pending),
            }
        }
        // NOTE: this answer is the last of its connection.
        self.watch_write(cx, Poll::Ready(Ok(bytes.len())))
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let num_before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let has_data = buffer.filled().len() > num_before;
        self.watch_read(cx, has_data)?;
        polled
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// hyper answers what is no HTTP by a head without a body; this is the status, and the same with a
/// body.
fn substitute(head: &[u8]) -> Option<(&str, String)> {
    let head = std::str::from_utf8(head).ok()?;
    let status = head.strip_prefix("HTTP/1.1 ")?.split(' ').next()?;
    if !head.contains("content-length: 0\r\n") {
        return None;
    }
    let (code, message) = match status {
        "400" => ("malformed_request", "the request is no HTTP/1.1"),
        "414" => ("uri_too_long", "the path of the request is too long"),
        "431" => ("headers_too_large", "the request has too many headers, or too long ones"),
        _ => return None,
    };
    let error = ApiError::bad_request(None, message).with_code(code);
    let head = head.split("content-length: 0\r\n").collect::<Vec<_>>().join("");
    Some((status, with_body(head.strip_suffix("\r\n")?, &error)))
}

/// The answer to a connection that is one too many.
pub(super) fn too_many(reason: ConnectionEnd) -> String {
    let (status, error) = match reason {
        ConnectionEnd::TooManyOfClient => {
            let message = "too many connections of one client; use fewer, or those there are";
            ("429 Too Many Requests", ApiError::overloaded(RETRY).with_message(message))
        }
        _ => {
            let message = "too many connections; try again later";
            ("503 Service Unavailable", ApiError::unavailable("too_many_connections", message))
        }
    };
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\nretry-after: 1\r\n");
    with_body(&head, &error)
}

const RETRY: Duration = Duration::from_secs(1);

/// `head` lacks its last, empty line.
fn with_body(head: &str, error: &ApiError) -> String {
    let body = serde_json::to_string(&error.body()).unwrap_or_default();
    let len = body.len();
    format!("{head}content-type: application/json\r\ncontent-length: {len}\r\n\r\n{body}")
}

/// An answer's body. The connection is busy until it is dropped; a panic breaks it off.
pub(super) struct TrackedBody {
    body: Body,
    app: Arc<App>,
    _request: ActiveRequest,
}

impl TrackedBody {
    pub(super) fn new(body: Body, app: Arc<App>, request: ActiveRequest) -> TrackedBody {
        TrackedBody { body, app, _request: request }
    }
}

impl HttpBody for TrackedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let body = &mut self.body;
        let polled = catch_unwind(AssertUnwindSafe(|| Pin::new(body).poll_frame(cx)));
        match polled {
            Ok(polled) => Poll::Ready(ready!(polled)),
            Err(_) => {
                self.app.metrics.handler_panicked();
                self.body = Body::empty();
                let error = io::Error::other("a handler panicked");
                Poll::Ready(Some(Err(axum::Error::new(error))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_without_a_body_get_one() {
        let head = "HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\
                    content-length: 0\r\ndate: now\r\n\r\n";
        let (status, text) = substitute(head.as_bytes()).unwrap();
        assert_eq!(status, "431");
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("connection: close\r\ndate: now\r\n"), "{head}");
        assert!(head.contains(&format!("content-length: {}", body.len())), "{head}");
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["error"]["code"], "headers_too_large");
        for other in [
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 7\r\n\r\n",
            "7\r\nHTTP/1.1 400",
            "",
        ] {
            assert_eq!(substitute(other.as_bytes()), None, "{other}");
        }
    }
}
