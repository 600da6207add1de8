//! The forms in which one model holds a linear: quantized, and dense in the layers that are left
//! out of quantization. And the forms of rows that its linears can read.

use super::{
    ActivationType, DType, LinearPlace, LinearRole, LinearShape, ModelShape, WeightFormat,
};
use crate::error::Error;

impl ModelShape {
    /// The linear `role` of a layer; for the head `layer_idx` says nothing.
    pub fn linear_in(&self, role: LinearRole, layer_idx: usize) -> LinearShape {
        let linear = self.linear(role);
        match self.dense_linears.binary_search(&LinearPlace { layer_idx, role }) {
            Ok(_) => self.dense(linear),
            Err(_) => linear,
        }
    }

    /// The forms that layers have the linear `role` in: that of [`ModelShape::linear`], and the
    /// dense one where it is another and some layers have it.
    pub fn linear_forms(&self, role: LinearRole) -> impl Iterator<Item = LinearShape> + use<> {
        let linear = self.linear(role);
        let is_mixed = self.dense_linears.iter().any(|place| place.role == role);
        let dense = is_mixed.then(|| self.dense(linear)).filter(|dense| *dense != linear);
        std::iter::once(linear).chain(dense)
    }

    /// As [`ModelShape::linear_forms`], and the head as it is run.
    pub fn served_forms(
        &self,
        role: LinearRole,
        activation: ActivationType,
    ) -> impl Iterator<Item = LinearShape> + use<> {
        let head = (role == LinearRole::Head).then(|| self.head_for(activation));
        let others = (role != LinearRole::Head).then(|| self.linear_forms(role));
        head.into_iter().chain(others.into_iter().flatten())
    }

