//! What the command line does with CUDA kernels; each function returns what is to be printed.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::cache::Temporary;
use super::compile::{Artifact, Compiler};
use super::emit;
use super::render::{self, Source};
use super::sass::{self, Counts, Statistics};
use super::{Arch, Choice, KvType, Regime, Variant, plan, process};
use crate::error::Error;
use crate::presets;

/// What disassembling one kernel may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Every kernel's instantiation of its template, one line each.
pub fn render(variants: &[Variant]) -> Result<String, Error> {
    let line = |variant: &Variant| {
        let instance = variant.instance();
        let hash = blake3::hash(render::render(variant)?.text.as_bytes()).to_hex();
        let constants: Vec<String> = instance
            .constants
            .iter()
            .map(|constant| constant.to_string().replace("static constexpr ", ""))
            .collect();
        Ok(format!(
            "{} = {}::{} {{ {} }} of {}\n",
            variant.symbol(),
            variant.spec().op(),
            instance.kernel,
            constants.join(" "),
            &hash[..16]
        ))
    };
    variants.iter().map(line).collect()
}

/// The sources of kernels, by their symbols.
pub fn source(symbols: &[String]) -> Result<String, Error> {
    let text = |symbol: &String| {
        let variant = Variant::parse(symbol).ok_or_else(|| Error::Compile {
            symbol: symbol.clone(),
            message: "no such CUDA kernel; `kernel-gen plan MODEL --target cuda` lists them"
                .to_string(),
        })?;
        Ok(render::render(&variant)?.text)
    };
    symbols.iter().map(text).collect()
}

fn sources(variants: &[Variant]) -> Result<Vec<Source>, Error> {
    variants.iter().map(render::render).collect()
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.display().to_string(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(io)?;
    }
    std::fs::write(path, bytes).map_err(io)
}

/// Compiles kernels and writes `<symbol>.cubin` and `kernels.json` into `folder`.
pub fn build(variants: &[Variant], compiler: &Compiler, folder: &Path) -> Result<String, Error> {
    let begin = Instant::now();
    let artifacts = compiler.compile(sources(variants)?)?;
    let seconds = begin.elapsed().as_secs_f64();
    for artifact in &artifacts {
        write(&folder.join(format!("{}.cubin", artifact.source.symbol)), &artifact.cubin)?;
    }
    let contents = emit::Contents {
        artifacts: &artifacts,
        servings: &[],
        toolkit: &compiler.toolkit.version,
        is_tuner: false,
    };
    let generated = emit::emit(&contents);
    write(&folder.join("kernels.json"), crate::emit::json_text(generated.rows).as_bytes())?;
    let cached = artifacts.iter().filter(|artifact| artifact.is_cached).count();
    let bytes: usize = artifacts.iter().map(|artifact| artifact.cubin.len()).sum();
    let deflated: usize = generated.blobs.iter().map(|(_, bytes)| bytes.len()).sum();
    Ok(format!(
        "{} kernels, {cached} of them cached, in {seconds:.1} s; {bytes} bytes of machine code, \
         {deflated} deflated; nvcc {}\n",
        artifacts.len(),
        compiler.toolkit.version,
    ))
}

/// A table of the instructions of kernels.
pub fn print_sass(variants: &[Variant], compiler: &Compiler) -> Result<String, Error> {
    let mut text = String::new();
    for (artifact, statistics) in statistics(variants, compiler)? {
        let row = row(&artifact, &statistics);
        text.push_str(&format!("{} {row}\n", artifact.source.symbol));
    }
    Ok(text)
}

/// Compares the representative kernels with the file.
pub fn check_sass(compiler: &Compiler, path: &Path) -> Result<String, Error> {
    let io = |source| Error::Io { path: path.display().to_string(), source };
    let text = std::fs::read_to_string(path).map_err(io)?;
    let golden: Value = serde_json::from_str(&text).unwrap_or_default();
    let found = representative_rows(compiler)?;
    if golden["toolkit"] != compiler.toolkit.version.as_str() {
        return Ok(format!(
            "skipped: {} is of nvcc {}, this is {}\n",
            path.display(),
            golden["toolkit"],
            compiler.toolkit.version
        ));
    }
    let differences = differences(&golden["kernels"], &found);
    match differences.is_empty() {
        true => Ok(format!("{} kernels as in {}\n", found.len(), path.display())),
        false => Err(Error::Compile {
            symbol: path.display().to_string(),
            message: format!(
                "the kernels' instructions are others:\n{}write them with `kernel-gen sass \
                 --write`, and say in the commit why they changed",
                differences.concat()
            ),
        }),
    }
}

