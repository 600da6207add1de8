//! `/v1/chat/completions`: from a conversation to its next messages.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};

use super::app::App;
use super::auth::Caller;
use super::error::ApiError;
use super::generation::{self, ChoiceText, Generation, Outputs, TextRules};
use super::json::ApiJson;
use super::language::chat_options;
use super::messages::{Tools, template_messages, template_tools};
use super::metrics::Endpoint;
use super::openai::chat::{
    Answer, ChatChoice, ChatChunk, ChatFinish, ChatLogprob, ChatRequest, ChatResponse, ChunkChoice,
    Delta, FunctionCall, FunctionCallDelta, FunctionKind, Logprobs, MESSAGES_MAX, ResponseFormat,
    TOOLS_MAX, Tool, ToolCall, ToolCallDelta, ToolChoice, ToolMode,
};
use super::openai::sampling::{Ending, Sampling, random, random_id};
use super::openai::{StreamOptions, Usage};
use super::stream::{self, EventWriter, Events};
use super::workers::Work;
use super::{Access, Route, unix_seconds};
use crate::answer::{
    self, AnswerDelta, AnswerFormat, AnswerOptions, AnswerParser, ToolFormat, ToolSpec,
};
use crate::grammar::GrammarSpec;
use crate::request::{FinishReason, Request, RequestOutput};
use crate::tokenizer::chat::ChatOptions;

pub(super) fn routes() -> Vec<Route> {
    vec![Route::new("/v1/chat/completions", Access::Key).post(chat)]
}

/// Answers a conversation.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "OpenAI",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The answers; with `stream`, events of them", content(
            (ChatResponse = "application/json"),
            (ChatChunk = "text/event-stream"),
        )),
        super::openapi::GenerationErrors,
    )
)]
pub(super) async fn chat(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    ApiJson(request): ApiJson<ChatRequest>,
) -> Result<Response, ApiError> {
    let meter = app.metrics.start_request(Endpoint::Chat);
    let plan = match plan(&app, &caller, request).await {
        Ok(plan) => plan,
        Err(error) => {
            meter.end(generation::outcome(&error));
            return Err(error);
        }
    };
    let Plan { request, answers, is_stream, includes_usage } = plan;
    let head = Head::new(&app)?;
    let generation = Generation::start(&app, vec![request], meter)?;
    match is_stream {
        true => stream::respond(generation, ChatEvents { head, answers, includes_usage }).await,
        false => Ok(Json(collect(generation, head, answers).await?).into_response()),
    }
}

/// A request that was checked and understood.
struct Plan {
    request: Request,
    answers: Answers,
    is_stream: bool,
    includes_usage: bool,
}

/// Whether answers call tools.
enum ToolUse {
    Never,
    Maybe,
    Must(answer::ToolChoice),
}

