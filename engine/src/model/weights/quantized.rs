//! The tensors of a module with 4-bit weights, as the program that packed them wrote them.

use bespoke_kernel_gen::model::Packing;
use safetensors::Dtype;

use super::repack::{self, InexactScale};
use super::{AwqTensors, Expected, FLOAT16, FLOATS, PartTensors, floats_of};
use crate::error::Error;
use crate::model::safetensors::Checkpoint;

const INT32: &[Dtype] = &[Dtype::I32];
const INT8: &[Dtype] = &[Dtype::I8];
const INTEGERS: &[Dtype] = &[Dtype::I64, Dtype::I32];

/// A module `[n, k]` with groups of `group` inputs.
pub(super) struct QuantizedModule<'a> {
    pub(super) name: &'a str,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) group: usize,
    /// Whether zeros are stored; every zero is 8 else.
    pub(super) zero_point: bool,
    pub(super) has_bias: bool,
    pub(super) packing: Packing,
}

impl QuantizedModule<'_> {
    /// The module's tensors, its bias aside.
    pub(super) fn expected(&self) -> Vec<Expected> {
        let &QuantizedModule { n, k, zero_point, .. } = self;
        let num_groups = self.num_groups();
        let tensor = |suffix, dtypes, shape, required| Expected {
            name: self.tensor(suffix),
            dtypes,
            shape,
            required,
        };
        match self.packing {
            Packing::Awq => vec![
                tensor("qweight", INT32, vec![k, n / 8], true),
                tensor("qzeros", INT32, vec![num_groups, n / 8], zero_point),
                tensor("scales", FLOAT16, vec![num_groups, n], true),
            ],
            Packing::Gptq { act_order, .. } => {
                let mut all = vec![
                    tensor("qweight", INT32, vec![k / 8, n], true),
                    tensor("qzeros", INT32, vec![num_groups, n / 8], true),
                    tensor("scales", FLOATS, vec![num_groups, n], true),
                    tensor("g_idx", INT32, vec![k], act_order),
                ];
                if !self.has_bias {
                    all.push(tensor("bias", FLOATS, vec![n], false));
                }
                all
            }
            Packing::CompressedTensors { act_order } => vec![
                tensor("weight_packed", INT32, vec![n, k / 8], true),
                tensor("weight_scale", FLOATS, vec![n, num_groups], true),
                tensor("weight_shape", INTEGERS, vec![2], true),
                match zero_point {
                    true => tensor("weight_zero_point", INT32, vec![n / 8, num_groups], true),
                    false => tensor("weight_zero_point", INT8, vec![n, num_groups], false),
                },
                tensor("weight_g_idx", INT32, vec![k], act_order),
            ],
        }
    }

    /// The module in AWQ's layout.
    pub(super) fn read(&self, checkpoint: &Checkpoint) -> Result<PartTensors, Error> {
        let (qweight, qzeros, scales) = match self.packing {
            Packing::Awq => {
                let scales = checkpoint.read(&self.tensor("scales"))?;
                self.check_finite(checkpoint, "scales", &scales)?;
                (
                    checkpoint.read(&self.tensor("qweight"))?,
                    self.read_optional(checkpoint, "qzeros")?,
                    scales,
                )
            }
            Packing::Gptq { zero_offset, .. } => self.read_gptq(checkpoint, zero_offset)?,
            Packing::CompressedTensors { .. } => self.read_compressed(checkpoint)?,
        };
        let &QuantizedModule { n, k, group, .. } = self;
        Ok(PartTensors::Awq(AwqTensors { n, k, group, qweight, qzeros, scales }))
    }

    fn read_gptq(&self, checkpoint: &Checkpoint, zero_offset: u8) -> Result<Tensors, Error> {
        self.check_order(checkpoint, "g_idx")?;
        self.check_no_bias(checkpoint)?;
        let scales = self.read_scales(checkpoint, "scales")?;
        let qzeros = checkpoint.read(&self.tensor("qzeros"))?;
        let qzeros = repack::gptq_zeros(&qzeros, zero_offset).map_err(|idx| {
            let message = format!(
                "holds a zero of 15 at element {idx}, which programs read as 0 or as 16; convert \
                 the checkpoint to checkpoint_format gptq_v2"
            );
            self.error(checkpoint, "qzeros", &message)
        })?;
        let qweight = checkpoint.read(&self.tensor("qweight"))?;
        Ok((repack::gptq_weights(&qweight, self.n, self.k), Some(qzeros), scales))
    }

    fn read_compressed(&self, checkpoint: &Checkpoint) -> Result<Tensors, Error> {
        let &QuantizedModule { n, k, .. } = self;
        let num_groups = self.num_groups();
        self.check_order(checkpoint, "weight_g_idx")?;
        self.check_weight_shape(checkpoint)?;
        let scales = self.read_scales(checkpoint, "weight_scale")?;
        let scales = repack::transposed_scales(&scales, n, num_groups);
        let zeros = self.read_optional(checkpoint, "weight_zero_point")?;
        let qzeros = match zeros {
            Some(zeros) if self.zero_point => Some(repack::compressed_zeros(&zeros, n, num_groups)),
            Some(zeros) if zeros.iter().any(|zero| *zero != 0) => {
                let message = "is not 0 everywhere, but the config says symmetric";
                return Err(self.error(checkpoint, "weight_zero_point", message));
            }
            _ => None,
        };
        let packed = checkpoint.read(&self.tensor("weight_packed"))?;
        Ok((repack::compressed_weights(&packed, n, k), qzeros, scales))
    }

    /// float16 scales in the order of the file; errors name the first that is none.
    fn read_scales(&self, checkpoint: &Checkpoint, suffix: &str) -> Result<Vec<u8>, Error> {
        let name = self.tensor(suffix);
        let bytes = checkpoint.read(&name)?;
        let dtype = checkpoint.get(&name).map(|tensor| tensor.dtype);
        let scales = match dtype {
            Some(Dtype::F16) => bytes,
            _ => {
                let values = floats_of(checkpoint, &name, &bytes)?;
                repack::exact_scales(&values).map_err(|InexactScale { idx, value }| {
                    let message = format!(
                        "holds {value:e} at element {idx}, which no float16 number equals, and \
                         scales are kept in float16; quantize with float16 scales"
                    );
                    self.error(checkpoint, suffix, &message)
                })?
            }
        };
        self.check_finite(checkpoint, suffix, &scales)?;
        Ok(scales)
    }

    fn check_finite(
        &self,
        checkpoint: &Checkpoint,
        suffix: &str,
        scales: &[u8],
    ) -> Result<(), Error> {
        let is_finite = |b: &[u8; 2]| half::f16::from_le_bytes(*b).is_finite();
        match scales.as_chunks::<2>().0.iter().position(|b| !is_finite(b)) {
            None => Ok(()),
            Some(idx) => {
                let message = format!("is not finite at element {idx}");
                Err(self.error(checkpoint, suffix, &message))
            }
        }
    }

    /// Refuses inputs that do not lie group after group. Programs also fill what they do not use
    /// with −1.
    fn check_order(&self, checkpoint: &Checkpoint, suffix: &str) -> Result<(), Error> {
        let Some(bytes) = self.read_optional(checkpoint, suffix)? else { return Ok(()) };
        let groups = bytes.as_chunks::<4>().0.iter().map(|word| i32::from_le_bytes(*word));
        if groups.clone().all(|group| group == -1) {
            return Ok(());
        }
        let is_wrong = |(k, group): &(usize, i32)| usize::try_from(*group) != Ok(k / self.group);
        match groups.enumerate().find(is_wrong) {
            None => Ok(()),
            Some((k, group)) => {
                let message = format!(
                    "puts input {k} into group {group}; supported are groups of {} inputs side by \
                     side, as desc_act or actorder leave them with static groups",
                    self.group
                );
                Err(self.error(checkpoint, suffix, &message))
            }
        }
    }

    /// Some programs write a bias for each module; where the model has none it must be 0.
    fn check_no_bias(&self, checkpoint: &Checkpoint) -> Result<(), Error> {
        if self.has_bias {
            return Ok(());
        }
        let Some(bytes) = self.read_optional(checkpoint, "bias")? else { return Ok(()) };
        match floats_of(checkpoint, &self.tensor("bias"), &bytes)?.iter().all(|b| *b == 0.0) {
            true => Ok(()),
            false => {
                let message = "is not 0 everywhere, but the model of config.json has no such bias";
                Err(self.error(checkpoint, "bias", message))
            }
        }
    }

    fn check_weight_shape(&self, checkpoint: &Checkpoint) -> Result<(), Error> {
        let bytes = checkpoint.read(&self.tensor("weight_shape"))?;
        let found: Vec<i64> = match bytes.len() {
            16 => bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            _ => bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
        };
        let expected = [self.n, self.k];
        let same = found.iter().map(|dim| usize::try_from(*dim)).eq(expected.map(Ok));
        match same {
            true => Ok(()),
            false => {
                let message = format!("is {found:?}, expected {expected:?} from config.json");
                Err(self.error(checkpoint, "weight_shape", &message))
            }
        }
    }

    fn read_optional(
        &self,
        checkpoint: &Checkpoint,
        suffix: &str,
    ) -> Result<Option<Vec<u8>>, Error> {
        let name = self.tensor(suffix);
        checkpoint.get(&name).map(|_| checkpoint.read(&name)).transpose()
    }

    fn num_groups(&self) -> usize {
        self.k / self.group
    }

    fn tensor(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.name)
    }

    fn error(&self, checkpoint: &Checkpoint, suffix: &str, message: &str) -> Error {
        Error::model(checkpoint.dir(), format!("tensor '{}' {message}", self.tensor(suffix)))
    }
}

/// `qweight`, `qzeros` and `scales` of an AWQ module.
type Tensors = (Vec<u8>, Option<Vec<u8>>, Vec<u8>);
