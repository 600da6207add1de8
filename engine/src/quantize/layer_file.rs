//! A quantized layer as a file: a hash over the key of the run and all that follows, then
//! safetensors, whose tensor `layer` is JSON.

use std::collections::BTreeMap;

use half::f16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::awq_format::{PACK, PackedLinear};
use super::quantized_layer::{Factors, LayerReport, QuantizedLayer};

const HASH_BYTES: usize = blake3::OUT_LEN;

/// What the tensors do not say themselves.
#[derive(Serialize, Deserialize)]
struct Header {
    layer_idx: usize,
    linears: BTreeMap<String, Sizes>,
    report: LayerReport,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Sizes {
    n: usize,
    k: usize,
    group: usize,
}

/// The file's content; `None` where a number of the report is not finite.
pub(super) fn encode(layer: &QuantizedLayer, key: &blake3::Hash) -> Option<Vec<u8>> {
    let sizes = |linear: &PackedLinear| Sizes { n: linear.n, k: linear.k, group: linear.group };
    let linears = layer.linears.iter().map(|(name, linear)| (name.clone(), sizes(linear)));
    let header = Header {
        layer_idx: layer.layer_idx,
        linears: linears.collect(),
        report: layer.report.clone(),
    };
    let json = serde_json::to_vec(&header).ok()?;
    // NOTE: a number that is not finite is written as null, which is no number.
    serde_json::from_slice::<Header>(&json).ok()?;
    let mut tensors = vec![("layer".to_owned(), Dtype::U8, json)];
    for (name, linear) in &layer.linears {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let scales = linear.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        tensors.push((format!("{name}/qweight"), Dtype::U32, words(&linear.qweight)));
        tensors.push((format!("{name}/qzeros"), Dtype::U32, words(&linear.qzeros)));
        tensors.push((format!("{name}/scales"), Dtype::F16, scales));
    }
    let mut add_floats = |name: String, values: &[f32]| {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensors.push((name, Dtype::F32, bytes));
    };
    for (name, values) in &layer.floats {
        add_floats(format!("{name}/floats"), values);
    }
    for (name, factors) in &layer.factors {
        add_floats(format!("{name}/input"), &factors.input);
        add_floats(format!("{name}/output"), &factors.output);
    }
    let views = tensors.iter().map(|(name, dtype, bytes)| {
        let shape = vec![bytes.len() * 8 / dtype.bitsize()];
        TensorView::new(*dtype, shape, bytes).map(|view| (name, view))
    });
    let views: Vec<_> = views.collect::<Result<_, _>>().ok()?;
    let body = safetensors::serialize(views, None).ok()?;
    Some([&hash(key, &body).as_bytes()[..], &body].concat())
}

/// The layer; `None` where the file is damaged or belongs to another run.
pub(super) fn decode(bytes: &[u8], key: &blake3::Hash) -> Option<QuantizedLayer> {
    let (told, body) = bytes.split_at_checked(HASH_BYTES)?;
    if told != hash(key, body).as_bytes() {
        return None;
    }
    let file = SafeTensors::deserialize(body).ok()?;
    let header: Header = serde_json::from_slice(file.tensor("layer").ok()?.data()).ok()?;
    let mut linears = BTreeMap::new();
    for (name, sizes) in header.linears {
        linears.insert(name.clone(), decode_linear(&file, &name, sizes)?);
    }
    let (mut floats, mut inputs, mut outputs) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (name, view) in file.iter().filter(|(_, view)| view.dtype() == Dtype::F32) {
        let (words, _) = view.data().as_chunks::<4>();
        let values: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
        let (name, kind) = name.rsplit_once('/')?;
        let kept = match kind {
            "floats" => &mut floats,
            "input" => &mut inputs,
            _ => &mut outputs,
        };
        kept.insert(name.to_owned(), values);
    }
    let mut factors = BTreeMap::new();
    for (name, input) in inputs {
        let output = outputs.remove(&name)?;
        factors.insert(name, Factors { input, output });
    }
    let Header { layer_idx, report, .. } = header;
    Some(QuantizedLayer { layer_idx, linears, floats, factors, report })
}

fn decode_linear(file: &SafeTensors<'_>, name: &str, sizes: Sizes) -> Option<PackedLinear> {
    let Sizes { n, k, group } = sizes;
    let part = |part: &str| file.tensor(&format!("{name}/{part}")).ok();
    let words = |view: TensorView<'_>| -> Vec<u32> {
        let (words, _) = view.data().as_chunks::<4>();
        words.iter().map(|word| u32::from_le_bytes(*word)).collect()
    };
    let scales = part("scales")?;
    let (halves, _) = scales.data().as_chunks::<2>();
    let linear = PackedLinear {
        n,
        k,
        group,
        qweight: words(part("qweight")?),
        qzeros: words(part("qzeros")?),
        scales: halves.iter().map(|half| f16::from_le_bytes(*half)).collect(),
    };
    let is_sound = n.is_multiple_of(PACK)
        && group > 0
        && k.is_multiple_of(group)
        && Some(linear.qweight.len()) == (n / PACK).checked_mul(k)
        && Some(linear.qzeros.len()) == (n / PACK).checked_mul(k / group)
        && Some(linear.scales.len()) == n.checked_mul(k / group);
    is_sound.then_some(linear)
}