/// Writes the file that [`check_sass`] reads.
pub fn write_sass(compiler: &Compiler, path: &Path) -> Result<String, Error> {
    let found = representative_rows(compiler)?;
    let (num, toolkit) = (found.len(), compiler.toolkit.version.as_str());
    let text = format!("{:#}\n", json!({ "toolkit": toolkit, "kernels": found }));
    write(path, text.as_bytes())?;
    Ok(format!("{num} kernels in {}\n", path.display()))
}

fn differences(golden: &Value, found: &Map<String, Value>) -> Vec<String> {
    let mut lines = Vec::new();
    for (symbol, row) in found {
        match golden.get(symbol) {
            Some(expected) if expected == row => {}
            Some(expected) => lines.push(format!("{symbol}: {expected} → {row}\n")),
            None => lines.push(format!("{symbol}: new\n")),
        }
    }
    let gone = golden.as_object().into_iter().flat_map(Map::keys);
    lines
        .extend(gone.filter(|symbol| !found.contains_key(*symbol)).map(|s| format!("{s}: gone\n")));
    lines
}

fn representative_rows(compiler: &Compiler) -> Result<Map<String, Value>, Error> {
    let rows = statistics(&representative()?, compiler)?;
    for (artifact, statistics) in &rows {
        let Source { variant, symbol, .. } = &artifact.source;
        check_stream(variant, statistics)
            .map_err(|message| Error::Compile { symbol: symbol.clone(), message })?;
    }
    let row = |(artifact, statistics): &(Artifact, Statistics)| {
        (artifact.source.symbol.clone(), row(artifact, statistics))
    };
    Ok(rows.iter().map(row).collect())
}

/// Some kernels of Llama-3.1-8B AWQ for every architecture: each body, the largest int4 matmul.
pub fn representative() -> Result<Vec<Variant>, Error> {
    let shape = presets::shape("llama-3.1-8b-awq", &[])?;
    let n_max = 2 * shape.intermediate_size;
    let is_chosen = |variant: &Variant| match variant.choice {
        Choice::AwqGemm(kernel) => {
            let regimes = [Regime::UpTo(8), Regime::UpTo(64), Regime::Many];
            kernel.op.n == n_max && regimes.contains(&variant.regime)
        }
        Choice::Gemm(_) => [Regime::UpTo(8), Regime::Many].contains(&variant.regime),
        Choice::PagedAttention(kernel) => {
            variant.regime == Regime::Decode || kernel.op.kv == KvType::Rows
        }
        Choice::Rope(kernel) => kernel.op.kv != KvType::I8,
        _ => true,
    };
    Ok(plan::plan(&[shape], &Arch::ALL)?.into_iter().filter(is_chosen).collect())
}

fn statistics(
    variants: &[Variant],
    compiler: &Compiler,
) -> Result<Vec<(Artifact, Statistics)>, Error> {
    let artifacts = compiler.compile(sources(variants)?)?;
    let nvdisasm = compiler.toolkit.tool("nvdisasm")?;
    let read = |idx: usize| -> Result<Statistics, Error> {
        let artifact: &Artifact = &artifacts[idx];
        let fault = |message: String| Error::Compile {
            symbol: artifact.source.symbol.clone(),
            message: format!("{}: {message}", nvdisasm.display()),
        };
        let file = Temporary(compiler.cache.temporary("cubin")?);
        write(file.path(), &artifact.cubin)?;
        let output = process::run(Command::new(&nvdisasm).arg("-c").arg(file.path()), LIMIT)
            .map_err(|failure| fault(failure.to_string()))?;
        if !output.status.success() {
            return Err(fault(output.stderr));
        }
        let statistics = sass::read(&String::from_utf8_lossy(&output.stdout));
        match statistics.all.local() {
            0 => Ok(statistics),
            local => Err(fault(format!("{local} accesses to local memory"))),
        }
    };
    let statistics = compiler.jobs.run(artifacts.len(), read)?;
    Ok(artifacts.into_iter().zip(statistics).collect())
}

/// A kernel in the golden file.
fn row(artifact: &Artifact, statistics: &Statistics) -> Value {
    let counts = |counts: &Counts| {
        let mut row = Map::new();
        row.insert("instructions".to_string(), counts.instructions.into());
        row.extend(counts.kinds.iter().map(|(kind, count)| (kind.clone(), (*count).into())));
        Value::Object(row)
    };
    let mut row = json!({
        "registers": artifact.usage.registers,
        "instructions": statistics.all.instructions,
    });
    if let Some(hot_loop) = &statistics.hot_loop {
        row["loop"] = counts(hot_loop);
        if let Some(slots) = slots_per_word(&artifact.source.variant, hot_loop) {
            row["slots_per_word"] = json!((slots * 100.0).round() / 100.0);
        }
    }
    row
}