async fn plan(app: &Arc<App>, caller: &Caller, mut chat: ChatRequest) -> Result<Plan, ApiError> {
    app.check_model(&chat.model)?;
    check_len("messages", chat.messages.len(), 1..=MESSAGES_MAX)?;
    let tools = chat.tools.take().unwrap_or_default();
    check_len("tools", tools.len(), 0..=TOOLS_MAX)?;
    let num_top = chat.top_logprobs.map_or(0, |num| num.get() as usize);
    let has_logprobs = chat.logprobs.unwrap_or(false);
    if num_top > 0 && !has_logprobs {
        let message = "top_logprobs needs logprobs to be true";
        return Err(ApiError::bad_request("top_logprobs".to_owned(), message));
    }
    let is_stream = chat.stream.unwrap_or(false);
    let includes_usage = StreamOptions::includes_usage(chat.stream_options, is_stream)?;
    let (tool_use, specs) = tool_use(&chat, &tools)?;
    let mut reading = Reading::new(app, &tool_use, &specs, &chat);
    let shown = match tool_use {
        ToolUse::Never => Vec::new(),
        ToolUse::Maybe | ToolUse::Must(_) => tools,
    };
    let by = match app.language.format.tools {
        Some(_) => Tools::InTemplate,
        None => Tools::InText,
    };
    let mut request = request(caller, &mut chat, num_top)?;
    app.check_tokens(&request)?;
    let (language, messages) = (Arc::clone(&app.language), std::mem::take(&mut chat.messages));
    let kwargs = chat.chat_template_kwargs.take().unwrap_or_default();
    let rendering = move || {
        if has_logprobs {
            language.list_tokens();
        }
        let mut options = ChatOptions { kwargs, ..chat_options() };
        if by == Tools::InTemplate {
            options.tools = template_tools(&shown);
        }
        language.render(&template_messages(&messages, &shown, by), &options)
    };
    let prompt = app.workers.run(Work::Template, rendering).await?;
    app.check_prompt_len(prompt.ids.len(), "messages")?;
    request.prompt_ids = prompt.ids;
    request.max_tokens = request.max_tokens.min(app.model.max_context);
    reading.options.starts_in_reasoning = reading.format.opens_reasoning(&prompt.text);
    if let Some((spec, param)) = answer_spec(&reading, tool_use, &specs, chat.response_format)? {
        let language = Arc::clone(&app.language);
        let compiling = move || language.compile(&spec, param);
        request.grammar = Some(app.workers.run(Work::Grammar, compiling).await?);
    }
    let mut rules = TextRules::of(&app.language.tokenizer, &request);
    if reading.is_needed() {
        rules.markers = reading.format.markers();
    }
    let answers = Answers::new(app, &rules, &reading, request.num_choices, has_logprobs)?;
    Ok(Plan { request, answers, is_stream, includes_usage })
}

pub(super) fn check_len(
    param: &str,
    len: usize,
    lens: std::ops::RangeInclusive<usize>,
) -> Result<(), ApiError> {
    match lens.contains(&len) {
        true => Ok(()),
        false => {
            let (min, max) = (lens.start(), lens.end());
            let message = format!("{param} has {len} entries, it must have {min} to {max}");
            Err(ApiError::bad_request(param.to_owned(), message))
        }
    }
}

/// The request without its prompt.
fn request(caller: &Caller, chat: &mut ChatRequest, num_top: usize) -> Result<Request, ApiError> {
    let sampling = Sampling {
        temperature: chat.temperature,
        top_p: chat.top_p,
        top_k: chat.top_k,
        min_p: chat.min_p,
        presence_penalty: chat.presence_penalty,
        frequency_penalty: chat.frequency_penalty,
        repetition_penalty: chat.repetition_penalty,
        logit_bias: chat.logit_bias.take(),
        seed: chat.seed,
        min_tokens: chat.min_tokens,
        num_top_logprobs: num_top,
    };
    let max_tokens = chat.max_completion_tokens.or(chat.max_tokens);
    let mut request = Request {
        // NOTE: the context ends the answer where nothing else does.
        max_tokens: max_tokens.map_or(usize::MAX, |max| max.get() as usize),
        sampling: sampling.params()?,
        num_choices: chat.n.map_or(1, |n| n.get() as usize),
        namespace: caller.namespace,
        ..Request::default()
    };
    let ending = Ending {
        stop: chat.stop.take(),
        stop_token_ids: chat.stop_token_ids.take(),
        ignore_eos: chat.ignore_eos,
    };
    ending.apply(&mut request);
    Ok(request)
}

