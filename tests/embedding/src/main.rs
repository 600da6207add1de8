//! Goes on from a text with the model that this program was made for.
//!
//! ```sh
//! cargo run -- path/to/model "Once upon a time"
//! ```

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use bespoke::binding::Binding;
use bespoke::engine::Engine;
use bespoke::handle::{EngineHandle, Event, HandleLimits, Submission};
use bespoke::request::Request;
use bespoke::tokenizer::stream::TextStream;
use bespoke::tokenizer::{SpecialTokens, Tokenizer};
use bespoke_embedding::model;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(dir), Some(prompt)) = (arguments.next(), arguments.next()) else {
        return Err("usage: bespoke-embedding MODEL_DIR PROMPT".into());
    };
    let dir = PathBuf::from(dir);
    let tokenizer = Arc::new(Tokenizer::load(&dir)?);
    let prompt_ids = tokenizer.encode(&prompt, SpecialTokens::Add)?;
    let mut text = TextStream::new(Arc::clone(&tokenizer));
    let load = move || {
        let mut engine = Engine::load(&dir, &model::Kernels::options(), &mut |_| {})?;
        engine.set_tokenizer(tokenizer);
        Ok(engine)
    };
    let engine = EngineHandle::start(load, HandleLimits::default())?;
    let request = Request { prompt_ids, max_tokens: 32, ..Request::default() };
    let Submission::Accepted(events) = engine.submit(request)? else {
        return Err("the engine takes no requests".into());
    };
    let mut out = std::io::stdout();
    for event in events {
        match event {
            Event::Output(output) => {
                if let Some(token) = output.token {
                    write!(out, "{}", text.push(token)?)?;
                    out.flush()?;
                }
            }
            Event::Finished => writeln!(out, "{}", text.flush()?)?,
            last => return Err(format!("no answer: {last:?}").into()),
        }
    }
    Ok(())
}
