//! Criterion benches of Bespoke live in `kernels.rs`; shared measurement code is here.
