//! The integration tests of Bespoke live in `it/`.
