//! An HTTP client that keeps its connections, and measures one streamed answer.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::events::{ApiFailure, Chunk, EventLines, Usage};
use super::url::ServerUrl;

/// Time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest body that is not streamed.
const BODY_BYTES_MAX: usize = 1 << 20;

type Sender = SendRequest<Full<Bytes>>;

/// Talks to one server.
pub(super) struct Client {
    pub(super) url: ServerUrl,
    /// `Bearer …`
    pub(super) authorization: Option<HeaderValue>,
    /// For the answer to begin, and for each further part of it.
    pub(super) timeout: Duration,
    idle: Mutex<Vec<Sender>>,
}

/// One answer, on the client's clock.
#[derive(Clone, Debug)]
pub(super) struct Exchange {
    /// From sending the request to the first text.
    pub(super) ttft: Duration,
    /// Between two parts of the text.
    pub(super) gaps: Vec<Duration>,
    /// From the first to the last part.
    pub(super) text_time: Duration,
    /// From sending the request to the end of the answer.
    pub(super) total: Duration,
    pub(super) usage: Usage,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// Nobody listens: the server is not there, or no longer.
    Refused,
    /// No connection could be made, for another reason.
    Connect(String),
    /// The connection broke.
    Connection(String),
    /// Nothing came for so long.
    Timeout(Duration),
    /// The server said no.
    Status { status: u16, message: String },
    /// An error within the stream.
    Event(String),
    /// The stream is not what it should be.
    Stream(String),
    /// Fewer or more tokens than were asked for.
    Length { expected: usize, found: usize },
}

impl Failure {
    /// What failures are counted by.
    pub(super) fn kind(&self) -> String {
        match self {
            Failure::Refused => "refused".to_owned(),
            Failure::Connect(_) => "connect".to_owned(),
            Failure::Connection(_) => "connection".to_owned(),
            Failure::Timeout(_) => "timeout".to_owned(),
            Failure::Status { status, .. } => format!("status {status}"),
            Failure::Event(_) => "error event".to_owned(),
            Failure::Stream(_) => "stream".to_owned(),
            Failure::Length { .. } => "length".to_owned(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Refused => f.write_str("nobody listens there"),
            Failure::Connect(message) => write!(f, "cannot connect: {message}"),
            Failure::Connection(message) => write!(f, "the connection broke: {message}"),
            Failure::Timeout(time) => write!(f, "nothing came for {} s", time.as_secs_f64()),
            Failure::Status { status, message } => write!(f, "status {status}: {message}"),
            Failure::Event(message) => write!(f, "an error within the stream: {message}"),
            Failure::Stream(message) => f.write_str(message),
            Failure::Length { expected, found } => {
                write!(f, "{found} tokens where {expected} were asked for")
            }
        }
    }
}

impl Client {
    pub(super) fn new(
        url: ServerUrl,
        authorization: Option<HeaderValue>,
        timeout: Duration,
    ) -> Client {
        Client { url, authorization, timeout, idle: Mutex::default() }
    }

    /// The JSON of a small page.
    pub(super) async fn get<T: DeserializeOwned>(&self, endpoint: &str) -> Result<T, Failure> {
        let (response, sender) = self.send(Method::GET, endpoint, Bytes::new()).await?;
        let status = response.status();
        let body = self.read(response).await?;
        if status != StatusCode::OK {
            return Err(refusal(status, &body));
        }
        self.keep(sender);
        serde_json::from_slice(&body)
            .map_err(|error| Failure::Stream(format!("{endpoint}: {error}")))
    }

    /// Asks for a streamed answer of `max_tokens` tokens, and reads it to its end.
    pub(super) async fn exchange(
        &self,
        endpoint: &str,
        body: Bytes,
        max_tokens: usize,
    ) -> Result<Exchange, Failure> {
        let start = Instant::now();
        let (response, sender) = self.send(Method::POST, endpoint, body).await?;
        let status = response.status();
        if status != StatusCode::OK {
            let body = self.read(response).await?;
            self.keep(sender);
            return Err(refusal(status, &body));
        }
        let mut answer = Answer::new(start);
        let mut body = response.into_body();
        let mut lines = EventLines::default();
        while let Some(frame) = self.limit(body.frame()).await? {
            let frame = frame.map_err(broken)?;
            let now = Instant::now();
            let Some(bytes) = frame.data_ref() else { continue };
            lines.push(bytes).map_err(Failure::Stream)?;
            while let Some(data) = lines.next() {
                answer.take(data, now)?;
            }
        }
        self.keep(sender);
        answer.end(max_tokens)
    }

