//! Model shapes → `models.rs`: what a binary knows of the models that its kernels are for.

use crate::spec::{LinearPlace, LinearShape, ModelShape, WeightFormat};

/// A function `models` that returns `shapes`.
pub fn models_rs(shapes: &[ModelShape]) -> String {
    let mut text = String::from(
        "/// The models that this build has kernels for.\n\
         pub fn models() -> Vec<::bespoke::kernel_gen::spec::ModelShape> {\n",
    );
    if shapes.is_empty() {
        // Without names to import: the compiler would warn.
        text.push_str("    Vec::new()\n}\n");
        return text;
    }
    text.push_str("    use ::bespoke::kernel_gen::spec::*;\n    vec![\n");
    for shape in shapes {
        text.push_str(&format!("        {},\n", expression(shape)));
    }
    text.push_str("    ]\n}\n");
    text
}

/// The shape as an expression, where the names of `spec` are in scope.
pub(crate) fn expression(shape: &ModelShape) -> String {
    // NOTE: every field is named here, so that a new one cannot be forgotten.
    let ModelShape {
        name,
        num_layers,
        vocab_size,
        hidden_size,
        intermediate_size,
        num_heads,
        num_kv_heads,
        head_dim,
        rotary_dim,
        qk_norm,
        sliding_window,
        dtype,
        qkv,
        o,
        gate_up,
        down,
        head,
        dense_linears,
        page_size,
    } = shape;
    let [qkv, o, gate_up, down, head] = [qkv, o, gate_up, down, head].map(linear);
    let dense_linears: Vec<String> = dense_linears.iter().map(place).collect();
    let dense_linears = dense_linears.join(", ");
    format!(
        "ModelShape {{ name: {name:?}.to_owned(), num_layers: {num_layers}, vocab_size: \
         {vocab_size}, hidden_size: {hidden_size}, intermediate_size: {intermediate_size}, \
         num_heads: {num_heads}, num_kv_heads: {num_kv_heads}, head_dim: {head_dim}, rotary_dim: \
         {rotary_dim}, qk_norm: {qk_norm}, sliding_window: {sliding_window:?}, dtype: \
         DType::{dtype:?}, qkv: {qkv}, o: {o}, gate_up: {gate_up}, down: {down}, head: {head}, \
         dense_linears: vec![{dense_linears}], page_size: {page_size} }}"
    )
}

fn linear(linear: &LinearShape) -> String {
    let LinearShape { n, k, format, bias } = linear;
    let format = match format {
        WeightFormat::Dense(dtype) => format!("WeightFormat::Dense(DType::{dtype:?})"),
        WeightFormat::Awq(group) => format!("WeightFormat::Awq(GroupSize::{group:?})"),
    };
    format!("LinearShape {{ n: {n}, k: {k}, format: {format}, bias: {bias} }}")
}

fn place(place: &LinearPlace) -> String {
    let LinearPlace { layer_idx, role } = place;
    format!("LinearPlace {{ layer_idx: {layer_idx}, role: LinearRole::{role:?} }}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets;
    use crate::spec::LinearRole;

    #[test]
    fn a_shape_becomes_an_expression() {
        let mut shape = presets::shape("qwen2.5-7b-awq", &[]).unwrap();
        shape.dense_linears = vec![LinearPlace { layer_idx: 3, role: LinearRole::Down }];
        let text = models_rs(&[shape.clone(), shape]);
        assert_eq!(text.matches("name: \"qwen2.5-7b-awq\".to_owned()").count(), 2);
        for part in [
            "sliding_window: None",
            "dtype: DType::F16",
            "qkv: LinearShape { n: 4608, k: 3584, format: \
             WeightFormat::Awq(GroupSize::Of(128)), bias: true }",
            "dense_linears: vec![LinearPlace { layer_idx: 3, role: LinearRole::Down }]",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
