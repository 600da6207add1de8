//! The web chat, the dashboard's page and that of the API: files that the binary carries.
//!
//! They hold nothing of a server, so everybody gets them; what they show they ask for with the key
//! that the person at the page gives.

use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::{Access, Route};

/// A file of the pages.
#[derive(Clone, Copy, Debug)]
pub struct Asset {
    /// Where it is served.
    pub path: &'static str,
    /// Its media type.
    pub kind: &'static str,
    pub bytes: &'static [u8],
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// The file `page/$name`, served at `$path`.
macro_rules! asset {
    ($path:expr, $name:literal, $kind:expr) => {
        Asset { path: $path, kind: $kind, bytes: include_bytes!(concat!("page/", $name)) }
    };
    ($name:literal, $kind:expr) => {
        asset!(concat!("/page/", $name), $name, $kind)
    };
}

/// All of them.
pub const ASSETS: &[Asset] = &[
    asset!("/", "index.html", HTML),
    asset!("/dashboard", "dashboard.html", HTML),
    asset!("/docs", "docs.html", HTML),
    asset!("base.css", CSS),
    asset!("chat.css", CSS),
    asset!("dashboard.css", CSS),
    asset!("docs.css", CSS),
    asset!("icon.svg", "image/svg+xml"),
    asset!("answer.js", SCRIPT),
    asset!("app.js", SCRIPT),
    asset!("charts.js", SCRIPT),
    asset!("client.js", SCRIPT),
    asset!("composer.js", SCRIPT),
    asset!("conversation.js", SCRIPT),
    asset!("dashboard.js", SCRIPT),
    asset!("dialogs.js", SCRIPT),
    asset!("docs.js", SCRIPT),
    asset!("dom.js", SCRIPT),
    asset!("markdown.js", SCRIPT),
    asset!("render.js", SCRIPT),
    asset!("settings.js", SCRIPT),
    asset!("settings_panel.js", SCRIPT),
    asset!("sidebar.js", SCRIPT),
    asset!("sse.js", SCRIPT),
    asset!("statistics.js", SCRIPT),
    asset!("store.js", SCRIPT),
    asset!("theme.js", SCRIPT),
];

pub(super) fn routes() -> Vec<Route> {
    ASSETS.iter().map(route).collect()
}

fn route(asset: &'static Asset) -> Route {
    let tag = format!("\"{}\"", &blake3::hash(asset.bytes).to_hex()[..16]);
    Route::new(asset.path, Access::Page)
        .get(move |headers: HeaderMap| async move { serve(asset, &tag, &headers) })
}

/// The file, or that the browser's copy is still right.
fn serve(asset: &Asset, tag: &str, headers: &HeaderMap) -> Response {
    let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    let tag_header = (header::ETAG, tag.to_owned());
    if known.is_some_and(|known| known.split(',').any(|known| known.trim() == tag)) {
        return (StatusCode::NOT_MODIFIED, [tag_header]).into_response();
    }
    let kind = (header::CONTENT_TYPE, asset.kind.to_owned());
    ([kind, tag_header], asset.bytes).into_response()
}
