//! A whole model by activation-aware quantization: layer by layer into a work folder, from there
//! into the output folder.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Instant;

use bespoke_kernel_gen::spec::ActivationType;

use super::awq_format::PackedLinear;
use super::budget;
use super::calibration::{Calibration, CalibrationOptions, TextSource};
use super::checkpoint::Checkpoint;
use super::layer_pass::{LayerPass, PassOptions};
use super::output::{self, OutputPlan, QuantizedValues};
use super::quantized_layer::{AwqOptions, Factors, LayerReport, QuantizedLayer};
use super::report::{
    CalibrationReport, ErrorReport, PerplexityReport, QuantizationReport, SizeReport,
};
use super::source::{Linear, Linears, SourceModel, named_modules};
use super::work_dir::WorkDir;
use crate::config::{EngineOptions, context_max};
use crate::engine::Engine;
use crate::error::Error;
use crate::files::{self, IfExists, StagedDir, human_bytes};
use crate::kernels::generated;
use crate::memory;
use crate::perplexity::{self, Perplexity};
use crate::progress::{Progress, Report, Unit};
use crate::tokenizer::Tokenizer;

const PROGRAM: &str = concat!("bespoke ", env!("CARGO_PKG_VERSION"));

/// Progress within a layer is told in so many steps.
const STEPS_PER_LAYER: u64 = 1000;

/// A model card beyond this is not kept.
const CARD_BYTES_MAX: u64 = 1 << 20;

/// All that is asked for.
pub struct AwqJob {
    pub options: AwqOptions,
    pub pass: PassOptions,
    pub calibration: CalibrationOptions,
    /// Linears stay in 16 bits, those with the largest errors first, as long as a weight has no
    /// more bits than this on average.
    pub bits_max: Option<f64>,
    pub shard_bytes_max: u64,
    pub perplexity: PerplexityOf,
    pub if_exists: IfExists,
}

/// Which text tells the perplexity before and after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PerplexityOf {
    /// Chunks of the calibration text that are no samples.
    HeldOut,
    Text(TextSource),
    Nothing,
}

/// A text to measure the perplexity on.
struct Evaluation {
    name: String,
    ids: Vec<u32>,
    ctx: usize,
}

/// Quantizes the model in `model_dir` into the new folder `out_dir`. A run that was killed goes on
/// where it ended, when it is asked for the same again; the same model, text and options give the
/// same weights whether it was or not.
///
/// After AWQ (Lin et al., "AWQ: Activation-aware Weight Quantization", 2023).
pub fn awq(
    model_dir: &Path,
    out_dir: &Path,
    job: &AwqJob,
    report: Report,
) -> Result<QuantizationReport, Error> {
    let start = Instant::now();
    let model = SourceModel::open(model_dir)?;
    let linears = model.linears(job.options.group_size)?;
    let skipped = named_modules(&linears, &job.options.skip)?;
    if skipped.len() == linears.len() {
        return Err(Error::Request(
            "all linears are skipped, so that nothing is left to quantize; skip less".to_owned(),
        ));
    }
    model.quantized_config(job.options.group_size, &skipped)?;
    if let Some(bits_max) = job.bits_max {
        budget::check(&linears, &skipped, bits_max)?;
    }
    let tokenizer = tokenizer(&model)?;
    let calibration = Calibration::read(&job.calibration, &tokenizer, context_max(&model.config))?;
    let evaluation = evaluation(job, &calibration, &tokenizer)?;

    let staged = StagedDir::create(out_dir, job.if_exists)?;
    let key = run_key(model_dir, &model, &calibration, job)?;
    let mut run = Run { model, linears, job, calibration, work: WorkDir::open(out_dir, key)? };
    let (layers, num_layers_resumed) = run.quantize_layers(staged.path(), report)?;
    let left_out = match job.bits_max {
        Some(bits_max) => budget::choose(&run.linears, &skipped, &layers, bits_max),
        None => skipped,
    };
    let bytes_after = run.write(staged.path(), &left_out, report)?;
    let (perplexity, perplexity_note) = measure(&run, staged.path(), evaluation, report)?;
    let layers = with_left_out(layers, &left_out);
    let result = QuantizationReport {
        bytes: SizeReport { before: run.model.num_bytes(), after: bytes_after },
        error: ErrorReport::of(&layers),
        perplexity,
        perplexity_note,
        num_layers_resumed,
        seconds: start.elapsed().as_secs_f64(),
        layers,
        ..run.report(&left_out)
    };
    write_reports(&result, model_dir, staged.path())?;
    staged.commit()?;
    run.work.remove()?;
    Ok(result)
}

