//! Plain loops in float32: any shape, slow, the oracle of the kernels.
