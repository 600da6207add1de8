//! `/v1/completions`: texts and tokens continued as they are.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};

use super::app::App;
use super::auth::Caller;
use super::error::ApiError;
use super::generation::{self, ChoiceText, Generation, Outputs, TextRules};
use super::json::ApiJson;
use super::language::Language;
use super::metrics::Endpoint;
use super::openai::completions::{
    CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse,
};
use super::openai::number::TokenId;
use super::openai::sampling::{Ending, Sampling, random_id};
use super::openai::text::Prompt;
use super::openai::{StreamOptions, Usage};
use super::stream::{self, EventWriter, Events};
use super::workers::Work;
use super::{Access, Route, unix_seconds};
use crate::request::{Request, RequestOutput};
use crate::tokenizer::SpecialTokens;

/// As in OpenAI's API.
const MAX_TOKENS_DEFAULT: usize = 16;

/// Most answers of all prompts together.
const ANSWERS_MAX: usize = 64;

pub(super) fn routes() -> Vec<Route> {
    vec![Route::new("/v1/completions", Access::Key).post(complete)]
}

/// Continues texts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "OpenAI",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answers; with `stream`, events of them", content(
            (CompletionResponse = "application/json"),
            (CompletionResponse = "text/event-stream"),
        )),
        super::openapi::GenerationErrors,
    )
)]
pub(super) async fn complete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    ApiJson(request): ApiJson<CompletionRequest>,
) -> Result<Response, ApiError> {
    let meter = app.metrics.start_request(Endpoint::Completions);
    let plan = match plan(&app, &caller, request).await {
        Ok(plan) => plan,
        Err(error) => {
            meter.end(generation::outcome(&error));
            return Err(error);
        }
    };
    let Plan { requests, answers, is_stream, includes_usage } = plan;
    let generation = Generation::start(&app, requests, meter)?;
    match is_stream {
        true => stream::respond(generation, CompletionEvents { answers, includes_usage }).await,
        false => collect(generation, answers).await,
    }
}

/// A request that was checked and understood.
struct Plan {
    requests: Vec<Request>,
    answers: Answers,
    is_stream: bool,
    includes_usage: bool,
}

/// How many answers are generated for a prompt, and how many are given.
#[derive(Clone, Copy)]
struct Counts {
    best_of: usize,
    n: usize,
}

impl Counts {
    fn of(request: &CompletionRequest) -> Result<Counts, ApiError> {
        let n = request.n.map_or(1, |n| n.get() as usize);
        let best_of = request.best_of.map_or(n, |best_of| best_of.get() as usize);
        let refuse = |message: String| Err(ApiError::bad_request("best_of".to_owned(), message));
        if best_of < n {
            return refuse(format!("best_of is {best_of}, it must be at least n, which is {n}"));
        }
        if best_of > n && request.stream == Some(true) {
            return refuse(format!("best_of is {best_of}; in a stream it can only be n, {n}"));
        }
        Ok(Counts { best_of, n })
    }
}

async fn plan(
    app: &Arc<App>,
    caller: &Caller,
    mut of: CompletionRequest,
) -> Result<Plan, ApiError> {
    app.check_model(&of.model)?;
    let is_stream = of.stream.unwrap_or(false);
    let includes_usage = StreamOptions::includes_usage(of.stream_options, is_stream)?;
    let counts = Counts::of(&of)?;
    let num_prompts = match &of.prompt {
        Prompt::Text(_) | Prompt::Tokens(_) => 1,
        Prompt::Texts(texts) => texts.len(),
        Prompt::TokenLists(lists) => lists.len(),
    };
    if num_prompts * counts.best_of > ANSWERS_MAX {
        let message = format!(
            "{num_prompts} prompts with {} answers each; at most {ANSWERS_MAX} are possible",
            counts.best_of
        );
        return Err(ApiError::bad_request("prompt".to_owned(), message));
    }
    let (language, vocab_size) = (Arc::clone(&app.language), app.model.vocab_size);
    let (echo, has_logprobs) = (of.echo.unwrap_or(false), of.logprobs.is_some());
    let prompt = std::mem::replace(&mut of.prompt, Prompt::Texts(Vec::new()));
    let reading = move || {
        if has_logprobs {
            language.list_tokens();
        }
        read_prompts(&language, vocab_size, prompt, echo)
    };
    let prompts = app.workers.run(Work::Tokenize, reading).await?;
    for prompt in &prompts {
        app.check_prompt_len(prompt.ids.len(), "prompt")?;
    }
    let request = request(caller, &mut of, counts)?;
    app.check_tokens(&request)?;
    let max_tokens = request.max_tokens.min(app.model.max_context);
    let request = Request { max_tokens, ..request };
    let rules = TextRules::of(&app.language.tokenizer, &request);
    let answers = Answers::new(app, &rules, &prompts, counts, has_logprobs)?;
    let requests = prompts
        .into_iter()
        .map(|prompt| Request { prompt_ids: prompt.ids, ..request.clone() })
        .collect();
    Ok(Plan { requests, answers, is_stream, includes_usage })
}