    /// Sends a request, over a connection that was used before where there is one. What an old
    /// connection did not take is sent over another.
    async fn send(
        &self,
        method: Method,
        endpoint: &str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, Sender), Failure> {
        let mut request = self.request(method, endpoint, body)?;
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let (mut sender, is_new) = match idle {
                Some(sender) if sender.is_closed() => continue,
                Some(sender) => (sender, false),
                None => (self.connect().await?, true),
            };
            match self.limit(sender.try_send_request(request)).await? {
                Ok(response) => return Ok((response, sender)),
                Err(mut error) => match error.take_message() {
                    Some(unsent) if !is_new => request = unsent,
                    _ => return Err(broken(error.into_error())),
                },
            }
        }
    }

    fn request(
        &self,
        method: Method,
        endpoint: &str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(self.url.path(endpoint))
            .header(HOST, self.url.authority.as_str())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization.clone());
        }
        request.body(Full::new(body)).map_err(|error| Failure::Connect(error.to_string()))
    }

    async fn connect(&self) -> Result<Sender, Failure> {
        let address = (self.url.host.as_str(), self.url.port);
        let stream = match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Err(_) => return Err(Failure::Timeout(CONNECT_TIMEOUT)),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                return Err(Failure::Refused);
            }
            Ok(Err(error)) => return Err(Failure::Connect(error.to_string())),
            Ok(Ok(stream)) => stream,
        };
        // NOTE: a request is one small write; without this it could wait for an acknowledgement.
        stream.set_nodelay(true).map_err(|error| Failure::Connect(error.to_string()))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // NOTE: its errors are told to the request that it carries.
        drop(tokio::spawn(connection));
        Ok(sender)
    }

    /// The body of an answer that is not streamed.
    async fn read(&self, response: Response<Incoming>) -> Result<Bytes, Failure> {
        let body = Limited::new(response.into_body(), BODY_BYTES_MAX);
        match self.limit(body.collect()).await? {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) => Err(Failure::Connection(error.to_string())),
        }
    }

    /// Keeps a connection for the next request.
    fn keep(&self, sender: Sender) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
    }

    async fn limit<T>(&self, work: impl Future<Output = T>) -> Result<T, Failure> {
        timeout(self.timeout, work).await.map_err(|_| Failure::Timeout(self.timeout))
    }
}

/// A streamed answer, as far as it has come.
struct Answer {
    start: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    gaps: Vec<Duration>,
    usage: Option<Usage>,
    has_end: bool,
    is_done: bool,
}

impl Answer {
    fn new(start: Instant) -> Answer {
        let (first, last, gaps) = (None, None, Vec::new());
        Answer { start, first, last, gaps, usage: None, has_end: false, is_done: false }
    }

    /// Takes the data of one event, which came at `now`.
    fn take(&mut self, data: &[u8], now: Instant) -> Result<(), Failure> {
        if self.is_done {
            return Err(Failure::Stream("the stream goes on behind its end".to_owned()));
        }
        if data == b"[DONE]" {
            self.is_done = true;
            return Ok(());
        }
        let chunk = Chunk::parse(data).map_err(Failure::Stream)?;
        if let Some(error) = chunk.error {
            return Err(Failure::Event(error.message));
        }
        if chunk.has_text() || (chunk.has_end() && self.first.is_none()) {
            self.first.get_or_insert(now);
            if let Some(last) = self.last.replace(now) {
                self.gaps.push(now - last);
            }
        }
        self.has_end |= chunk.has_end();
        self.usage = chunk.usage.or(self.usage);
        Ok(())
    }

    fn end(self, max_tokens: usize) -> Result<Exchange, Failure> {
        let broken = |what: &str| Err(Failure::Stream(format!("the stream ended without {what}")));
        if !self.has_end {
            return broken("a finish reason");
        }
        if !self.is_done {
            return broken("[DONE]");
        }
        let (Some(first), Some(last), Some(usage)) = (self.first, self.last, self.usage) else {
            return broken("its usage");
        };
        if usage.completion_tokens != max_tokens {
            let found = usage.completion_tokens;
            return Err(Failure::Length { expected: max_tokens, found });
        }
        Ok(Exchange {
            ttft: first - self.start,
            gaps: self.gaps,
            text_time: last - first,
            total: self.start.elapsed(),
            usage,
        })
    }
}

fn broken(error: hyper::Error) -> Failure {
    let mut message = error.to_string();
    if let Some(source) = std::error::Error::source(&error) {
        message.push_str(&format!(": {source}"));
    }
    Failure::Connection(message)
}

/// A failure with what the server says of it.
fn refusal(status: StatusCode, body: &[u8]) -> Failure {
    #[derive(serde::Deserialize)]
    struct Body {
        error: ApiFailure,
    }
    let message = match serde_json::from_slice::<Body>(body) {
        Ok(body) => body.error.message,
        Err(_) => String::from_utf8_lossy(body).chars().take(200).collect(),
    };
    Failure::Status { status: status.as_u16(), message }
}
