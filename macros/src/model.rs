//! Declarations → kernels: every name is known, and what is said twice agrees by name. Sizes are
//! compared by the assertions that `expand` writes.

use std::collections::BTreeSet;

use proc_macro2::Span;
use syn::spanned::Spanned;
use syn::{Expr, GenericArgument, Ident, Lit, LitInt, LitStr, PathArguments};

use crate::error::Errors;
use crate::parse::{Declaration, required};

/// An op: its template's functions and the fields of its spec.
pub(crate) struct Op {
    /// Template module.
    pub(crate) name: &'static str,
    /// Variant of `KernelSpec` and of `KernelFn`.
    pub(crate) spec: &'static str,
    pub(crate) args: &'static str,
    pub(crate) entries: &'static [Entry],
    pub(crate) fields: &'static [Field],
}

/// A template function: its row regime and its generic parameters in order.
pub(crate) struct Entry {
    pub(crate) name: &'static str,
    pub(crate) regime: &'static str,
    pub(crate) parameters: &'static [&'static str],
}

/// A field of a spec, and the parameter that says the same, if there is one.
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) parameter: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Size,
    Flag,
    DType,
    KvDType,
    GroupSize,
    ActivationType,
    RowFormat,
}

/// A checked declaration.
pub(crate) struct Kernel {
    pub(crate) symbol: Ident,
    pub(crate) op: &'static Op,
    pub(crate) entry: &'static Entry,
    /// In the order of the entry's parameters.
    pub(crate) arguments: Vec<Value>,
    /// In the order of the op's fields.
    pub(crate) fields: Vec<Value>,
    pub(crate) regime: Ident,
    pub(crate) target: Ident,
    pub(crate) features: LitStr,
    pub(crate) rows: LitInt,
    pub(crate) cols: LitInt,
    pub(crate) scratch_bytes: LitInt,
    pub(crate) reduction_class: LitStr,
    pub(crate) source_hash: LitStr,
}

/// The value of a parameter or a field.
#[derive(Clone)]
pub(crate) enum Value {
    Size(LitInt),
    Flag(syn::LitBool),
    /// A type or an enum variant by its name.
    Name(Ident),
    /// `Of(64)`, `I8 { group: 64 }`: a variant with a size in it.
    Sized(Ident, LitInt),
}

impl Value {
    pub(crate) fn span(&self) -> Span {
        match self {
            Value::Size(literal) | Value::Sized(_, literal) => literal.span(),
            Value::Flag(literal) => literal.span(),
            Value::Name(name) => name.span(),
        }
    }

    pub(crate) fn is_name(&self, expected: &str) -> bool {
        matches!(self, Value::Name(name) | Value::Sized(name, _) if name == expected)
    }
}

macro_rules! fields {
    ($($name:ident: $kind:ident $(= $parameter:ident)?),*) => {
        &[$(Field {
            name: stringify!($name),
            kind: Kind::$kind,
            parameter: fields!(@parameter $($parameter)?),
        }),*]
    };
    (@parameter $parameter:ident) => { Some(stringify!($parameter)) };
    (@parameter) => { None };
}

/// Entries of a matmul: sizes, and behind them the fields of a configuration.
macro_rules! matmul_entries {
    ($($regime:ident $name:ident<$($parameter:ident),*>),*) => {
        entries!($($regime $name<
            $($parameter,)* COLS, ROWS, TILES, UNROLL, PREFETCH, SPLIT, HALVES
        >),*)
    };
}

macro_rules! entries {
    ($($regime:ident $name:ident<$($parameter:ident),*>),*) => {
        &[$(Entry {
            name: stringify!($name),
            regime: stringify!($regime),
            parameters: &[$(stringify!($parameter)),*],
        }),*]
    };
}