fn tokenizer(model: &SourceModel) -> Result<Tokenizer, Error> {
    let tokenizer = Tokenizer::load_optional(&model.dir)?.ok_or_else(|| {
        Error::model(
            &model.dir,
            "the model has no tokenizer.json, so it cannot read a calibration text; add the file, \
             or quantize without a text by --method rtn",
        )
    })?;
    tokenizer.check_vocab_size(model.config.vocab_size)?;
    Ok(tokenizer)
}

fn evaluation(
    job: &AwqJob,
    calibration: &Calibration,
    tokenizer: &Tokenizer,
) -> Result<Option<Evaluation>, Error> {
    let ctx = job.calibration.sample_len;
    let (name, ids) = match &job.perplexity {
        PerplexityOf::Nothing => return Ok(None),
        PerplexityOf::HeldOut => {
            let name = format!("held-out chunks of {}", job.calibration.text.name());
            (name, calibration.held_out.clone())
        }
        PerplexityOf::Text(text) => (text.name(), text.token_ids(tokenizer)?),
    };
    if ids.len() < ctx && job.perplexity != PerplexityOf::HeldOut {
        return Err(Error::Request(format!(
            "the text for the perplexity ({name}) has {} tokens, fewer than one chunk of {ctx}; \
             give more text or a smaller --seqlen",
            ids.len()
        )));
    }
    Ok(Some(Evaluation { name, ids, ctx }))
}

/// A hash of everything that a layer's values depend on.
fn run_key(
    model_dir: &Path,
    model: &SourceModel,
    calibration: &Calibration,
    job: &AwqJob,
) -> Result<blake3::Hash, Error> {
    let weights = crate::model::safetensors::Checkpoint::open(model_dir)?.fingerprint()?;
    let AwqOptions { group_size, symmetric, compensate, skip } = &job.options;
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(PROGRAM.as_bytes());
    add(model.config_text.as_bytes());
    add(weights.as_bytes());
    add(format!("{group_size} {symmetric} {compensate} {skip:?}").as_bytes());
    add(format!("{:?} {:?}", job.pass.backend, job.pass.target).as_bytes());
    for sample in &calibration.samples {
        let bytes: Vec<u8> = sample.iter().flat_map(|id| id.to_le_bytes()).collect();
        add(&bytes);
    }
    Ok(hasher.finalize())
}

/// A run between its layers and its output.
struct Run<'a> {
    model: SourceModel,
    linears: Linears,
    job: &'a AwqJob,
    calibration: Calibration,
    work: WorkDir,
}