fn tool_use(chat: &ChatRequest, tools: &[Tool]) -> Result<(ToolUse, Vec<ToolSpec>), ApiError> {
    let spec = |(idx, tool): (usize, &Tool)| {
        let parameters = tool.function.parameters.clone().map_or_else(Default::default, Into::into);
        ToolSpec::new(&tool.function.name, parameters).map_err(|error| {
            ApiError::bad_request(format!("tools[{idx}].function"), error.to_string())
        })
    };
    let specs: Vec<ToolSpec> = tools.iter().enumerate().map(spec).collect::<Result<_, _>>()?;
    let mut names = BTreeSet::new();
    if let Some(double) = specs.iter().find(|spec| !names.insert(spec.name())) {
        let message = format!("tools: two have the name {:?}", double.name());
        return Err(ApiError::bad_request("tools".to_owned(), message));
    }
    let is_parallel = chat.parallel_tool_calls.unwrap_or(true);
    let tool_use = match &chat.tool_choice {
        Some(ToolChoice::Mode(ToolMode::None)) => ToolUse::Never,
        None | Some(ToolChoice::Mode(ToolMode::Auto)) if tools.is_empty() => ToolUse::Never,
        None | Some(ToolChoice::Mode(ToolMode::Auto)) => ToolUse::Maybe,
        Some(_) if tools.is_empty() => {
            let message = "tool_choice asks for a call, and there are no tools";
            return Err(ApiError::bad_request("tool_choice".to_owned(), message));
        }
        Some(ToolChoice::Mode(ToolMode::Required)) if is_parallel => {
            ToolUse::Must(answer::ToolChoice::OneOrMore)
        }
        Some(ToolChoice::Mode(ToolMode::Required)) => ToolUse::Must(answer::ToolChoice::One),
        Some(ToolChoice::Named(named)) => {
            let name = &named.function.name;
            if !specs.iter().any(|spec| spec.name() == name) {
                let message = format!("tool_choice: there is no tool {name:?}");
                return Err(ApiError::bad_request("tool_choice.function.name".to_owned(), message));
            }
            ToolUse::Must(answer::ToolChoice::Named(name.clone()))
        }
    };
    Ok((tool_use, specs))
}

/// How answers are read.
struct Reading {
    format: AnswerFormat,
    options: AnswerOptions,
    /// Calls behind the first are dropped.
    has_one_call: bool,
}

impl Reading {
    fn new(app: &App, tool_use: &ToolUse, specs: &[ToolSpec], chat: &ChatRequest) -> Reading {
        let mut format = app.language.format;
        // A model whose template shows no format is told of this one.
        format.tools = format.tools.or(Some(ToolFormat::Hermes));
        let is_text = matches!(chat.response_format, None | Some(ResponseFormat::Text {}));
        let may_call = match tool_use {
            ToolUse::Never => false,
            // What is held to a format of its own is no call.
            ToolUse::Maybe => is_text,
            ToolUse::Must(_) => true,
        };
        let names = specs.iter().map(|spec| spec.name().to_owned());
        let tool_names = if may_call { names.collect() } else { Vec::new() };
        let options = AnswerOptions { tool_names, ..AnswerOptions::default() };
        let has_one_call = !chat.parallel_tool_calls.unwrap_or(true);
        Reading { format, options, has_one_call }
    }

    /// Whether answers may be more than content.
    fn is_needed(&self) -> bool {
        self.format.has_reasoning || !self.options.tool_names.is_empty()
    }

    fn parser(&self) -> Result<Option<AnswerParser>, ApiError> {
        if !self.is_needed() {
            return Ok(None);
        }
        let call_id_seed = (u128::from(random()?) << 64) | u128::from(random()?);
        Ok(Some(self.format.parser(AnswerOptions { call_id_seed, ..self.options.clone() })))
    }
}

/// What the answers are held to, and which field says so.
fn answer_spec(
    reading: &Reading,
    tool_use: ToolUse,
    specs: &[ToolSpec],
    format: Option<ResponseFormat>,
) -> Result<Option<(GrammarSpec, &'static str)>, ApiError> {
    let in_reasoning = reading.options.starts_in_reasoning;
    if let ToolUse::Must(choice) = tool_use {
        let spec = reading.format.tool_grammar(specs, &choice, in_reasoning)?;
        return Ok(spec.map(|spec| (spec, "tools")));
    }
    let spec = match format {
        None | Some(ResponseFormat::Text {}) => return Ok(None),
        Some(ResponseFormat::JsonObject {}) => GrammarSpec::JsonObject,
        Some(ResponseFormat::JsonSchema { json_schema }) => match json_schema.schema {
            Some(schema) => GrammarSpec::JsonSchema(schema.into()),
            None => GrammarSpec::JsonObject,
        },
        Some(ResponseFormat::Regex { regex }) => GrammarSpec::Regex(regex),
        Some(ResponseFormat::Grammar { grammar }) => GrammarSpec::Lark(grammar),
    };
    Ok(Some((reading.format.after_reasoning(spec, in_reasoning), "response_format")))
}

