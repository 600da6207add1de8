//! The calibration activations in front of a layer: the float model's, and the quantized model's
//! where it is followed too.

use bespoke_kernel_gen::spec::LinearRole;
use ndarray::{Array2, ArrayView2};

use super::activations::Activations;
use super::gram::Gram;
use super::group::{Calibration, Deviation};
use super::layer_builder::LayerBuilder;
use super::layer_pass::PassOptions;
use super::layer_runner::{RunLayer, WeightSet};
use super::linalg::multiply;
use super::quantized_layer::AwqOptions;
use crate::error::Error;
use crate::model::weights::{ModelWeights, Weights};

/// The linears of a layer, in the order in which they are computed and quantized.
pub(super) const ROLES: [LinearRole; 4] =
    [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down];

/// Residual streams of all samples.
pub(super) struct Streams {
    num_samples: usize,
    sample_len: usize,
    hidden: usize,
    float: Activations,
    /// The float model's between attention and MLP, and the quantized model's.
    second: Option<Second>,
}

struct Second {
    middle: Activations,
    quantized: Activations,
}

/// Tells how many pieces of a layer's work are done.
struct Counter<'a> {
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    total: u64,
}

impl Counter<'_> {
    fn step(&mut self) {
        self.done += 1;
        (self.progress)(self.done, self.total);
    }
}

impl Streams {
    pub(super) fn new(
        num_samples: usize,
        sample_len: usize,
        hidden: usize,
        options: &AwqOptions,
        pass: &PassOptions,
    ) -> Result<Streams, Error> {
        let len = sample_len.saturating_mul(hidden);
        let make = |name| Activations::new(num_samples, len, pass.spill.as_deref(), name);
        let second = match options.compensate {
            true => Some(Second { middle: make("middle")?, quantized: make("quantized")? }),
            false => None,
        };
        Ok(Streams { num_samples, sample_len, hidden, float: make("float")?, second })
    }

    /// Starts all streams with the embeddings of the samples' tokens.
    pub(super) fn embed(
        &mut self,
        weights: &Weights<'_>,
        samples: &[Vec<u32>],
    ) -> Result<(), Error> {
        let table = weights.embedding()?;
        let table = table.view();
        let mut rows = self.room();
        for (idx, sample) in samples.iter().enumerate() {
            for (token, row) in sample.iter().zip(rows.chunks_exact_mut(self.hidden)) {
                table.row(*token as usize, row);
            }
            self.float.write(idx, &rows)?;
            if let Some(second) = &mut self.second {
                second.quantized.write(idx, &rows)?;
            }
        }
        Ok(())
    }

    /// Moves the float model's stream behind the layer, and quantizes it by what was seen.
    pub(super) fn calibrate_float(
        &mut self,
        runner: &mut dyn RunLayer,
        builder: &mut LayerBuilder<'_>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), Error> {
        let total = (self.num_samples + ROLES.len()) as u64;
        let mut counter = Counter { progress, done: 0, total };
        let mut grams = ROLES.map(|role| builder.gram(role));
        let mut rows = self.room();
        for idx in 0..self.num_samples {
            self.float.read(idx, &mut rows)?;
            for half in [&ROLES[..2], &ROLES[2..]] {
                let (first, second) = (half[0], half[1]);
                runner.start(first, &rows);
                let input = runner.input(first);
                grams[first as usize].add(self.matrix(&input));
                runner.linear(WeightSet::Float, first);
                let mut input = runner.input(second);
                runner.linear(WeightSet::Float, second);
                add(&mut rows, &runner.delta());
                self.weigh(&row_weights(&rows, self.hidden), &mut input);
                grams[second as usize].add(self.matrix(&input));
            }
            self.float.write(idx, &rows)?;
            counter.step();
        }
        for (role, gram) in ROLES.into_iter().zip(grams) {
            builder.quantize(role, Calibration { gram, deviation: Deviation::None })?;
            counter.step();
        }
        Ok(())
    }

