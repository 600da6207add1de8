//! Angles of the rotary embedding.

use bespoke::batch::Batch;
use bespoke::kernels::abi::SequenceSpan;
use bespoke::model::rope::Rope;
use bespoke_kernel_gen::model::{ModelConfig, RopeScaling};

use super::folder::Folder;

fn config(scaling: RopeScaling) -> ModelConfig {
    let text = serde_json::to_string(&Folder::read("llama-gqa2").config).unwrap();
    ModelConfig { rope_scaling: scaling, ..ModelConfig::parse(&text).unwrap() }
}

/// A batch of one span a sequence, each of the one position given.
fn batch(positions: &[u32]) -> Batch {
    let span = |row: usize| SequenceSpan {
        first_row: row as u32,
        num_rows: 1,
        context_len: positions[row] + 1,
        first_page: 0,
    };
    let spans = (0..positions.len()).map(span).collect();
    Batch { positions: positions.to_vec(), spans, ..Batch::default() }
}

#[test]
fn a_row_holds_cosines_then_sines() {
    let mut rope = Rope::new(&config(RopeScaling::Default));
    let mut batch = batch(&[0, 3]);
    rope.fill(&mut batch, &[1, 4]);
    assert_eq!(batch.cos_sin.len(), 2 * 16);
    assert_eq!(batch.cos_sin[..16], [[1.0; 8], [0.0; 8]].concat());
    let second = &batch.cos_sin[16..];
    for i in 0..8 {
        let angle = 3.0 * 10000f64.powf(-2.0 * i as f64 / 16.0);
        assert!((f64::from(second[i]) - angle.cos()).abs() < 1e-6, "cosine {i}");
        assert!((f64::from(second[8 + i]) - angle.sin()).abs() < 1e-6, "sine {i}");
    }
}

#[test]
fn the_dynamic_base_follows_from_each_sequence_alone() {
    let scaling = RopeScaling::Dynamic { factor: 2.0, original_max_position: 32 };
    let mut rope = Rope::new(&config(scaling));
    let mut both = batch(&[5, 5]);
    rope.fill(&mut both, &[70, 6]);
    let (long, short) = both.cos_sin.split_at(16);
    assert_ne!(long, short);

    let mut default = Rope::new(&config(RopeScaling::Default));
    let mut alone = batch(&[5]);
    default.fill(&mut alone, &[6]);
    assert_eq!(short, alone.cos_sin);

    rope.fill(&mut alone, &[70]);
    assert_eq!(long, alone.cos_sin);
}
