//! One layer while it becomes 4 bits: what of it is quantized, and which factors it carries.

use std::collections::{BTreeMap, BTreeSet};

use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{DType, LinearRole, ModelShape};
use ndarray::Array2;

use super::awq_format::{PACK, PackedLinear, unpack};
use super::gram::Gram;
use super::grid::{Rounded, stored as stored_scale};
use super::group::{self, Calibration, Module, Overflow, Settings};
use super::layer_runner::{RunLayer, WeightSet};
use super::quantized_layer::{AwqOptions, Factors, LayerReport, QuantizedLayer};
use super::scales::{Carrier, stored};
use crate::error::Error;
use crate::model::linear::{DenseView, LinearPart};
use crate::model::weights::{ModelWeights, Weights};

/// Scales of float16 keep eight bits down to here.
const SCALE_LOW: f32 = 1.0 / 65_536.0;
const SCALE_HIGH: f32 = 32_768.0;

/// The float weights of a layer, and what has become of them.
pub(super) struct LayerBuilder<'a> {
    weights: &'a Weights<'a>,
    config: &'a ModelConfig,
    shape: &'a ModelShape,
    options: &'a AwqOptions,
    pub(super) num_threads: usize,
    layer: QuantizedLayer,
    /// By the name of the module, as in the layer, which has their packed forms.
    rounded: BTreeMap<String, Rounded>,
}

