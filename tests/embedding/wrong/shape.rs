//! Weights for a linear of the model with another number of inputs.

use bespoke::slices::Runner;
use bespoke_embedding::model::{Head, Kernels};

fn main() {
    let runner = Runner::<Kernels>::new(None).unwrap();
    Head::new(&runner, &[[0.0; 129]; 160], None).unwrap();
}
