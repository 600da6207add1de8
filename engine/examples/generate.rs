//! Continues a text on one thread: an engine, a callback that sees each token, and an end of one's
//! own.
//!
//! ```sh
//! BESPOKE_MODEL=path/to/model cargo run --release --example generate -- path/to/model "Once upon"
//! ```

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use bespoke::config::EngineOptions;
use bespoke::engine::Engine;
use bespoke::kernels::generated;
use bespoke::request::Request;
use bespoke::sampling::SamplingParams;
use bespoke::tokenizer::stream::TextStream;
use bespoke::tokenizer::{SpecialTokens, Tokenizer};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(dir), Some(prompt)) = (arguments.next(), arguments.next()) else {
        return Err("usage: generate MODEL_DIR PROMPT".into());
    };
    let dir = PathBuf::from(dir);
    let tokenizer = Arc::new(Tokenizer::load(&dir)?);
    let options = EngineOptions::new(generated::table());
    let mut engine = Engine::load(&dir, &options, &mut |progress| {
        eprint!("\rloading {} of {}", progress.num_done, progress.num_parts);
    })?;
    eprintln!();
    engine.set_tokenizer(Arc::clone(&tokenizer));

    let request = Request {
        prompt_ids: tokenizer.encode(&prompt, SpecialTokens::Add)?,
        max_tokens: 200,
        sampling: SamplingParams { temperature: 0.7, top_p: 0.9, ..SamplingParams::default() },
        ..Request::default()
    };
    let mut stream = TextStream::new(tokenizer);
    let (mut failure, mut num_lines) = (None, 0);
    let generation = engine.generate(request, &mut |output| {
        let Some(token) = output.token else { return ControlFlow::Continue(()) };
        match stream.push(token) {
            Ok(text) => {
                print!("{text}");
                num_lines += text.matches('\n').count();
            }
            Err(error) => failure = Some(error),
        }
        // Three lines are enough.
        match failure.is_some() || num_lines >= 3 {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    })?;
    if let Some(error) = failure {
        return Err(error.into());
    }
    println!("{}", stream.flush()?);
    let reason = generation.finish_reason.map_or("broken off", |reason| reason.name());
    eprintln!("{} tokens: {reason}", generation.output_ids.len());
    Ok(())
}
