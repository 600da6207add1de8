//! What a server is told before it starts: addresses, keys, limits and time-outs.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::auth::Keys;
use crate::error::Error;

/// Options of [`Server::start`](super::Server::start). The defaults are those of a server that may
/// be exposed.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where to listen. Port 0 takes a free one.
    pub address: SocketAddr,
    /// A second address that serves `/metrics` alone, without a key.
    pub metrics_address: Option<SocketAddr>,
    /// Who may use the server; none: everybody who reaches it.
    pub keys: Keys,
    /// Listens to other machines even without keys.
    pub allows_anyone: bool,
    /// Origins whose pages may use the server from a browser, as `https://example.com`.
    pub allowed_origins: Vec<String>,
    /// Names by which a server on the loopback address may be called besides `localhost`.
    pub allowed_hosts: Vec<String>,
    /// Where sessions are kept while the server does not run.
    pub session_dir: Option<PathBuf>,
    /// Sessions that nobody used for so long are ended.
    pub session_ttl: Duration,
    pub limits: ServerLimits,
    pub timeouts: Timeouts,
}

/// Sizes and counts that a server accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// Connections at once.
    pub connections_max: usize,
    /// Connections of one client address at once.
    pub connections_per_client_max: usize,
    /// Header lines of a request.
    pub headers_max: usize,
    /// Bytes of a request's head; at least 8,192.
    pub header_bytes_max: usize,
    /// Bytes of a request's body.
    pub body_bytes_max: usize,
    /// Bytes of all bodies that are held at once.
    pub all_bodies_bytes_max: usize,
    /// Nesting of arrays and objects in a body.
    pub json_depth_max: usize,
    /// Threads that tokenize, render and compile.
    pub worker_threads: usize,
    /// Tasks that wait for such a thread.
    pub worker_queue_max: usize,
    /// Threads that serve sockets.
    pub io_threads: usize,
}

/// How long a server waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For the head of a request, from its first byte, and for the first byte of a connection.
    pub header: Duration,
    /// For the next request on a connection.
    pub keep_alive: Duration,
    /// For the whole body of a request.
    pub body: Duration,
    /// For a client that takes no data.
    pub write: Duration,
    /// For the whole answer to a request.
    pub request: Duration,
    /// For the first token of a request.
    pub queue: Duration,
    /// For one task of tokenizer, template or grammar.
    pub worker: Duration,
    /// For one step of the engine; the server gives up then.
    pub step: Duration,
    /// For running requests, after the server was told to stop.
    pub drain: Duration,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), ServerOptions::PORT),
            metrics_address: None,
            keys: Keys::default(),
            allows_anyone: false,
            allowed_origins: Vec::new(),
            allowed_hosts: Vec::new(),
            session_dir: None,
            session_ttl: Duration::from_secs(15 * 60),
            limits: ServerLimits::default(),
            timeouts: Timeouts::default(),
        }
    }
}

impl Default for ServerLimits {
    fn default() -> ServerLimits {
        ServerLimits {
            connections_max: 1024,
            connections_per_client_max: 64,
            headers_max: 64,
            header_bytes_max: 16 << 10,
            body_bytes_max: 2 << 20,
            all_bodies_bytes_max: 64 << 20,
            json_depth_max: 64,
            worker_threads: 2,
            worker_queue_max: 512,
            io_threads: 2,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            header: Duration::from_secs(10),
            keep_alive: Duration::from_secs(75),
            body: Duration::from_secs(30),
            write: Duration::from_secs(30),
            request: Duration::from_secs(600),
            queue: Duration::from_secs(60),
            worker: Duration::from_secs(10),
            step: Duration::from_secs(60),
            drain: Duration::from_secs(30),
        }
    }
}

impl ServerOptions {
    /// The port where none is asked for, LMDeploy's.
    pub const PORT: u16 = 23333;

    /// Refuses what makes no sense, and what would expose the server to others without a key.
    pub fn check(&self) -> Result<(), Error> {
        self.limits.check()?;
        let is_open = self.keys.is_empty() && !self.allows_anyone;
        let others = [Some(self.address), self.metrics_address];
        match others.into_iter().flatten().find(|address| !address.ip().is_loopback()) {
            Some(address) if is_open => Err(Error::Request(format!(
                "{} can be reached from other machines, and there are no keys: name a file with \
                 --api-key-file, listen on 127.0.0.1, or let anyone in with --insecure-no-auth",
                address.ip()
            ))),
            _ => self.check_origins(),
        }
    }

