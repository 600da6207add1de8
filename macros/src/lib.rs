//! Binds generated kernels with their shapes checked by the compiler.
