//! Weights with another group size than the model's.

use bespoke::slices::{AwqMatmul, AwqWeights, Runner};
use bespoke_embedding::model::Kernels;

fn main() {
    let runner = Runner::<Kernels>::new(None).unwrap();
    let weights = AwqWeights::<256, 128, 64>::new(&[], None, &[]).unwrap();
    AwqMatmul::<Kernels, 256, 128, 64>::new(&runner, &weights, None).unwrap();
}
