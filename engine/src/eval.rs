//! Multiple-choice questions, answered by which choice the model finds likeliest.
//!
//! The measures are those of EleutherAI's lm-evaluation-harness: `acc` takes the choice with the
//! largest log-likelihood behind the context, `acc_norm` the one with the largest log-likelihood a
//! byte of its text. Nothing is generated.

use serde::Deserialize;
use serde_json::Value as Json;

use crate::engine::Engine;
use crate::error::Error;
use crate::perplexity::negative_log_likelihood;
use crate::tokenizer::{SpecialTokens, Tokenizer};

/// Longest line of a file with questions.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// Choices have letters.
const CHOICES_MAX: usize = 26;

/// What is asked, and the right answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// What the model reads before a choice.
    pub context: String,
    pub choices: Vec<String>,
    /// Index of the right choice.
    pub answer: usize,
    /// Where the question stands in its file, from 1.
    pub line: usize,
}

/// A question as the model reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizedQuestion {
    pub choices: Vec<TokenizedChoice>,
    pub answer: usize,
    pub line: usize,
}

/// A choice behind its context.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizedChoice {
    /// Context and choice.
    pub ids: Vec<u32>,
    /// Tokens of the context, at least one.
    pub context_len: usize,
    /// Bytes of the choice's text.
    pub num_bytes: usize,
}

/// How well a model answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Share of the questions whose likeliest choice is right.
    pub accuracy: f64,
    /// The same by the likelihood a byte.
    pub accuracy_norm: f64,
    /// Standard errors of both; `None` for a single question.
    pub stderr: Option<f64>,
    pub stderr_norm: Option<f64>,
    pub num_questions: usize,
    /// Tokens of all choices, without their contexts.
    pub tokens_scored: usize,
}

/// A line of the file. Other fields are left alone.
#[derive(Deserialize)]
struct Line {
    context: Option<String>,
    question: Option<String>,
    choices: Vec<String>,
    answer: Json,
}

/// Reads JSON lines, at most `limit` of them: `choices`, `answer` as an index from 0 or a letter,
/// and `context` as it stands before a choice, or `question`, which becomes
/// `Question: …\nAnswer:`. Empty lines are skipped. Errors name the line.
pub fn parse(text: &str, limit: Option<usize>) -> Result<Vec<Question>, Error> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let questions: Vec<Question> = lines
        .take(limit.unwrap_or(usize::MAX))
        .map(|(idx, line)| question(line, idx + 1).map_err(|reason| at_line(idx + 1, &reason)))
        .collect::<Result<_, _>>()?;
    match questions.is_empty() {
        true => Err(Error::Request(
            "there are no questions; give lines such as {\"question\": \"…\", \"choices\": \
             [\"…\", \"…\"], \"answer\": 0}"
                .to_owned(),
        )),
        false => Ok(questions),
    }
}

fn at_line(line: usize, reason: &str) -> Error {
    Error::Request(format!("line {line}: {reason}"))
}

fn question(text: &str, line: usize) -> Result<Question, String> {
    if text.len() > LINE_BYTES_MAX {
        return Err(format!("{} bytes; at most {LINE_BYTES_MAX} are read", text.len()));
    }
    let Line { context, question, choices, answer } =
        serde_json::from_str(text).map_err(|error| format!("not a question: {error}"))?;
    let context = match (context, question) {
        (Some(context), None) => context,
        (None, Some(question)) => format!("Question: {question}\nAnswer:"),
        (Some(_), Some(_)) => return Err("both context and question given; give one".to_owned()),
        (None, None) => return Err("neither context nor question given".to_owned()),
    };
    if !(2..=CHOICES_MAX).contains(&choices.len()) {
        return Err(format!("{} choices given, 2 to {CHOICES_MAX} expected", choices.len()));
    }
    if let Some(idx) = choices.iter().position(|choice| choice.trim().is_empty()) {
        return Err(format!("choice {idx} is empty"));
    }
    let answer = answer_idx(&answer, choices.len())?;
    Ok(Question { context, choices, answer, line })
}

