//! The habits of CONTRIBUTING.md and ARCHITECTURE.md that a machine can check.

mod source;

use std::fs;
use std::path::{Path, PathBuf};

use source::{Source, functions, lines_with, named_paths};

const FUNCTION_LINES_MAX: usize = 70;
const COLUMNS_MAX: usize = 100;

/// What some files must not name.
enum Name {
    /// An item or anything below it.
    Path(&'static str),
    /// A macro, by its name alone.
    Macro(&'static str),
    /// An identifier followed by one of these.
    Word(&'static str, &'static [&'static str]),
}

struct Rule {
    names: &'static [Name],
    /// Files and folders it holds for.
    within: &'static [&'static str],
    /// Files and folders inside them that it does not hold for.
    except: &'static [&'static str],
    /// Paths below a forbidden one that are allowed.
    allowed: &'static [&'static str],
    why: &'static str,
}

const CRATES: &[&str] = &["engine/src", "engine/c/src", "kernel-gen/src", "macros/src"];
const SPEAKERS: &[&str] =
    &["engine/src/cli", "engine/src/main.rs", "kernel-gen/src/cargo.rs", "kernel-gen/src/main.rs"];
const ENVIRONMENT_READERS: &[&str] = &[
    "engine/src/cli",
    "engine/src/import/environment.rs",
    "engine/src/main.rs",
    "kernel-gen/src/cargo.rs",
    "kernel-gen/src/main.rs",
];

const RULES: &[Rule] = &[
    Rule {
        names: &[Name::Word("unsafe", &["{", "fn ", "impl ", "trait ", "extern "])],
        within: &["engine/src", "engine/build.rs", "kernel-gen/src", "macros/src"],
        except: &["engine/src/backend/cpu", "engine/src/backend/cuda"],
        allowed: &[],
        // Beside these, engine/c: its functions take what callers in C promise.
        why: "unsafe code lives in templates, backend::cpu, backend::cuda and the C library",
    },
    Rule {
        names: &[
            Name::Macro("print"),
            Name::Macro("println"),
            Name::Macro("eprint"),
            Name::Macro("eprintln"),
        ],
        within: CRATES,
        except: SPEAKERS,
        allowed: &[],
        why: "only the command lines print",
    },
    Rule {
        names: &[Name::Path("std::env")],
        within: CRATES,
        except: ENVIRONMENT_READERS,
        allowed: &[],
        why: "only the command lines and import::environment read the environment",
    },
    Rule {
        names: &[Name::Path("axum"), Name::Path("tower"), Name::Path("tower_http")],
        within: CRATES,
        except: &["engine/src/server"],
        allowed: &[],
        why: "only server knows HTTP",
    },
    Rule {
        names: &[Name::Path("hyper"), Name::Path("hyper_util"), Name::Path("http_body_util")],
        within: CRATES,
        except: &["engine/src/server", "engine/src/cli/bench/serving"],
        allowed: &[],
        why: "only server and the client that measures it know HTTP",
    },
    Rule {
        names: &[Name::Path("cudarc")],
        within: CRATES,
        except: &["engine/src/backend/cuda"],
        allowed: &[],
        why: "only backend::cuda knows the CUDA driver",
    },
    Rule {
        names: &[Name::Path("crate::cli"), Name::Path("crate::server"), Name::Path("bespoke::cli")],
        within: &["engine/src"],
        except: &["engine/src/cli", "engine/src/server", "engine/src/main.rs"],
        allowed: &[],
        why: "nothing below the front ends knows them",
    },
    Rule {
        names: &[
            Name::Path("crate::engine"),
            Name::Path("crate::handle"),
            Name::Path("crate::scheduler"),
            Name::Path("crate::sampling"),
            Name::Path("crate::model"),
            Name::Path("crate::import"),
            Name::Path("crate::quantize"),
            Name::Path("crate::tokenizer"),
        ],
        within: &["engine/src/backend", "engine/src/kernels", "engine/src/kv_cache"],
        except: &[],
        // The views of checkpoint tensors that a backend packs.
        allowed: &["crate::model::linear"],
        why: "backends, kernels and the KV cache know no model and nothing above it",
    },
    Rule {
        names: &[Name::Path("crate::backend"), Name::Path("std::time"), Name::Path("rand")],
        within: &[
            "engine/src/batch.rs",
            "engine/src/kv_cache",
            "engine/src/scheduler.rs",
            "engine/src/sequence.rs",
        ],
        except: &[],
        allowed: &[],
        why: "scheduling knows no device, no clock and no randomness",
    },
    Rule {
        names: &[Name::Path("crate"), Name::Path("bespoke")],
        within: &["templates"],
        except: &[],
        allowed: &[],
        why: "templates know each other and their arguments (`super::`), not the engine",
    },
    Rule {
        names: &[Name::Path("std::time"), Name::Word("HashMap", &[]), Name::Word("HashSet", &[])],
        within: &["kernel-gen/src"],
        // Limits of compilers that hang, and how long a build took.
        except: &["kernel-gen/src/cuda/commands.rs", "kernel-gen/src/cuda/process.rs"],
        allowed: &["std::time::Duration"],
        why: "generated output depends on its input alone: no clock, no hash order",
    },
    Rule {
        names: &[Name::Path("std::time::SystemTime")],
        within: &["engine/src/handle", "engine/src/server"],
        // What is shown to people, and the chat template's date.
        except: &["engine/src/server/mod.rs", "engine/src/server/language.rs"],
        allowed: &[],
        why: "time-outs and idle times are on a clock that nobody sets",
    },
    Rule {
        names: &[Name::Macro("todo"), Name::Macro("unimplemented"), Name::Macro("dbg")],
        within: &["engine", "kernel-gen", "macros", "templates", "tests", "benches"],
        except: &[],
        allowed: &[],
        why: "nothing half-done is committed",
    },
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests is a folder of the workspace")
        .into()
}

/// Every Rust file of the workspace; symlinks are not followed, so templates come once.
fn sources() -> Vec<Source> {
    let root = root();
    let mut sources = Vec::new();
    for folder in ["benches", "engine", "kernel-gen", "macros", "templates", "tests"] {
        collect(&root, &root.join(folder), &mut sources);
    }
    assert!(sources.len() > 20, "only {} Rust files found below {}", sources.len(), root.display());
    sources
}

fn collect(root: &Path, folder: &Path, sources: &mut Vec<Source>) {
    for entry in
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
    {
        let entry = entry.expect("a readable folder entry");
        let path = entry.path();
        let kind = entry.file_type().expect("a folder entry has a type");
        if kind.is_dir() && !path.ends_with("target") {
            collect(root, &path, sources);
        } else if kind.is_file() && path.extension().is_some_and(|extension| extension == "rs") {
            let text = read(&path);
            let relative = path.strip_prefix(root).expect("below the root").to_string_lossy();
            sources.push(Source::new(relative.replace('\\', "/"), text));
        }
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Fails with all of them at once.
fn assert_none(violations: &[String]) {
    assert!(violations.is_empty(), "{} violations:\n{}", violations.len(), violations.join("\n"));
}

fn is_within(path: &str, places: &[&str]) -> bool {
    places.iter().any(|place| {
        path.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

/// Whether `path` is `root` or an item below it.
fn is_below(path: &str, root: &str) -> bool {
    path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

impl Rule {
    fn violations(&self, source: &Source) -> Vec<String> {
        if !is_within(&source.path, self.within) || is_within(&source.path, self.except) {
            return Vec::new();
        }
        let code = source.own_code();
        let mut violations = Vec::new();
        for name in self.names {
            for (line, found) in self.uses(name, &code) {
                violations.push(format!("{}:{line}: `{found}`: {}", source.path, self.why));
            }
        }
        violations
    }

    fn uses(&self, name: &Name, code: &str) -> Vec<(usize, String)> {
        match name {
            Name::Path(root) => named_paths(code)
                .into_iter()
                .filter(|named| is_below(&named.path, root))
                .filter(|named| !self.allowed.iter().any(|allowed| is_below(&named.path, allowed)))
                .map(|named| (named.line, named.path))
                .collect(),
            Name::Macro(word) => lines_with(code, word, &["!(", "!{", "!["])
                .into_iter()
                .map(|line| (line, format!("{word}!")))
                .collect(),
            Name::Word(word, next) => lines_with(code, word, next)
                .into_iter()
                .map(|line| (line, (*word).to_owned()))
                .collect(),
        }
    }
}

#[test]
fn lines_and_functions_are_short() {
    let mut violations = Vec::new();
    for source in sources() {
        for (idx, line) in source.text.lines().enumerate() {
            let columns = line.chars().count();
            if columns > COLUMNS_MAX {
                let path = &source.path;
                violations.push(format!("{path}:{}: {columns} columns > {COLUMNS_MAX}", idx + 1));
            }
        }
        for function in functions(&source.code) {
            if function.num_lines > FUNCTION_LINES_MAX {
                violations.push(format!(
                    "{}:{}: `{}` has {} lines > {FUNCTION_LINES_MAX}",
                    source.path, function.line, function.name, function.num_lines
                ));
            }
        }
    }
    assert_none(&violations);
}

#[test]
fn dependencies_point_one_way() {
    let violations: Vec<String> = sources()
        .iter()
        .flat_map(|source| RULES.iter().flat_map(|rule| rule.violations(source)))
        .collect();
    assert_none(&violations);
}

#[test]
fn rules_find_what_they_forbid() {
    let check = |path: &str, text: &str, expected: usize| {
        let source = Source::new(path.to_owned(), text.to_owned());
        let violations: Vec<String> =
            RULES.iter().flat_map(|rule| rule.violations(&source)).collect();
        assert_eq!(violations.len(), expected, "{path}: {text}\n{}", violations.join("\n"));
    };
    check("engine/src/model/mod.rs", "fn f() { unsafe { g() } }", 1);
    check("engine/src/backend/cpu/mod.rs", "fn f() { unsafe { g() } }", 0);
    check("engine/src/kernels/mod.rs", "enum K { A(unsafe fn(u8)) }", 0);
    check("engine/c/src/input.rs", "fn f() { unsafe { g() } }", 0);
    check("engine/c/src/input.rs", "fn f() { println!(\"x\") }", 1);
    check("engine/src/model/mod.rs", "fn f() { println!(\"x\") }", 1);
    check("engine/src/cli/mod.rs", "fn f() { println!(\"x\") }", 0);
    check("engine/src/model/mod.rs", "use std::{env, fs};", 1);
    check("engine/src/model/mod.rs", "#[cfg(test)]\nmod tests { use std::env; }", 0);
    check("engine/src/backend/cpu/pack.rs", "use crate::model::linear::DenseView;", 0);
    check("engine/src/backend/cpu/pack.rs", "use crate::model::{linear, weights};", 1);
    check("engine/src/scheduler.rs", "use crate::backend::Backend;", 1);
    check("engine/src/scheduler.rs", "use crate::backend_names::Backend;", 0);
    check("engine/src/model/mod.rs", "use crate::cli::run;", 1);
    check("engine/src/model/mod.rs", "use axum::Router;", 1);
    check("engine/src/cli/bench/mod.rs", "use hyper::Uri;", 1);
    check("engine/src/cli/bench/serving/url.rs", "use hyper::Uri;", 0);
    check("templates/rope/rope.rs", "use crate::batch::Batch;", 1);
    check("kernel-gen/src/plan.rs", "use std::collections::HashMap;", 1);
    check("kernel-gen/src/plan.rs", "fn f() { quote! { use std::collections::HashMap; } }", 0);
    check("tests/it/x.rs", "fn f() { todo!() }", 1);
}

/// Names in the dependency tables of a manifest.
fn manifest_dependencies(text: &str) -> Vec<&str> {
    let mut in_table = false;
    let mut names = Vec::new();
    for line in text.lines() {
        if line.starts_with('[') {
            in_table = line.trim_end().ends_with("dependencies]");
        } else if in_table {
            names.extend(line.split(['.', '=', ' ']).next().filter(|name| !name.is_empty()));
        }
    }
    names
}

#[test]
fn manifests_point_one_way() {
    let forbidden: &[(&str, &[&str])] = &[
        ("kernel-gen", &["bespoke", "bespoke-macros"]),
        ("macros", &["bespoke", "bespoke-kernel-gen"]),
        ("engine", &["bespoke-tests", "bespoke-benches", "bespoke-c"]),
    ];
    let mut violations = Vec::new();
    for (package, names) in forbidden {
        let text = read(&root().join(package).join("Cargo.toml"));
        let dependencies = manifest_dependencies(&text);
        assert!(dependencies.len() > 2, "{package}: dependencies not found: {dependencies:?}");
        for name in names.iter().filter(|name| dependencies.contains(name)) {
            violations.push(format!("{package}/Cargo.toml: must not depend on {name}"));
        }
    }
    assert_none(&violations);
    let text = "[dependencies]\na.workspace = true\nb = \"1\"\n[lints]\nc = 1\n";
    assert_eq!(manifest_dependencies(text), ["a", "b"]);
}

#[test]
fn nothing_is_skipped_or_postponed() {
    // Spelled in halves, or this file would be its own first violation.
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:")];
    let ignore = concat!("#[ig", "nore");
    let mut violations = Vec::new();
    for source in sources() {
        for (idx, line) in source.text.lines().enumerate() {
            for mark in marks.iter().filter(|mark| line.contains(**mark)) {
                violations.push(format!("{}:{}: {mark}", source.path, idx + 1));
            }
            if line.trim_start().starts_with(ignore) {
                violations.push(format!("{}:{}: ignored test", source.path, idx + 1));
            }
        }
    }
    assert_none(&violations);
}

#[test]
fn modules_say_what_they_are() {
    let violations: Vec<String> = sources()
        .iter()
        .filter(|source| source.path.contains("/src/") || source.path.starts_with("templates/"))
        .filter(|source| !source.text.starts_with("//! "))
        .map(|source| format!("{}:1: no `//!` sentence", source.path))
        .collect();
    assert_none(&violations);
}

#[test]
fn templates_are_part_of_both_packages() {
    for package in ["engine", "kernel-gen"] {
        let link = root().join(package).join("templates");
        let kind = fs::symlink_metadata(&link).unwrap_or_else(|error| {
            panic!("{}: {error}; it is a symlink to ../templates", link.display())
        });
        assert!(kind.is_symlink(), "{} is not a symlink", link.display());
        let target = fs::read_link(&link).expect("a symlink has a target");
        assert_eq!(target, Path::new("../templates"), "{}", link.display());
    }
}

/// Folders of `templates/` that hold an op.
fn ops() -> Vec<String> {
    let mut ops: Vec<String> = fs::read_dir(root().join("templates"))
        .expect("the templates folder")
        .map(|entry| entry.expect("a readable folder entry"))
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != "common")
        .collect();
    ops.sort();
    ops
}

/// `awq_gemm` → `AwqGemm`
fn type_name(op: &str) -> String {
    op.split('_')
        .flat_map(|word| {
            let (first, rest) = word.split_at(1);
            [first.to_uppercase(), rest.to_owned()]
        })
        .collect()
}

/// One op, one name: its folder, spec, arguments, kernel entry, tests and bench group.
#[test]
fn ops_have_one_name_everywhere() {
    let sources = sources();
    let code = |path: &str| {
        let source = sources.iter().find(|source| source.path == path);
        &source.unwrap_or_else(|| panic!("{path} is missing")).code
    };
    let bench_text: String = sources
        .iter()
        .filter(|source| source.path.starts_with("benches/"))
        .map(|source| source.text.as_str())
        .collect();
    let spec = code("kernel-gen/src/spec.rs");
    let kernels = code("engine/src/kernels/mod.rs");
    let abi = code("engine/src/kernels/abi.rs");
    let mut violations = Vec::new();
    for op in ops() {
        let name = type_name(&op);
        let mut demand = |is_there: bool, what: String| {
            if !is_there {
                violations.push(format!("op {op}: {what}"));
            }
        };
        let has = |code: &str, word: &str| !lines_with(code, word, &[]).is_empty();
        let template = format!("templates/{op}/{op}.rs");
        demand(has(spec, &name), format!("no KernelSpec::{name} in kernel-gen/src/spec.rs"));
        demand(has(kernels, &op), format!("no `mod {op}` in engine/src/kernels/mod.rs"));
        demand(has(kernels, &name), format!("no KernelFn::{name} in engine/src/kernels/mod.rs"));
        demand(has(abi, &format!("{name}Args")), format!("no {name}Args in kernels/abi.rs"));
        let is_tested = code(&template).contains("#[cfg(test)]")
            || sources.iter().any(|source| source.path == format!("tests/it/ops/{op}.rs"));
        demand(is_tested, format!("no tests in {template} or tests/it/ops/{op}.rs"));
        demand(bench_text.contains(&format!("\"{op}\"")), "no bench group in benches".to_owned());
    }
    assert_none(&violations);
    assert_eq!(type_name("awq_gemm"), "AwqGemm");
}
