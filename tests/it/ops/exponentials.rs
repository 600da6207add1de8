//! `exp` and `exp2` of the vector types.

use bespoke::kernels::abi::Share;
use bespoke::kernels::simd::Simd;

use super::{Instance, instances, run};

/// Values and what became of them.
struct Values {
    inputs: Vec<f32>,
    exp: *mut f32,
    exp2: *mut f32,
}

/// # Safety
/// Both outputs hold as many values as there are inputs, a multiple of `S::LANES`.
#[inline(always)]
unsafe fn exponentials<S: Simd>(args: &Values, _share: Share) {
    for at in (0..args.inputs.len()).step_by(S::LANES) {
        // SAFETY: as the caller promises.
        unsafe {
            let x = S::load(args.inputs.as_ptr().add(at));
            S::store(args.exp.add(at), S::exp(x));
            S::store(args.exp2.add(at), S::exp2(x));
        }
    }
}

/// The largest relative error that the trait promises.
const TOLERANCE: f64 = 2e-7;

fn check(what: &str, got: f32, expected: f64) {
    let least_normal = f64::from(f32::MIN_POSITIVE);
    let got = f64::from(got);
    if expected < least_normal {
        assert!((0.0..=least_normal).contains(&got), "{what}: {got}, expected {expected}");
    } else {
        let error = (got / expected - 1.0).abs();
        // NOTE: where a result is barely normal, the factor it is multiplied with may not be.
        let may_vanish = got == 0.0 && expected < 2.0 * least_normal;
        assert!(error <= TOLERANCE || may_vanish, "{what}: {got}, expected {expected}");
    }
}

#[test]
fn exponentials_are_as_exact_as_promised() {
    // Of every range of the reduction many, and the ends.
    let mut inputs: Vec<f32> = (-3_000_000..870_000).map(|i| i as f32 / 1e4).collect();
    inputs.extend([0.0, -0.0, -105.0, -151.0, -1e30, -3.0e38, 87.9]);
    inputs.resize(inputs.len().next_multiple_of(16), 0.0);
    let found: Vec<Instance<Values>> = instances!(Values, exponentials::<S>);
    for (vectors, kernel) in found {
        let (mut exp, mut exp2) = (vec![f32::NAN; inputs.len()], vec![f32::NAN; inputs.len()]);
        let args =
            Values { inputs: inputs.clone(), exp: exp.as_mut_ptr(), exp2: exp2.as_mut_ptr() };
        run(kernel, &args, 1, 0);
        for ((x, exp), exp2) in inputs.iter().zip(exp).zip(exp2) {
            check(&format!("{vectors}, exp({x})"), exp, f64::from(*x).exp());
            check(&format!("{vectors}, exp2({x})"), exp2, f64::from(*x).exp2());
            assert!(*x != 0.0 || (exp, exp2) == (1.0, 1.0), "{vectors}: 1 of 0");
            assert!(*x > -105.0 || exp == 0.0, "{vectors}: exp({x}) is {exp}");
            assert!(*x > -151.0 || exp2 == 0.0, "{vectors}: exp2({x}) is {exp2}");
        }
    }
}