    /// Moves both streams behind the layer, and quantizes its linears one after the other, each by
    /// what the quantized model's reads once those before it are quantized.
    pub(super) fn calibrate_both(
        &mut self,
        runner: &mut dyn RunLayer,
        builder: &mut LayerBuilder<'_>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), Error> {
        let total = (5 * self.num_samples + ROLES.len()) as u64;
        let mut counter = Counter { progress, done: 0, total };
        let calibration = self.see_qkv(runner, builder, &mut counter)?;
        builder.quantize(LinearRole::Qkv, calibration)?;
        counter.step();
        builder.load(runner, &[LinearRole::Qkv])?;
        let calibration = self.see_second(LinearRole::O, runner, builder, &mut counter)?;
        builder.quantize(LinearRole::O, calibration)?;
        counter.step();
        // The factors on attention's outputs are in the values now.
        builder.load(runner, &[LinearRole::Qkv, LinearRole::O])?;
        let calibration = self.see_gate_up(runner, builder, &mut counter)?;
        builder.quantize(LinearRole::GateUp, calibration)?;
        counter.step();
        builder.load(runner, &[LinearRole::GateUp])?;
        let calibration = self.see_second(LinearRole::Down, runner, builder, &mut counter)?;
        builder.quantize(LinearRole::Down, calibration)?;
        counter.step();
        builder.load(runner, &[LinearRole::GateUp, LinearRole::Down])?;
        for idx in 0..self.num_samples {
            self.move_half(idx, runner, WeightSet::Quantized, &ROLES[2..])?;
            counter.step();
        }
        Ok(())
    }

    /// Moves the float model's stream behind the layer.
    pub(super) fn move_float(&mut self, runner: &mut dyn RunLayer) -> Result<(), Error> {
        for idx in 0..self.num_samples {
            self.move_half(idx, runner, WeightSet::Float, &ROLES[..2])?;
            self.move_half(idx, runner, WeightSet::Float, &ROLES[2..])?;
        }
        Ok(())
    }

    /// Moves the quantized model's stream behind the layer, whose quantized weights are loaded.
    pub(super) fn move_quantized(&mut self, runner: &mut dyn RunLayer) -> Result<(), Error> {
        for idx in 0..self.num_samples {
            self.move_half(idx, runner, WeightSet::Quantized, &ROLES[..2])?;
            self.move_half(idx, runner, WeightSet::Quantized, &ROLES[2..])?;
        }
        Ok(())
    }

    /// Moves one sample of the stream of `set` behind half a layer; gives where it is then.
    fn move_half(
        &mut self,
        sample_idx: usize,
        runner: &mut dyn RunLayer,
        set: WeightSet,
        half: &[LinearRole],
    ) -> Result<Vec<f32>, Error> {
        let mut rows = self.room();
        let stream = match set {
            WeightSet::Float => &mut self.float,
            WeightSet::Quantized => &mut self.second.as_mut().expect(TWO).quantized,
        };
        stream.read(sample_idx, &mut rows)?;
        runner.start(half[0], &rows);
        half.iter().for_each(|role| runner.linear(set, *role));
        add(&mut rows, &runner.delta());
        stream.write(sample_idx, &rows)?;
        Ok(rows)
    }

    /// What q, k and v read in both models; the float model's stream moves behind the layer.
    fn see_qkv(
        &mut self,
        runner: &mut dyn RunLayer,
        builder: &LayerBuilder<'_>,
        counter: &mut Counter<'_>,
    ) -> Result<Calibration, Error> {
        let mut seen = Seen::new(builder.gram(LinearRole::Qkv), self.hidden, builder.num_threads);
        let (mut rows, mut quantized_rows) = (self.room(), self.room());
        for idx in 0..self.num_samples {
            self.float.read(idx, &mut rows)?;
            runner.start(LinearRole::Qkv, &rows);
            let input = runner.input(LinearRole::Qkv);
            let middle = self.move_half(idx, runner, WeightSet::Float, &ROLES[..2])?;
            self.move_half(idx, runner, WeightSet::Float, &ROLES[2..])?;
            let second = self.second.as_mut().expect(TWO);
            second.middle.write(idx, &middle)?;
            second.quantized.read(idx, &mut quantized_rows)?;
            runner.start(LinearRole::Qkv, &quantized_rows);
            let quantized = runner.input(LinearRole::Qkv);
            seen.add(difference(&input, &quantized), &quantized);
            counter.step();
        }
        Ok(Calibration { gram: seen.gram, deviation: Deviation::Inputs(seen.moment) })
    }

