//! Angles of the rotary embedding under every scaling, computed in float32 as Hugging Face
//! transformers computes them, so that long positions round alike.

use std::f64::consts::PI;

use bespoke_kernel_gen::model::{ModelConfig, RopeScaling};

use crate::batch::Batch;

/// Rotary frequencies of one model.
#[derive(Clone, Debug)]
pub struct Rope {
    theta: f64,
    rotary_dim: usize,
    scaling: RopeScaling,
    /// `[rotary_dim / 2]`; for dynamic scaling those of short sequences.
    inv_freq: Vec<f32>,
    /// Multiplies cosines and sines.
    attention_factor: f32,
    /// `[rotary_dim / 2]` of the sequence at hand under dynamic scaling.
    sequence_inv_freq: Vec<f32>,
}

impl Rope {
    pub fn new(config: &ModelConfig) -> Rope {
        let mut inv_freq = Vec::with_capacity(config.rotary_dim / 2);
        unscaled(config.rope_theta, config.rotary_dim, &mut inv_freq);
        let mut attention_factor = 1.0;
        match &config.rope_scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => {}
            RopeScaling::Linear { factor } => {
                inv_freq.iter_mut().for_each(|freq| *freq /= *factor as f32);
            }
            RopeScaling::Llama3 { .. } => scale_llama3(&config.rope_scaling, &mut inv_freq),
            RopeScaling::Yarn { attention_factor: factor, .. } => {
                attention_factor = *factor as f32;
                scale_yarn(config, &mut inv_freq);
            }
        }
        Rope {
            theta: config.rope_theta,
            rotary_dim: config.rotary_dim,
            scaling: config.rope_scaling.clone(),
            sequence_inv_freq: inv_freq.clone(),
            inv_freq,
            attention_factor,
        }
    }

    /// Fills `batch.cos_sin` for all rows. `start_lens[i]` is the length that the sequence of span
    /// `i` had when it was started: under dynamic scaling it fixes the base.
    pub fn fill(&mut self, batch: &mut Batch, start_lens: &[usize]) {
        assert_eq!(batch.spans.len(), start_lens.len(), "one start length for each span");
        batch.cos_sin.clear();
        for (span, start_len) in batch.spans.iter().zip(start_lens) {
            if let RopeScaling::Dynamic { factor, original_max_position } = self.scaling {
                let theta = dynamic_theta(
                    self.theta,
                    self.rotary_dim,
                    factor,
                    original_max_position,
                    *start_len,
                );
                unscaled(theta, self.rotary_dim, &mut self.sequence_inv_freq);
            }
            let rows = span.first_row as usize..(span.first_row + span.num_rows) as usize;
            for position in &batch.positions[rows] {
                let angle = |freq: &f32| *position as f32 * freq;
                let factor = self.attention_factor;
                let freqs = &self.sequence_inv_freq;
                batch.cos_sin.extend(freqs.iter().map(|freq| angle(freq).cos() * factor));
                batch.cos_sin.extend(freqs.iter().map(|freq| angle(freq).sin() * factor));
            }
        }
    }

    /// A number that two start lengths share where the same tokens have the same keys.
    pub fn variant(&self, start_len: usize) -> u64 {
        match self.scaling {
            RopeScaling::Dynamic { original_max_position, .. } => {
                start_len.max(original_max_position) as u64
            }
            _ => 0,
        }
    }

    /// The frequencies of a sequence too short for dynamic scaling.
    pub fn inv_freq(&self) -> &[f32] {
        &self.inv_freq
    }
}

/// `theta^(-2i / rotary_dim)`
fn unscaled(theta: f64, rotary_dim: usize, inv_freq: &mut Vec<f32>) {
    inv_freq.clear();
    let freq = |i: usize| {
        let exponent = (2 * i) as f32 / rotary_dim as f32;
        1.0 / (theta as f32).powf(exponent)
    };
    inv_freq.extend((0..rotary_dim / 2).map(freq));
}

/// NTK-aware base of a sequence of `len` tokens (u/bloc97's dynamic scaling).
fn dynamic_theta(
    theta: f64,
    rotary_dim: usize,
    factor: f64,
    original_max_position: usize,
    len: usize,
) -> f64 {
    let len = len.max(original_max_position) as f64;
    let dim = rotary_dim as f64;
    let stretch = factor * len / original_max_position as f64 - (factor - 1.0);
    theta * stretch.powf(dim / (dim - 2.0))
}

/// Llama 3.1: long wavelengths are divided by `factor`, short ones stay, with a ramp between.
fn scale_llama3(scaling: &RopeScaling, inv_freq: &mut [f32]) {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } =
        *scaling
    else {
        return;
    };
    let original = original_max_position as f64;
    let long = original / low_freq_factor;
    let short = original / high_freq_factor;
    for freq in inv_freq {
        let wavelength = 2.0 * PI / f64::from(*freq);
        let scaled = f64::from(*freq) / factor;
        if wavelength > long {
            *freq = scaled as f32;
        } else if wavelength >= short {
            let range = high_freq_factor - low_freq_factor;
            let smooth = (original / wavelength - low_freq_factor) / range;
            *freq = ((1.0 - smooth) * scaled + smooth * f64::from(*freq)) as f32;
        }
    }
}

/// YaRN: dimensions that turn rarely are interpolated, those that turn often stay.
fn scale_yarn(config: &ModelConfig, inv_freq: &mut [f32]) {
    let RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, truncate, .. } =
        config.rope_scaling
    else {
        return;
    };
    let dim = config.rotary_dim as f64;
    // The dimension that turns `turns` times over the original context.
    let dimension_of = |turns: f64| {
        let ratio = original_max_position as f64 / (turns * 2.0 * PI);
        dim * ratio.ln() / (2.0 * config.rope_theta.ln())
    };
    let (mut low, mut high) = (dimension_of(beta_fast), dimension_of(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    for (i, freq) in inv_freq.iter_mut().enumerate() {
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        let stretched = f64::from(*freq) / factor;
        *freq = (stretched * ramp + f64::from(*freq) * (1.0 - ramp)) as f32;
    }
}
