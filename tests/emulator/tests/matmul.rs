//! What the tests of `gemm` and `awq_gemm` share: a linear with random weights, its launch in every
//! row regime, and the comparison with a loop in float64.

use std::ops::Range;

use bespoke::backend::cuda::pack;
use bespoke::model::linear::{AwqView, DenseView, LinearPart, LinearSource};
use bespoke_emulator::{Access, Library, Report, SharedAccesses};
use bespoke_kernel_gen::cuda::{
    Arch, AwqGemm, Gemm, OutType, Regime, RowType, Spec, Variant, Workspace, templates,
};
use bespoke_kernel_gen::spec::DType;
use half::f16;

use crate::common::{
    Bytes, Params, Random, SEEDS, emulator, generated, launch, round, to_u16, to_u32,
    tolerance as rounding, upload, widen,
};

/// Row counts for a spec of a model: around the limits of the regimes once, then every regime.
pub(crate) fn check_kernels(kernels: &[Kernel], linear: impl Fn(usize, u64) -> Linear) {
    for seed in SEEDS {
        let all = [1, 8, 9, 16, 17, 32, 33, 64, 65];
        let row_counts = if seed == SEEDS[0] { &all[..] } else { &[7, 15, 31, 63, 66] };
        let rows_max = row_counts.iter().copied().max().unwrap();
        linear(rows_max, seed).check(kernels, row_counts, seed);
    }
}

/// Row counts around the limits of every regime and tile.
pub(crate) const ROW_COUNTS: [usize; 11] = [1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 130];

/// A linear, its weights as they lie in a checkpoint, and rows for it.
pub(crate) struct Linear {
    pub(crate) spec: Spec,
    rows: RowType,
    n: usize,
    k: usize,
    tensors: Tensors,
    bias: Option<Vec<f32>>,
    x: Vec<u16>,
}

enum Tensors {
    Dense(Vec<u8>),
    Awq { group: usize, qweight: Vec<u8>, qzeros: Vec<u8>, scales: Vec<u8> },
}

impl Linear {
    pub(crate) fn awq(op: AwqGemm, num_rows: usize, has_bias: bool, seed: u64) -> Linear {
        let mut random = Random(seed);
        let group = op.group.of(op.k);
        let num_groups = op.k / group;
        let mut bytes = |count: usize| (0..count).map(|_| random.next() as u8).collect::<Vec<u8>>();
        let (qweight, qzeros) = (bytes(op.k * op.n / 2), bytes(num_groups * op.n / 2));
        let scales = random.floats(num_groups * op.n, 0.02);
        let scales: Vec<u16> = scales.iter().map(|s| f16::from_f32(*s).to_bits()).collect();
        let tensors = Tensors::Awq { group, qweight, qzeros, scales: scales.bytes() };
        Linear::new(Spec::AwqGemm(op), op.rows, (op.n, op.k), tensors, num_rows, has_bias, random)
    }

    pub(crate) fn dense(op: Gemm, num_rows: usize, has_bias: bool, seed: u64) -> Linear {
        let mut random = Random(seed);
        let weights = random.floats(op.n * op.k, 0.1);
        let weights: Vec<u16> = weights.iter().map(|w| round(op.rows, *w)).collect();
        let tensors = Tensors::Dense(weights.bytes());
        Linear::new(Spec::Gemm(op), op.rows, (op.n, op.k), tensors, num_rows, has_bias, random)
    }

    fn new(
        spec: Spec,
        rows: RowType,
        (n, k): (usize, usize),
        tensors: Tensors,
        num_rows: usize,
        has_bias: bool,
        mut random: Random,
    ) -> Linear {
        let x = random.floats(num_rows * k, 2.0).iter().map(|v| round(rows, *v)).collect();
        let bias = has_bias.then(|| random.floats(n, 1.0));
        Linear { spec, rows, n, k, tensors, bias, x }
    }

