//! Layers from calibration tokens to 4 bits: tiny models of every kind, on the reference backend.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bespoke::Error;
use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kernels::KernelTable;
use bespoke::quantize::layer_pass::{LayerPass, PassOptions};
use bespoke::quantize::quantized_layer::{AwqOptions, QuantizedLayer};
use bespoke_kernel_gen::spec::GroupSize;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use super::golden::golden_dir;

/// One of each kind of attention, of fusion and of bias.
const MODELS: [&str; 9] = [
    "internlm2-fused",
    "llama-gqa2",
    "llama-hd80-bias",
    "llama-mha-tied",
    "llama-mqa-hd24",
    "mistral-sliding",
    "phi3-fused",
    "qwen2-gqa7",
    "qwen3-qknorm",
];

const NO_KERNELS: KernelTable = KernelTable::EMPTY;

fn model_dir(model: &str) -> PathBuf {
    golden_dir().join("tiny").join(model)
}

fn options(compensate: bool) -> AwqOptions {
    AwqOptions { group_size: GroupSize::Of(8), symmetric: false, compensate, skip: Vec::new() }
}

fn pass_options(num_threads: usize) -> PassOptions {
    PassOptions {
        kernels: NO_KERNELS,
        backend: BackendChoice::Reference,
        num_threads: Some(num_threads),
        target: None,
        spill: None,
    }
}

/// Tokens that any of the models has.
fn samples(num: u32) -> Vec<Vec<u32>> {
    let token = |i: u32| (i * i + 31 * i + 7) % 160;
    (0..num).map(|sample| (0..24).map(|i| token(29 * sample + i)).collect()).collect()
}

fn open(model: &str, options: &AwqOptions, pass: &PassOptions) -> LayerPass {
    LayerPass::open(&model_dir(model), &samples(6), options, pass).unwrap()
}

/// All layers, without what depends on the clock.
fn quantize(model: &str, options: &AwqOptions, pass: &PassOptions) -> Vec<QuantizedLayer> {
    let mut pass = open(model, options, pass);
    (0..pass.num_layers()).map(|_| next(&mut pass)).collect()
}

fn next(pass: &mut LayerPass) -> QuantizedLayer {
    let mut seen = (0, 0);
    let mut layer = pass
        .quantize(&mut |done, total| {
            assert!(done == seen.0 + 1 && done <= total);
            seen = (done, total);
        })
        .unwrap();
    assert_eq!(seen.0, seen.1, "all pieces are counted");
    layer.report.seconds = 0.0;
    layer
}

/// Changes a tensor: its name, values and shape.
type Change<'a> = &'a dyn Fn(&str, &mut [f32], &[usize]);

/// A copy of the model with changed tensors.
fn rewrite(from: &Path, to: &Path, change: Change<'_>) {
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (name, tensor) in file.iter() {
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "the tiny models are float32");
        let words = tensor.data().chunks_exact(4);
        let mut values: Vec<f32> =
            words.map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect();
        change(name, &mut values, tensor.shape());
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensors.insert(name.to_owned(), (tensor.shape().to_vec(), data));
    }
    let views = tensors.iter().map(|(name, (shape, data))| {
        (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
    });
    fs::create_dir_all(to).unwrap();
    fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
}