impl Run<'_> {
    /// Brings all layers into the work folder; says how many an earlier run had left there.
    fn quantize_layers(
        &self,
        out_dir: &Path,
        report: Report,
    ) -> Result<(Vec<LayerReport>, usize), Error> {
        let num_layers = self.model.config.num_layers;
        let mut reports = Vec::new();
        let mut pass: Option<LayerPass> = None;
        let mut num_resumed = 0;
        for layer_idx in 0..num_layers {
            if let Some(layer) = self.work.read(layer_idx, self.layer_bytes_max())? {
                if let Some(pass) = &mut pass {
                    pass.resume(&layer)?;
                }
                reports.push(layer.report);
                num_resumed += 1;
                continue;
            }
            let pass = match &mut pass {
                Some(pass) => pass,
                none => none.insert(self.open_pass(out_dir, layer_idx, report)?),
            };
            let first = layer_idx as u64 * STEPS_PER_LAYER;
            let layer = pass.quantize(&mut |done, total| {
                let steps = (done * STEPS_PER_LAYER).checked_div(total).unwrap_or(0);
                report(Progress {
                    stage: "quantizing layers",
                    done: first + steps.min(STEPS_PER_LAYER),
                    total: num_layers as u64 * STEPS_PER_LAYER,
                    unit: Unit::Share,
                });
            })?;
            self.work.write(&layer)?;
            reports.push(layer.report);
        }
        Ok((reports, num_resumed))
    }

    /// A pass that stands before layer `layer_idx`.
    fn open_pass(
        &self,
        out_dir: &Path,
        layer_idx: usize,
        report: Report,
    ) -> Result<LayerPass, Error> {
        // Layers and output lie side by side for a while.
        let none = BTreeSet::new();
        let plan =
            OutputPlan::new(&self.model.checkpoint, &self.linears, &none, self.job.shard_bytes_max);
        files::ensure_space(out_dir, plan.num_bytes.saturating_mul(2))?;
        let mut pass = LayerPass::open(
            &self.model.dir,
            &self.calibration.samples,
            &self.job.options,
            &self.job.pass,
        )?;
        for done in 0..layer_idx {
            pass.resume(&finished_layer(&self.work, done, self.layer_bytes_max())?)?;
            report(Progress {
                stage: "going on behind finished layers",
                done: done as u64 + 1,
                total: layer_idx as u64,
                unit: Unit::Layers,
            });
        }
        Ok(pass)
    }

    /// Writes weights, configuration and companions, and reads them again. Returns the bytes of
    /// all tensors.
    fn write(
        &mut self,
        dir: &Path,
        left_out: &BTreeSet<String>,
        report: Report,
    ) -> Result<u64, Error> {
        let config = self.model.quantized_config(self.job.options.group_size, left_out)?;
        let Run { model, linears, job, work, .. } = self;
        let plan = OutputPlan::new(&model.checkpoint, linears, left_out, job.shard_bytes_max);
        let len_max = layer_bytes_max(linears);
        let mut values = FinishedLayers { work, len_max, layer: None };
        plan.write(&mut model.checkpoint, &mut values, dir, "writing weights", report)?;
        output::finish(model, &config, dir)?;
        Ok(plan.num_bytes)
    }

    fn layer_bytes_max(&self) -> u64 {
        layer_bytes_max(&self.linears)
    }

    /// What is known before anything is measured.
    fn report(&self, left_out: &BTreeSet<String>) -> QuantizationReport {
        let AwqOptions { group_size, symmetric, compensate, skip } = &self.job.options;
        QuantizationReport {
            program: PROGRAM.to_owned(),
            model: self.model.name(),
            method: if *compensate { "awq+" } else { "awq" }.to_owned(),
            group_size: group_size.to_string(),
            symmetric: *symmetric,
            calibration: CalibrationReport {
                text: self.job.calibration.text.name(),
                num_tokens: self.calibration.num_tokens,
                num_samples: self.calibration.samples.len(),
                sample_len: self.job.calibration.sample_len,
            },
            skip: skip.clone(),
            max_bits_per_weight: self.job.bits_max,
            bits_per_weight: budget::bits_per_weight(&self.linears, left_out),
            modules_not_converted: left_out.iter().cloned().collect(),
            bytes: SizeReport { before: 0, after: 0 },
            error: ErrorReport::of(&[]),
            perplexity: None,
            perplexity_note: None,
            num_layers_resumed: 0,
            seconds: 0.0,
            layers: Vec::new(),
        }
    }
}

/// More than any layer takes in the work folder.
fn layer_bytes_max(linears: &Linears) -> u64 {
    let largest = linears.values().map(|linear| (linear.n * linear.k) as u64).max().unwrap_or(0);
    largest.saturating_mul(8).saturating_add(64 << 20)
}

fn finished_layer(work: &WorkDir, layer_idx: usize, len_max: u64) -> Result<QuantizedLayer, Error> {
    work.read(layer_idx, len_max)?.ok_or_else(|| {
        Error::Resources(format!(
            "layer {layer_idx} is gone from the work folder; something else has changed it: run \
             the command again"
        ))
    })
}

/// The layers of the work folder, one in memory at a time.
struct FinishedLayers<'a> {
    work: &'a WorkDir,
    len_max: u64,
    layer: Option<QuantizedLayer>,
}

impl QuantizedValues for FinishedLayers<'_> {
    fn enter(&mut self, layer_idx: Option<usize>) -> Result<(), Error> {
        self.layer = None;
        if let Some(layer_idx) = layer_idx {
            self.layer = Some(finished_layer(self.work, layer_idx, self.len_max)?);
        }
        Ok(())
    }

    fn packed(
        &mut self,
        checkpoint: &mut Checkpoint,
        module: &str,
        linear: Linear,
    ) -> Result<Cow<'_, PackedLinear>, Error> {
        let packed = self.layer.as_ref().and_then(|layer| layer.linears.get(module));
        let packed = packed.filter(|packed| {
            (packed.n, packed.k, packed.group) == (linear.n, linear.k, linear.group)
        });
        packed.map(Cow::Borrowed).ok_or_else(|| {
            let message =
                format!("'{module}' has no 4-bit weights, but is to be written with some");
            Error::model(checkpoint.dir(), message)
        })
    }

    fn floats(&self, tensor: &str) -> Option<&[f32]> {
        self.layer.as_ref()?.floats.get(tensor).map(Vec::as_slice)
    }

    fn factors(&self, module: &str) -> Option<&Factors> {
        let factors = self.layer.as_ref()?.factors.get(module)?;
        let all = factors.input.iter().chain(&factors.output);
        all.copied().any(|factor| factor != 1.0).then_some(factors)
    }
}