impl<'a> LayerBuilder<'a> {
    pub(super) fn new(
        weights: &'a Weights<'a>,
        (config, shape): (&'a ModelConfig, &'a ModelShape),
        layer_idx: usize,
        options: &'a AwqOptions,
        num_threads: usize,
    ) -> LayerBuilder<'a> {
        let layer = QuantizedLayer {
            layer_idx,
            linears: BTreeMap::new(),
            floats: BTreeMap::new(),
            factors: BTreeMap::new(),
            report: LayerReport { layer_idx, groups: Vec::new(), seconds: 0.0 },
        };
        let rounded = BTreeMap::new();
        LayerBuilder { weights, config, shape, options, num_threads, layer, rounded }
    }

    pub(super) fn finish(self, seconds: f64) -> QuantizedLayer {
        let mut layer = self.layer;
        layer.report.seconds = seconds;
        layer
    }

    /// Room for the statistics of what the linear `role` reads.
    pub(super) fn gram(&self, role: LinearRole) -> Gram {
        Gram::new(self.shape.linear(role).k, self.num_threads)
    }

    /// Quantizes the modules of `role`, and lets what makes their input carry its factors.
    pub(super) fn quantize(
        &mut self,
        role: LinearRole,
        mut calibration: Calibration,
    ) -> Result<(), Error> {
        let modules = self.modules(role)?;
        if !calibration.gram.finish() {
            return Err(Error::Unsupported(format!(
                "the activations that '{}' reads are not finite on the calibration text; the \
                 model's weights are damaged or too large for this arithmetic",
                modules[0].name
            )));
        }
        let carrier = self.carrier(role, &modules)?;
        let settings = Settings { options: self.options, num_threads: self.num_threads };
        let found = group::quantize(role.name(), &modules, &calibration, &carrier, &settings)
            .map_err(|overflow| self.overflow(&modules, &overflow))?;
        for (module, rounded) in modules.iter().zip(found.rounded) {
            let output = vec![1.0; module.weights.nrows()];
            let factors = Factors { input: found.factors.clone(), output };
            self.layer.factors.insert(module.name.clone(), factors);
            if let Some(rounded) = rounded {
                self.layer.linears.insert(module.name.clone(), rounded.packed());
                self.rounded.insert(module.name.clone(), rounded);
            }
        }
        self.layer.report.groups.push(found.report);
        if found.factors.iter().any(|factor| *factor != 1.0) {
            self.carry(role, &carrier, &found.factors)?;
        }
        Ok(())
    }

    /// The modules of `role` in float32.
    fn modules(&self, role: LinearRole) -> Result<Vec<Module>, Error> {
        let tensors = self.weights.linear(role, self.layer.layer_idx)?;
        let source = tensors.source();
        let mut modules = Vec::new();
        for (part, name) in source.parts.iter().zip(self.names(role)) {
            let mut weights = Array2::zeros((part.n(), part.k()));
            for (n, mut row) in weights.rows_mut().into_iter().enumerate() {
                let row = row.as_slice_mut().expect("a row");
                match part {
                    LinearPart::Dense(view) => view.row(n, row),
                    LinearPart::Awq(view) => view.row(n, row),
                }
                if let Some(k) = row.iter().position(|weight| !weight.is_finite()) {
                    let message =
                        format!("tensor '{name}.weight' is not finite at output {n}, input {k}");
                    return Err(Error::model(self.weights.dir(), message));
                }
            }
            let is_skipped = self.options.skips(&name);
            modules.push(Module { name, weights, is_skipped });
        }
        Ok(modules)
    }

    /// Loads the linears `roles` as they are quantized by now.
    pub(super) fn load(
        &self,
        runner: &mut dyn RunLayer,
        roles: &[LinearRole],
    ) -> Result<(), Error> {
        load_quantized(&self.layer, self.weights, self.config, runner, roles)
    }

    fn names(&self, role: LinearRole) -> Vec<String> {
        names(self.config, role, self.layer.layer_idx)
    }

    fn overflow(&self, modules: &[Module], overflow: &Overflow) -> Error {
        let Overflow { module_idx, output, group } = *overflow;
        let Module { name, weights, .. } = &modules[module_idx];
        let size = self.options.group_size.of(weights.ncols());
        let row = weights.row(output);
        let largest = row.iter().skip(group * size).take(size).fold(0.0f32, |a, w| a.max(w.abs()));
        Error::model(
            self.weights.dir(),
            format!(
                "tensor '{name}.weight': weights of size {largest} of output {output} need a scale \
                 that float16 does not hold"
            ),
        )
    }

    /// What can carry factors on the input of `role`.
    fn carrier(&self, role: LinearRole, modules: &[Module]) -> Result<Carrier, Error> {
        if modules.iter().any(|module| module.is_skipped) {
            return Ok(Carrier::Nothing);
        }
        match role {
            LinearRole::Qkv | LinearRole::GateUp => {
                let name = self.norm_name(role);
                let dtype = self.weights.dtype(&name)?;
                Ok(Carrier::Norm { weight: self.weights.read_floats(&name)?, dtype })
            }
            _ => self.output_carrier(role),
        }
    }

    fn norm_name(&self, role: LinearRole) -> String {
        let (attention, mlp) = self.weights.norm_names(self.layer.layer_idx);
        if role == LinearRole::Qkv { attention } else { mlp }
    }

    /// The values' or up's outputs.
    fn output_carrier(&self, role: LinearRole) -> Result<Carrier, Error> {
        let mut bounds = Vec::new();
        for (name, row) in self.carrying_rows(role)? {
            let Some(rounded) = self.rounded.get(&name) else {
                return Ok(Carrier::Nothing);
            };
            let scales = rounded.grid.scales.row(row);
            let largest = scales.iter().copied().fold(0.0f32, f32::max);
            let smallest = scales.iter().copied().fold(f32::INFINITY, f32::min);
            bounds.push(((largest / SCALE_HIGH).min(1.0), (smallest / SCALE_LOW).max(1.0)));
        }
        let of_input = (0..self.shape.linear(role).k).map(|k| self.output_of(role, k)).collect();
        Ok(Carrier::Outputs { of_input, bounds })
    }

    /// By output of the values or of up: its module and row there.
    fn carrying_rows(&self, role: LinearRole) -> Result<Vec<(String, usize)>, Error> {
        let ModelShape { num_heads, num_kv_heads, head_dim, intermediate_size, .. } = *self.shape;
        let (first_role, outputs) = match role {
            LinearRole::O => {
                let first = (num_heads + num_kv_heads) * head_dim;
                (LinearRole::Qkv, first..first + num_kv_heads * head_dim)
            }
            _ => (LinearRole::GateUp, intermediate_size..2 * intermediate_size),
        };
        let tensors = self.weights.linear(first_role, self.layer.layer_idx)?;
        let (source, names) = (tensors.source(), self.names(first_role));
        let located = |output| {
            let (part, row) = source.locate(output);
            (names[part].clone(), row)
        };
        Ok(outputs.map(located).collect())
    }

    /// The output of the values or of up that input `k` of `role` comes from: query heads share
    /// their values.
    fn output_of(&self, role: LinearRole, k: usize) -> usize {
        let ModelShape { num_heads, num_kv_heads, head_dim, .. } = *self.shape;
        match role {
            LinearRole::O => {
                let head = k / head_dim / (num_heads / num_kv_heads);
                head * head_dim + k % head_dim
            }
            _ => k,
        }
    }

    /// Divides what makes the input of `role` by `factors`.
    fn carry(&mut self, role: LinearRole, carrier: &Carrier, factors: &[f32]) -> Result<(), Error> {
        match carrier {
            Carrier::Nothing => {}
            Carrier::Norm { weight, dtype } => {
                let divided = weight.iter().zip(factors).map(|(w, f)| stored(w / f, *dtype));
                self.layer.floats.insert(self.norm_name(role), divided.collect());
            }
            Carrier::Outputs { .. } => {
                let rows = self.carrying_rows(role)?;
                let mut of_output = vec![1.0; rows.len()];
                for (k, factor) in factors.iter().enumerate() {
                    of_output[self.output_of(role, k)] = *factor;
                }
                for ((name, row), factor) in rows.iter().zip(of_output) {
                    self.divide_output(name, *row, factor)?;
                }
                for name in rows.iter().map(|(name, _)| name).collect::<BTreeSet<_>>() {
                    self.layer.linears.insert(name.clone(), self.rounded[name].packed());
                }
            }
        }
        Ok(())
    }

    /// Divides an output of a quantized module, and its bias, by `factor`.
    fn divide_output(&mut self, name: &str, row: usize, factor: f32) -> Result<(), Error> {
        let rounded = self.rounded.get_mut(name).expect("a carrier is quantized");
        let mut scales = rounded.grid.scales.row_mut(row);
        scales.mapv_inplace(|scale| stored_scale(scale / factor));
        let factors = self.layer.factors.get_mut(name).expect("a carrier has its factors");
        factors.output[row] = 1.0 / factor;
        let bias_name = format!("{name}.bias");
        if !self.weights.has(&bias_name) {
            return Ok(());
        }
        let dtype = self.weights.dtype(&bias_name)?;
        let bias = match self.layer.floats.get_mut(&bias_name) {
            Some(bias) => bias,
            None => {
                let bias = self.weights.read_floats(&bias_name)?;
                self.layer.floats.entry(bias_name).or_insert(bias)
            }
        };
        bias[row] = stored(bias[row] / factor, dtype);
        Ok(())
    }
}

