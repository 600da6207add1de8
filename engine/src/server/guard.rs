//! What every request passes before and after its handler: the name it calls the server by, other
//! origins, sizes, panics, metrics and the access log.

use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;

use super::app::App;
use super::auth::Caller;
use super::error::ApiError;
use super::listener::Peer;
use super::log::{AccessRecord, LoggedBody, RequestIds};
use super::metrics::Rejection;

/// The outermost layer.
pub(super) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
    let method = request.method().clone();
    let origin = allowed_origin(&app, request.headers());
    let mut response = match check(&app, &request) {
        Err(error) => error.into_response(),
        Ok(()) if origin.is_some() && is_preflight(&request) => preflight(),
        Ok(()) => match AssertUnwindSafe(next.run(request)).catch_unwind().await {
            Ok(response) => response,
            Err(_) => {
                app.metrics.handler_panicked();
                ApiError::internal().into_response()
            }
        },
    };
    let id = RequestIds::next();
    finish_headers(response.headers_mut(), origin, &id);
    let route = route.as_ref().map_or("none", MatchedPath::as_str);
    app.metrics.http_request(route, response.status().as_u16());
    let caller = response.extensions().get::<Caller>().map(|caller| Arc::clone(&caller.name));
    let record = AccessRecord {
        id,
        method,
        route: route.to_owned(),
        status: response.status(),
        caller,
        peer: peer.map(|peer| peer.ip()),
        start,
    };
    LoggedBody::wrap(response, record)
}

fn check(app: &App, request: &Request) -> Result<(), ApiError> {
    if app.options.address.ip().is_loopback() {
        check_host(app, request.uri(), request.headers())
            .inspect_err(|_| app.metrics.rejected(Rejection::WrongHost))?;
    }
    let bytes_max = app.options.limits.body_bytes_max;
    let len = request.headers().get(header::CONTENT_LENGTH);
    let len = len.and_then(|len| len.to_str().ok()?.parse::<u64>().ok());
    if len.is_some_and(|len| len > bytes_max as u64) {
        app.metrics.rejected(Rejection::TooLarge);
        return Err(ApiError::body_too_large(bytes_max));
    }
    Ok(())
}

/// A page that lets its own name point to this machine is not answered.
fn check_host(app: &App, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next().and_then(|host| host.to_str().ok());
    let (Some(host), None) = (host, hosts.next()) else {
        let message = "a request needs exactly one header Host";
        return Err(ApiError::bad_request(None, message));
    };
    let is_known = |authority: &str| is_own_name(authority, &app.options.allowed_hosts);
    match is_known(host) && uri.authority().is_none_or(|of_uri| is_known(of_uri.as_str())) {
        true => Ok(()),
        false => Err(ApiError::misdirected()),
    }
}

/// Whether `authority`, a host with or without a port, names this machine.
fn is_own_name(authority: &str, allowed: &[String]) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    };
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let is_loopback = |text: &str| text.parse().is_ok_and(|it: IpAddr| it.is_loopback());
    // NOTE: some clients leave out the brackets of an address without a port.
    host.eq_ignore_ascii_case("localhost")
        || is_loopback(address)
        || is_loopback(authority)
        || allowed.iter().any(|name| name.eq_ignore_ascii_case(host))
}

/// The request's origin, where it is one that may read the answers.
fn allowed_origin(app: &App, headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let allowed = &app.options.allowed_origins;
    allowed.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes()).then(|| origin.clone())
}

fn is_preflight(request: &Request) -> bool {
    request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

fn preflight() -> Response {
    let headers = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST, DELETE"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, "authorization, content-type"),
        (header::ACCESS_CONTROL_MAX_AGE, "600"),
    ];
    (StatusCode::NO_CONTENT, headers).into_response()
}

fn finish_headers(headers: &mut HeaderMap, origin: Option<HeaderValue>, id: &str) {
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        let exposed = HeaderValue::from_static("retry-after, x-request-id, x-should-retry");
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    }
    let nosniff = HeaderValue::from_static("nosniff");
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, nosniff);
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert("x-request-id", id);
    }
}

/// What a page of this server may do in a browser.
pub(super) async fn page_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    let policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                  img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; \
                  form-action 'none'";
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// 404 for paths that no route has.
pub(super) async fn no_route() -> ApiError {
    ApiError::not_found("there is nothing at this path; /openapi.json lists what there is")
}

/// 405 for methods that a route does not have.
pub(super) async fn no_method() -> ApiError {
    ApiError::method_not_allowed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_its_own() {
        let allowed = ["box.lan".to_owned()];
        for name in [
            "localhost",
            "LOCALHOST:80",
            "127.0.0.1",
            "127.0.0.1:23333",
            "127.9.9.9",
            "[::1]",
            "[::1]:1",
            "::1",
            "box.lan",
            "Box.LAN:1",
        ] {
            assert!(is_own_name(name, &allowed), "{name}");
        }
        for name in [
            "",
            ":80",
            "example.com",
            "localhost.example.com",
            "localhost:80@evil.com",
            "127.0.0.1.nip.io",
            "10.0.0.1",
            "0.0.0.0",
            "x/v1/models?",
            "localhost#",
            "[::2]",
        ] {
            assert!(!is_own_name(name, &allowed), "{name}");
        }
    }
}