    /// The activations that make a difference to the model: rounding is for quantized linears, or
    /// for bfloat16 weights where there are no others.
    pub fn activations(&self) -> &'static [ActivationType] {
        let is_bf16 = |role| self.linear(role).format == WeightFormat::Dense(DType::BF16);
        if self.is_quantized() {
            &[ActivationType::Float, ActivationType::Int8]
        } else if LinearRole::ALL.into_iter().all(is_bf16) {
            &[ActivationType::Float, ActivationType::Bf16]
        } else {
            &[ActivationType::Float]
        }
    }

    /// Refuses activations that the model cannot have. Those that make no difference are none.
    ///
    /// # Errors
    /// bfloat16 activations, and a linear that has other weights.
    pub fn check_activations(&self, activation: ActivationType) -> Result<(), Error> {
        for role in LinearRole::ALL {
            for linear in self.served_forms(role, activation) {
                linear.kernel(activation)?;
            }
        }
        Ok(())
    }

    /// Models of one layer that together have this one's linears in all forms.
    pub fn single_layers(&self) -> Vec<ModelShape> {
        let quantized = ModelShape { num_layers: 1, dense_linears: Vec::new(), ..self.clone() };
        if self.dense_linears.is_empty() {
            return vec![quantized];
        }
        let mut dense = quantized.clone();
        for LinearPlace { role, .. } in &self.dense_linears {
            let linear = self.dense(self.linear(*role));
            *dense.linear_mut(*role) = linear;
        }
        vec![quantized, dense]
    }

    fn dense(&self, linear: LinearShape) -> LinearShape {
        LinearShape { format: WeightFormat::Dense(self.dtype), ..linear }
    }

    fn linear_mut(&mut self, role: LinearRole) -> &mut LinearShape {
        match role {
            LinearRole::Qkv => &mut self.qkv,
            LinearRole::O => &mut self.o,
            LinearRole::GateUp => &mut self.gate_up,
            LinearRole::Down => &mut self.down,
            LinearRole::Head => &mut self.head,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::presets;
    use crate::spec::{KernelSpec, RowFormat};

    fn place(layer_idx: usize, role: LinearRole) -> LinearPlace {
        LinearPlace { layer_idx, role }
    }

    #[test]
    fn a_mixed_model_has_the_kernels_of_both_forms() {
        let plain = presets::shape("smollm2-135m-awq", &[]).unwrap();
        let mut mixed = plain.clone();
        mixed.dense_linears = vec![place(2, LinearRole::O), place(2, LinearRole::Down)];
        let specs = |shape: &ModelShape| BTreeSet::from_iter(shape.kernel_specs());
        let added: Vec<KernelSpec> = specs(&mixed).difference(&specs(&plain)).copied().collect();
        let gemm = |linear: LinearShape| KernelSpec::Gemm {
            n: linear.n,
            k: linear.k,
            weight: mixed.dtype,
        };
        assert_eq!(added, [gemm(mixed.o), gemm(mixed.down)]);
        assert!(specs(&plain).is_subset(&specs(&mixed)));
        let is_dense = |role, layer_idx| {
            matches!(mixed.linear_in(role, layer_idx).format, WeightFormat::Dense(_))
        };
        assert!(is_dense(LinearRole::O, 2) && is_dense(LinearRole::Down, 2));
        assert!(!is_dense(LinearRole::O, 1) && !is_dense(LinearRole::Qkv, 2));
        let cuda = |shape: &ModelShape| BTreeSet::from_iter(shape.cuda_specs().unwrap());
        assert_eq!(cuda(&mixed).difference(&cuda(&plain)).count(), 2);
    }

    /// Silu-and-mul writes what the layer's down reads, norms what qkv reads.
    #[test]
    fn a_mixed_model_has_rows_of_both_forms() {
        let mut shape = presets::shape("smollm2-135m-awq", &[]).unwrap();
        let rows = |shape: &ModelShape, role| -> Vec<RowFormat> {
            let forms = shape.served_forms(role, ActivationType::Int8);
            forms.map(|linear| linear.row_format(ActivationType::Int8)).collect()
        };
        let int8 = RowFormat::I8 { group: 64 };
        assert_eq!(rows(&shape, LinearRole::Down), [int8]);
        shape.dense_linears = vec![place(0, LinearRole::Down)];
        assert_eq!(rows(&shape, LinearRole::Down), [int8, RowFormat::F32]);
        assert_eq!(rows(&shape, LinearRole::Qkv), [int8]);
    }

    #[test]
    fn bf16_activations_are_for_bf16_weights_alone() {
        use ActivationType::{Bf16, Float, Int8};
        let check = |shape: &ModelShape, activations: &[ActivationType], error: Option<&str>| {
            assert_eq!(shape.activations(), activations);
            for activation in [Float, Int8] {
                shape.check_activations(activation).unwrap();
            }
            let found = shape.check_activations(Bf16).map_err(|error| error.to_string());
            match error {
                None => assert_eq!(found, Ok(())),
                Some(part) => assert!(found.unwrap_err().contains(part), "{part}"),
            }
        };
        let mut shape = presets::shape("smollm2-135m", &[]).unwrap();
        check(&shape, &[Float, Bf16], None);
        let rows = LinearRole::ALL.map(|role| shape.linear_rows(role, Bf16));
        assert_eq!(rows, [RowFormat::Bf16; 5]);
        let specs = shape.kernel_specs();
        assert!(specs.contains(&KernelSpec::Quantize { k: 576, out: RowFormat::Bf16 }));
        shape.head.format = WeightFormat::Dense(DType::F16);
        check(&shape, &[Float], Some("has f16 weights; choose float activations"));
        let quantized = presets::shape("smollm2-135m-awq", &[]).unwrap();
        check(&quantized, &[Float, Int8], Some("has 4-bit weights; choose int8 or float"));
    }

    #[test]
    fn single_layers_have_all_forms() {
        let mut shape = presets::shape("smollm2-135m-awq", &[]).unwrap();
        assert_eq!(shape.single_layers().len(), 1);
        shape.dense_linears = vec![place(1, LinearRole::GateUp), place(4, LinearRole::GateUp)];
        let [quantized, dense] = shape.single_layers().try_into().unwrap();
        assert_eq!((quantized.num_layers, dense.num_layers), (1, 1));
        assert_eq!(quantized.gate_up, shape.gate_up);
        assert_eq!(dense.gate_up, shape.dense(shape.gate_up));
        assert_eq!(dense.qkv, shape.qkv);
        assert!(quantized.dense_linears.is_empty() && dense.dense_linears.is_empty());
    }
}
