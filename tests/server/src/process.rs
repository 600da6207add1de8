//! The real command in a process of its own: for signals, limits of the system and logs.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bespoke::cli::{self, Console};
use bespoke::kernels::generated;
use serde_json::json;
use tempfile::TempDir;

use crate::{Client, LONG, VOCAB, tokenizer};

/// Arguments of the command in the child, separated by line ends.
const ARGS: &str = "BESPOKE_SERVER_TEST_ARGS";

/// The test whose only purpose is to be the child.
pub const CHILD_TEST: &str = "process::child";

/// A running `bespoke serve` on the null backend. Dropping it kills it.
pub struct ServerProcess {
    child: Child,
    address: SocketAddr,
    log: Arc<Mutex<String>>,
    _model: TempDir,
}

impl ServerProcess {
    /// Starts the command with further arguments, and waits until it listens.
    pub fn start(args: &[&str]) -> ServerProcess {
        ServerProcess::start_after("true", args)
    }

    /// As [`ServerProcess::start`] after the shell command `before`, such as `ulimit -n 64`.
    pub fn start_after(before: &str, args: &[&str]) -> ServerProcess {
        let model = tempfile::tempdir().expect("a temporary folder");
        write_model(model.path());
        let dir = model.path().to_str().expect("a path in UTF-8");
        let mut all = vec!["bespoke", "serve", "--model", dir, "--backend", "null"];
        all.extend(["--port", "0", "--served-model-name", crate::MODEL]);
        all.extend(args);
        let program = env::current_exe().expect("this test has a path");
        let mut child = Command::new("sh")
            .args(["-c", &format!("{before} && exec \"$0\" \"$@\"")])
            .arg(program)
            .args(["--exact", CHILD_TEST, "--nocapture", "--test-threads", "1"])
            .env(ARGS, all.join("\n"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a shell");
        let log = Arc::new(Mutex::new(String::new()));
        let stderr = child.stderr.take().expect("it is a pipe");
        let addresses = follow(stderr, Arc::clone(&log));
        match addresses.recv_timeout(LONG) {
            Ok(address) => ServerProcess { child, address, log, _model: model },
            Err(_) => {
                let _ = child.kill();
                panic!("the server does not listen: {}", log.lock().expect("a log"));
            }
        }
    }

    pub fn client(&self) -> Client {
        Client::new(self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends a signal, as `TERM`.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status().expect("kill runs");
        assert!(status.success(), "kill -s {name} {pid}");
    }

    /// What it has written to standard error.
    pub fn log(&self) -> String {
        self.log.lock().expect("nobody panics over it").clone()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LONG;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not end: {}", self.log());
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // Fails where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The child's side: runs the command and ends the process as `main` would. Does nothing in a test
/// that is no child.
pub fn run_child() {
    let Ok(args) = env::var(ARGS) else { return };
    let mut console = Console {
        out: &mut std::io::stdout(),
        err: &mut std::io::stderr(),
        is_terminal: false,
        kernels: generated::table(),
        home: None,
        program: None,
        bundle: None,
        start: Instant::now(),
        before_main: None,
    };
    let exit = cli::run(args.split('\n'), &mut console);
    std::process::exit(exit as i32);
}

/// Keeps what the child writes, and gives the address that it says it listens on.
fn follow(stderr: impl Read + Send + 'static, log: Arc<Mutex<String>>) -> Receiver<SocketAddr> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if let Some(address) = line.strip_prefix("listening on http://") {
                let _ = sender.send(address.parse().expect("an address"));
            }
            let mut log = log.lock().expect("nobody panics over it");
            log.push_str(&line);
            log.push('\n');
        }
    });
    receiver
}

/// A model folder that the null backend takes: it has no weights.
pub fn write_model(dir: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": true, "torch_dtype": "float32",
    });
    fs::write(dir.join("config.json"), config.to_string()).expect("a writable folder");
    tokenizer::write(dir);
}
