//! A small HTTP client over plain sockets, which says exactly what it is told to.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

use crate::LONG;

/// Talks to one server; each request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    address: SocketAddr,
    key: Option<String>,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// An answer whose body is read piece by piece.
pub struct Reader {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
    /// What is left of a body of known length; `None` where it is chunked.
    left: Option<usize>,
    is_over: bool,
    /// Of an event that has not ended.
    rest: Vec<u8>,
}

impl Client {
    pub fn new(address: SocketAddr) -> Client {
        Client { address, key: None }
    }

    /// The same with an API key.
    pub fn with_key(self, key: &str) -> Client {
        Client { key: Some(key.to_owned()), ..self }
    }

    /// A connection on which nothing has been said.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("the server listens");
        stream.set_read_timeout(Some(LONG)).expect("a time that is not zero");
        stream
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        let headers = [("content-type", "application/json")];
        self.request("POST", path, &headers, body.to_string().as_bytes())
    }

    pub fn delete(&self, path: &str) -> Answer {
        self.request("DELETE", path, &[], b"")
    }

    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        let head = self.head(method, path, headers, body.len());
        self.send(&[head.as_bytes(), body].concat()).into_answer()
    }

    /// Posts, and reads no more than the head.
    pub fn stream(&self, path: &str, body: &Value) -> Reader {
        let body = body.to_string();
        let headers = [("content-type", "application/json")];
        let head = self.head("POST", path, &headers, body.len());
        self.send(&[head.as_bytes(), body.as_bytes()].concat())
    }

    /// Says `bytes` on a new connection and reads the head of the answer.
    pub fn send(&self, bytes: &[u8]) -> Reader {
        let mut stream = self.connect();
        // The server may have answered and gone before everything is said.
        let _ = stream.write_all(bytes);
        Reader::new(stream).expect("an answer")
    }

    /// The head of a request, with Host, Content-Length and Connection where `headers` lack them.
    pub fn head(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body_len: usize,
    ) -> String {
        let mut head = format!("{method} {path} HTTP/1.1\r\n");
        let has = |name: &str| headers.iter().any(|(other, _)| other.eq_ignore_ascii_case(name));
        if !has("host") {
            head += &format!("host: {}\r\n", self.address);
        }
        if body_len > 0 && !has("content-length") && !has("transfer-encoding") {
            head += &format!("content-length: {body_len}\r\n");
        }
        if !has("connection") {
            head += "connection: close\r\n";
        }
        if let Some(key) = self.key.as_ref().filter(|_| !has("authorization")) {
            head += &format!("authorization: Bearer {key}\r\n");
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head + "\r\n"
    }
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("status {}: {error}: {}", self.status, self.text()))
    }

    /// Checks the shape of an error and gives it.
    pub fn error(&self) -> Value {
        let json = self.json();
        let error = &json["error"];
        assert!(error["message"].is_string() && error["type"].is_string(), "{json}");
        assert!(error.get("param").is_some() && error.get("code").is_some(), "{json}");
        assert!(self.status >= 400, "{}: {json}", self.status);
        error.clone()
    }
}

impl Reader {
    /// Reads the head of the next answer on a connection.
    pub fn new(stream: TcpStream) -> io::Result<Reader> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let broken = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| broken(&line))?;
        let mut headers = Vec::new();
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            match line.trim_end().split_once(':') {
                Some((name, value)) => {
                    headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
                }
                None if line.trim_end().is_empty() => break,
                None => return Err(broken(&line)),
            }
        }
        let header = |name: &str| headers.iter().find(|(other, _)| other == name);
        let left = match (header("content-length"), header("transfer-encoding")) {
            (Some((_, len)), _) => Some(len.parse().map_err(|_| broken(len))?),
            (None, Some(_)) => None,
            (None, None) => Some(0),
        };
        let is_over = left == Some(0);
        Ok(Reader { status, headers, reader, left, is_over, rest: Vec::new() })
    }

    /// The next piece of the body; `None` at its end. `Err` where the connection broke.
    pub fn next_piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.is_over {
            return Ok(None);
        }
        if let Some(left) = self.left {
            let mut piece = vec![0; left];
            self.reader.read_exact(&mut piece)?;
            self.is_over = true;
            return Ok(Some(piece));
        }
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        let len = usize::from_str_radix(line.trim_end(), 16)
            .map_err(|_| io::Error::new(io::ErrorKind::UnexpectedEof, line.clone()))?;
        let mut piece = vec![0; len + 2];
        self.reader.read_exact(&mut piece)?;
        piece.truncate(len);
        self.is_over = len == 0;
        Ok((len > 0).then_some(piece))
    }

    /// What the next event of a stream of events says; `None` at its end.
    pub fn next_event(&mut self) -> io::Result<Option<String>> {
        loop {
            let end = self.rest.windows(2).position(|pair| pair == b"\n\n");
            if let Some(end) = end {
                let event: Vec<u8> = self.rest.drain(..end + 2).collect();
                let event = String::from_utf8_lossy(&event).into_owned();
                if let Some(data) = event.trim_end().strip_prefix("data: ") {
                    return Ok(Some(data.to_owned()));
                }
                continue;
            }
            match self.next_piece()? {
                Some(piece) => self.rest.extend(piece),
                None => return Ok(None),
            }
        }
    }

    /// All that is left.
    pub fn into_answer(mut self) -> Answer {
        let mut body = Vec::new();
        while let Some(piece) = self.next_piece().expect("the whole body") {
            body.extend(piece);
        }
        Answer { status: self.status, headers: self.headers, body }
    }

    /// The socket, for those who want to break it.
    pub fn into_stream(self) -> TcpStream {
        self.reader.into_inner()
    }
}
