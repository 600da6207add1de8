//! What the CPU backend tells of its kernels' times.

use std::ops::ControlFlow;
use std::path::PathBuf;

use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::request::Request;
use bespoke_tests::tiny_kernels;

#[test]
fn the_kernels_of_a_step_are_timed() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/tiny/llama-awq-g64");
    let options =
        EngineOptions { backend: BackendChoice::Cpu, ..EngineOptions::new(tiny_kernels()) };
    let mut engine = Engine::load(&dir, &options, &mut |_| {}).unwrap();
    assert_eq!(engine.kernel_usage().unwrap(), [], "nothing has run");

    let request =
        Request { prompt_ids: vec![5; 40], max_tokens: 20, ignore_eos: true, ..Request::default() };
    let answer = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(answer.output_ids.len(), 20);
    let usage = engine.kernel_usage().unwrap();
    // The first step and two of the nineteen after it are timed: prompt and decode.
    let calls = |op: &str| -> u64 {
        usage.iter().filter(|usage| usage.op == op).map(|usage| usage.num_calls).sum()
    };
    let num_layers = engine.shape().num_layers as u64;
    assert_eq!(calls("paged_attention"), 3 * num_layers);
    assert_eq!(calls("awq_gemm"), 3 * 4 * num_layers);
    assert_eq!(calls("embed"), 3);
    for usage in &usage {
        assert!(usage.seconds > 0.0 && usage.limit_seconds > 0.0, "{usage:?}");
        assert!(usage.bytes > 0, "{usage:?}");
        let is_matmul = matches!(usage.op, "awq_gemm" | "gemm" | "paged_attention");
        assert_eq!(usage.ops > 0, is_matmul, "{usage:?}");
    }
}