/// What all answers to a request and all events of a stream begin with.
struct Head {
    app: Arc<App>,
    id: String,
    created: u64,
}

impl Head {
    fn new(app: &Arc<App>) -> Result<Head, ApiError> {
        let id = random_id("chatcmpl-")?;
        Ok(Head { app: Arc::clone(app), id, created: unix_seconds() })
    }

    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<Option<Usage>>) -> ChatChunk<'_> {
        ChatChunk {
            id: &self.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.app.model.name,
            system_fingerprint: &self.app.model.fingerprint,
            choices,
            usage,
        }
    }
}

/// The choices of a request as they come.
struct Answers {
    app: Arc<App>,
    choices: Vec<ChoiceAnswer>,
    has_logprobs: bool,
    has_one_call: bool,
    /// Reused.
    deltas: Vec<AnswerDelta>,
}

/// A choice, and what came of it since it was last taken.
struct ChoiceAnswer {
    text: ChoiceText,
    parser: Option<AnswerParser>,
    delta: Delta,
    logprobs: Option<Logprobs>,
    finish: Option<ChatFinish>,
    is_new: bool,
}

impl Answers {
    fn new(
        app: &Arc<App>,
        rules: &TextRules,
        reading: &Reading,
        num_choices: usize,
        has_logprobs: bool,
    ) -> Result<Answers, ApiError> {
        let choice = |_| {
            Ok(ChoiceAnswer {
                text: rules.choice()?,
                parser: reading.parser()?,
                delta: Delta { role: Some("assistant"), ..Delta::default() },
                logprobs: has_logprobs.then(Logprobs::default),
                finish: None,
                is_new: true,
            })
        };
        Ok(Answers {
            app: Arc::clone(app),
            choices: (0..num_choices).map(choice).collect::<Result<_, ApiError>>()?,
            has_logprobs,
            has_one_call: reading.has_one_call,
            deltas: Vec::new(),
        })
    }

    fn push(&mut self, output: &RequestOutput) -> Result<(), ApiError> {
        let choice = &mut self.choices[output.choice_idx];
        let text = choice.text.push(output)?;
        if let (Some(logprobs), Some(token)) = (&mut choice.logprobs, choice.text.token(output)) {
            let language = &self.app.language;
            logprobs.content.push(ChatLogprob {
                token: language.logprob(token, output.logprob),
                top_logprobs: language.logprobs(&output.top_logprobs),
            });
        }
        match &mut choice.parser {
            None if text.is_empty() => {}
            None => choice.delta.content.get_or_insert_default().push_str(&text),
            Some(parser) => {
                parser.push(&text, &mut self.deltas);
                if output.finish_reason.is_some() {
                    parser.finish(&mut self.deltas);
                }
                for delta in self.deltas.drain(..) {
                    choice.delta.take(delta, self.has_one_call);
                }
            }
        }
        let has_calls = choice.parser.as_ref().is_some_and(AnswerParser::has_tool_calls);
        choice.finish = output.finish_reason.map(|reason| match reason {
            FinishReason::Stop if has_calls => ChatFinish::ToolCalls,
            // NOTE: a failure has ended the generation before.
            FinishReason::Stop | FinishReason::Failed(_) => ChatFinish::Stop,
            FinishReason::Length => ChatFinish::Length,
        });
        Ok(())
    }
}

impl Delta {
    fn is_empty(&self) -> bool {
        self.content.is_none() && self.reasoning_content.is_none() && self.tool_calls.is_empty()
    }

