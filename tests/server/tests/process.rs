//! What the tests that need a process of its own start.

/// Not a test: it becomes the server where a test starts it as a child.
#[test]
fn child() {
    bespoke_server_tests::process::run_child();
}
