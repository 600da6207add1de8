//! The server's frame: guards, keys, health, metrics.

use bespoke_server_tests::{Setup, client};

#[test]
fn a_server_that_runs_is_live_and_ready() {
    let server = Setup::default().start();
    let client = client(&server);
    for path in ["/live", "/ready", "/health"] {
        let answer = client.get(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    }
    assert!(client.get("/metrics").text().contains("bespoke_engine_running 0\n"));
    assert_eq!(client.get("/nothing").error()["code"], "not_found");
}
