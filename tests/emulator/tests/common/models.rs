//! What the tiny models and SmolLM2 need.

use bespoke_kernel_gen::cuda::Spec;
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::presets;
use bespoke_kernel_gen::spec::ModelShape;

/// The specs of their plans, each once.
pub(crate) fn specs() -> Vec<Spec> {
    let mut specs: Vec<Spec> =
        shapes().iter().flat_map(|shape| shape.cuda_specs().unwrap()).collect();
    specs.sort();
    specs.dedup();
    specs
}

fn shapes() -> Vec<ModelShape> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../golden/tiny");
    let presets = ["smollm2-135m", "smollm2-135m-awq"];
    let mut shapes: Vec<ModelShape> = presets.map(|name| presets::shape(name, &[]).unwrap()).into();
    let mut paths: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths.iter().map(|path| path.join("config.json")).filter(|path| path.exists()) {
        // NOTE: models that the engine refuses are among them.
        if let Ok(config) = ModelConfig::parse(&std::fs::read_to_string(&path).unwrap()) {
            shapes.extend(config.shape("tiny"));
        }
    }
    assert!(shapes.len() > 8);
    shapes
}