pub(crate) const OPS: &[Op] = &[
    Op {
        name: "embed",
        spec: "Embed",
        args: "EmbedArgs",
        entries: entries!(Any run<S, E, HIDDEN>),
        fields: fields!(hidden: Size = HIDDEN, dtype: DType = E),
    },
    Op {
        name: "rms_norm",
        spec: "RmsNorm",
        args: "RmsNormArgs",
        entries: entries!(Any run<S, HIDDEN, GROUP>),
        fields: fields!(hidden: Size = HIDDEN, out: RowFormat = GROUP),
    },
    Op {
        name: "gemm",
        spec: "Gemm",
        args: "GemmArgs",
        entries: matmul_entries!(
            One one<S, E, N, K>,
            Few few<S, E, N, K>,
            Many many<S, E, N, K>,
            One int8_one<S, N, K, GROUP>,
            Few int8_few<S, N, K, GROUP>,
            Many int8_many<S, N, K, GROUP>
        ),
        fields: fields!(n: Size = N, k: Size = K, weight: DType = E),
    },
    Op {
        name: "gemm_bf16",
        spec: "GemmBf16",
        args: "GemmBf16Args",
        entries: matmul_entries!(One one<S, N, K>, Few few<S, N, K>, Many many<S, N, K>),
        fields: fields!(n: Size = N, k: Size = K),
    },
    Op {
        name: "awq_gemm",
        spec: "AwqGemm",
        args: "AwqGemmArgs",
        entries: matmul_entries!(
            One float_one<S, N, K, GROUP>,
            Few float_few<S, N, K, GROUP>,
            Many float_many<S, N, K, GROUP>,
            One int8_one<S, N, K, GROUP>,
            Few int8_few<S, N, K, GROUP>,
            Many int8_many<S, N, K, GROUP>
        ),
        fields: fields!(
            n: Size = N, k: Size = K, group: GroupSize = GROUP, activation: ActivationType
        ),
    },
    Op {
        name: "rope",
        spec: "Rope",
        args: "RopeArgs",
        entries: entries!(
            Any run<S, KV, HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, PAGE, QK_NORM>
        ),
        fields: fields!(
            num_heads: Size = HEADS, num_kv_heads: Size = KV_HEADS, head_dim: Size = HEAD_DIM,
            rotary_dim: Size = ROTARY_DIM, qk_norm: Flag = QK_NORM, kv: KvDType = KV,
            page_size: Size = PAGE
        ),
    },
    Op {
        name: "paged_attention",
        spec: "PagedAttention",
        args: "PagedAttentionArgs",
        entries: entries!(
            One decode<S, KV, HEADS, KV_HEADS, HEAD_DIM, WINDOW, PAGE>,
            Many prefill<S, KV, HEADS, KV_HEADS, HEAD_DIM, WINDOW, PAGE>
        ),
        fields: fields!(
            num_heads: Size = HEADS, num_kv_heads: Size = KV_HEADS, head_dim: Size = HEAD_DIM,
            window: Size = WINDOW, kv: KvDType = KV, page_size: Size = PAGE
        ),
    },
    Op {
        name: "silu_and_mul",
        spec: "SiluAndMul",
        args: "SiluAndMulArgs",
        entries: entries!(Any run<S, INTERMEDIATE, GROUP>),
        fields: fields!(intermediate: Size = INTERMEDIATE, out: RowFormat = GROUP),
    },
    Op {
        name: "quantize",
        spec: "Quantize",
        args: "QuantizeArgs",
        entries: entries!(Any run<S, K, GROUP>),
        fields: fields!(k: Size = K, out: RowFormat = GROUP),
    },
    Op {
        name: "sample",
        spec: "Sample",
        args: "SampleArgs",
        entries: entries!(Any run<S, VOCAB>),
        fields: fields!(vocab: Size = VOCAB),
    },
];

/// What `target` names.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    /// Its vector type, and the module of that.
    pub(crate) simd: &'static str,
    pub(crate) module: &'static str,
    /// The architecture that has its instructions; `None`: any.
    pub(crate) arch: Option<&'static str>,
}

pub(crate) const TARGETS: [Target; 4] = [
    Target { name: "Portable", simd: "Portable", module: "simd_portable", arch: None },
    Target { name: "X86_64V3", simd: "V3", module: "simd_x86", arch: Some("x86_64") },
    Target { name: "Avx512", simd: "Avx512", module: "simd_x86", arch: Some("x86_64") },
    Target { name: "Neon", simd: "Neon", module: "simd_neon", arch: Some("aarch64") },
];