/// The request without its prompt.
fn request(
    caller: &Caller,
    of: &mut CompletionRequest,
    counts: Counts,
) -> Result<Request, ApiError> {
    let sampling = Sampling {
        temperature: of.temperature,
        top_p: of.top_p,
        top_k: of.top_k,
        min_p: of.min_p,
        presence_penalty: of.presence_penalty,
        frequency_penalty: of.frequency_penalty,
        repetition_penalty: of.repetition_penalty,
        logit_bias: of.logit_bias.take(),
        seed: of.seed,
        min_tokens: of.min_tokens,
        num_top_logprobs: of.logprobs.map_or(0, |num| num.get() as usize),
    };
    let mut request = Request {
        max_tokens: of.max_tokens.map_or(MAX_TOKENS_DEFAULT, |max| max.get() as usize),
        sampling: sampling.params()?,
        num_choices: counts.best_of,
        namespace: caller.namespace,
        ..Request::default()
    };
    let ending = Ending {
        stop: of.stop.take(),
        stop_token_ids: of.stop_token_ids.take(),
        ignore_eos: of.ignore_eos,
    };
    ending.apply(&mut request);
    Ok(request)
}

/// A prompt, with its text where the answer repeats it.
struct ReadPrompt {
    ids: Vec<u32>,
    echo: Option<String>,
}

fn read_prompts(
    language: &Language,
    vocab_size: usize,
    prompt: Prompt,
    echo: bool,
) -> Result<Vec<ReadPrompt>, ApiError> {
    let of_text = |text: String| {
        let ids = language.tokenizer.encode(&text, SpecialTokens::Add)?;
        Ok(ReadPrompt { ids, echo: echo.then_some(text) })
    };
    let of_tokens = |tokens: Vec<TokenId>| {
        let ids: Vec<u32> = tokens.into_iter().map(|id| id.get() as u32).collect();
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
            let message =
                format!("prompt: token id {id} is outside the vocabulary of {vocab_size} tokens");
            return Err(ApiError::bad_request("prompt".to_owned(), message));
        }
        let echo = if echo { Some(language.tokenizer.decode(&ids)?) } else { None };
        Ok(ReadPrompt { ids, echo })
    };
    match prompt {
        Prompt::Text(text) => Ok(vec![of_text(text)?]),
        Prompt::Tokens(tokens) => Ok(vec![of_tokens(tokens)?]),
        Prompt::Texts(texts) => texts.into_iter().map(of_text).collect(),
        Prompt::TokenLists(lists) => lists.into_iter().map(of_tokens).collect(),
    }
}

/// The choices of all prompts as they come.
struct Answers {
    app: Arc<App>,
    id: String,
    created: u64,
    counts: Counts,
    /// Those of the first prompt come first.
    choices: Vec<ChoiceAnswer>,
}

/// A choice, and what came of it since it was last taken.
struct ChoiceAnswer {
    text: ChoiceText,
    new_text: String,
    logprobs: Option<CompletionLogprobs>,
    /// Characters of the tokens so far.
    num_chars: usize,
    sum_logprobs: f64,
    num_tokens: usize,
    finish_reason: Option<&'static str>,
}

impl Answers {
    fn new(
        app: &Arc<App>,
        rules: &TextRules,
        prompts: &[ReadPrompt],
        counts: Counts,
        has_logprobs: bool,
    ) -> Result<Answers, ApiError> {
        let mut choices = Vec::with_capacity(prompts.len() * counts.best_of);
        for prompt in prompts {
            for _ in 0..counts.best_of {
                let mut choice = ChoiceAnswer {
                    text: rules.choice()?,
                    new_text: prompt.echo.clone().unwrap_or_default(),
                    logprobs: has_logprobs.then(CompletionLogprobs::default),
                    num_chars: 0,
                    sum_logprobs: 0.0,
                    num_tokens: 0,
                    finish_reason: None,
                };
                if prompt.echo.is_some() {
                    choice.echo_logprobs(&app.language, &prompt.ids);
                }
                choices.push(choice);
            }
        }
        Ok(Answers {
            app: Arc::clone(app),
            id: random_id("cmpl-")?,
            created: unix_seconds(),
            counts,
            choices,
        })
    }

