//! The web chat and the dashboard: what is served, to whom, and that all of it belongs together.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bespoke::handle::Submission;
use bespoke::request::Request;
use bespoke::server::Keys;
use bespoke::server::page::{ASSETS, Asset};
use bespoke_server_tests::{LONG, Setup, client};
use serde_json::Value;

/// Characters of all files together: a page that loads at once.
const CHARS_MAX: usize = 132_000;

const KEY: &str = "0123456789abcdef";

fn text(asset: &Asset) -> &'static str {
    std::str::from_utf8(asset.bytes).expect("assets are text")
}

#[test]
fn files_come_to_everybody_with_strict_headers() {
    let mut setup = Setup::default();
    setup.server.keys = Keys::parse(KEY).expect("a key");
    let server = setup.start();
    let client = client(&server);
    for asset in ASSETS {
        let answer = client.get(asset.path);
        assert_eq!(answer.status, 200, "{}", asset.path);
        assert_eq!(answer.body, asset.bytes, "{}", asset.path);
        for (name, value) in [
            ("content-type", asset.kind),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-cache"),
            (
                "content-security-policy",
                "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                 img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; \
                 form-action 'none'",
            ),
        ] {
            assert_eq!(answer.header(name), Some(value), "{}: {name}", asset.path);
        }
    }
}

#[test]
fn a_copy_that_is_still_right_is_not_sent_again() {
    let server = Setup::default().start();
    let client = client(&server);
    let tag = client.get("/").header("etag").expect("a tag").to_owned();
    let ask = |tag: &str| client.request("GET", "/", &[("if-none-match", tag)], b"");
    let same = ask(&tag);
    assert_eq!((same.status, same.body.len(), same.header("etag")), (304, 0, Some(&*tag)));
    assert_eq!(ask(&format!("\"other\", {tag}")).status, 304);
    assert_eq!(ask("\"other\"").status, 200);
    let others: BTreeSet<String> = ASSETS
        .iter()
        .map(|asset| client.get(asset.path).header("etag").expect("a tag").to_owned())
        .collect();
    assert_eq!(others.len(), ASSETS.len(), "equal tags of different files");
}

/// What a file of a page asks for: `"/page/…"` and imports of neighbours.
fn references(asset: &Asset) -> BTreeSet<String> {
    let quoted = text(asset).split('"').skip(1).step_by(2);
    let mut found: BTreeSet<String> = quoted
        .filter_map(|quoted| match quoted.strip_prefix("./") {
            Some(name) => Some(format!("/page/{name}")),
            None => quoted.starts_with("/page/").then(|| quoted.to_owned()),
        })
        .collect();
    found.remove(asset.path);
    found
}

#[test]
fn files_belong_together() {
    let paths: BTreeSet<String> = ASSETS.iter().map(|asset| asset.path.to_owned()).collect();
    let mut used = BTreeSet::from(["/", "/dashboard", "/docs"].map(str::to_owned));
    for asset in ASSETS {
        let references = references(asset);
        let missing: Vec<_> = references.difference(&paths).collect();
        assert!(missing.is_empty(), "{} asks for {missing:?}", asset.path);
        used.extend(references);
    }
    assert_eq!(used, paths, "files that no page asks for");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../engine/src/server/page");
    let is_asset = |path: &PathBuf| {
        let content = fs::read(path).expect("a readable file");
        ASSETS.iter().any(|asset| asset.bytes == content)
    };
    let files = fs::read_dir(&folder).expect("the folder of the page");
    for path in files.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file()) {
        assert!(is_asset(&path), "{} is not served", path.display());
    }
    let size: usize = ASSETS.iter().map(|asset| asset.bytes.len()).sum();
    assert!(size <= CHARS_MAX, "the pages have {size} bytes, more than {CHARS_MAX}");
}

