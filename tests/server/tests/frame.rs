//! The server's frame: guards, keys, bodies, panics, health, metrics.

use std::convert::Infallible;
use std::io::Write;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Method;
use bespoke::server::{
    Access, ApiError, ApiJson, App, Caller, Keys, Route, Server, ServerOptions, Work, routes,
};
use bespoke_server_tests::{Answer, Client, Setup, client};
use serde_json::{Value, json};

const KEY: &str = "sk-0123456789abcdef";
const OTHER_KEY: &str = "sk-fedcba9876543210";

/// Says back what it is given.
async fn echo(ApiJson(value): ApiJson<Value>) -> Json<Value> {
    Json(value)
}

async fn whoami(caller: axum::Extension<Caller>) -> String {
    format!("{} {}", caller.name, caller.namespace.0)
}

async fn panics() {
    panic!("a canary in a panic");
}

async fn panics_in_body() -> Body {
    let pieces = futures_util::stream::unfold(0, |idx| async move {
        // What came before is sent meanwhile.
        tokio::task::yield_now().await;
        assert!(idx < 2, "a canary in a body");
        Some((Ok::<_, Infallible>(format!("piece {idx}")), idx + 1))
    });
    Body::from_stream(pieces)
}

async fn panics_in_worker(State(app): State<Arc<App>>) -> Result<(), ApiError> {
    app.workers.run(Work::Grammar, || panic!("a canary in a worker")).await
}

fn test_routes() -> Vec<Route> {
    vec![
        Route::new("/test/echo", Access::Key).post(echo),
        Route::new("/test/whoami", Access::Key).get(whoami),
    ]
}

fn panicking_routes() -> Vec<Route> {
    vec![
        Route::new("/test/panic", Access::Key).get(panics),
        Route::new("/test/panic-in-body", Access::Key).get(panics_in_body),
        Route::new("/test/panic-in-worker", Access::Key).get(panics_in_worker),
    ]
}

fn start(change: impl FnOnce(&mut ServerOptions)) -> (Server, Client) {
    let routes = test_routes().into_iter().chain(panicking_routes()).collect();
    let mut setup = Setup { routes, ..Setup::default() };
    change(&mut setup.server);
    let server = setup.start();
    let client = client(&server);
    (server, client)
}

fn keys() -> Keys {
    Keys::parse(&format!("# who may come in\nalice:{KEY}\n\n{OTHER_KEY}\n")).unwrap()
}

