//! Server-sent events: what a generation gives, as it comes.

use std::convert::Infallible;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;

use super::error::ApiError;
use super::generation::{Generation, News, Outputs};
use super::openai::Usage;

/// Writes what a generation gives as the events of one API.
pub(super) trait EventWriter: Send + 'static {
    fn outputs(&mut self, outputs: &Outputs, events: &mut Events) -> Result<(), ApiError>;

    /// The last events, when all outputs were written.
    fn finish(&mut self, usage: Usage, events: &mut Events);

    /// The last events where the generation was called off.
    fn cancelled(&mut self, _usage: Usage, events: &mut Events) {
        events.json(&ApiError::draining().body());
    }
}

/// Events that wait to be sent.
#[derive(Default)]
pub(super) struct Events {
    buffer: BytesMut,
}

impl Events {
    /// Adds an event that says `value`.
    pub(super) fn json<T: Serialize>(&mut self, value: &T) {
        self.buffer.put_slice(b"data: ");
        let start = self.buffer.len();
        // NOTE: memory takes every byte, and the values have nothing that JSON cannot say; what is
        // half written is not sent in any case.
        if let Err(error) = serde_json::to_writer((&mut self.buffer).writer(), value) {
            tracing::error!(%error, "an event cannot be written");
            self.buffer.truncate(start);
            self.buffer.put_slice(b"{}");
        }
        self.buffer.put_slice(b"\n\n");
    }

    /// Adds the event that ends a stream of OpenAI's API.
    pub(super) fn done(&mut self) {
        self.buffer.put_slice(b"data: [DONE]\n\n");
    }

    /// Adds a line that says nothing.
    fn alive(&mut self) {
        self.buffer.put_slice(b": alive\n\n");
    }

    fn take(&mut self) -> Bytes {
        self.buffer.split().freeze()
    }
}

/// A stream that is being written.
struct Stream<W> {
    generation: Generation,
    writer: W,
    events: Events,
    outputs: Outputs,
    is_over: bool,
}

impl<W: EventWriter> Stream<W> {
    /// Waits for news and writes them.
    async fn advance(&mut self) -> Result<(), ApiError> {
        match self.generation.next(&mut self.outputs).await? {
            News::Outputs => {
                let written = self.writer.outputs(&self.outputs, &mut self.events);
                written.map_err(|error| self.generation.fail(error))
            }
            News::Silence => {
                self.events.alive();
                Ok(())
            }
            News::Finished => {
                self.writer.finish(self.generation.usage(), &mut self.events);
                self.is_over = true;
                Ok(())
            }
            News::Cancelled => {
                self.writer.cancelled(self.generation.usage(), &mut self.events);
                self.is_over = true;
                Ok(())
            }
        }
    }

    /// The next bytes; `None` at the end.
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        while self.events.buffer.is_empty() {
            if self.is_over {
                return None;
            }
            if let Err(error) = self.advance().await {
                self.events.json(&error.body());
                self.is_over = true;
            }
        }
        Some((Ok(self.events.take()), self))
    }
}

/// Answers with the events of `generation`. What fails before the first of them is an error with a
/// status of its own.
pub(super) async fn respond<W: EventWriter>(
    generation: Generation,
    writer: W,
) -> Result<Response, ApiError> {
    let (events, outputs) = (Events::default(), Outputs::new());
    let mut stream = Stream { generation, writer, events, outputs, is_over: false };
    while stream.outputs.is_empty() && !stream.is_over {
        stream.advance().await?;
    }
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        // Proxies that collect answers would hold tokens back.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    let body = Body::from_stream(futures_util::stream::unfold(stream, Stream::next));
    Ok((headers, body).into_response())
}

/// Waits for all of `generation`; `take` gets every output. False where it was called off.
pub(super) async fn collect(
    generation: &mut Generation,
    mut take: impl FnMut(&Outputs) -> Result<(), ApiError>,
) -> Result<bool, ApiError> {
    let mut outputs = Outputs::new();
    loop {
        match generation.next(&mut outputs).await? {
            News::Outputs => take(&outputs).map_err(|error| generation.fail(error))?,
            News::Silence => {}
            News::Finished => return Ok(true),
            News::Cancelled => return Ok(false),
        }
    }
}
