//! Generates the kernels of the models that `BESPOKE_MODEL` names.

fn main() {
    bespoke_kernel_gen::cargo::build();
}