/// Loads the linears `roles` as `layer` has them.
///
/// # Errors
/// The layer's modules are not those of the model.
pub(super) fn load_quantized(
    layer: &QuantizedLayer,
    weights: &Weights<'_>,
    config: &ModelConfig,
    runner: &mut dyn RunLayer,
    roles: &[LinearRole],
) -> Result<(), Error> {
    for &role in roles {
        let tensors = weights.linear(role, layer.layer_idx)?;
        let mut source = tensors.source();
        let mut dense = Vec::new();
        for (part, name) in source.parts.iter().zip(names(config, role, layer.layer_idx)) {
            dense.push(dequantized(layer, &name, (part.n(), part.k()))?);
        }
        for (part, bytes) in source.parts.iter_mut().zip(&dense) {
            if let Some(bytes) = bytes {
                let (n, k) = (part.n(), part.k());
                *part = LinearPart::Dense(DenseView { n, k, dtype: DType::F32, bytes });
            }
        }
        runner.load_linear(WeightSet::Quantized, role, &source)?;
    }
    Ok(())
}

/// Names of the modules of `role` in the checkpoint.
fn names(config: &ModelConfig, role: LinearRole, layer_idx: usize) -> Vec<String> {
    let modules = config.architecture.modules(role);
    modules.iter().map(|module| format!("model.layers.{layer_idx}.{module}")).collect()
}

/// The float32 weights, without factors, that a quantized module stands for; `None` where it is
/// not quantized.
fn dequantized(
    layer: &QuantizedLayer,
    name: &str,
    (n, k): (usize, usize),
) -> Result<Option<Vec<u8>>, Error> {
    let Some(packed) = layer.linears.get(name) else { return Ok(None) };
    let PackedLinear { group, .. } = *packed;
    let factors = layer.factors.get(name);
    let factors = factors.filter(|factors| (factors.output.len(), factors.input.len()) == (n, k));
    let (Some(factors), true) = (factors, (packed.n, packed.k) == (n, k)) else {
        return Err(Error::Request(format!(
            "layer {}: '{name}' is {} × {} where the model's is {n} × {k}; quantize the model anew",
            layer.layer_idx, packed.n, packed.k
        )));
    };
    let groups = k / group;
    let mut bytes = vec![0; n * k * 4];
    for (block, rows) in bytes.chunks_exact_mut(PACK * k * 4).enumerate() {
        for input in 0..k {
            let g = block * groups + input / group;
            let (levels, zeros) =
                (unpack(packed.qweight[block * k + input]), unpack(packed.qzeros[g]));
            for i in 0..PACK {
                let scale = packed.scales[g * PACK + i].to_f32();
                let value = (f32::from(levels[i]) - f32::from(zeros[i])) * scale;
                let value = value / (factors.input[input] * factors.output[block * PACK + i]);
                rows[(i * k + input) * 4..][..4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    Ok(Some(bytes))
}