    fn source(&self) -> LinearSource<'_> {
        let (n, k) = (self.n, self.k);
        let part = match &self.tensors {
            Tensors::Dense(bytes) => {
                let dtype = if self.rows == RowType::F16 { DType::F16 } else { DType::BF16 };
                LinearPart::Dense(DenseView { n, k, dtype, bytes })
            }
            Tensors::Awq { group, qweight, qzeros, scales } => {
                let qzeros = Some(&qzeros[..]);
                LinearPart::Awq(AwqView { n, k, group: *group, qweight, qzeros, scales })
            }
        };
        LinearSource { parts: vec![part], row_map: None, bias: None }
    }

    /// Packed weights and scales.
    fn packed(&self) -> (Vec<u8>, Vec<u8>) {
        match self.spec {
            Spec::AwqGemm(op) => {
                let tiles = pack::awq(&self.source(), &op.layout(), op.rows, 1).unwrap();
                (tiles.weight, tiles.scales)
            }
            Spec::Gemm(op) => (pack::dense(&self.source(), op.rows, 1).unwrap(), Vec::new()),
            _ => unreachable!("a linear is a matmul"),
        }
    }

    fn has_f32_out(&self) -> bool {
        matches!(self.spec, Spec::Gemm(Gemm { out: OutType::F32, .. }))
    }

    /// Outputs of the first `num_rows` rows in float64, and how far a kernel's may be: its sums
    /// round once for each input and once for each chain of inputs, its result once.
    fn expected(&self, num_rows: usize) -> Vec<(f64, f64)> {
        let source = self.source();
        let mut expected = vec![(0.0, 0.0); num_rows * self.n];
        let mut weights = vec![0.0; self.k];
        for n in 0..self.n {
            source.row(n, &mut weights);
            for row in 0..num_rows {
                let x = &self.x[row * self.k..(row + 1) * self.k];
                let products = x.iter().zip(&weights);
                let products =
                    products.map(|(x, w)| f64::from(widen(self.rows, *x)) * f64::from(*w));
                let (mut sum, mut size) = (0.0, 0.0);
                for product in products {
                    sum += product;
                    size += product.abs();
                }
                let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[n]));
                let value = sum + bias;
                let num_roundings = (2 * self.k + 64) as f64;
                let mut tolerance = num_roundings * 2f64.powi(-24) * (size + bias.abs());
                if !self.has_f32_out() {
                    tolerance += f64::from(rounding(self.rows, value as f32));
                }
                expected[row * self.n + n] = (value, tolerance);
            }
        }
        expected
    }
}

/// Bank conflicts of all but the few accesses at the end of the sums.
fn main_loop_conflicts(report: &Report) -> u64 {
    let text = templates::find("common/matmul.cuh").unwrap().text;
    let end = text.lines().position(|line| line.contains("--- the end of the sums ---")).unwrap();
    let in_loop = |access: &&SharedAccesses| {
        !access.file.ends_with("common/matmul.cuh") || (access.line as usize) < end
    };
    let accesses = report.shared.iter().filter(in_loop);
    accesses.map(|access| access.num_passes - access.num_passes_min).sum()
}

/// A compiled kernel.
pub(crate) struct Kernel {
    variant: Variant,
    compiled: Library,
}

impl Kernel {
    pub(crate) fn new(variant: Variant) -> Kernel {
        variant.is_feasible().unwrap();
        let compiled = generated(&variant);
        Kernel { variant, compiled }
    }

    /// The kernels of every row regime.
    pub(crate) fn all(spec: &Spec, arch: Arch) -> Vec<Kernel> {
        Regime::MATMUL.into_iter().map(|regime| Kernel::new(spec.variant(regime, arch))).collect()
    }

    pub(crate) fn symbol(&self) -> String {
        self.variant.symbol()
    }