/// Marks the modules that are written in 16 bits, whose error is none.
fn with_left_out(mut layers: Vec<LayerReport>, left_out: &BTreeSet<String>) -> Vec<LayerReport> {
    let groups = layers.iter_mut().flat_map(|layer| &mut layer.groups);
    for module in groups.flat_map(|group| &mut group.modules) {
        if left_out.contains(&module.name) {
            module.is_skipped = true;
            module.error = 0.0;
        }
    }
    layers
}

/// The perplexity of the model before and after, or why there is none.
fn measure(
    run: &Run<'_>,
    quantized_dir: &Path,
    evaluation: Option<Evaluation>,
    report: Report,
) -> Result<(Option<PerplexityReport>, Option<String>), Error> {
    let Some(evaluation) = evaluation else { return Ok((None, None)) };
    if evaluation.ids.is_empty() {
        let note = "all of the calibration text was calibrated on; give another text with \
                    --report-perplexity, or take fewer --samples";
        return Ok((None, Some(note.to_owned())));
    }
    let needed = run.model.num_bytes() + run.model.num_bytes() / 4;
    if let Some(free) = memory::available_bytes().filter(|free| *free < needed) {
        let note = format!(
            "the whole model takes about {} of memory, and {} are free",
            human_bytes(needed),
            human_bytes(free)
        );
        return Ok((None, Some(note)));
    }
    let mut of = |dir: &Path, stage| perplexity_of(dir, &evaluation, &run.job.pass, stage, report);
    let before = of(&run.model.dir, "measuring the original")?;
    let after = of(quantized_dir, "measuring the quantized model")?;
    match (before, after) {
        (Some(before), Some(after)) => {
            let report = PerplexityReport {
                text: evaluation.name,
                ctx: evaluation.ctx,
                tokens_scored: after.tokens_scored,
                before: before.ppl,
                after: after.ppl,
            };
            Ok((Some(report), None))
        }
        (_, _) => {
            let note = "this binary has no kernels for the quantized model; build one that has \
                        them with `BESPOKE_MODEL=<quantized model> cargo build --release`";
            Ok((None, Some(note.to_owned())))
        }
    }
}

/// `None` where the binary has no kernels for the model.
fn perplexity_of(
    dir: &Path,
    evaluation: &Evaluation,
    pass: &PassOptions,
    stage: &'static str,
    report: Report,
) -> Result<Option<Perplexity>, Error> {
    let options = EngineOptions {
        backend: pass.backend,
        activation: ActivationType::Float,
        target: pass.target,
        num_threads: pass.num_threads,
        cuda_kernels: generated::cuda_table(),
        max_sequences: 1,
        max_context: Some(evaluation.ctx),
        ..EngineOptions::new(pass.kernels)
    };
    let mut engine = match Engine::load(dir, &options, &mut |_| ()) {
        Err(Error::MissingKernels { .. }) => return Ok(None),
        engine => engine?,
    };
    let mut progress = |done: usize, total: usize, _: f64| {
        report(Progress { stage, done: done as u64, total: total as u64, unit: Unit::Chunks });
    };
    perplexity::measure(&mut engine, &evaluation.ids, evaluation.ctx, &mut progress).map(Some)
}

/// Writes the two reports and the model card, which keeps what the original's says.
fn write_reports(report: &QuantizationReport, model_dir: &Path, dir: &Path) -> Result<(), Error> {
    let original = model_dir.join("README.md");
    let is_short = fs::metadata(&original).is_ok_and(|m| m.is_file() && m.len() <= CARD_BYTES_MAX);
    let original = match is_short {
        true => fs::read(&original).map_err(|e| Error::io(&original, e)).map(Some)?,
        false => None,
    };
    let original = original.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let card = report.card(original.as_deref());
    files::write_durable(&dir.join("README.md"), card.as_bytes())?;
    files::write_durable(&dir.join("quantization.json"), report.json().as_bytes())?;
    files::write_durable(&dir.join("quantization.html"), report.page().as_bytes())
}
