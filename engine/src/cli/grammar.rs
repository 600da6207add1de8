//! Arguments that hold an answer to a grammar.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::model::ModelFiles;
use super::prompt::read_text;
use crate::grammar::{Grammar, GrammarSpec};

/// What an answer has to look like.
#[derive(clap::Args, Clone, Debug)]
#[group(multiple = false)]
pub(super) struct GrammarArgs {
    /// JSON schema of the answer: a file, or the schema itself
    #[arg(long, value_name = "FILE|SCHEMA")]
    json_schema: Option<String>,
    /// Regular expression that the whole answer matches
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    regex: Option<String>,
    /// File with a Lark grammar of the answer
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
}

impl GrammarArgs {
    /// The grammar for the model of `files`; `None` where none is asked for.
    pub(super) fn compile(&self, files: &ModelFiles) -> anyhow::Result<Option<Grammar>> {
        let Some((name, spec)) = self.spec()? else { return Ok(None) };
        compile(&spec, files).with_context(|| name.to_owned()).map(Some)
    }

    /// The grammar, and the argument that names it.
    fn spec(&self) -> anyhow::Result<Option<(&'static str, GrammarSpec)>> {
        Ok(if let Some(schema) = &self.json_schema {
            let text = match schema.trim_start().starts_with('{') {
                true => schema.clone(),
                false => read_text(Path::new(schema))?,
            };
            let schema = serde_json::from_str(&text).context("--json-schema: not valid JSON")?;
            Some(("--json-schema", GrammarSpec::JsonSchema(schema)))
        } else if let Some(regex) = &self.regex {
            Some(("--regex", GrammarSpec::Regex(regex.clone())))
        } else if let Some(path) = &self.grammar {
            Some(("--grammar", GrammarSpec::Lark(read_text(path)?)))
        } else {
            None
        })
    }
}

#[cfg(feature = "grammar")]
fn compile(spec: &GrammarSpec, files: &ModelFiles) -> anyhow::Result<Grammar> {
    let compiler =
        crate::grammar::GrammarCompiler::new(files.tokenizer()?, files.config.vocab_size)?;
    Ok(compiler.compile(spec)?)
}

#[cfg(not(feature = "grammar"))]
fn compile(_spec: &GrammarSpec, _files: &ModelFiles) -> anyhow::Result<Grammar> {
    anyhow::bail!("this binary was built without grammars; build it with `--features grammar`")
}
