//! A small Hub on 127.0.0.1: one repository, and connections that break when asked to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

pub(crate) const REPOSITORY: &str = "org/tiny";
const REVISION: &str = "0123abcd";

/// What the server does wrong.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Fault {
    #[default]
    None,
    /// Bodies of downloads end after this many bytes.
    Cut(usize),
    /// Every file has this etag.
    Etag(&'static str),
    /// The commit has this name.
    Revision(&'static str),
    /// Connections are accepted and never answered.
    Silence,
}

/// Files, faults and what was asked for.
pub(crate) struct HubServer {
    pub(crate) endpoint: String,
    pub(crate) fault: Arc<Mutex<Fault>>,
    /// `name` and first byte of each download, in order.
    pub(crate) downloads: Arc<Mutex<Vec<(String, usize)>>>,
    num_requests: Arc<AtomicUsize>,
}

struct Shared {
    files: BTreeMap<&'static str, Vec<u8>>,
    fault: Arc<Mutex<Fault>>,
    downloads: Arc<Mutex<Vec<(String, usize)>>>,
    num_requests: Arc<AtomicUsize>,
}

impl HubServer {
    /// Serves until the test ends.
    pub(crate) fn start(files: BTreeMap<&'static str, Vec<u8>>) -> HubServer {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let (fault, downloads) = (Arc::default(), Arc::default());
        let num_requests: Arc<AtomicUsize> = Arc::default();
        let shared = Arc::new(Shared {
            files,
            fault: Arc::clone(&fault),
            downloads: Arc::clone(&downloads),
            num_requests: Arc::clone(&num_requests),
        });
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                // A client that hangs up in the middle is part of the tests.
                std::thread::spawn(move || drop(answer(stream, &shared)));
            }
        });
        HubServer { endpoint, fault, downloads, num_requests }
    }

    pub(crate) fn set_fault(&self, fault: Fault) {
        *self.fault.lock().expect("no panic holds it") = fault;
    }

    pub(crate) fn num_requests(&self) -> usize {
        self.num_requests.load(Ordering::SeqCst)
    }
}

fn answer(stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    shared.num_requests.fetch_add(1, Ordering::SeqCst);
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut range = String::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(bytes) = line.strip_prefix("range: bytes=") {
            range = bytes.to_owned();
        }
    }
    let fault = shared.fault.lock().expect("no panic holds it").clone();
    let path = request.split(' ').nth(1).unwrap_or("").to_owned();
    let mut stream = reader.into_inner();
    if fault == Fault::Silence {
        // Until the client gives up.
        return std::io::copy(&mut stream, &mut std::io::sink()).map(|_| ());
    }
    let revision = match fault {
        Fault::Revision(name) => name,
        _ => REVISION,
    };
    if path.starts_with(&format!("/api/models/{REPOSITORY}/")) {
        let siblings: Vec<_> =
            shared.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let info = serde_json::json!({"sha": revision, "siblings": siblings}).to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{info}",
            info.len()
        );
    }
    let name = path.strip_prefix(&format!("/{REPOSITORY}/resolve/{revision}/")).unwrap_or("");
    let Some(content) = shared.files.get(name) else {
        return stream.write_all(
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        );
    };
    send_file(&mut stream, name, content, &range, &fault, shared)
}

/// Answers `first-` or `first-last`. Downloads leave the end open, questions about sizes do not.
fn send_file(
    stream: &mut TcpStream,
    name: &str,
    content: &[u8],
    range: &str,
    fault: &Fault,
    shared: &Shared,
) -> std::io::Result<()> {
    let (first, last) = range.split_once('-').unwrap_or(("0", ""));
    let first: usize = first.parse().unwrap_or(0);
    let end = last.parse().map_or(content.len(), |last: usize| last + 1).min(content.len());
    let body = &content[first.min(end)..end];
    let etag = match fault {
        Fault::Etag(etag) => (*etag).to_owned(),
        _ => format!("{}-{}", name.replace('.', "-"), content.len()),
    };
    let is_download = last.is_empty();
    if is_download {
        let mut downloads = shared.downloads.lock().expect("no panic holds it");
        downloads.push((name.to_owned(), first));
    }
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes \
         {first}-{}/{}\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {REVISION}\r\n\
         Connection: close\r\n\r\n",
        body.len(),
        end.saturating_sub(1),
        content.len()
    )?;
    let sent = match fault {
        Fault::Cut(len) if is_download => (*len).min(body.len()),
        _ => body.len(),
    };
    stream.write_all(&body[..sent])
}