/// The kernels of all declarations that are right; the others are reported.
pub(crate) fn check(declarations: Vec<Declaration>, errors: &mut Errors) -> Vec<Kernel> {
    let mut symbols = BTreeSet::new();
    let mut kernels = Vec::new();
    for declaration in declarations {
        if !symbols.insert(declaration.symbol.to_string()) {
            let message = format!("kernel `{}` is declared twice", declaration.symbol);
            errors.push(declaration.symbol.span(), message);
            continue;
        }
        kernels.extend(check_one(declaration, errors));
    }
    kernels
}

fn check_one(declaration: Declaration, errors: &mut Errors) -> Option<Kernel> {
    let symbol = declaration.symbol;
    // NOTE: all keys are asked for before any is given up on, so that all errors are reported.
    let run = required(declaration.run, "run", &symbol, errors);
    let spec = required(declaration.spec, "spec", &symbol, errors);
    let regime = required(declaration.regime, "regime", &symbol, errors);
    let target = required(declaration.target, "target", &symbol, errors);
    let features = required(declaration.features, "features", &symbol, errors);
    let rows = required(declaration.rows, "rows", &symbol, errors);
    let cols = required(declaration.cols, "cols", &symbol, errors);
    let scratch_bytes = required(declaration.scratch_bytes, "scratch_bytes", &symbol, errors);
    let class = required(declaration.reduction_class, "reduction_class", &symbol, errors);
    let source_hash = required(declaration.source_hash, "source_hash", &symbol, errors);
    let run = run.and_then(|run| check_run(&run, errors));
    let fields = match (&run, spec) {
        (Some((op, _, _)), Some(spec)) => check_spec(op, &spec, errors),
        _ => None,
    };
    let (op, entry, arguments) = run?;
    let kernel = Kernel {
        symbol,
        op,
        entry,
        arguments,
        fields: fields?,
        regime: regime?,
        target: target?,
        features: features?,
        rows: rows?,
        cols: cols?,
        scratch_bytes: scratch_bytes?,
        reduction_class: class?,
        source_hash: source_hash?,
    };
    check_agreement(&kernel, errors).then_some(kernel)
}

type Run = (&'static Op, &'static Entry, Vec<Value>);

/// `op::entry<S = …, …>` with every parameter of the entry exactly once.
fn check_run(run: &syn::Path, errors: &mut Errors) -> Option<Run> {
    let segments: Vec<&syn::PathSegment> = run.segments.iter().collect();
    let [module, function] = segments[..] else {
        errors.push(run.span(), "`op::function<…>` expected");
        return None;
    };
    let Some(op) = OPS.iter().find(|op| module.ident == op.name) else {
        let names: Vec<&str> = OPS.iter().map(|op| op.name).collect();
        let message = format!("no op `{}`; there are {}", module.ident, names.join(", "));
        errors.push(module.ident.span(), message);
        return None;
    };
    let Some(entry) = op.entries.iter().find(|entry| function.ident == entry.name) else {
        let names: Vec<&str> = op.entries.iter().map(|entry| entry.name).collect();
        let message = format!(
            "no function `{}` in {}; there are {}",
            function.ident,
            op.name,
            names.join(", ")
        );
        errors.push(function.ident.span(), message);
        return None;
    };
    let mut arguments: Vec<Option<Value>> = vec![None; entry.parameters.len()];
    let mut right = true;
    if let PathArguments::AngleBracketed(given) = &function.arguments {
        for argument in &given.args {
            right &= check_argument(argument, entry, &mut arguments, errors);
        }
    }
    for (name, argument) in entry.parameters.iter().zip(&arguments) {
        if argument.is_none() && right {
            errors.push(function.ident.span(), format!("`{name} = …` is missing"));
        }
    }
    let arguments: Option<Vec<Value>> = arguments.into_iter().collect();
    Some((op, entry, arguments.filter(|_| right)?))
}

