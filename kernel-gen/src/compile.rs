//! Sources → artifacts. The CPU kernels themselves are compiled by rustc with the crate that
//! includes them; here each instantiation is checked against its template, so that a mismatch is
//! reported with the template's line, and what a kernel is made from is hashed.

use std::collections::BTreeMap;

use crate::error::Error;
use crate::render::{Argument, Source};
use crate::templates::{self, Template};

/// A checked source and the hash of everything it is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    pub source: Source,
    /// 32 hex digits.
    pub hash: String,
}

/// The public functions of a template: name, line and the names of the generic parameters.
struct Entries {
    functions: Vec<(String, usize, Vec<String>)>,
}

/// Checks and hashes every source; all templates are parsed once.
pub fn compile(sources: Vec<Source>) -> Result<Vec<Artifact>, Error> {
    let mut parsed: BTreeMap<&'static str, Entries> = BTreeMap::new();
    let mut artifacts = Vec::with_capacity(sources.len());
    for source in sources {
        let body = templates::body(&source.variant.spec);
        let entries = match parsed.entry(body.path) {
            std::collections::btree_map::Entry::Occupied(slot) => slot.into_mut(),
            std::collections::btree_map::Entry::Vacant(slot) => slot.insert(read_entries(&body)?),
        };
        check_entry(&source, &body, entries)?;
        let hash = hash(&source);
        artifacts.push(Artifact { source, hash });
    }
    Ok(artifacts)
}

fn read_entries(template: &Template) -> Result<Entries, Error> {
    let file = syn::parse_file(template.text).map_err(|error| {
        let start = error.span().start();
        Error::Source {
            position: format!("{}:{}:{}", template.path, start.line, start.column + 1),
            message: error.to_string(),
        }
    })?;
    let functions = file.items.iter().filter_map(|item| match item {
        syn::Item::Fn(function) => Some(&function.sig),
        _ => None,
    });
    let generics = |signature: &syn::Signature| {
        let names = signature.generics.params.iter().filter_map(|parameter| match parameter {
            syn::GenericParam::Type(parameter) => Some(parameter.ident.to_string()),
            syn::GenericParam::Const(parameter) => Some(parameter.ident.to_string()),
            syn::GenericParam::Lifetime(_) => None,
        });
        names.collect()
    };
    let row = |signature: &syn::Signature| {
        (signature.ident.to_string(), signature.ident.span().start().line, generics(signature))
    };
    Ok(Entries { functions: functions.map(row).collect() })
}

fn check_entry(source: &Source, template: &Template, entries: &Entries) -> Result<(), Error> {
    let error = |line, message| Error::Source {
        position: format!("{}:{line}:1", template.path),
        message: format!("{}: {message}", source.symbol),
    };
    let Some((_, line, generics)) =
        entries.functions.iter().find(|(name, _, _)| name == source.entry)
    else {
        return Err(error(1, format!("no function `{}` in the template", source.entry)));
    };
    let given: Vec<&str> = source.arguments.iter().map(Argument::parameter).collect();
    if given != *generics {
        let message = format!(
            "`{}` takes <{}>, the generator gives <{}>",
            source.entry,
            generics.join(", "),
            given.join(", ")
        );
        return Err(error(*line, message));
    }
    Ok(())
}

/// Hash of a kernel's instantiation and of the code of the template files that it comes from:
/// another body has another hash, other comments or another layout have not.
pub fn hash(source: &Source) -> String {
    let used = templates::used(&source.variant.spec, source.variant.target);
    let codes: Vec<(&str, &str)> =
        used.into_iter().map(|template| (template.path, template.code())).collect();
    hash_of(source, &codes)
}

/// Hash of an instantiation of templates with these paths and codes.
fn hash_of(source: &Source, codes: &[(&str, &str)]) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    add(&source.instantiation());
    add(source.variant.target.features());
    for (path, code) in codes {
        add(path);
        add(code);
    }
    hasher.finalize().to_hex()[..32].to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::KernelVariant;
    use crate::render::render;
    use crate::templates::code_of;

    #[test]
    fn another_body_has_another_hash_and_another_comment_has_not() {
        let symbol = "awq_gemm_n960_k576_g64_int8_few__avx512";
        let source = render(&KernelVariant::parse(symbol).unwrap());
        let used = templates::used(&source.variant.spec, source.variant.target);
        // The hash if the text of one template were edited.
        let after = |edited: &str, edit: &dyn Fn(&str) -> String| {
            let code = |template: &Template| match template.path.ends_with(edited) {
                true => (template.path, code_of(&edit(template.text))),
                false => (template.path, code_of(template.text)),
            };
            let codes: Vec<(&str, String)> = used.iter().map(code).collect();
            let codes: Vec<(&str, &str)> =
                codes.iter().map(|(path, code)| (*path, &**code)).collect();
            hash_of(&source, &codes)
        };
        let today = hash(&source);
        for file in ["awq_gemm.rs", "gemm.rs", "simd.rs", "simd_x86.rs"] {
            assert!(used.iter().any(|template| template.path.ends_with(file)), "{file}");
            assert_eq!(after(file, &str::to_string), today, "{file}");
            assert_eq!(after(file, &|text| format!("// Why.\n{text}")), today, "{file}");
            let other_code = |text: &str| format!("{text}\nconst OTHER: usize = 1;\n");
            assert_ne!(after(file, &other_code), today, "{file}");
        }
        let other_sum = |text: &str| text.replacen(" += ", " -= ", 1);
        assert_ne!(after("awq_gemm.rs", &other_sum), today);
    }
}