fn answer_idx(answer: &Json, num_choices: usize) -> Result<usize, String> {
    let idx = match answer {
        Json::Number(number) => number.as_u64().and_then(|idx| usize::try_from(idx).ok()),
        Json::String(text) => match text.as_bytes() {
            [letter] if letter.is_ascii_alphabetic() => {
                Some(usize::from(letter.to_ascii_uppercase() - b'A'))
            }
            _ => None,
        },
        _ => None,
    };
    idx.filter(|idx| *idx < num_choices).ok_or_else(|| {
        let text = answer.to_string();
        format!("answer is {text:.40}, not an index from 0 or a letter for {num_choices} choices")
    })
}

/// The tokens of every choice behind its context, without those that the tokenizer puts around a
/// text. `start` is read where a context has no token; at most `len_max` tokens fit.
pub fn tokenize(
    questions: &[Question],
    tokenizer: &Tokenizer,
    start: Option<u32>,
    len_max: usize,
) -> Result<Vec<TokenizedQuestion>, Error> {
    let tokenize = |question: &Question| {
        let choices = question.choices.iter();
        let choices = choices
            .map(|choice| tokenize_choice(&question.context, choice, tokenizer, start, len_max))
            .collect::<Result<_, _>>()
            .map_err(|error| at_line(question.line, &error.to_string()))?;
        Ok(TokenizedQuestion { choices, answer: question.answer, line: question.line })
    };
    questions.iter().map(tokenize).collect()
}

/// Context and choice are tokenized together and cut where the context's own tokens end, as the
/// harness does; spaces between them belong to the choice.
fn tokenize_choice(
    context: &str,
    choice: &str,
    tokenizer: &Tokenizer,
    start: Option<u32>,
    len_max: usize,
) -> Result<TokenizedChoice, Error> {
    let trimmed = context.trim_end();
    let spaces = &context[trimmed.len()..];
    let is_apart =
        context.is_empty() || !spaces.is_empty() || choice.starts_with(char::is_whitespace);
    let delimiter = if is_apart { "" } else { " " };
    let whole = format!("{trimmed}{spaces}{delimiter}{choice}");
    let mut ids = tokenizer.encode(&whole, SpecialTokens::Omit)?;
    let mut context_len = tokenizer.encode(trimmed, SpecialTokens::Omit)?.len();
    if context_len == 0 {
        let start = start.ok_or_else(|| {
            Error::Request(
                "the context is empty, and the model has no BOS or EOS token to start from"
                    .to_owned(),
            )
        })?;
        ids.insert(0, start);
        context_len = 1;
    }
    if context_len >= ids.len() {
        return Err(Error::Request(format!("no token is left for the choice '{choice:.40}'")));
    }
    if ids.len() > len_max {
        return Err(Error::Request(format!(
            "{} tokens do not fit the context of {len_max}; shorten the question",
            ids.len()
        )));
    }
    Ok(TokenizedChoice { ids, context_len, num_bytes: choice.len() })
}

/// Scores every choice. Those of a question follow each other, so that the engine's prefix cache
/// has the full pages of their context. `progress` hears the number of questions that are done.
pub fn measure(
    engine: &mut Engine,
    questions: &[TokenizedQuestion],
    progress: &mut dyn FnMut(usize),
) -> Result<Evaluation, Error> {
    let (mut num_right, mut num_right_norm, mut tokens_scored) = (0, 0, 0);
    for (idx, question) in questions.iter().enumerate() {
        let (mut scores, mut scores_norm) = (Vec::new(), Vec::new());
        for choice in &question.choices {
            let score = log_likelihood(engine, choice)
                .map_err(|error| at_line(question.line, &error.to_string()))?;
            scores.push(score);
            scores_norm.push(score / choice.num_bytes as f64);
            tokens_scored += choice.ids.len() - choice.context_len;
        }
        num_right += usize::from(largest(&scores) == question.answer);
        num_right_norm += usize::from(largest(&scores_norm) == question.answer);
        progress(idx + 1);
    }
    let num_questions = questions.len();
    let share = |num_right: usize| num_right as f64 / num_questions as f64;
    let (accuracy, accuracy_norm) = (share(num_right), share(num_right_norm));
    Ok(Evaluation {
        accuracy,
        accuracy_norm,
        stderr: stderr(accuracy, num_questions),
        stderr_norm: stderr(accuracy_norm, num_questions),
        num_questions,
        tokens_scored,
    })
}