    /// Adds a piece of the answer.
    fn take(&mut self, delta: AnswerDelta, has_one_call: bool) {
        match delta {
            AnswerDelta::Content(text) => self.content.get_or_insert_default().push_str(&text),
            AnswerDelta::Reasoning(text) => {
                self.reasoning_content.get_or_insert_default().push_str(&text);
            }
            AnswerDelta::ToolCallStart { idx, .. } | AnswerDelta::ToolCallArguments { idx, .. }
                if has_one_call && idx > 0 => {}
            AnswerDelta::ToolCallStart { idx, id, name } => self.tool_calls.push(ToolCallDelta {
                index: idx,
                id: Some(id),
                kind: Some(FunctionKind::Function),
                function: FunctionCallDelta { name: Some(name), arguments: String::new() },
            }),
            AnswerDelta::ToolCallArguments { idx, text } => match self.tool_calls.last_mut() {
                Some(call) if call.index == idx => call.function.arguments.push_str(&text),
                _ => {
                    let function = FunctionCallDelta { name: None, arguments: text };
                    let call = ToolCallDelta { index: idx, id: None, kind: None, function };
                    self.tool_calls.push(call);
                }
            },
        }
    }
}

/// Waits for the whole of all answers.
async fn collect(
    mut generation: Generation,
    head: Head,
    mut answers: Answers,
) -> Result<ChatResponse, ApiError> {
    let take = |outputs: &Outputs| outputs.iter().try_for_each(|(_, output)| answers.push(output));
    if !stream::collect(&mut generation, take).await? {
        return Err(ApiError::draining());
    }
    let choices = answers.choices.into_iter().enumerate();
    Ok(ChatResponse {
        id: head.id,
        object: "chat.completion",
        created: head.created,
        model: head.app.model.name.clone(),
        choices: choices.map(|(idx, choice)| choice.into_whole(idx)).collect(),
        usage: generation.usage(),
        system_fingerprint: head.app.model.fingerprint.clone(),
    })
}

impl ChoiceAnswer {
    fn into_whole(self, index: usize) -> ChatChoice {
        let Delta { content, reasoning_content, tool_calls, .. } = self.delta;
        let call = |call: ToolCallDelta| ToolCall {
            id: call.id.unwrap_or_default(),
            kind: FunctionKind::Function,
            function: FunctionCall {
                name: call.function.name.unwrap_or_default(),
                arguments: call.function.arguments,
            },
        };
        let tool_calls: Vec<ToolCall> = tool_calls.into_iter().map(call).collect();
        let content = match tool_calls.is_empty() {
            true => Some(content.unwrap_or_default()),
            false => content,
        };
        let message = Answer {
            role: "assistant",
            content,
            refusal: None,
            reasoning_content: reasoning_content.unwrap_or_default(),
            tool_calls,
        };
        let finish_reason = self.finish.unwrap_or(ChatFinish::Stop);
        ChatChoice { index, message, logprobs: self.logprobs, finish_reason }
    }
}

/// Writes answers as chunks.
struct ChatEvents {
    head: Head,
    answers: Answers,
    includes_usage: bool,
}

impl EventWriter for ChatEvents {
    fn outputs(&mut self, outputs: &Outputs, events: &mut Events) -> Result<(), ApiError> {
        outputs.iter().try_for_each(|(_, output)| self.answers.push(output))?;
        let usage = self.includes_usage.then_some(None);
        let has_logprobs = self.answers.has_logprobs;
        for (index, choice) in self.answers.choices.iter_mut().enumerate() {
            let mut logprobs = choice.logprobs.take();
            logprobs = logprobs.filter(|logprobs| !logprobs.content.is_empty());
            let finish_reason = choice.finish.take();
            let mut delta = std::mem::take(&mut choice.delta);
            let is_first = std::mem::take(&mut choice.is_new);
            if is_first && delta.is_empty() {
                delta.content = Some(String::new());
            }
            if is_first || !delta.is_empty() || logprobs.is_some() {
                let choice = ChunkChoice { index, delta, logprobs, finish_reason: None };
                events.json(&self.head.chunk(vec![choice], usage));
            }
            if finish_reason.is_some() {
                let delta = Delta::default();
                let choice = ChunkChoice { index, delta, logprobs: None, finish_reason };
                events.json(&self.head.chunk(vec![choice], usage));
            }
            choice.logprobs = has_logprobs.then(Logprobs::default);
        }
        Ok(())
    }

    fn finish(&mut self, usage: Usage, events: &mut Events) {
        if self.includes_usage {
            events.json(&self.head.chunk(Vec::new(), Some(Some(usage))));
        }
        events.done();
    }
}