/// The value of a metric, 0 where it has none yet.
fn metric(client: &Client, name: &str) -> f64 {
    let text = client.get("/metrics").text();
    let line = text.lines().find(|line| line.rsplit_once(' ').is_some_and(|(of, _)| of == name));
    line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

#[test]
fn a_server_that_runs_is_live_and_ready() {
    let (_server, client) = start(|_| ());
    for path in ["/live", "/ready", "/health"] {
        let answer = client.get(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    }
    let missing = client.get("/nothing");
    assert_eq!((missing.status, &missing.error()["code"]), (404, &json!("not_found")));
    let wrong = client.request("PUT", "/live", &[], b"");
    assert_eq!((wrong.status, &wrong.error()["code"]), (405, &json!("method_not_allowed")));
    assert_eq!(wrong.header("allow"), Some("GET,HEAD"));
}

#[test]
fn every_route_but_three_and_the_pages_needs_a_key() {
    let (_server, client) = start(|options| options.keys = keys());
    let mut public = Vec::new();
    let mut num_checked = 0;
    for route in routes().into_iter().chain(test_routes()) {
        let path = route.path.replace("{id}", "x").replace("{name}", "x");
        assert!(!path.contains('{'), "{path}: the test knows no value for this");
        for method in &route.methods {
            let ask = |client: &Client| client.request(method.as_str(), &path, &[], b"").status;
            match route.access {
                Access::Public => public.push(route.path),
                Access::Page => assert_eq!(*method, Method::GET, "{path}"),
                Access::Key => {
                    num_checked += 1;
                    for wrong in ["", "x", &KEY[..18], &format!("{KEY}0"), &"k".repeat(4000)] {
                        let wrong = client.clone().with_key(wrong);
                        assert_eq!(ask(&wrong), 401, "{method} {path}");
                    }
                    assert_eq!(ask(&client), 401, "{method} {path}");
                    let known = client.clone().with_key(KEY);
                    assert_ne!(ask(&known), 401, "{method} {path}");
                }
            }
        }
    }
    assert_eq!(public, ["/live", "/ready", "/health"]);
    assert!(num_checked > test_routes().len(), "{num_checked}");
}

#[test]
fn other_spellings_of_a_path_let_nobody_in() {
    let (_server, client) = start(|options| options.keys = keys());
    for path in [
        "/test/whoami/",
        "//test/whoami",
        "/TEST/whoami",
        "/test/%77hoami",
        "/test/whoami;x",
        "/live/../test/whoami",
        "/live/%2e%2e/test/whoami",
        "/test%2fwhoami",
        "/test/whoami?x=/live",
        "/test/whoami#/live",
        "http://localhost/test/whoami",
    ] {
        let answer = client.get(path);
        assert!([400, 401, 404].contains(&answer.status), "{path}: {}", answer.status);
        answer.error();
    }
}

#[test]
fn callers_are_known_by_their_keys() {
    let (_server, client) = start(|options| options.keys = keys());
    let who = |headers: &[(&str, &str)]| client.request("GET", "/test/whoami", headers, b"");
    let text = |answer: Answer| (answer.status, answer.text());
    let alice = text(who(&[("authorization", &format!("Bearer {KEY}"))]));
    assert_eq!(alice.0, 200);
    assert!(alice.1.starts_with("alice "), "{}", alice.1);
    assert_eq!(alice, text(who(&[("authorization", &format!("bearer  {KEY} "))])));
    let other = text(who(&[("authorization", &format!("Bearer {OTHER_KEY}"))]));
    assert!(other.1.starts_with("line-4 "), "{}", other.1);
    let namespace = |text: &str| text.split(' ').next_back().map(str::to_owned);
    assert_ne!(namespace(&alice.1), namespace(&other.1));
    for wrong in [KEY, &format!("Basic {KEY}"), "Bearer", "Bearer ", &format!("Bearer{KEY}")] {
        let answer = who(&[("authorization", wrong)]);
        assert_eq!(answer.status, 401, "{wrong}");
        assert_eq!(answer.error()["code"], "invalid_api_key");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        assert_eq!(answer.header("x-should-retry"), Some("false"));
    }
    let (_server, client) = start(|_| ());
    assert_eq!(client.get("/test/whoami").text(), "anonymous 0");
}

#[test]
fn key_files_that_make_no_sense_are_refused() {
    for (text, part) in [
        ("short", "line 1: a key of 5 bytes"),
        ("a:short", "line 1: a key of 5 bytes"),
        (&format!("{KEY}\n# x\n{KEY}"), "line 3: the key is there already"),
        (&format!("a b:{KEY}"), "cannot name a key"),
        (&format!(":{KEY}"), "cannot name a key"),
        (&format!("a:{KEY} x"), "letters, digits and ASCII signs"),
        (&format!("a:{}", "k".repeat(513)), "513 bytes"),
    ] {
        let error = Keys::parse(text).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
        assert!(!error.contains(KEY), "a key in a message: {error}");
    }
    assert!(!format!("{:?}", keys()).contains("0123"), "a key in debug output");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys");
    assert!(Keys::read(&path).is_err());
    std::fs::write(&path, "# nothing\n").unwrap();
    assert!(Keys::read(&path).unwrap_err().to_string().contains("no key"));
    std::fs::write(&path, format!("a:{KEY}\n")).unwrap();
    assert!(!Keys::read(&path).unwrap().is_empty());
}

#[test]
fn a_loopback_server_answers_to_names_of_its_machine_only() {
    let (_server, client) = start(|options| options.allowed_hosts = vec!["box.lan".to_owned()]);
    let ask = |host: &str| client.request("GET", "/test/whoami", &[("host", host)], b"");
    for host in ["localhost", "127.0.0.1:1", "[::1]:80", "box.lan"] {
        assert_eq!(ask(host).status, 200, "{host}");
    }
    for host in ["evil.com", "localhost.evil.com", "10.0.0.1", "x/v1/models?", ""] {
        let answer = ask(host);
        assert_eq!((answer.status, &answer.error()["code"]), (421, &json!("misdirected_request")));
    }
    let absolute = client.request("GET", "http://evil.com/test/whoami", &[], b"");
    assert_eq!(absolute.status, 421);
    let head = "GET /test/whoami HTTP/1.1\r\nconnection: close\r\n";
    assert_eq!(client.send(format!("{head}\r\n").as_bytes()).status, 400);
    let two = format!("{head}host: localhost\r\nhost: evil.com\r\n\r\n");
    assert_eq!(client.send(two.as_bytes()).status, 400);
    assert_eq!(metric(&client, "bespoke_rejections_total{reason=\"wrong_host\"}"), 8.0);
}

#[test]
fn other_origins_are_told_nothing_unless_they_are_allowed() {
    let origin = "https://app.example";
    let ask = |client: &Client, method: &str, origin: &str| {
        let headers = [("origin", origin), ("access-control-request-method", "POST")];
        client.request(method, "/test/whoami", &headers, b"")
    };
    let has_cors = |answer: &Answer| {
        answer.headers.iter().any(|(name, _)| name.starts_with("access-control-"))
    };
    let (_server, client) = start(|_| ());
    for method in ["GET", "OPTIONS"] {
        assert!(!has_cors(&ask(&client, method, origin)), "{method}");
    }
    let (_server, client) = start(|options| options.allowed_origins = vec![origin.to_owned()]);
    for method in ["GET", "OPTIONS"] {
        assert!(!has_cors(&ask(&client, method, "https://evil.example")), "{method}");
        let answer = ask(&client, method, origin);
        assert_eq!(answer.header("access-control-allow-origin"), Some(origin), "{method}");
        assert_eq!(answer.header("access-control-allow-credentials"), None);
        assert_eq!(answer.header("vary"), Some("Origin"));
    }
    assert_eq!(ask(&client, "OPTIONS", origin).status, 204);
}

#[test]
fn heads_are_bounded() {
    let (_server, client) = start(|_| ());
    let with = |num: usize, len: usize| {
        let name_of = |idx: usize| format!("x-{idx}");
        let names: Vec<String> = (0..num).map(name_of).collect();
        let value = "v".repeat(len);
        let headers: Vec<_> = names.iter().map(|name| (name.as_str(), value.as_str())).collect();
        client.request("GET", "/live", &headers, b"")
    };
    // With Host and Connection.
    assert_eq!(with(62, 10).status, 200);
    let many = with(63, 10);
    assert_eq!((many.status, &many.error()["code"]), (431, &json!("headers_too_large")));
    assert_eq!(with(1, 15 << 10).status, 200);
    let long = with(1, 17 << 10);
    assert_eq!((long.status, &long.error()["code"]), (431, &json!("headers_too_large")));
    let malformed = client.send(b"GET /live HTTP/1.1\r\nbad header\r\n\r\n").into_answer();
    assert_eq!(malformed.status, 400);
    assert_eq!(malformed.error()["code"], "malformed_request");
    assert_eq!(client.send(b"\x16\x03\x01\x00\xa5\x01\x00\x00\r\n\r\n").status, 400);
    assert_eq!(metric(&client, "bespoke_connection_ends_total{reason=\"malformed\"}"), 2.0);
    assert_eq!(metric(&client, "bespoke_rejections_total{reason=\"too_large\"}"), 2.0);
}

#[test]
fn bodies_are_bounded() {
    let (_server, client) = start(|options| options.limits.body_bytes_max = 1000);
    let json = ("content-type", "application/json");
    let post = |headers: &[(&str, &str)], body: &str| {
        client.request("POST", "/test/echo", headers, body.as_bytes())
    };
    let text = |len: usize| json!("x".repeat(len - 2)).to_string();
    assert_eq!(post(&[json], &text(1000)).status, 200);
    let large = post(&[json], &text(1001));
    assert_eq!((large.status, &large.error()["code"]), (413, &json!("request_too_large")));
    // Refused by what it says, before it comes.
    let head = client.head("POST", "/test/echo", &[json, ("content-length", "99999999999")], 0);
    assert_eq!(client.send(head.as_bytes()).status, 413);
    let chunked = |body: &str| {
        let chunks: String = body.chars().map(|c| format!("1\r\n{c}\r\n")).collect();
        let head = client.head("POST", "/test/echo", &[json, ("transfer-encoding", "chunked")], 0);
        client.send(format!("{head}{chunks}0\r\n\r\n").as_bytes()).into_answer()
    };
    assert_eq!(chunked(&text(1000)).status, 200);
    assert_eq!(chunked(&text(1001)).status, 413);
    let kind = post(&[("content-type", "text/plain")], "{}");
    assert_eq!((kind.status, &kind.error()["code"]), (415, &json!("unsupported_media_type")));
    assert_eq!(post(&[], "{}").status, 415);
    let broken = post(&[json, ("transfer-encoding", "chunked")], "zz\r\n");
    assert_eq!(broken.status, 400);
}

#[test]
fn bodies_say_one_thing() {
    let (_server, client) = start(|_| ());
    let post = |body: &[u8]| {
        let headers = [("content-type", "application/json; charset=utf-8")];
        client.request("POST", "/test/echo", &headers, body)
    };
    let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    assert_eq!(post(nested(64).as_bytes()).status, 200);
    let refused: [&[u8]; 10] = [
        nested(65).as_bytes(),
        &nested(100_000).into_bytes(),
        b"",
        b"{",
        b"{} {}",
        b"{\"a\":1,\"a\":2}",
        b"\"\xff\xfe\"",
        br#""\ud800""#,
        b"[1e999]",
        b"NaN",
    ]
    .map(|body: &[u8]| Box::leak(body.to_vec().into_boxed_slice()) as &[u8]);
    for body in refused {
        let answer = post(body);
        let shown = String::from_utf8_lossy(&body[..body.len().min(20)]);
        assert_eq!(
            (answer.status, &answer.error()["code"]),
            (400, &json!("invalid_json")),
            "{shown}"
        );
    }
    let text = json!({"nul": "a\u{0}b", "emoji": "\u{1f600}", "big": u64::MAX, "small": i64::MIN});
    assert_eq!(post(text.to_string().as_bytes()).json(), text);
}

#[test]
fn memory_for_bodies_is_bounded() {
    let (_server, client) = start(|options| {
        options.limits.body_bytes_max = 64 << 10;
        options.limits.all_bodies_bytes_max = 64 << 10;
    });
    let kind = ("content-type", "application/json");
    let len = (48 << 10).to_string();
    let head = client.head("POST", "/test/echo", &[kind, ("content-length", &len)], 0);
    let hold = || {
        let mut held = client.connect();
        held.write_all(format!("{head}\"{}", "x".repeat(40 << 10)).as_bytes()).unwrap();
        held.set_nonblocking(true).unwrap();
        held
    };
    let body = json!("y".repeat(40 << 10));
    let mut held = hold();
    let refused = loop {
        let answer = client.post("/test/echo", &body);
        if answer.status != 200 {
            break answer;
        }
        // Of two that come at once either may be the one that is refused.
        if held.peek(&mut [0]).is_ok() {
            held = hold();
        }
    };
    assert_eq!((refused.status, &refused.error()["code"]), (503, &json!("out_of_resources")));
    assert!(refused.header("retry-after").is_some());
    drop(held);
    while client.post("/test/echo", &body).status != 200 {}
}

#[test]
fn a_panic_is_the_end_of_one_request() {
    let (_server, client) = start(|_| ());
    let answer = client.get("/test/panic");
    assert_eq!((answer.status, &answer.error()["code"]), (500, &json!("internal_error")));
    assert!(!answer.text().contains("canary"));
    assert_eq!(metric(&client, "bespoke_handler_panics_total"), 1.0);
    let worker = client.get("/test/panic-in-worker");
    assert_eq!(worker.status, 500);
    assert!(!worker.text().contains("canary"));
    let name = "bespoke_worker_failures_total{work=\"grammar\",reason=\"panic\"}";
    assert_eq!(metric(&client, name), 1.0);
    let mut body = client.send(client.head("GET", "/test/panic-in-body", &[], 0).as_bytes());
    assert_eq!(body.status, 200);
    let mut text = Vec::new();
    let error = loop {
        match body.next_piece() {
            Ok(Some(piece)) => text.extend(piece),
            Ok(None) => panic!("a broken answer looks whole"),
            Err(error) => break error,
        }
    };
    assert!(b"piece 0piece 1".starts_with(&text[..]), "{error}");
    assert_eq!(metric(&client, "bespoke_handler_panics_total"), 2.0);
    assert_eq!(client.get("/ready").status, 200);
}

#[test]
fn metrics_have_the_names_that_are_promised() {
    let (_server, client) = start(|_| ());
    let answer = client.get("/metrics");
    let kind = answer.header("content-type").unwrap().to_owned();
    assert!(kind.starts_with("application/openmetrics-text; version=1.0.0"), "{kind}");
    let text = answer.text();
    assert!(text.ends_with("# EOF\n"));
    for name in [
        "bespoke_engine_running 0",
        "bespoke_engine_waiting 0",
        "bespoke_queue_tokens 0",
        "bespoke_pages_total 2048",
        "bespoke_pages_free 2048",
        "bespoke_pages_used 0",
        "bespoke_pages_cached 0",
        "bespoke_preemptions_total 0",
        "bespoke_nan_rows_total 0",
        "bespoke_prefix_cache_hit_tokens_total 0",
        "bespoke_prompt_tokens_total 0",
        "bespoke_output_tokens_total 0",
        "bespoke_time_to_first_token_seconds_count 0",
        "bespoke_inter_token_seconds_count 0",
        "bespoke_request_time_seconds_count 0",
        "bespoke_step_time_seconds_count 0",
        "bespoke_sessions 0",
        "bespoke_sessions_expired_total 0",
        "vllm:num_requests_running 0",
        "vllm:num_requests_waiting 0",
        "vllm:kv_cache_usage_perc 0.0",
        "vllm:gpu_cache_usage_perc 0.0",
        "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"2048\"} 1",
        "bespoke_connections 1",
    ] {
        assert!(text.lines().any(|line| line == name), "{name}:\n{text}");
    }
    assert!(text.contains("bespoke_build_info{version=\""), "{text}");
}

#[test]
fn metrics_have_an_address_of_their_own() {
    let (server, client) = start(|options| {
        options.keys = keys();
        options.metrics_address = Some("127.0.0.1:0".parse().unwrap());
    });
    assert_eq!(client.get("/metrics").status, 401);
    assert_eq!(client.with_key(KEY).get("/metrics").status, 200);
    let metrics = Client::new(server.metrics_address().unwrap());
    assert_eq!(metrics.get("/metrics").status, 200);
    assert_eq!(metrics.get("/test/whoami").status, 404);
}
