//! A client that keeps its connection, on one thread with hundreds of others.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

type Sender = SendRequest<Full<Bytes>>;

/// One connection at a time to one server.
pub(crate) struct Client {
    address: SocketAddr,
    sender: Option<Sender>,
}

/// A stream of server-sent events.
pub(crate) struct Events {
    body: Incoming,
    /// What came and is not read.
    rest: Vec<u8>,
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Client {
        Client { address, sender: None }
    }

    /// Sends a request and reads the head of the answer.
    pub(crate) async fn send(
        &mut self,
        method: &str,
        path: &str,
        body: &Value,
    ) -> Response<Incoming> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut sender = match self.sender.take() {
            Some(sender) => self.reuse(sender).await,
            None => self.connect().await,
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.address.to_string())
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .expect("a sound request");
        let response = sender.send_request(request).await.expect("an answer");
        self.sender = Some(sender);
        response
    }

    /// Status and whole body.
    pub(crate) async fn ask(&mut self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let response = self.send(method, path, body).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.expect("the whole body").to_bytes();
        let text = String::from_utf8_lossy(&body);
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text.into_owned())))
    }

    /// Goes away, whatever is under way.
    pub(crate) fn leave(&mut self) {
        self.sender = None;
    }

    /// The same connection, or a new one where the server has hung up.
    async fn reuse(&self, mut sender: Sender) -> Sender {
        match sender.ready().await {
            Ok(()) => sender,
            Err(_) => self.connect().await,
        }
    }

    async fn connect(&self) -> Sender {
        let stream = TcpStream::connect(self.address).await.expect("the server listens");
        let (sender, connection) =
            handshake(TokioIo::new(stream)).await.expect("a connection that speaks HTTP");
        // NOTE: it ends when the sender and the body are dropped, or the server hangs up.
        tokio::spawn(async move { drop(connection.await) });
        sender
    }
}

impl Events {
    pub(crate) fn new(response: Response<Incoming>) -> Events {
        Events { body: response.into_body(), rest: Vec::new() }
    }

    /// The data of the next event; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.rest.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.rest.drain(..end + 2).collect();
                let event = String::from_utf8(event).expect("events are UTF-8");
                match event.trim_end().strip_prefix("data: ") {
                    Some(data) => return Some(data.to_owned()),
                    None => continue,
                }
            }
            let frame = self.body.frame().await?.expect("a whole stream");
            self.rest.extend(frame.into_data().unwrap_or_default());
        }
    }
}
