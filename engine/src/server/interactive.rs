//! `/v1/chat/interactive`: conversations whose history the engine keeps, as LMDeploy's.
//!
//! The first turn is what the chat template makes of its messages. A later one is what the template
//! writes between an answer and the answer to the turn: the end of the answer before, the turn's
//! messages, and the beginning of the next answer. Where the history ends with the token that ends
//! an answer, that token is not repeated. The history itself is never rendered again.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};

use super::app::App;
use super::auth::Caller;
use super::chat::check_len;
use super::error::ApiError;
use super::generation::{self, ChoiceText, Generation, Outputs, TextRules};
use super::json::ApiJson;
use super::language::chat_options;
use super::messages::{Tools, template_messages};
use super::metrics::Endpoint;
use super::openai::Usage;
use super::openai::chat::MESSAGES_MAX;
use super::openai::interactive::{
    InteractiveRequest, InteractiveResponse, SessionName, TurnPrompt,
};
use super::openai::sampling::{Ending, Sampling, random_id};
use super::sessions::{CANCEL_STEPS, Claim};
use super::stream::{self, EventWriter, Events};
use super::workers::Work;
use super::{Access, Route};
use crate::engine::Engine;
use crate::request::{Request, RequestOutput};
use crate::session::{SessionId, SessionTurn};
use crate::tokenizer::chat::Message;

/// LMDeploy's defaults.
const OUTPUT_LEN_DEFAULT: usize = 512;
const TOP_K_DEFAULT: usize = 40;
const TOP_P_DEFAULT: f32 = 0.8;
const TEMPERATURE_DEFAULT: f32 = 0.8;

pub(super) fn routes() -> Vec<Route> {
    vec![Route::new("/v1/chat/interactive", Access::Key).post(converse)]
}

/// Answers the next turn of a conversation.
#[utoipa::path(
    post,
    path = "/v1/chat/interactive",
    tag = "LMDeploy",
    request_body = InteractiveRequest,
    responses(
        (status = 200, description = "The answer; with `stream`, events of it", content(
            (InteractiveResponse = "application/json"),
            (InteractiveResponse = "text/event-stream"),
        )),
        super::openapi::GenerationErrors,
    )
)]
pub(super) async fn converse(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    ApiJson(request): ApiJson<InteractiveRequest>,
) -> Result<Response, ApiError> {
    if request.cancel == Some(true) {
        return cancel(&app, &caller, &request).map(IntoResponse::into_response);
    }
    let meter = app.metrics.start_request(Endpoint::Interactive);
    let is_stream = request.stream.unwrap_or(false);
    let (request, answer) = match plan(&app, &caller, request).await {
        Ok(plan) => plan,
        Err(error) => {
            meter.end(generation::outcome(&error));
            return Err(error);
        }
    };
    let generation = Generation::start(&app, vec![request], meter)?;
    answer.claim.set_running(generation.cancellation());
    match is_stream {
        true => stream::respond(generation, answer).await,
        false => Ok(Json(collect(generation, answer).await?).into_response()),
    }
}

fn cancel(
    app: &App,
    caller: &Caller,
    request: &InteractiveRequest,
) -> Result<Json<InteractiveResponse>, ApiError> {
    let Some(SessionName::Named(name)) = &request.session_id else {
        let message = "session_id: it is needed to say what is to be cancelled";
        return Err(ApiError::bad_request("session_id".to_owned(), message));
    };
    let is_running = app.sessions.cancel(&session_id(caller, name)?);
    Ok(Json(InteractiveResponse {
        text: String::new(),
        tokens: 0,
        input_tokens: 0,
        history_tokens: 0,
        finish_reason: is_running.then_some("cancelled"),
        session_id: name.clone(),
    }))
}

fn session_id(caller: &Caller, name: &str) -> Result<SessionId, ApiError> {
    SessionId::new(caller.namespace, name)
        .map_err(|error| ApiError::bad_request("session_id".to_owned(), error.to_string()))
}

async fn plan(
    app: &Arc<App>,
    caller: &Caller,
    of: InteractiveRequest,
) -> Result<(Request, Answer), ApiError> {
    let name = match &of.session_id {
        Some(SessionName::Named(name)) => name.clone(),
        // A name that cannot be guessed.
        Some(SessionName::New) | None => random_id("")?,
    };
    let id = session_id(caller, &name)?;
    let claim = app.sessions.claim(id.clone())?;
    let History { exists, has_room, len: history_len, last_token, .. } =
        History::of(app, &id).await?;
    let mut request = request(caller, &of)?;
    let is_kept = of.interactive_mode.unwrap_or(false);
    // NOTE: a conversation of one turn needs no session.
    if exists || is_kept {
        request.session =
            Some(SessionTurn { start: !exists, end: !is_kept, ..SessionTurn::of(id) });
    }
    if is_kept && !exists && !has_room {
        let message = "there are as many sessions as are allowed; delete one first";
        return Err(ApiError::conflict(message).with_code("sessions_full"));
    }
    let messages = messages(of.prompt)?;
    let language = Arc::clone(&app.language);
    let rendering = move || match history_len {
        0 => language.render(&messages, &chat_options()),
        _ => language.continuation(&messages),
    };
    let mut ids = app.workers.run(Work::Template, rendering).await?.ids;
    let ends = app.language.tokenizer.eos_ids();
    if last_token.is_some_and(|last| ends.contains(&last) && ids.first() == Some(&last)) {
        ids.remove(0);
    }
    app.check_prompt_len(ids.len(), "prompt")?;
    if history_len + ids.len() >= app.model.max_context {
        let message = format!(
            "prompt: {} tokens behind a history of {history_len}; the context of {} leaves no room \
             for an answer: rewind the session or start a new one",
            ids.len(),
            app.model.max_context
        );
        return Err(ApiError::context_length("prompt".to_owned(), message));
    }
    request.prompt_ids = ids;
    let answer = Answer {
        text: TextRules::of(&app.language.tokenizer, &request).choice()?,
        new_text: String::new(),
        finish_reason: None,
        num_tokens: 0,
        input_len: request.prompt_ids.len(),
        history_len,
        name,
        claim,
    };
    Ok((request, answer))
}

