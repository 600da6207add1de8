//! `/set`: options that can change between two answers.

use std::fmt::Display;
use std::str::FromStr;

use anyhow::{anyhow, bail};

use crate::request::Request;

/// Changes the option `name` of the requests to come; `vocab_size` is the model's.
pub(super) fn set(
    request: &mut Request,
    name: &str,
    value: &str,
    vocab_size: usize,
) -> anyhow::Result<()> {
    let mut changed = request.clone();
    let sampling = &mut changed.sampling;
    match name.replace('_', "-").as_str() {
        "temperature" => sampling.temperature = parse(name, value)?,
        "top-p" => sampling.top_p = parse(name, value)?,
        "top-k" => sampling.top_k = parse(name, value)?,
        "min-p" => sampling.min_p = parse(name, value)?,
        "repetition-penalty" => sampling.repetition_penalty = parse(name, value)?,
        "presence-penalty" => sampling.presence_penalty = parse(name, value)?,
        "frequency-penalty" => sampling.frequency_penalty = parse(name, value)?,
        "seed" => sampling.seed = parse(name, value)?,
        "max-tokens" => changed.max_tokens = parse(name, value)?,
        _ => bail!("there is no option {name}; /set shows all of them"),
    }
    if changed.max_tokens == 0 {
        bail!("max-tokens is 0, it must be at least 1");
    }
    changed.sampling.check(vocab_size)?;
    *request = changed;
    Ok(())
}

/// All options, a line each.
pub(super) fn show(request: &Request) -> String {
    let sampling = &request.sampling;
    let options: [(&str, &dyn Display); 9] = [
        ("temperature", &sampling.temperature),
        ("top-p", &sampling.top_p),
        ("top-k", &sampling.top_k),
        ("min-p", &sampling.min_p),
        ("repetition-penalty", &sampling.repetition_penalty),
        ("presence-penalty", &sampling.presence_penalty),
        ("frequency-penalty", &sampling.frequency_penalty),
        ("seed", &sampling.seed),
        ("max-tokens", &request.max_tokens),
    ];
    options.iter().map(|(name, value)| format!("{name:<20}{value}\n")).collect()
}

fn parse<T: FromStr>(name: &str, value: &str) -> anyhow::Result<T> {
    value.parse().map_err(|_| anyhow!("{name}: '{value}' is not a number that it can have"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_that_is_shown_can_be_set() {
        let mut request = Request { max_tokens: 9, ..Request::default() };
        for line in show(&request.clone()).lines() {
            let (name, value) = line.split_once(' ').unwrap();
            set(&mut request, name, value.trim(), 100).unwrap();
            set(&mut request, name, "1", 100).unwrap();
        }
        let sampling = &request.sampling;
        assert_eq!((sampling.temperature, sampling.top_k, sampling.seed), (1.0, 1, 1));
        assert_eq!(request.max_tokens, 1);
        for (name, value, expected) in [
            ("depth", "1", "no option depth"),
            ("top-k", "-1", "top-k: '-1' is not a number"),
            ("temperature", "-1", "temperature is -1"),
            ("max-tokens", "0", "max-tokens is 0"),
        ] {
            let error = set(&mut request, name, value, 100).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        // What is refused changes nothing.
        assert_eq!(request.sampling.temperature, 1.0);
    }
}