fn hash(key: &blake3::Hash, body: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(key.as_bytes());
    hasher.update(body);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::quantized_layer::{GroupReport, ModuleReport};

    fn layer() -> QuantizedLayer {
        let mut linear = PackedLinear::new(16, 8, 4);
        linear.qweight.iter_mut().enumerate().for_each(|(i, word)| *word = i as u32 * 77);
        linear.qzeros.iter_mut().for_each(|word| *word = 0x8888_8888);
        linear.scales.iter_mut().enumerate().for_each(|(i, s)| *s = f16::from_f32(i as f32));
        let factors = Factors { input: vec![0.5, 1.0 / 3.0], output: vec![1.0, f32::MIN_POSITIVE] };
        let module = ModuleReport {
            name: "a.o_proj".to_owned(),
            num_weights: 128,
            error_rtn: 0.1,
            error_awq: 1.0 / 3.0,
            error: 1e-300,
            clipped: 0.25,
            is_skipped: false,
        };
        let group = GroupReport {
            role: "o".to_owned(),
            alpha: 0.45,
            beta: 0.1,
            factors: [0.5, 1.0, 2.0],
            modules: vec![module],
        };
        QuantizedLayer {
            layer_idx: 3,
            linears: BTreeMap::from([("a.o_proj".to_owned(), linear)]),
            floats: BTreeMap::from([("a.norm.weight".to_owned(), vec![1.0, -0.0, 3.5])]),
            factors: BTreeMap::from([("a.o_proj".to_owned(), factors)]),
            report: LayerReport { layer_idx: 3, groups: vec![group], seconds: 1.5 },
        }
    }

    #[test]
    fn layers_come_back_as_they_were() {
        let key = blake3::hash(b"a run");
        let bytes = encode(&layer(), &key).expect("a file");
        assert_eq!(decode(&bytes, &key), Some(layer()));
        assert_eq!(encode(&layer(), &key), Some(bytes));
    }

    #[test]
    fn damaged_and_foreign_files_are_nothing() {
        let key = blake3::hash(b"a run");
        let bytes = encode(&layer(), &key).expect("a file");
        assert_eq!(decode(&bytes, &blake3::hash(b"another run")), None);
        for len in [0, 31, 32, 40, bytes.len() - 1] {
            assert_eq!(decode(&bytes[..len], &key), None, "{len} bytes");
        }
        for at in (0..bytes.len()).step_by(7) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(decode(&damaged, &key), None, "byte {at}");
        }
        // The right hash over a body of another shape.
        let mut wrong = layer();
        wrong.linears.values_mut().for_each(|linear| linear.k = 9);
        assert_eq!(decode(&encode(&wrong, &key).expect("a file"), &key), None);
    }
}
