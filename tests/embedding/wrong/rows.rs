//! Rows of another size than the linear reads.

use bespoke::slices::Runner;
use bespoke_embedding::model::{Kernels, Qkv};

fn run(qkv: &Qkv, runner: &mut Runner<Kernels>) {
    let rows = [[0.0; 130]; 3];
    qkv.run(runner, &rows, &mut [[0.0; 256]; 3]).unwrap();
}

fn main() {
    let _ = run;
}