    fn push(&mut self, prompt_idx: usize, output: &RequestOutput) -> Result<(), ApiError> {
        let choice = &mut self.choices[prompt_idx * self.counts.best_of + output.choice_idx];
        choice.new_text.push_str(&choice.text.push(output)?);
        choice.finish_reason = output.finish_reason.map(|reason| reason.name());
        if output.token.is_some() {
            choice.sum_logprobs += f64::from(output.logprob);
            choice.num_tokens += 1;
        }
        if let Some(token) = choice.text.token(output) {
            choice.push_logprob(&self.app.language, token, output);
        }
        Ok(())
    }

    fn response(
        &self,
        choices: Vec<CompletionChoice>,
        usage: Option<Option<Usage>>,
    ) -> CompletionResponse<'_> {
        CompletionResponse {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.app.model.name,
            system_fingerprint: &self.app.model.fingerprint,
            choices,
            usage,
        }
    }
}

impl ChoiceAnswer {
    /// Lists the prompt's tokens, whose log-probabilities are not computed.
    fn echo_logprobs(&mut self, language: &Language, ids: &[u32]) {
        let Some(logprobs) = &mut self.logprobs else { return };
        for id in ids {
            let text = language.logprob(*id, 0.0).token;
            logprobs.text_offset.push(self.num_chars);
            self.num_chars += text.chars().count();
            logprobs.tokens.push(text);
            logprobs.token_logprobs.push(None);
            logprobs.top_logprobs.push(None);
        }
    }

    fn push_logprob(&mut self, language: &Language, token: u32, output: &RequestOutput) {
        let Some(logprobs) = &mut self.logprobs else { return };
        let own = language.logprob(token, output.logprob);
        // The token itself is among them in any case.
        let top = language.logprobs(&output.top_logprobs).into_iter().chain([own.clone()]);
        let top = top.map(|top| (top.token, top.logprob.into())).collect();
        logprobs.text_offset.push(self.num_chars);
        self.num_chars += own.token.chars().count();
        logprobs.tokens.push(own.token);
        logprobs.token_logprobs.push(Some(own.logprob));
        logprobs.top_logprobs.push(Some(top));
    }

    fn mean_logprob(&self) -> f64 {
        self.sum_logprobs / self.num_tokens.max(1) as f64
    }

    /// What came since the last time.
    fn take(&mut self, index: usize) -> CompletionChoice {
        let logprobs = self.logprobs.as_mut().map(std::mem::take);
        CompletionChoice {
            index,
            text: std::mem::take(&mut self.new_text),
            logprobs,
            finish_reason: self.finish_reason.take(),
        }
    }

    fn has_news(&self) -> bool {
        let has_logprobs = self.logprobs.as_ref().is_some_and(|list| !list.tokens.is_empty());
        !self.new_text.is_empty() || has_logprobs || self.finish_reason.is_some()
    }
}

/// Waits for the whole of all answers.
async fn collect(mut generation: Generation, mut answers: Answers) -> Result<Response, ApiError> {
    let take =
        |outputs: &Outputs| outputs.iter().try_for_each(|(idx, output)| answers.push(*idx, output));
    if !stream::collect(&mut generation, take).await? {
        return Err(ApiError::draining());
    }
    let Counts { best_of, n } = answers.counts;
    let mut choices = Vec::new();
    for of_prompt in answers.choices.chunks_mut(best_of) {
        if best_of > n {
            of_prompt.sort_by(|a, b| b.mean_logprob().total_cmp(&a.mean_logprob()));
        }
        for choice in &mut of_prompt[..n] {
            choices.push(choice.take(choices.len()));
        }
    }
    let usage = Some(Some(generation.usage()));
    Ok(Json(answers.response(choices, usage)).into_response())
}

/// Writes answers as chunks.
struct CompletionEvents {
    answers: Answers,
    includes_usage: bool,
}

impl EventWriter for CompletionEvents {
    fn outputs(&mut self, outputs: &Outputs, events: &mut Events) -> Result<(), ApiError> {
        outputs.iter().try_for_each(|(idx, output)| self.answers.push(*idx, output))?;
        let usage = self.includes_usage.then_some(None);
        for index in 0..self.answers.choices.len() {
            let choice = &mut self.answers.choices[index];
            if choice.has_news() {
                let choice = choice.take(index);
                events.json(&self.answers.response(vec![choice], usage));
            }
        }
        Ok(())
    }

    fn finish(&mut self, usage: Usage, events: &mut Events) {
        if self.includes_usage {
            events.json(&self.answers.response(Vec::new(), Some(Some(usage))));
        }
        events.done();
    }
}
