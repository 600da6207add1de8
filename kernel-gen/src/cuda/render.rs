//! A variant → its source: one self-contained file, in which every line knows the template it comes
//! from.
//!
//! Includes are resolved here, each file once, so that the text is all a kernel depends on: its
//! hash is the kernel's identity, and a compiler needs no include path.

use super::Variant;
use super::templates::{self, PTX, Template};
use crate::error::Error;

/// One kernel's source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub variant: Variant,
    pub symbol: String,
    pub text: String,
}

/// The source that nvcc compiles.
pub fn render(variant: &Variant) -> Result<Source, Error> {
    render_with(variant, None)
}

/// The same source with `ptx` in place of `common/ptx.cuh`: for running kernels elsewhere. Its
/// includes of other templates are resolved too.
pub fn render_with(variant: &Variant, ptx: Option<Template<'_>>) -> Result<Source, Error> {
    let op = variant.spec().op();
    let symbol = variant.symbol();
    let mut flattened = Flattened { ptx, text: String::new(), included: Vec::new() };
    flattened.include(&format!("{op}/{op}.cuh"))?;
    let text = format!("{}{}", flattened.text, shell(variant, &symbol));
    Ok(Source { variant: *variant, symbol, text })
}

/// The constants and the entry.
fn shell(variant: &Variant, symbol: &str) -> String {
    let instance = variant.instance();
    let constants: String =
        instance.constants.iter().map(|constant| format!("    {constant}\n")).collect();
    format!(
        "#line 1 \"{symbol}\"\n\
         struct Constants {{\n\
         {constants}\
         }};\n\
         \n\
         KERNEL({symbol}, {params}, {threads}, {blocks}) {{\n    \
             {op}::{kernel}<Constants>::run(params);\n\
         }}\n",
        params = instance.params,
        threads = instance.threads,
        blocks = instance.min_blocks,
        op = variant.spec().op(),
        kernel = instance.kernel,
    )
}

/// Templates with their includes in place.
struct Flattened<'a> {
    ptx: Option<Template<'a>>,
    text: String,
    included: Vec<String>,
}

impl Flattened<'_> {
    fn include(&mut self, path: &str) -> Result<(), Error> {
        if self.included.iter().any(|included| included == path) {
            return Ok(());
        }
        self.included.push(path.to_string());
        let Some(template) = self.find(path) else {
            let message = "no such template; list it in kernel-gen/src/cuda/templates.rs";
            return Err(Error::Source { position: path.to_string(), message: message.to_string() });
        };
        // NOTE: a replaced file keeps its own name in messages.
        let (name, text) = match (&self.ptx, path) {
            (Some(ptx), PTX) => (ptx.path.to_string(), ptx.text.to_string()),
            _ => (format!("templates/{path}"), template.text.to_string()),
        };
        self.position(1, &name);
        for (line_idx, line) in text.lines().enumerate() {
            match included_name(line) {
                Some(included) => {
                    let resolved = resolve(included, path).ok_or_else(|| Error::Source {
                        position: format!("{name}:{}", line_idx + 1),
                        message: format!("\"{included}\" is no template"),
                    })?;
                    self.include(&resolved)?;
                    self.position(line_idx + 2, &name);
                }
                // NOTE: each file is here once, and compilers warn of it in a main file.
                None if line.trim() == "#pragma once" => self.text.push('\n'),
                None => {
                    self.text.push_str(line);
                    self.text.push('\n');
                }
            }
        }
        Ok(())
    }

    fn find(&self, path: &str) -> Option<Template<'_>> {
        match (self.ptx, path) {
            (Some(ptx), PTX) => Some(ptx),
            _ => templates::find(path),
        }
    }

    fn position(&mut self, line: usize, name: &str) {
        self.text.push_str(&format!("#line {line} \"{name}\"\n"));
    }
}

/// `types.cuh` of `#include "types.cuh"`.
fn included_name(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix("#include")?.trim_start();
    rest.strip_prefix('"')?.split('"').next()
}

/// A name in quotes is looked up beside the file that includes it, in `common/`, then below
/// `templates/`.
fn resolve(name: &str, from: &str) -> Option<String> {
    let folder = from.rsplit_once('/').map_or("", |(folder, _)| folder);
    let candidates = [format!("{folder}/{name}"), format!("common/{name}"), name.to_string()];
    candidates.into_iter().find(|path| templates::find(path).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silu() -> Variant {
        Variant::parse("silu_and_mul_i1536_bf16__sm_90a").unwrap()
    }

    #[test]
    fn a_source_has_each_file_once() {
        let source = render(&silu()).unwrap();
        for file in ["common/ptx.cuh", "common/types.cuh", "common/params.h"] {
            let first = format!("#line 1 \"templates/{file}\"\n");
            assert_eq!(source.text.matches(&first).count(), 1, "{file}");
        }
        assert!(!source.text.contains("#include \""));
        assert!(!source.text.contains("#pragma once"));
        assert_eq!(render(&silu()).unwrap(), source);
    }

    #[test]
    fn lines_keep_their_places() {
        let source = render(&silu()).unwrap();
        let (mut file, mut number) = (String::new(), 0);
        for line in source.text.lines() {
            if let Some(rest) = line.strip_prefix("#line ") {
                let (first, name) = rest.split_once(' ').unwrap();
                (number, file) = (first.parse().unwrap(), name.trim_matches('"').to_string());
                continue;
            }
            if let Some(path) = file.strip_prefix("templates/") {
                let template = templates::find(path).unwrap();
                let original: &str = template.text.lines().nth(number - 1).unwrap();
                let expected = if original == "#pragma once" { "" } else { original };
                assert_eq!(line, expected, "{file}:{number}");
            }
            number += 1;
        }
    }

    #[test]
    fn the_shell_names_constants_and_entry() {
        let source = render(&silu()).unwrap();
        let shell = source.text.rsplit_once("#line 1 ").unwrap().1;
        let expected = "\
            \"silu_and_mul_i1536_bf16__sm_90a\"\n\
            struct Constants {\n    \
                using Rows = BF16;\n    \
                static constexpr u32 INTERMEDIATE = 1536;\n    \
                static constexpr u32 THREADS = 256;\n\
            };\n\
            \n\
            KERNEL(silu_and_mul_i1536_bf16__sm_90a, SiluAndMulParams, 256, 1) {\n    \
                silu_and_mul::Kernel<Constants>::run(params);\n\
            }\n";
        assert_eq!(shell, expected);
    }

    #[test]
    fn ptx_can_be_replaced() {
        let ptx = Template { path: "emulator/ptx.cuh", text: "// emulated\n#include <stdint.h>\n" };
        let source = render_with(&silu(), Some(ptx)).unwrap();
        assert!(source.text.contains("#line 1 \"emulator/ptx.cuh\"\n// emulated\n"));
        assert!(!source.text.contains("__global__"));
    }
}