/// The natural logarithm of the choice's probability behind its context.
fn log_likelihood(engine: &mut Engine, choice: &TokenizedChoice) -> Result<f64, Error> {
    let TokenizedChoice { ids, context_len, .. } = choice;
    let mut sum = 0.0;
    engine.logits_of(ids, context_len - 1..ids.len() - 1, &mut |position, logits| {
        sum -= negative_log_likelihood(logits, ids[position + 1]);
    })?;
    match sum.is_finite() {
        true => Ok(sum),
        false => Err(Error::Unsupported(
            "the model's logits are not finite; its weights are damaged or too large for this \
             arithmetic"
                .to_owned(),
        )),
    }
}

/// The index of the largest score, the first of equal ones.
fn largest(scores: &[f64]) -> usize {
    let mut best = 0;
    for (idx, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = idx;
        }
    }
    best
}

/// The standard error of the mean of zeros and ones: √(p · (1 − p) / (n − 1)).
fn stderr(share: f64, num: usize) -> Option<f64> {
    (num > 1).then(|| (share * (1.0 - share) / (num - 1) as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_questions() {
        let text = "{\"question\": \"Up?\", \"choices\": [\"yes\", \"no\"], \"answer\": \"b\"}\n\n\
             {\"context\": \"It is \", \"choices\": [\"a\", \"b\", \"c\"], \"answer\": 2, \
             \"id\": 7}";
        let questions = parse(text, None).unwrap();
        assert_eq!(questions.len(), 2);
        assert_eq!(questions[0].context, "Question: Up?\nAnswer:");
        assert_eq!((questions[0].answer, questions[0].line), (1, 1));
        assert_eq!((questions[1].answer, questions[1].line), (2, 3));
        assert_eq!(parse(text, Some(1)).unwrap(), questions[..1]);
    }

    #[test]
    fn bad_lines_are_named() {
        let good = "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 0}";
        let check = |line: &str, expect: &str| {
            let error = parse(&format!("{good}\n{line}"), None).unwrap_err().to_string();
            assert!(error.starts_with("line 2: ") && error.contains(expect), "{error}");
        };
        let with = |choices: &str, answer: &str| {
            format!("{{\"context\": \"a\", \"choices\": {choices}, \"answer\": {answer}}}")
        };
        let two = "[\"b\", \"c\"]";
        check("nonsense", "not a question");
        check("{\"context\": \"a\", \"answer\": 0}", "choices");
        check(&with("[\"b\"]", "0"), "1 choices given, 2 to 26");
        check(&with(&format!("[{}]", ["\"x\""; 27].join(",")), "0"), "27 choices");
        check(&with("[\"b\", \" \"]", "0"), "choice 1 is empty");
        check(&with(two, "2"), "answer is 2, not an index");
        check(&with(two, "-1"), "answer is -1");
        check(&with(two, "\"C\""), "answer is \"C\"");
        check(&with(two, "\"1\""), "answer is \"1\"");
        check(&with(two, "null"), "answer is null");
        check(&good.replace("context", "text"), "neither context nor question");
        check(&good.replace("{", "{\"question\": \"q\", "), "both");
        check(&" ".repeat(LINE_BYTES_MAX).replacen(' ', "x", 1).repeat(2), "bytes; at most");
        assert!(parse("\n \n", None).unwrap_err().to_string().contains("no questions"));
    }

    #[test]
    fn the_first_of_the_largest_wins() {
        assert_eq!(largest(&[-3.0, -1.0, -1.0]), 1);
        assert_eq!(largest(&[-1.0]), 0);
    }

    #[test]
    fn errors_are_those_of_a_sample() {
        // Three of four right: the sample's variance is 0.25, and √(0.25 / 4) its mean's error.
        assert_eq!(stderr(0.75, 4), Some(0.25));
        assert_eq!(stderr(1.0, 1), None);
    }
}