    /// What gate and up read in both models; the quantized model's stream moves behind attention.
    fn see_gate_up(
        &mut self,
        runner: &mut dyn RunLayer,
        builder: &LayerBuilder<'_>,
        counter: &mut Counter<'_>,
    ) -> Result<Calibration, Error> {
        let role = LinearRole::GateUp;
        let mut seen = Seen::new(builder.gram(role), self.hidden, builder.num_threads);
        let mut middle = self.room();
        for idx in 0..self.num_samples {
            let rows = self.move_half(idx, runner, WeightSet::Quantized, &ROLES[..2])?;
            runner.start(role, &rows);
            let quantized = runner.input(role);
            self.second.as_mut().expect(TWO).middle.read(idx, &mut middle)?;
            runner.start(role, &middle);
            seen.add(difference(&runner.input(role), &quantized), &quantized);
            counter.step();
        }
        Ok(Calibration { gram: seen.gram, deviation: Deviation::Inputs(seen.moment) })
    }

    /// What the second linear of half a layer reads in the quantized model, and what it should add
    /// to that model's stream to make it the float model's.
    fn see_second(
        &mut self,
        role: LinearRole,
        runner: &mut dyn RunLayer,
        builder: &LayerBuilder<'_>,
        counter: &mut Counter<'_>,
    ) -> Result<Calibration, Error> {
        let first = if role == LinearRole::O { LinearRole::Qkv } else { LinearRole::GateUp };
        let mut seen = Seen::new(builder.gram(role), self.hidden, builder.num_threads);
        let (mut wanted, mut rows) = (self.room(), self.room());
        for idx in 0..self.num_samples {
            let second = self.second.as_mut().expect(TWO);
            match role {
                LinearRole::O => second.middle.read(idx, &mut wanted)?,
                _ => self.float.read(idx, &mut wanted)?,
            }
            second.quantized.read(idx, &mut rows)?;
            runner.start(first, &rows);
            runner.linear(WeightSet::Quantized, first);
            let mut input = runner.input(role);
            runner.linear(WeightSet::Float, role);
            let weights = row_weights(&wanted, self.hidden);
            let mut lack = difference(&difference(&wanted, &rows), &runner.delta());
            self.weigh(&weights, &mut input);
            self.weigh(&weights, &mut lack);
            seen.add(lack, &input);
            counter.step();
        }
        Ok(Calibration { gram: seen.gram, deviation: Deviation::Outputs(seen.moment) })
    }

    fn room(&self) -> Vec<f32> {
        vec![0.0; self.sample_len * self.hidden]
    }

    /// Rows of one sample.
    fn matrix<'a>(&self, values: &'a [f32]) -> ArrayView2<'a, f32> {
        matrix(values, values.len() / self.sample_len)
    }

    /// Multiplies each row of a sample by its weight.
    fn weigh(&self, weights: &[f32], values: &mut [f32]) {
        let width = values.len() / self.sample_len;
        for (row, weight) in values.chunks_exact_mut(width).zip(weights) {
            row.iter_mut().for_each(|value| *value *= weight);
        }
    }
}

const TWO: &str = "compensation follows two streams";

/// Sums over what a linear reads in the quantized model, and what its outputs are to be beyond
/// those that it would make of that.
struct Seen {
    gram: Gram,
    /// `[width of the deviation, k]`
    moment: Array2<f32>,
    num_threads: usize,
}

impl Seen {
    /// For deviations of the input where the input is as wide as the residual stream; else of the
    /// output, which is.
    fn new(gram: Gram, hidden: usize, num_threads: usize) -> Seen {
        let k = gram.matrix.nrows();
        Seen { gram, moment: Array2::zeros((hidden, k)), num_threads }
    }

    fn add(&mut self, deviation: Vec<f32>, input: &[f32]) {
        let (width, k) = self.moment.dim();
        let input = matrix(input, k);
        self.gram.add(input);
        let deviation = matrix(&deviation, width);
        let out = &mut self.moment.view_mut();
        multiply(1.0, deviation.t(), input, 1.0, out, self.num_threads);
    }
}

fn matrix(values: &[f32], width: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((values.len() / width, width), values).expect("whole rows")
}

fn add(rows: &mut [f32], delta: &[f32]) {
    rows.iter_mut().zip(delta).for_each(|(value, delta)| *value += delta);
}

fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// One over the size of each row of the residual stream: the next norm divides by it, and with it
/// the errors that are added to the row.
fn row_weights(rows: &[f32], hidden: usize) -> Vec<f32> {
    let weight = |row: &[f32]| {
        let square: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
        1.0 / (square / hidden as f64).sqrt().max(1e-6) as f32
    };
    rows.chunks_exact(hidden).map(weight).collect()
}
