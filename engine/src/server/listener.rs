//! The accept loop: HTTP/1.1 over sockets that are counted and watched.

mod stream;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use futures_util::future::{Either, select};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tower::Service;

use self::stream::{CONNECTION, TrackedBody, WatchedStream};

use super::app::App;
use super::drain::Phase;
use super::metrics::ConnectionEnd;
use crate::error::Error;

pub(super) use self::stream::Activity;

/// The address of a client, an extension of its requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) SocketAddr);

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// What the system holds for a client that takes nothing: a slow reader is noticed soon.
const SEND_BUFFER_BYTES: u32 = 128 << 10;

/// Rests of the accept loop while the system has no file descriptors or memory.
const BACK_OFF: Duration = Duration::from_millis(20);
const BACK_OFF_MAX: Duration = Duration::from_secs(1);

/// Open connections, in all and by client.
#[derive(Default)]
pub(super) struct Connections {
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    num: usize,
    by_client: HashMap<IpAddr, usize>,
}

/// One open connection.
struct Ticket {
    app: Arc<App>,
    connections: Arc<Connections>,
    client: IpAddr,
}

/// Binds `address`. Must be called within the runtime.
pub(super) fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    let bind = || {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_reuseaddr(true)?;
        socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    bind().map_err(|error: io::Error| {
        Error::Resources(format!("cannot listen on {address}: {error}; choose another --port"))
    })
}

/// Accepts connections until the server closes.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    app: Arc<App>,
    connections: Arc<Connections>,
) {
    let mut closing = pin!(app.lifecycle.reached(Phase::Closing));
    let mut back_off = BACK_OFF;
    loop {
        let accepted = match select(pin!(listener.accept()), closing.as_mut()).await {
            Either::Left((accepted, _)) => accepted,
            Either::Right(_) => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                back_off = BACK_OFF;
                admit(stream, peer, &router, &app, &connections);
            }
            // The client gave up while it waited.
            Err(error) if is_of_client(&error) => {}
            Err(error) => {
                app.metrics.connection_ended(ConnectionEnd::NoResources);
                tracing::warn!(%error, "cannot accept a connection");
                // NOTE: the connection stays in the queue, so that a loop without a rest would
                // spin; nobody is told by it that the system has room again.
                select(pin!(tokio::time::sleep(back_off)), closing.as_mut()).await;
                back_off = (back_off * 2).min(BACK_OFF_MAX);
            }
        }
    }
}

fn is_of_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// Serves a connection on a task of its own, or says that there are too many.
fn admit(
    stream: TcpStream,
    peer: SocketAddr,
    router: &Router,
    app: &Arc<App>,
    connections: &Arc<Connections>,
) {
    match connections.enter(app, peer.ip()) {
        Ok(ticket) => {
            let router = router.clone();
            let activity = Arc::new(Activity::default());
            let served = connection(stream, peer, router, ticket, Arc::clone(&activity));
            tokio::spawn(CONNECTION.scope(activity, served));
        }
        Err(reason) => {
            app.metrics.connection_ended(reason);
            // NOTE: what does not fit into an empty buffer is not worth waiting for.
            let _ = stream.try_write(stream::too_many(reason).as_bytes());
        }
    }
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    ticket: Ticket,
    activity: Arc<Activity>,
) {
    // Fails only for sockets that are gone already.
    let _ = stream.set_nodelay(true);
    let app = &ticket.app;
    let io = WatchedStream::new(stream, Arc::clone(app), Arc::clone(&activity));
    let for_bodies = Arc::clone(app);
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut router = router.clone();
        let tracker = activity.begin();
        let mut request: Request = request.map(Body::new);
        request.extensions_mut().insert(Peer(peer));
        let app = Arc::clone(&for_bodies);
        async move {
            let response = router.call(request).await?;
            let track = |body| TrackedBody::new(body, app, tracker);
            Ok::<_, std::convert::Infallible>(response.map(track))
        }
    });
    let limits = &app.options.limits;
    let mut builder = http1::Builder::new();
    builder
        .max_headers(limits.headers_max)
        .max_buf_size(limits.header_bytes_max)
        .header_read_timeout(None)
        .writev(false);
    let mut served = pin!(builder.serve_connection(TokioIo::new(io), service));
    let closing = pin!(app.lifecycle.reached(Phase::Closing));
    // NOTE: what breaks a connection off was counted where it was noticed.
    match select(served.as_mut(), closing).await {
        Either::Left(_) => {}
        Either::Right(_) => {
            served.as_mut().graceful_shutdown();
            let _ = served.await;
        }
    }
}

impl Connections {
    /// Open connections.
    pub(super) fn num(&self) -> usize {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).num
    }

    fn enter(
        self: &Arc<Connections>,
        app: &Arc<App>,
        client: IpAddr,
    ) -> Result<Ticket, ConnectionEnd> {
        let limits = &app.options.limits;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.num >= limits.connections_max {
            return Err(ConnectionEnd::TooMany);
        }
        let num_of_client = open.by_client.get(&client).copied().unwrap_or(0);
        if num_of_client >= limits.connections_per_client_max {
            return Err(ConnectionEnd::TooManyOfClient);
        }
        open.num += 1;
        open.by_client.insert(client, num_of_client + 1);
        app.metrics.connection_opened();
        Ok(Ticket { app: Arc::clone(app), connections: Arc::clone(self), client })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut open = self.connections.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.num -= 1;
        if let Some(num) = open.by_client.get_mut(&self.client) {
            *num -= 1;
            if *num == 0 {
                open.by_client.remove(&self.client);
            }
        }
        self.app.metrics.connection_closed();
    }
}