/// Issue slots of a warp for each 32-bit word of int4 weights a lane has: a word is the operand of
/// one tensor-core instruction for every eight rows of the warp.
fn slots_per_word(variant: &Variant, hot_loop: &Counts) -> Option<f64> {
    let (Choice::AwqGemm(kernel), Regime::UpTo(_)) = (variant.choice, variant.regime) else {
        return None;
    };
    let words = hot_loop.of("HMMA") as f64 / kernel.config.row_tiles as f64;
    (words > 0.0).then(|| hot_loop.instructions as f64 / words)
}

/// Issue slots of a warp for each word of int4 weights a lane has: an H100's 3.2 TB/s leave about
/// 36 of them, as its 132 multiprocessors issue four a cycle at 1.75 GHz.
const SLOTS_MAX: f64 = 24.0;

/// Whether the int4 matmul of few rows can keep up with memory: the slots of its loop, weights that
/// come into shared memory and into registers by 16 bytes.
fn check_stream(variant: &Variant, statistics: &Statistics) -> Result<(), String> {
    let (Choice::AwqGemm(kernel), Regime::UpTo(8)) = (variant.choice, variant.regime) else {
        return Ok(());
    };
    let hot_loop = statistics.hot_loop.as_ref().ok_or("it has no loop over its weights")?;
    let slots = slots_per_word(variant, hot_loop).ok_or("its loop uses no tensor core")?;
    if slots > SLOTS_MAX {
        return Err(format!("its loop takes {slots:.1} slots for eight weights, not {SLOTS_MAX}"));
    }
    let words = hot_loop.of("HMMA") / kernel.config.row_tiles;
    if 4 * hot_loop.of("LDS.128") < words || hot_loop.of("LDGSTS.128") == 0 {
        return Err(format!("its loop does not load weights by 16 bytes: {:?}", hot_loop.kinds));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_loops_are_refused() {
        let symbol = "awq_gemm_n28672_k4096_g128_f16_upto8__sm_90a";
        let variant = Variant::parse(symbol).unwrap();
        let statistics = |instructions: usize, wide: &str| {
            let kinds = [("HMMA", 12), ("LDGSTS.128", 6), (wide, 3)];
            let kinds = kinds.map(|(kind, count)| (kind.to_string(), count)).into();
            let hot_loop = Some(Counts { instructions, kinds });
            Statistics { all: Counts::default(), hot_loop }
        };
        assert_eq!(check_stream(&variant, &statistics(218, "LDS.128")), Ok(()));
        let slow = check_stream(&variant, &statistics(300, "LDS.128")).unwrap_err();
        assert!(slow.contains("25.0 slots"), "{slow}");
        let narrow = check_stream(&variant, &statistics(218, "LDS.32")).unwrap_err();
        assert!(narrow.contains("16 bytes"), "{narrow}");
        assert!(check_stream(&variant, &Statistics::default()).is_err());
    }

    #[test]
    fn every_body_is_represented_on_every_architecture() {
        let variants = representative().unwrap();
        for arch in Arch::ALL {
            let mut kernels: Vec<(&str, &str)> = variants
                .iter()
                .filter(|variant| variant.arch == arch)
                .map(|variant| (variant.spec().op(), variant.instance().kernel))
                .collect();
            kernels.sort_unstable();
            kernels.dedup();
            let mut ops: Vec<&str> = kernels.iter().map(|(op, _)| *op).collect();
            ops.dedup();
            assert_eq!(ops.len(), 8, "{kernels:?}");
            for kernel in [("paged_attention", "Decode"), ("paged_attention", "Prefill")] {
                assert!(kernels.contains(&kernel), "{kernels:?}");
            }
        }
    }

    #[test]
    fn differences_name_the_kernels() {
        let golden = json!({ "a": { "loop": 1 }, "b": { "loop": 2 }, "c": {} });
        let found = json!({ "a": { "loop": 1 }, "b": { "loop": 3 }, "d": {} });
        let lines = differences(&golden, found.as_object().unwrap());
        assert_eq!(lines, ["b: {\"loop\":2} → {\"loop\":3}\n", "d: new\n", "c: gone\n"]);
        assert!(differences(&Value::Null, &Map::new()).is_empty());
    }
}
