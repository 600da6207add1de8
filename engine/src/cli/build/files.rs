//! The small files of a model that its program brings.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use bespoke_kernel_gen::model::ModelConfig;
use serde::de::IgnoredAny;

use crate::bundle;
use crate::source::ModelFolder;
use crate::tokenizer::TOKENIZER_BYTES_MAX;

/// The small files of a model folder whose configuration is one that kernels can be made for.
pub(super) fn read(dir: &Path) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let folder = ModelFolder::Disk(dir.to_owned());
    let config = ModelConfig::parse(&folder.config_text()?)
        .with_context(|| folder.path("config.json").display().to_string())?;
    config.shape(&folder.name())?;
    let mut files = BTreeMap::new();
    for name in bundle::FILES {
        if let Some(bytes) = folder.read(name, TOKENIZER_BYTES_MAX)? {
            files.insert(name.to_owned(), compact(&bytes));
        }
    }
    Ok(files)
}

/// JSON without the white space between its values: of a tokenizer that is half. What is no JSON
/// stays as it is.
fn compact(text: &[u8]) -> Vec<u8> {
    if serde_json::from_slice::<IgnoredAny>(text).is_err() {
        return text.to_vec();
    }
    let (mut in_string, mut is_escaped) = (false, false);
    let is_kept = |byte: &u8| {
        let is_kept = in_string || !byte.is_ascii_whitespace();
        if !is_escaped && *byte == b'"' {
            in_string = !in_string;
        }
        is_escaped = in_string && !is_escaped && *byte == b'\\';
        is_kept
    };
    text.iter().copied().filter(is_kept).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_white_space_between_values_goes() {
        let check = |text: &str, expected: &str| {
            assert_eq!(String::from_utf8(compact(text.as_bytes())).unwrap(), expected);
        };
        check(
            "{ \"a b\" :\n\t[1 , -2e5, null],\r\n\"\": { } }\n",
            "{\"a b\":[1,-2e5,null],\"\":{}}",
        );
        check(r#"[ "\" , ", "\\", " é ", "\\\" x" ]"#, r#"["\" , ","\\"," é ","\\\" x"]"#);
        // Neither is JSON: a template, and values side by side.
        check("{{ messages }} \n", "{{ messages }} \n");
        check("1 2", "1 2");
    }

    #[test]
    fn a_compact_file_says_the_same() {
        let texts: Vec<String> = (0..0x300).filter_map(char::from_u32).map(String::from).collect();
        let value = serde_json::json!({ "texts": texts, " \" ": [{ "\\": 1.5 }, [], true] });
        let pretty = serde_json::to_vec_pretty(&value).unwrap();
        assert_eq!(compact(&pretty), serde_json::to_vec(&value).unwrap());
    }
}