fn check_argument(
    argument: &GenericArgument,
    entry: &Entry,
    arguments: &mut [Option<Value>],
    errors: &mut Errors,
) -> bool {
    let (name, value) = match argument {
        GenericArgument::AssocType(assoc) => (&assoc.ident, type_value(&assoc.ty)),
        GenericArgument::AssocConst(assoc) => (&assoc.ident, expr_value(&assoc.value)),
        other => {
            errors.push(other.span(), "`PARAMETER = value` expected");
            return false;
        }
    };
    let Some(idx) = entry.parameters.iter().position(|parameter| name == parameter) else {
        let names = entry.parameters.join(", ");
        let message = format!("no parameter `{name}`; `{}` takes {names}", entry.name);
        errors.push(name.span(), message);
        return false;
    };
    let expected = match entry.parameters[idx] {
        "S" | "E" | "KV" => "a type",
        "QK_NORM" => "true or false",
        _ => "an integer",
    };
    let fits = |value: &Value| match value {
        Value::Name(_) => expected == "a type",
        Value::Flag(_) => expected == "true or false",
        Value::Size(_) => expected == "an integer",
        Value::Sized(..) => false,
    };
    match value.filter(fits) {
        Some(_) if arguments[idx].is_some() => {
            errors.push(name.span(), format!("`{name}` is given twice"));
            false
        }
        Some(value) => {
            arguments[idx] = Some(value);
            true
        }
        None => {
            errors.push(argument.span(), format!("`{name}` wants {expected}"));
            false
        }
    }
}

fn type_value(ty: &syn::Type) -> Option<Value> {
    match ty {
        syn::Type::Path(path) => path.path.get_ident().cloned().map(Value::Name),
        _ => None,
    }
}

/// A literal, a name, `Of(64)` or `I8 { group: 64 }`.
fn expr_value(expr: &Expr) -> Option<Value> {
    match expr {
        Expr::Lit(literal) => match &literal.lit {
            // NOTE: sizes are usize; parsing refuses what does not fit.
            Lit::Int(int) if int.base10_parse::<u64>().is_ok() => Some(Value::Size(int.clone())),
            Lit::Bool(flag) => Some(Value::Flag(flag.clone())),
            _ => None,
        },
        Expr::Path(path) => path.path.get_ident().cloned().map(Value::Name),
        Expr::Call(call) => match (expr_value(&call.func)?, call.args.first().map(expr_value)) {
            (Value::Name(name), Some(Some(Value::Size(size)))) if call.args.len() == 1 => {
                Some(Value::Sized(name, size))
            }
            _ => None,
        },
        Expr::Struct(fields) => match (fields.path.get_ident(), fields.fields.first()) {
            (Some(name), Some(field)) if fields.fields.len() == 1 => {
                match (&field.member, expr_value(&field.expr)) {
                    (syn::Member::Named(member), Some(Value::Size(size))) if member == "group" => {
                        Some(Value::Sized(name.clone(), size))
                    }
                    _ => None,
                }
            }
            _ => None,
        },
        _ => None,
    }
}

/// The spec's fields, all there, each of its kind.
fn check_spec(op: &Op, spec: &syn::ExprStruct, errors: &mut Errors) -> Option<Vec<Value>> {
    if !spec.path.is_ident(op.spec) {
        errors.push(spec.path.span(), format!("`{}` expected for op {}", op.spec, op.name));
        return None;
    }
    let mut right = true;
    for field in &spec.fields {
        let known = |field: &syn::FieldValue| match &field.member {
            syn::Member::Named(name) => op.fields.iter().any(|known| name == known.name),
            syn::Member::Unnamed(_) => false,
        };
        if !known(field) {
            errors.push(field.member.span(), format!("no such field in {}", op.spec));
            right = false;
        }
    }
    let mut values = Vec::new();
    for field in op.fields {
        let named = |given: &&syn::FieldValue| match &given.member {
            syn::Member::Named(name) => name == field.name,
            syn::Member::Unnamed(_) => false,
        };
        let given: Vec<&syn::FieldValue> = spec.fields.iter().filter(named).collect();
        let [given] = given[..] else {
            let message = format!("field `{}` is given {} times", field.name, given.len());
            errors.push(spec.path.span(), message);
            right = false;
            continue;
        };
        match expr_value(&given.expr).filter(|value| is_of_kind(value, field.kind)) {
            Some(value) => values.push(value),
            None => {
                let message = format!("`{}` wants a {:?}", field.name, field.kind);
                errors.push(given.expr.span(), message);
                right = false;
            }
        }
    }
    right.then_some(values)
}

