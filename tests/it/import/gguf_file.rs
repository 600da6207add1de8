//! Writes GGUF files for tests, sound and unsound ones.

/// A metadata value with its GGUF type.
#[derive(Clone)]
pub(crate) enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(&'static str),
    Texts(Vec<String>),
    I32s(Vec<i32>),
}

/// GGML type ids.
pub(crate) const F32: u32 = 0;
pub(crate) const Q4_0: u32 = 2;

#[derive(Clone)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    /// The contiguous dimension first.
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

#[derive(Clone)]
pub(crate) struct GgufFile {
    pub(crate) metadata: Vec<(String, Meta)>,
    pub(crate) tensors: Vec<GgufTensor>,
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Meta {
    fn write(&self, out: &mut Vec<u8>) {
        let kind = |out: &mut Vec<u8>, id: u32| out.extend(id.to_le_bytes());
        match self {
            Meta::U32(value) => {
                kind(out, 4);
                out.extend(value.to_le_bytes());
            }
            Meta::F32(value) => {
                kind(out, 6);
                out.extend(value.to_le_bytes());
            }
            Meta::Bool(value) => {
                kind(out, 7);
                out.push(u8::from(*value));
            }
            Meta::Text(text) => {
                kind(out, 8);
                push_text(out, text);
            }
            Meta::Texts(texts) => {
                kind(out, 9);
                kind(out, 8);
                out.extend((texts.len() as u64).to_le_bytes());
                texts.iter().for_each(|text| push_text(out, text));
            }
            Meta::I32s(values) => {
                kind(out, 9);
                kind(out, 5);
                out.extend((values.len() as u64).to_le_bytes());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
    }
}

impl GgufFile {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            push_text(&mut out, key);
            value.write(&mut out);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            push_text(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (tensor.data.len() as u64).next_multiple_of(32);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&tensor.data);
        }
        out
    }

    pub(crate) fn set(&mut self, key: &str, value: Meta) {
        match self.metadata.iter_mut().find(|entry| entry.0 == key) {
            Some(entry) => entry.1 = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor of the file")
    }
}

/// Sizes of [`tiny_llama`].
pub(crate) const HIDDEN: usize = 64;
pub(crate) const HEAD_DIM: usize = 16;
pub(crate) const INTERMEDIATE: usize = 96;

/// A one-layer Llama with 4 query heads, 2 KV heads and a byte-level vocabulary. Row `r` of q and
/// k holds the value `r`; the other linears are Q4_0.
pub(crate) fn tiny_llama() -> GgufFile {
    let tokens: Vec<String> = ["<|end|>", "<|turn|>"]
        .into_iter()
        .map(str::to_owned)
        .chain(('!'..='~').map(String::from))
        .chain(["Ġ", "Ċ", "he", "ll", "hell", "hello", "Ġw", "12", "123"].map(str::to_owned))
        .collect();
    let mut types = vec![1; tokens.len()];
    types[..2].fill(3);
    let merges =
        ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3"].map(str::to_owned).to_vec();
    let vocab = tokens.len();
    let prefixed = [
        ("block_count", Meta::U32(1)),
        ("context_length", Meta::U32(128)),
        ("embedding_length", Meta::U32(HIDDEN as u32)),
        ("feed_forward_length", Meta::U32(INTERMEDIATE as u32)),
        ("attention.head_count", Meta::U32(4)),
        ("attention.head_count_kv", Meta::U32(2)),
        ("attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("rope.freq_base", Meta::F32(10_000.0)),
    ];
    let mut metadata = vec![("general.architecture".to_owned(), Meta::Text("llama"))];
    metadata.extend(prefixed.map(|(key, value)| (format!("llama.{key}"), value)));
    for (key, value) in [
        ("model", Meta::Text("gpt2")),
        ("pre", Meta::Text("smollm")),
        ("tokens", Meta::Texts(tokens)),
        ("token_type", Meta::I32s(types)),
        ("merges", Meta::Texts(merges)),
        ("bos_token_id", Meta::U32(1)),
        ("eos_token_id", Meta::U32(0)),
        ("add_bos_token", Meta::Bool(false)),
    ] {
        metadata.push((format!("tokenizer.ggml.{key}"), value));
    }
    metadata.push(("tokenizer.chat_template".to_owned(), Meta::Text("{{ messages }}")));
    GgufFile { metadata, tensors: tensors(vocab) }
}

fn tensors(vocab: usize) -> Vec<GgufTensor> {
    let float = |name: &str, dims: &[usize], value: &dyn Fn(usize) -> f32| GgufTensor {
        name: name.to_owned(),
        dims: dims.iter().map(|&dim| dim as u64).collect(),
        kind: F32,
        data: (0..dims.iter().product()).flat_map(|i| value(i).to_le_bytes()).collect(),
    };
    // Scale 0.5 in each block, nibbles that differ.
    let quantized = |name: &str, dims: [usize; 2]| GgufTensor {
        name: name.to_owned(),
        dims: dims.map(|dim| dim as u64).to_vec(),
        kind: Q4_0,
        data: (0..dims[0] * dims[1] / 32)
            .flat_map(|block| {
                let bytes = (0..16).map(move |i| (block * 7 + i * 13) as u8);
                [0x00, 0x38].into_iter().chain(bytes)
            })
            .collect(),
    };
    let row = |i: usize| (i / HIDDEN) as f32;
    vec![
        float("token_embd.weight", &[HIDDEN, vocab], &|i| (i % 100) as f32 / 64.0),
        float("output_norm.weight", &[HIDDEN], &|_| 1.0),
        float("blk.0.attn_norm.weight", &[HIDDEN], &|_| 1.0),
        float("blk.0.ffn_norm.weight", &[HIDDEN], &|_| 1.0),
        float("blk.0.attn_q.weight", &[HIDDEN, 4 * HEAD_DIM], &row),
        float("blk.0.attn_k.weight", &[HIDDEN, 2 * HEAD_DIM], &row),
        quantized("blk.0.attn_v.weight", [HIDDEN, 2 * HEAD_DIM]),
        quantized("blk.0.attn_output.weight", [4 * HEAD_DIM, HIDDEN]),
        quantized("blk.0.ffn_gate.weight", [HIDDEN, INTERMEDIATE]),
        quantized("blk.0.ffn_up.weight", [HIDDEN, INTERMEDIATE]),
        quantized("blk.0.ffn_down.weight", [INTERMEDIATE, HIDDEN]),
    ]
}