fn logits(dir: &Path) -> Vec<f32> {
    let options =
        EngineOptions { backend: BackendChoice::Reference, ..EngineOptions::new(NO_KERNELS) };
    let options = EngineOptions { max_context: Some(64), ..options };
    let mut engine = Engine::load(dir, &options, &mut |_| {}).unwrap();
    let mut all = Vec::new();
    engine.logits(&samples(1)[0], &mut |_, logits| all.extend_from_slice(logits)).unwrap();
    all
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The weights that a quantized module stands for, factors included: `[n, k]`.
fn values(layer: &QuantizedLayer, module: &str) -> Vec<f32> {
    use bespoke::quantize::awq_format::unpack;
    let packed = &layer.linears[module];
    let groups = packed.k / packed.group;
    let value = |n: usize, k: usize| {
        let (block, i) = (n / 8, n % 8);
        let g = block * groups + k / packed.group;
        let level = unpack(packed.qweight[block * packed.k + k])[i];
        let zero = unpack(packed.qzeros[g])[i];
        (f32::from(level) - f32::from(zero)) * packed.scales[g * 8 + i].to_f32()
    };
    (0..packed.n).flat_map(|n| (0..packed.k).map(move |k| value(n, k))).collect()
}

/// Norms, biases and weights with their factors make the model that they were taken from.
#[test]
fn factors_leave_the_model_as_it_is() {
    for model in MODELS {
        for compensate in [false, true] {
            let layers = quantize(model, &options(compensate), &pass_options(2));
            let dir = tempfile::tempdir().unwrap();
            rewrite(&model_dir(model), dir.path(), &|name, values, shape| {
                for layer in &layers {
                    if let Some(floats) = layer.floats.get(name) {
                        values.copy_from_slice(floats);
                    }
                    let module = name.strip_suffix(".weight").unwrap_or("");
                    let Some(factors) = layer.factors.get(module) else { continue };
                    let (rows, k) = (values.chunks_exact_mut(shape[1]), shape[1]);
                    assert_eq!((factors.output.len(), factors.input.len()), (shape[0], k));
                    for (row, output) in rows.zip(&factors.output) {
                        let columns = row.iter_mut().zip(&factors.input);
                        columns.for_each(|(value, input)| *value *= input * output);
                    }
                }
            });
            let (expected, found) = (logits(&model_dir(model)), logits(dir.path()));
            let largest = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            let off = largest_difference(&expected, &found);
            assert!(off <= 1e-4 * largest, "{model}, compensate {compensate}: off by {off}");
        }
        let layers = quantize(model, &options(false), &pass_options(2));
        let factors = layers.iter().flat_map(|layer| layer.factors.values());
        let is_one = |factor: &f32| *factor == 1.0;
        assert!(
            factors.clone().any(|factors| !factors.input.iter().all(is_one))
                && factors.clone().any(|factors| !factors.output.iter().all(is_one)),
            "{model}: nothing was scaled"
        );
    }
}

#[test]
fn no_module_is_worse_than_plain_rounding() {
    for model in MODELS {
        for (compensate, symmetric) in [(false, false), (true, false), (false, true), (true, true)]
        {
            let options = AwqOptions { symmetric, ..options(compensate) };
            for layer in quantize(model, &options, &pass_options(2)) {
                for group in &layer.report.groups {
                    let sums = group.modules.iter().fold((0.0, 0.0, 0.0), |sums, module| {
                        assert!(module.error <= module.error_awq, "{}", module.name);
                        let (rtn, awq, error) = sums;
                        (rtn + module.error_rtn, awq + module.error_awq, error + module.error)
                    });
                    let case = format!("{model}, layer {}, {}", layer.layer_idx, group.role);
                    assert!(sums.1 <= sums.0 && sums.2 <= sums.0, "{case}: {sums:?}");
                    assert!(!compensate || sums.2 < sums.1, "{case}: nothing was gained");
                }
            }
        }
    }
}

/// What is packed is near the weights with their factors, by as much as the steps are wide.
#[test]
fn levels_stand_for_the_weights() {
    for model in MODELS {
        let layers = quantize(model, &options(false), &pass_options(2));
        let bytes = fs::read(model_dir(model).join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for layer in &layers {
            for module in layer.linears.keys() {
                let data = file.tensor(&format!("{module}.weight")).unwrap().data();
                let words = data.chunks_exact(4);
                let weights = words.map(|word| f32::from_le_bytes(word.try_into().unwrap()));
                let (factors, packed) = (&layer.factors[module], &layer.linears[module]);
                let found = values(layer, module);
                let (mut square, mut error) = (0.0, 0.0);
                for (idx, weight) in weights.enumerate() {
                    let (n, k) = (idx / packed.k, idx % packed.k);
                    let wanted = weight * factors.input[k] * factors.output[n];
                    square += f64::from(wanted).powi(2);
                    error += f64::from(wanted - found[idx]).powi(2);
                }
                assert!(error < 0.02 * square, "{model}, {module}: {error} of {square}");
            }
        }
    }
}

#[test]
fn threads_and_files_change_no_bit() {
    for (model, compensate) in [("llama-gqa2", false), ("llama-gqa2", true), ("phi3-fused", true)] {
        let expected = quantize(model, &options(compensate), &pass_options(1));
        let dir = tempfile::tempdir().unwrap();
        let spill = Some(dir.path().join("activations"));
        let spilled = PassOptions { spill, ..pass_options(3) };
        assert_eq!(quantize(model, &options(compensate), &spilled), expected, "{model}");
    }
}

#[test]
fn a_resumed_pass_ends_as_one_in_one_go() {
    for model in ["llama-gqa2", "internlm2-fused", "llama-hd80-bias"] {
        for compensate in [false, true] {
            let (options, pass) = (options(compensate), pass_options(2));
            let expected = quantize(model, &options, &pass);
            let mut resumed = open(model, &options, &pass);
            resumed.resume(&expected[0]).unwrap();
            assert_eq!(next(&mut resumed), expected[1], "{model}, compensate {compensate}");
        }
    }
    let (options, pass) = (options(true), pass_options(1));
    let layers = quantize("llama-gqa2", &options, &pass);
    let error = open("llama-gqa2", &options, &pass).resume(&layers[1]).unwrap_err();
    assert!(error.to_string().contains("layer 1 was given where layer 0"), "{error}");
    let mut other = quantize("qwen3-qknorm", &options, &pass).remove(0);
    other.layer_idx = 0;
    let error = open("llama-gqa2", &options, &pass).resume(&other).unwrap_err();
    assert!(error.to_string().contains("quantize the model anew"), "{error}");
}

#[test]
fn skipped_modules_stay_and_carry_nothing() {
    let options =
        AwqOptions { skip: vec!["v_proj".into(), "1.mlp.down_proj".into()], ..options(true) };
    let layers = quantize("llama-gqa2", &options, &pass_options(2));
    for layer in &layers {
        let prefix = format!("model.layers.{}", layer.layer_idx);
        let down = format!("{prefix}.mlp.down_proj");
        assert!(!layer.linears.contains_key(&format!("{prefix}.self_attn.v_proj")));
        assert_eq!(layer.linears.contains_key(&down), layer.layer_idx == 0);
        for module in ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"] {
            let factors = &layer.factors[&format!("{prefix}.{module}")];
            assert!(factors.input.iter().chain(&factors.output).all(|factor| *factor == 1.0));
        }
        for group in &layer.report.groups {
            for module in &group.modules {
                assert_eq!(module.is_skipped, !layer.linears.contains_key(&module.name));
            }
        }
    }
}

#[test]
fn symmetric_levels_lie_around_eight() {
    let options = AwqOptions { symmetric: true, ..options(true) };
    for layer in quantize("llama-gqa2", &options, &pass_options(2)) {
        for packed in layer.linears.values() {
            assert!(packed.qzeros.iter().all(|zeros| *zeros == 0x8888_8888));
        }
    }
}

fn refusal(dir: &Path, samples: &[Vec<u32>], options: &AwqOptions, pass: &PassOptions) -> String {
    let refused = |error: Error| error.to_string();
    LayerPass::open(dir, samples, options, pass).err().map_or("nothing refused".into(), refused)
}

#[test]
fn what_cannot_be_quantized_is_refused() {
    let (dir, good) = (model_dir("llama-gqa2"), samples(2));
    let (plain, pass) = (options(false), pass_options(1));
    let check = |message: String, expected: &str| {
        assert!(message.contains(expected), "expected '{expected}' in '{message}'");
    };
    check(refusal(&model_dir("llama-awq-g32"), &good, &plain, &pass), "already quantized");
    check(refusal(&dir, &[], &plain, &pass), "at least one sample");
    check(refusal(&dir, &[vec![1; 4], vec![1; 3]], &plain, &pass), "sample 1 has 3 tokens");
    check(refusal(&dir, &[vec![1, 512]], &plain, &pass), "token 512");
    check(refusal(&dir, &[vec![1; 100_000]], &plain, &pass), "choose shorter samples");
    let wide = AwqOptions { group_size: GroupSize::Of(48), ..plain.clone() };
    check(refusal(&dir, &good, &wide, &pass), "48");
    let null = PassOptions { backend: BackendChoice::Null, ..pass.clone() };
    check(refusal(&dir, &good, &plain, &null), "null backend");
    let cpu = PassOptions { backend: BackendChoice::Cpu, ..pass.clone() };
    check(refusal(&dir, &good, &plain, &cpu), "missing");
    let damaged = tempfile::tempdir().unwrap();
    // Of the embeddings, one of the first token.
    let idx = 64 * good[0][0] as usize + 3;
    let broken = |tensor: &'static str, value: f32| {
        rewrite(&dir, damaged.path(), &move |name, values, _| {
            if name == tensor {
                values[idx] = value;
            }
        });
        let pass = LayerPass::open(damaged.path(), &good, &plain, &pass_options(1));
        let quantized = pass.and_then(|mut pass| pass.quantize(&mut |_, _| {}));
        quantized.err().map_or("nothing refused".into(), |error| error.to_string())
    };
    check(broken("model.layers.0.mlp.up_proj.weight", f32::NAN), "up_proj");
    check(broken("model.layers.0.mlp.up_proj.weight", f32::INFINITY), "up_proj");
    check(broken("model.embed_tokens.weight", f32::NAN), "not finite");
    check(broken("model.layers.0.self_attn.o_proj.weight", 1e30), "not");
}