fn is_of_kind(value: &Value, kind: Kind) -> bool {
    let one_of = |names: &[&str]| names.iter().any(|name| value.is_name(name));
    match (value, kind) {
        (Value::Size(_), Kind::Size) | (Value::Flag(_), Kind::Flag) => true,
        (Value::Name(_), Kind::DType) => one_of(&["F32", "F16", "BF16", "I8"]),
        (Value::Name(_), Kind::KvDType) => one_of(&["F32", "F16", "I8", "I4"]),
        (Value::Name(_), Kind::GroupSize) => one_of(&["Channel"]),
        (Value::Sized(..), Kind::GroupSize) => one_of(&["Of"]),
        (Value::Name(_), Kind::ActivationType) => one_of(&["Float", "Int8", "Bf16"]),
        (Value::Name(_), Kind::RowFormat) => one_of(&["F32", "Bf16"]),
        (Value::Sized(..), Kind::RowFormat) => one_of(&["I8"]),
        _ => false,
    }
}

/// Names that `run`, `spec`, `regime` and `target` share.
fn check_agreement(kernel: &Kernel, errors: &mut Errors) -> bool {
    let mut right = true;
    let mut expect = |is_right: bool, span: Span, message: String| {
        if !is_right {
            errors.push(span, message);
            right = false;
        }
    };
    let Kernel { entry, target, regime, .. } = kernel;
    let (name, wanted) = (entry.name, entry.regime);
    expect(regime == wanted, regime.span(), format!("`{name}` is for regime {wanted}"));
    match TARGETS.iter().find(|one| target == one.name) {
        None => expect(false, target.span(), format!("no target `{target}`")),
        Some(Target { name, simd, arch, .. }) => {
            let given = &kernel.arguments[0];
            expect(given.is_name(simd), given.span(), format!("target {name} has S = {simd}"));
            let plain = arch.is_none();
            let message =
                format!("target {name} {} features", if plain { "has no" } else { "needs" });
            expect(kernel.features.value().is_empty() == plain, kernel.features.span(), message);
        }
    }
    let is_int8 = entry.name.starts_with("int8_");
    for (field, value) in kernel.op.fields.iter().zip(&kernel.fields) {
        let span = value.span();
        let argument = argument(kernel, field.parameter);
        match (field.kind, argument) {
            (Kind::DType, Some(given)) => {
                let same = matches!(value, Value::Name(dtype) if given.is_name(&dtype.to_string()));
                expect(same, span, format!("not the E of `{name}`"));
            }
            (Kind::DType, None) => {
                expect(value.is_name("I8"), span, format!("`{name}` has I8 weights"));
            }
            (Kind::KvDType, Some(given)) => {
                let same = matches!(value, Value::Name(kv) if given.is_name(&format!("Kv{kv}")));
                expect(same, span, format!("not the KV of `{name}`"));
            }
            (Kind::Flag, Some(Value::Flag(given))) => {
                let same = matches!(value, Value::Flag(flag) if flag.value == given.value);
                expect(same, span, format!("not the QK_NORM of `{name}`"));
            }
            (Kind::ActivationType, _) => {
                let message = format!("not the activation of `{name}`");
                expect(value.is_name("Int8") == is_int8, span, message);
            }
            _ => {}
        }
    }
    right
}

/// The value of the entry's parameter, if it has it.
pub(crate) fn argument<'a>(kernel: &'a Kernel, parameter: Option<&str>) -> Option<&'a Value> {
    let idx = kernel.entry.parameters.iter().position(|name| Some(*name) == parameter)?;
    kernel.arguments.get(idx)
}
