//! `silu_and_mul` against a plain loop.

use bespoke_emulator::{Access, Launch};

use crate::common::{Params, ROWS, Random, Rows, SEEDS, emulator, library, to_u16, upload};

const THREADS: u32 = 128;

fn source(rows: Rows, intermediate: usize) -> String {
    let rows = rows.cuda();
    format!(
        "#include \"silu_and_mul/silu_and_mul.cuh\"
struct Constants {{
    using Rows = {rows};
    static constexpr u32 INTERMEDIATE = {intermediate};
    static constexpr u32 THREADS = {THREADS};
}};
KERNEL(kernel, SiluAndMulParams, {THREADS}, 1) {{
    silu_and_mul::Kernel<Constants>::run(params);
}}
"
    )
}

fn check(rows: Rows, intermediate: usize, num_rows: usize, num_blocks: u32) {
    let library = library("kernel", source(rows, intermediate));
    for seed in SEEDS {
        let mut random = Random(seed);
        let values = random.floats(num_rows * 2 * intermediate, 8.0);
        let x: Vec<u16> = values.iter().map(|&v| rows.round(v)).collect();
        let mut device = emulator(seed);
        let gate_up = upload(&mut device, &x, Access::ReadOnly);
        let out = device.alloc(num_rows * intermediate * 2, Access::ReadWrite);
        let params = Params::default().u64(gate_up).u64(out).u32(num_rows as u32).u32(0);
        let launch = Launch { grid: [num_blocks, 1], block: THREADS, shared_bytes: 0 };
        let result = device.launch(&library, "kernel", launch, &params.0);
        let report = result.unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        assert!(report.grid_waited);
        let got = to_u16(&device.read(out, num_rows * intermediate * 2).unwrap());
        for (i, &bits) in got.iter().enumerate() {
            let (row, col) = (i / intermediate, i % intermediate);
            let gate = f64::from(rows.widen(x[row * 2 * intermediate + col]));
            let up = f64::from(rows.widen(x[(row * 2 + 1) * intermediate + col]));
            let expected = (gate / (1.0 + (-gate).exp()) * up) as f32;
            let error = (rows.widen(bits) - expected).abs();
            assert!(
                error <= expected.abs() * rows.epsilon() + 1e-6,
                "{rows:?} {row} {col}: {} instead of {expected}",
                rows.widen(bits)
            );
        }
    }
}

#[test]
fn equals_a_plain_loop() {
    for rows in ROWS {
        for (intermediate, num_rows, num_blocks) in [(1536, 3, 4), (64, 1, 1), (96, 17, 2)] {
            check(rows, intermediate, num_rows, num_blocks);
        }
        // What 16 bytes do not divide.
        for (intermediate, num_rows, num_blocks) in [(2, 5, 2), (86, 3, 3), (172, 1, 1)] {
            check(rows, intermediate, num_rows, num_blocks);
        }
    }
}