/// What the engine keeps of a conversation.
struct History {
    exists: bool,
    is_running: bool,
    /// For one session more.
    has_room: bool,
    /// In tokens.
    len: usize,
    last_token: Option<u32>,
}

impl History {
    /// Of a claimed session: what still runs on it has been called off, and ends with the step.
    async fn of(app: &App, id: &SessionId) -> Result<History, ApiError> {
        for _ in 0..CANCEL_STEPS {
            let id = id.clone();
            let history = app.call(move |engine| History::read(engine, &id)).await?;
            if !history.is_running {
                return Ok(history);
            }
        }
        let message = format!("session {id} has a request running; wait for its end or cancel it");
        Err(ApiError::conflict(message).with_param("session_id"))
    }

    fn read(engine: &Engine, id: &SessionId) -> History {
        let tokens = engine.session_tokens(id).unwrap_or_default();
        let info = engine.session_info(id);
        History {
            exists: info.is_some(),
            is_running: info.is_some_and(|info| info.is_running),
            has_room: engine.has_session_room(),
            len: tokens.len(),
            last_token: tokens.last().copied(),
        }
    }
}

/// The request without its prompt and its session.
fn request(caller: &Caller, of: &InteractiveRequest) -> Result<Request, ApiError> {
    let sampling = Sampling {
        temperature: of.temperature,
        top_p: of.top_p,
        top_k: of.top_k,
        min_p: of.min_p,
        repetition_penalty: of.repetition_penalty,
        seed: of.seed,
        ..Sampling::default()
    };
    let mut sampling = sampling.params()?;
    if of.temperature.is_none() {
        sampling.temperature = TEMPERATURE_DEFAULT;
    }
    if of.top_p.is_none() {
        sampling.top_p = TOP_P_DEFAULT;
    }
    if of.top_k.is_none() {
        sampling.top_k = TOP_K_DEFAULT;
    }
    let mut request = Request {
        max_tokens: of.request_output_len.map_or(OUTPUT_LEN_DEFAULT, |max| max.get() as usize),
        sampling,
        namespace: caller.namespace,
        ..Request::default()
    };
    let ending = Ending { stop: of.stop.clone(), ignore_eos: of.ignore_eos, ..Ending::default() };
    ending.apply(&mut request);
    Ok(request)
}

fn messages(prompt: TurnPrompt) -> Result<Vec<Message>, ApiError> {
    match prompt {
        TurnPrompt::Text(text) => Ok(vec![Message::new("user", text)]),
        TurnPrompt::Messages(messages) => {
            check_len("prompt", messages.len(), 1..=MESSAGES_MAX)?;
            Ok(template_messages(&messages, &[], Tools::InText))
        }
    }
}

/// The answer to a turn, as it comes.
struct Answer {
    text: ChoiceText,
    /// What came since it was last taken.
    new_text: String,
    finish_reason: Option<&'static str>,
    num_tokens: usize,
    input_len: usize,
    history_len: usize,
    name: String,
    claim: Claim,
}

impl Answer {
    fn push(&mut self, output: &RequestOutput) -> Result<(), ApiError> {
        self.new_text.push_str(&self.text.push(output)?);
        self.num_tokens += usize::from(output.token.is_some());
        self.finish_reason = output.finish_reason.map(|reason| reason.name());
        Ok(())
    }

    /// What came since the last time.
    fn take(&mut self) -> InteractiveResponse {
        InteractiveResponse {
            text: std::mem::take(&mut self.new_text),
            tokens: self.num_tokens,
            input_tokens: self.input_len,
            history_tokens: self.history_len,
            finish_reason: self.finish_reason.take(),
            session_id: self.name.clone(),
        }
    }
}

/// Waits for the whole answer.
async fn collect(
    mut generation: Generation,
    mut answer: Answer,
) -> Result<InteractiveResponse, ApiError> {
    let take = |outputs: &Outputs| outputs.iter().try_for_each(|(_, output)| answer.push(output));
    if !stream::collect(&mut generation, take).await? {
        answer.finish_reason = Some("cancelled");
    }
    Ok(answer.take())
}

impl EventWriter for Answer {
    fn outputs(&mut self, outputs: &Outputs, events: &mut Events) -> Result<(), ApiError> {
        outputs.iter().try_for_each(|(_, output)| self.push(output))?;
        if !self.new_text.is_empty() || self.finish_reason.is_some() {
            events.json(&self.take());
        }
        Ok(())
    }

    fn finish(&mut self, _usage: Usage, _events: &mut Events) {}

    fn cancelled(&mut self, _usage: Usage, events: &mut Events) {
        self.finish_reason = Some("cancelled");
        events.json(&self.take());
    }
}