    /// Runs the kernel over rows `rows` of the linear: the bits of each output.
    pub(crate) fn run(&self, linear: &Linear, rows: Range<usize>, seed: u64) -> (Vec<u32>, Report) {
        let mut device = emulator(seed);
        let num_rows = rows.len();
        let Workspace { floats, counters } = self.variant.workspace(num_rows);
        let (weight, scales) = linear.packed();
        let size = if linear.has_f32_out() { 4 } else { 2 };
        let x = &linear.x[rows.start * linear.k..rows.end * linear.k];
        let mut constant = |bytes: &[u8]| match bytes.is_empty() {
            true => 0,
            false => device.upload(bytes, Access::Constant),
        };
        let weights = [constant(&weight), constant(&scales)];
        let bias = constant(&linear.bias.as_deref().unwrap_or(&[]).bytes());
        let x = upload(&mut device, x, Access::ReadOnly);
        let out = device.alloc(num_rows * linear.n * size, Access::ReadWrite);
        let workspace = device.alloc(floats.max(1) * 4, Access::ReadWrite);
        let counts = device.upload(&vec![0; counters.max(1) * 4], Access::ReadWrite);
        let params = weights.into_iter().chain([bias, x, out, workspace, counts]);
        let params = params.fold(Params::default(), Params::u64).u32(num_rows as u32).u32(0);
        let result = launch(&mut device, &self.compiled, &self.variant, num_rows, &params);
        let report = result.unwrap_or_else(|fault| panic!("{}: {fault}", self.symbol()));
        assert!(report.grid_waited);
        let counts = device.read(counts, counters * 4).unwrap();
        assert!(counts.iter().all(|byte| *byte == 0), "{}: counters are left", self.symbol());
        let bytes = device.read(out, num_rows * linear.n * size).unwrap();
        let bits = match linear.has_f32_out() {
            true => to_u32(&bytes),
            false => to_u16(&bytes).into_iter().map(u32::from).collect(),
        };
        (bits, report)
    }
}

impl Linear {
    fn value(&self, bits: u32) -> f64 {
        match self.has_f32_out() {
            true => f64::from(f32::from_bits(bits)),
            false => f64::from(widen(self.rows, bits as u16)),
        }
    }

    /// Compares a kernel's outputs of the first rows.
    fn compare(&self, symbol: &str, bits: &[u32], expected: &[(f64, f64)]) {
        for (i, (bits, (value, tolerance))) in bits.iter().zip(expected).enumerate() {
            let got = self.value(*bits);
            assert!(
                (got - value).abs() <= *tolerance,
                "{symbol}: row {}, output {}: {got} instead of {value} ± {tolerance}",
                i / self.n,
                i % self.n
            );
        }
    }

    /// Runs the kernel for each number of rows: right against the loop, and the same bits for a row
    /// whatever the number of rows, its place among them, and the regime.
    pub(crate) fn check(&self, kernels: &[Kernel], row_counts: &[usize], seed: u64) {
        let rows_max = row_counts.iter().copied().max().unwrap();
        let expected = self.expected(rows_max);
        let mut all = vec![None; rows_max];
        for num_rows in row_counts {
            let kernel = kernels
                .iter()
                .find(|kernel| kernel.variant.regime == Regime::of_rows(*num_rows))
                .unwrap();
            // Some of the rows, so that they are not always at the same place.
            let first = (rows_max - num_rows) / 2;
            let (bits, report) = kernel.run(self, first..first + num_rows, seed);
            self.compare(&kernel.symbol(), &bits, &expected[first * self.n..]);
            // Rows that are not 16-byte aligned are copied by 4 bytes, four to a bank.
            let conflicts = main_loop_conflicts(&report);
            let has_none = conflicts == 0 || !self.k.is_multiple_of(8);
            assert!(has_none, "{}: {:?}", kernel.symbol(), report.shared);
            for (row, bits) in (first..).zip(bits.chunks_exact(self.n)) {
                let known = all[row].get_or_insert_with(|| bits.to_vec());
                assert_eq!(known, bits, "{}: row {row} of {num_rows}", kernel.symbol());
            }
        }
    }
}