    fn check_origins(&self) -> Result<(), Error> {
        let is_origin = |origin: &str| match origin.split_once("://") {
            Some(("http" | "https", host)) => {
                !host.is_empty() && host.chars().all(|c| c.is_ascii_graphic() && c != '/')
            }
            _ => false,
        };
        match self.allowed_origins.iter().find(|origin| !is_origin(origin)) {
            Some(origin) => Err(Error::Request(format!(
                "{origin:?} is no origin; write scheme and host, such as https://example.com"
            ))),
            None => Ok(()),
        }
    }
}

impl ServerLimits {
    /// hyper's smallest buffer.
    const HEADER_BYTES_MIN: usize = 8 << 10;

    fn check(&self) -> Result<(), Error> {
        let at_least_one = [
            ("connections_max", self.connections_max),
            ("connections_per_client_max", self.connections_per_client_max),
            ("headers_max", self.headers_max),
            ("body_bytes_max", self.body_bytes_max),
            ("json_depth_max", self.json_depth_max),
            ("worker_threads", self.worker_threads),
            ("worker_queue_max", self.worker_queue_max),
            ("io_threads", self.io_threads),
        ];
        if let Some((name, _)) = at_least_one.into_iter().find(|(_, value)| *value == 0) {
            return Err(Error::Request(format!("{name} is 0, it must be at least 1")));
        }
        if self.header_bytes_max < ServerLimits::HEADER_BYTES_MIN {
            return Err(Error::Request(format!(
                "header_bytes_max is {}, it must be at least {}",
                self.header_bytes_max,
                ServerLimits::HEADER_BYTES_MIN
            )));
        }
        if self.all_bodies_bytes_max < self.body_bytes_max {
            return Err(Error::Request(format!(
                "all_bodies_bytes_max is {}, it must be at least body_bytes_max, {}",
                self.all_bodies_bytes_max, self.body_bytes_max
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_or_an_explicit_word_open_the_server_to_others() {
        let check = |address: &str, keys: &str, allows_anyone| {
            let address = SocketAddr::new(address.parse().unwrap(), 1);
            let keys = Keys::parse(keys).unwrap();
            ServerOptions { address, keys, allows_anyone, ..ServerOptions::default() }.check()
        };
        for loopback in ["127.0.0.1", "127.1.2.3", "::1"] {
            assert!(check(loopback, "", false).is_ok(), "{loopback}");
        }
        for open in ["0.0.0.0", "::", "192.168.1.1", "8.8.8.8"] {
            let error = check(open, "", false).unwrap_err().to_string();
            assert!(error.contains("--api-key-file"), "{error}");
            assert!(check(open, "a:0123456789abcdef", false).is_ok(), "{open}");
            assert!(check(open, "", true).is_ok(), "{open}");
        }
        let options = ServerOptions {
            metrics_address: Some("0.0.0.0:9".parse().unwrap()),
            ..ServerOptions::default()
        };
        assert!(options.check().is_err());
    }

    #[test]
    fn limits_and_origins_are_checked() {
        let with = |change: fn(&mut ServerOptions)| {
            let mut options = ServerOptions::default();
            change(&mut options);
            options.check().map_err(|error| error.to_string())
        };
        assert_eq!(with(|_| ()), Ok(()));
        assert!(with(|o| o.limits.io_threads = 0).unwrap_err().contains("io_threads is 0"));
        assert!(with(|o| o.limits.header_bytes_max = 100).unwrap_err().contains("8192"));
        assert!(with(|o| o.limits.all_bodies_bytes_max = 1).unwrap_err().contains("body_bytes"));
        for origin in ["*", "example.com", "https://", "https://a/b", "ftp://a", "https://a b"] {
            let options = ServerOptions {
                allowed_origins: vec![origin.to_owned()],
                ..ServerOptions::default()
            };
            assert!(options.check().is_err(), "{origin}");
        }
        assert_eq!(with(|o| o.allowed_origins = vec!["https://a.b:1".to_owned()]), Ok(()));
    }
}
