//! A body that comes byte by byte costs time, not memory.

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;

use bespoke_server_tests::{LONG, MODEL, Setup};
use serde_json::json;

use crate::process::{alone, memory_bytes};

/// Chunks of one byte; with their frames, six bytes each on the wire.
const NUM_CHUNKS: usize = 1_000_000;
const MEMORY_GROWTH_MAX: u64 = 16 << 20;

#[test]
fn a_million_chunks_of_one_byte_take_no_more_than_their_bytes() {
    let _alone = alone();
    let server = Setup::default().start();
    let request = json!({"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 1}).to_string();
    let padding = " ".repeat(NUM_CHUNKS - request.len());
    let memory_before = memory_bytes();
    let mut stream = TcpStream::connect(server.address()).expect("the server listens");
    stream.set_read_timeout(Some(LONG)).expect("a time that is not zero");
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n\
         transfer-encoding: chunked\r\nconnection: close\r\n\r\n",
        server.address()
    );
    stream.write_all(head.as_bytes()).expect("the server reads");
    let mut memory_most = 0;
    let body = request + &padding;
    for part in body.as_bytes().chunks(4096) {
        let chunks: Vec<u8> =
            part.iter().flat_map(|byte| [b'1', b'\r', b'\n', *byte, b'\r', b'\n']).collect();
        stream.write_all(&chunks).expect("the server reads");
        memory_most = memory_most.max(memory_bytes());
    }
    stream.write_all(b"0\r\n\r\n").expect("the server reads");
    let mut answer = String::new();
    BufReader::new(stream).read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let growth = memory_most.saturating_sub(memory_before);
    assert!(growth <= MEMORY_GROWTH_MAX, "memory grew by {growth} bytes");
}
