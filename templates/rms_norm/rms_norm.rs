//! `rms_norm`
