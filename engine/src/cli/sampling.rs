//! How tokens are chosen, as arguments.

use std::str::FromStr;

use anyhow::bail;

use super::model::ModelFiles;
use crate::sampling::SamplingParams;
use crate::tokenizer::SpecialTokens;

#[derive(clap::Args, Clone, Debug)]
pub(super) struct SamplingArgs {
    /// 0 takes the likeliest token, 1 follows the model's distribution
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Choose among the likeliest tokens up to this share of the probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Choose among this many of the likeliest tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Choose among tokens with at least this share of the likeliest one's probability
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Make tokens that were already seen less likely; 1 changes nothing
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Make tokens of the answer less likely to come again, from -2 to 2
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_hyphen_values = true)]
    presence_penalty: f32,
    /// The same for each time that they came, from -2 to 2
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_hyphen_values = true)]
    frequency_penalty: f32,
    /// Add BIAS, from -100 to 100, to the logit of token ID; may be repeated
    #[arg(long, value_name = "ID=BIAS", allow_hyphen_values = true)]
    logit_bias: Vec<TokenBias>,
    /// Text whose tokens, with or without a space before it, do not come in a row; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    bad_words: Vec<String>,
    /// Do not end the answer before it has so many tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    min_tokens: usize,
    /// List so many of the likeliest tokens in each place, at most 20
    #[arg(long, value_name = "N", requires = "json")]
    top_logprobs: Option<usize>,
    /// Start of the random numbers; the same seed gives the same answer
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
}

/// A token id and what is added to its logit, as they were typed.
#[derive(Clone, Copy, Debug)]
struct TokenBias(u32, f32);

impl FromStr for TokenBias {
    type Err = String;

    fn from_str(text: &str) -> Result<TokenBias, String> {
        let parse = || {
            let (token, bias) = text.split_once('=')?;
            Some(TokenBias(token.trim().parse().ok()?, bias.trim().parse().ok()?))
        };
        parse().ok_or_else(|| format!("'{text}' is not a token id and a bias, such as 42=-100"))
    }
}

impl SamplingArgs {
    /// The parameters, not checked yet; bad words take a tokenizer.
    pub(super) fn params(&self, files: &ModelFiles) -> anyhow::Result<SamplingParams> {
        Ok(SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.iter().map(|TokenBias(id, bias)| (*id, *bias)).collect(),
            bad_words: bad_words(&self.bad_words, files)?,
            min_tokens: self.min_tokens,
            num_top_logprobs: self.top_logprobs.unwrap_or(0),
            seed: self.seed,
        })
    }

    /// Whether the answer lists the likeliest tokens.
    pub(super) fn has_top_logprobs(&self) -> bool {
        self.top_logprobs.is_some()
    }
}

/// The tokens of each text, at the start of an answer and after a space: most vocabularies have the
/// space in the token of the word.
fn bad_words(texts: &[String], files: &ModelFiles) -> anyhow::Result<Vec<Vec<u32>>> {
    let mut words = Vec::new();
    for text in texts {
        let (tokenizer, text) = (files.tokenizer()?, text.trim_start());
        if text.is_empty() {
            bail!("a bad word is empty; give it at least one character");
        }
        for text in [text, &format!(" {text}")] {
            words.push(tokenizer.encode(text, SpecialTokens::Omit)?);
        }
    }
    Ok(words)
}
