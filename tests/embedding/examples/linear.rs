//! One linear of the model by its generated kernel, without an engine.
//!
//! ```sh
//! cargo run --example linear
//! ```

use std::error::Error;

use bespoke::slices::Runner;
use bespoke_embedding::model::{self, HIDDEN_SIZE, VOCAB_SIZE};

fn main() -> Result<(), Box<dyn Error>> {
    let mut runner = Runner::<model::Kernels>::new(None)?;
    // The weight of input k and output n is 1 where n = k.
    let mut weight = vec![[0.0; HIDDEN_SIZE]; VOCAB_SIZE];
    (0..HIDDEN_SIZE).for_each(|k| weight[k][k] = 1.0);
    let weight: &[[f32; HIDDEN_SIZE]; VOCAB_SIZE] = weight.as_slice().try_into()?;
    let head = model::Head::new(&runner, weight, None)?;

    let flat: Vec<f32> = (0..3 * HIDDEN_SIZE).map(|idx| idx as f32).collect();
    let (rows, _) = flat.as_chunks::<HIDDEN_SIZE>();
    let mut out = vec![[0.0; VOCAB_SIZE]; rows.len()];
    head.run(&mut runner, rows, &mut out)?;
    println!("{} on {} threads: {:?}", runner.target().name(), runner.num_threads(), &out[2][..4]);
    Ok(())
}
