//! A conversation that the engine remembers: each turn computes its own tokens only.
//!
//! ```sh
//! BESPOKE_MODEL=path/to/model cargo run --release --example session -- path/to/model
//! ```

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use bespoke::config::EngineOptions;
use bespoke::engine::Engine;
use bespoke::kernels::generated;
use bespoke::kv_cache::Namespace;
use bespoke::request::Request;
use bespoke::session::{SessionId, SessionTurn};
use bespoke::tokenizer::{SpecialTokens, Tokenizer};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args().nth(1).map(PathBuf::from).ok_or("usage: session MODEL_DIR")?;
    let tokenizer = Arc::new(Tokenizer::load(&dir)?);
    let options = EngineOptions::new(generated::table());
    let mut engine = Engine::load(&dir, &options, &mut |_| {})?;
    engine.set_tokenizer(Arc::clone(&tokenizer));

    let id = SessionId::new(Namespace::default(), "story")?;
    for (turn, text) in ["Once upon a time", " Then the dog said:", " The end."].iter().enumerate()
    {
        let special = if turn == 0 { SpecialTokens::Add } else { SpecialTokens::Omit };
        let session = SessionTurn { start: turn == 0, ..SessionTurn::of(id.clone()) };
        let request = Request {
            prompt_ids: tokenizer.encode(text, special)?,
            max_tokens: 24,
            session: Some(session),
            ..Request::default()
        };
        let answer = engine.generate(request, &mut |_| ControlFlow::Continue(()))?;
        println!("{text}{}", tokenizer.decode(&answer.output_ids)?);
    }

    // Another end for the same beginning: what both share is neither copied nor computed again.
    let other = SessionId::new(Namespace::default(), "other")?;
    let num_tokens = engine.session_tokens(&id)?.len();
    engine.branch_session(&id, &other, Some(num_tokens / 2))?;
    for info in engine.sessions() {
        eprintln!("session {}: {} tokens", info.id, info.num_tokens);
    }
    engine.end_session(&other)?;
    engine.end_session(&id)?;
    Ok(())
}