/// What the policy would not let work, and what would let text of a model act.
#[test]
fn nothing_is_inline_and_nothing_comes_from_elsewhere() {
    for asset in ASSETS {
        let (path, text) = (asset.path, text(asset));
        let mut forbidden = vec![
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "srcdoc",
            "new Function",
            "DOMParser",
            "createContextualFragment",
            "import(",
        ];
        match asset.kind.split(';').next() {
            Some("text/html") => {
                forbidden.extend(["<script>", "<style", " style=", " onclick=", "http:", "https:"]);
            }
            Some("text/css") => forbidden.extend(["@import", "url(", "http:", "https:"]),
            _ => {}
        }
        for word in forbidden {
            assert!(!text.contains(word), "{path} has {word}");
        }
    }
}

fn numbers(server: &bespoke::server::Server) -> Value {
    let answer = client(server).get("/dashboard/data");
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[test]
fn the_dashboard_has_the_engines_numbers() {
    let server = Setup::default().start();
    let before = numbers(&server);
    assert_eq!(before["state"], "running");
    assert_eq!(before["output_tokens"], 0);
    let pages = |numbers: &Value, state: &str| numbers["pages"][state].as_u64();
    assert_eq!(pages(&before, "total"), Some(2048));
    assert_eq!(pages(&before, "free"), Some(2048));
    let request = Request { prompt_ids: vec![3; 100], max_tokens: 5, ..Request::default() };
    let request = Request { ignore_eos: true, ..request };
    let submission = server.app().handle.submit(request).expect("a request that is possible");
    let Submission::Accepted(mut stream) = submission else { panic!("an idle engine refused") };
    while !stream.has_ended() {
        stream.next_timeout(LONG).expect("an event in time");
    }
    let after = numbers(&server);
    assert_eq!(after["output_tokens"], 5);
    assert_eq!(after["requests"]["finished"], 1);
    assert_eq!(after["requests"]["running"], 0);
    assert!(after["steps"].as_u64() >= Some(5), "{after}");
    assert_eq!(pages(&after, "active"), Some(0));
    // Full pages of the prompt stay; the rest is free again.
    assert!(pages(&after, "cached") >= Some(1), "{after}");
    let sum = ["free", "active", "cached"].iter().filter_map(|state| pages(&after, state)).sum();
    assert_eq!(pages(&after, "total"), Some(sum));
    for latency in ["first_token", "between_tokens", "request", "step"] {
        let latency = &after["latencies"][latency];
        let lens = ["bounds_s", "counts"].map(|part| latency[part].as_array().map_or(0, Vec::len));
        assert!(lens[0] > 5 && lens[1] == lens[0] + 1, "{latency}");
    }
    let counts = after["latencies"]["step"]["counts"].as_array().expect("buckets");
    let num_steps: u64 = counts.iter().filter_map(Value::as_u64).sum();
    assert_eq!(Some(num_steps), after["steps"].as_u64());
}

#[test]
fn the_dashboards_numbers_need_a_key_and_come_while_the_engine_is_busy() {
    let mut setup = Setup::default();
    setup.server.keys = Keys::parse(KEY).expect("a key");
    let server = setup.start();
    let stranger = client(&server);
    assert_eq!(stranger.get("/dashboard/data").status, 401);
    let known = client(&server).with_key(KEY);
    assert_eq!(known.get("/dashboard/data").json()["state"], "running");
    assert!(!known.get("/dashboard/data").json()["engine"].is_null());
    // Held by a call, the engine answers late: the last numbers come in its place.
    let (entered, has_entered) = std::sync::mpsc::channel();
    let (leave, may_leave) = std::sync::mpsc::channel::<()>();
    let handle = server.app().handle.clone();
    let call = std::thread::spawn(move || {
        handle.call(move |_| {
            entered.send(()).expect("the test waits");
            may_leave.recv_timeout(LONG).expect("the test lets go");
        })
    });
    has_entered.recv_timeout(LONG).expect("the engine is called");
    assert!(!known.get("/dashboard/data").json()["engine"].is_null());
    leave.send(()).expect("the engine waits");
    call.join().expect("no panic").expect("the engine runs");
    assert_eq!(known.get("/dashboard/data").status, 200);
}
