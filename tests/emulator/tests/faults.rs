//! Planted faults: each small kernel breaks one rule, and its correct twin breaks none.

use bespoke_emulator::{
    Access, Emulator, Fault, FaultKind, Launch, Library, Report, Source, compile,
};

use crate::common::{Params, emulator, to_u32, upload};

const PRELUDE: &str = r#"
#include "types.cuh"
struct Params {
    const u32* in;    // [1024], of the kernel before
    u32* out;         // [128]
    u32* counter;     // [1], 0
    u32 n;            // 128
    u32 pad;
};
using namespace ptx;
"#;

/// A kernel whose `@` is `correct` in one and `broken` in the other. Blocks of 64 threads, two of
/// them; shared memory of 4096 bytes.
struct Case {
    name: &'static str,
    body: &'static str,
    correct: &'static str,
    broken: &'static str,
    /// Which of them it is depends on the order of the threads.
    faults: &'static [FaultKind],
}

/// `t`: the thread, `base`: shared memory, `me`: the thread in the grid.
const START: &str = "
    u32 t = thread_idx(), base = shared_base(), me = block_idx() * 64 + t;
    (void)t, (void)base, (void)me;
";

const CASES: &[Case] = &[
    Case {
        name: "copy_wait",
        body: "grid_wait();
               cp_async_16(base + t * 16, params.in + t * 4);
               cp_async_commit();
               @
               store(params.out + me, load_shared<u32>(base + t * 16));
               cp_async_wait<0>();",
        correct: "cp_async_wait<0>();",
        broken: "",
        faults: &[FaultKind::NotAwaited],
    },
    Case {
        name: "copy_wait_one_group_too_few",
        body: "grid_wait();
               cp_async_4(base + t * 4, params.in + t);
               cp_async_commit();
               cp_async_4(base + 1024 + t * 4, params.in + t);
               cp_async_commit();
               cp_async_wait<@>();
               store(params.out + me, load_shared<u32>(base + 1024 + t * 4));
               cp_async_wait<0>();",
        correct: "0",
        broken: "1",
        faults: &[FaultKind::NotAwaited],
    },
    Case {
        name: "copy_barrier_after_wait",
        body: "grid_wait();
               cp_async_16(base + t * 16, params.in + t * 4);
               cp_async_commit();
               cp_async_wait<0>();
               @
               store(params.out + me, load_shared<u32>(base + (t ^ 32) * 16));",
        correct: "block_sync();",
        broken: "",
        faults: &[FaultKind::Race, FaultKind::Uninitialized, FaultKind::NotAwaited],
    },
    Case {
        name: "copy_barrier_before_wait",
        body: "grid_wait();
               cp_async_16(base + t * 16, params.in + t * 4);
               cp_async_commit();
               @
               store(params.out + me, load_shared<u32>(base + (t ^ 32) * 16));",
        correct: "cp_async_wait<0>(); block_sync();",
        broken: "block_sync(); cp_async_wait<0>();",
        faults: &[FaultKind::Race, FaultKind::NotAwaited, FaultKind::Uninitialized],
    },
    Case {
        name: "copy_into_what_others_read",
        body: "grid_wait();
               store_shared(base + t * 4, t);
               block_sync();
               u32 value = load_shared<u32>(base + (t ^ 32) * 4);
               @
               cp_async_4(base + t * 4, params.in + t);
               cp_async_commit();
               cp_async_wait<0>();
               store(params.out + me, value + load_shared<u32>(base + t * 4));",
        correct: "block_sync();",
        broken: "",
        faults: &[FaultKind::Race],
    },
    Case {
        name: "copy_at_exit",
        body: "grid_wait();
               cp_async_16(base + t * 16, params.in + t * 4);
               cp_async_commit();
               @",
        correct: "cp_async_wait<0>();",
        broken: "",
        faults: &[FaultKind::NotAwaited],
    },
    Case {
        name: "write_read",
        body: "grid_wait();
               store_shared(base + t * 4, t);
               @
               store(params.out + me, load_shared<u32>(base + (63 - t) * 4));",
        correct: "block_sync();",
        broken: "",
        faults: &[FaultKind::Race, FaultKind::Uninitialized],
    },
    Case {
        name: "write_read_16_bits",
        body: "grid_wait();
               store_shared(base + t * 2, u16(t));
               @
               store(params.out + me, u32(load_shared<u16>(base + (63 - t) * 2)));",
        correct: "block_sync();",
        broken: "warp_sync();",
        faults: &[FaultKind::Race, FaultKind::Uninitialized],
    },
    Case {
        name: "read_write",
        body: "grid_wait();
               store_shared(base + t * 4, t);
               block_sync();
               store(params.out + me, load_shared<u32>(base + (63 - t) * 4));
               @
               store_shared(base + t * 4, t + 1);",
        correct: "block_sync();",
        broken: "",
        faults: &[FaultKind::Race],
    },
    Case {
        name: "named_barrier",
        body: "grid_wait();
               store_shared(base + t * 4, t);
               @
               store(params.out + me, load_shared<u32>(base + (63 - t) * 4));",
        correct: "barrier_sync(1, 64);",
        broken: "barrier_sync(1 + t / 32, 32);",
        faults: &[FaultKind::Race, FaultKind::Uninitialized],
    },
    Case {
        name: "lanes",
        body: "grid_wait();
               store_shared(base + t * 4, t);
               @
               store(params.out + me, load_shared<u32>(base + (t ^ 1) * 4));",
        correct: "warp_sync();",
        broken: "shfl_xor(t, 1);",
        faults: &[FaultKind::Race, FaultKind::Uninitialized],
    },
    Case {
        name: "ldmatrix_rows",
        body: "grid_wait();
               store_shared(base + t * 16, u32x4{t, t, t, t});
               @
               u32 d[4];
               ldmatrix_x4(d, base + t * 16);
               store(params.out + me, d[0]);",
        correct: "warp_sync();",
        broken: "",
        faults: &[FaultKind::Race, FaultKind::Uninitialized],
    },
    Case {
        name: "tail_store",
        body: "grid_wait();
               for (u32 i = me; i @ params.n; i += 128) store(params.out + i, i);",
        correct: "<",
        broken: "<=",
        faults: &[FaultKind::OutOfBounds],
    },
    Case {
        name: "before_the_start",
        body: "grid_wait();
               store(params.out + me, load(params.in + i32(me) - @));",
        correct: "0",
        broken: "1",
        faults: &[FaultKind::OutOfBounds],
    },
    Case {
        name: "shared_size",
        body: "store_shared(base + t * 4 + @, t);",
        correct: "3840",
        broken: "3844",
        faults: &[FaultKind::OutOfBounds],
    },
    Case {
        name: "alignment",
        body: "grid_wait();
               u32x4 v = load(reinterpret_cast<const u32x4*>(params.in + t * 4 + @));
               store(params.out + me, v.x);",
        correct: "4",
        broken: "2",
        faults: &[FaultKind::Misaligned],
    },
    Case {
        name: "shared_alignment",
        body: "store_shared(base + t * 16 + @, u32x2{t, t});",
        correct: "8",
        broken: "4",
        faults: &[FaultKind::Misaligned],
    },
    Case {
        name: "read_only",
        body: "grid_wait();
               store(@ + me, t);",
        correct: "params.out",
        broken: "const_cast<u32*>(params.in)",
        faults: &[FaultKind::ReadOnly],
    },
    Case {
        name: "uninitialized_shared",
        body: "grid_wait();
               if (t < @) store_shared(base + t * 4, t);
               block_sync();
               store(params.out + me, load_shared<u32>(base + t * 4));",
        correct: "64",
        broken: "63",
        faults: &[FaultKind::Uninitialized],
    },
    Case {
        name: "uninitialized_global",
        body: "grid_wait();
               @
               store(params.out + me, load(params.out + me) + 1);",
        correct: "store(params.out + me, t);",
        broken: "",
        faults: &[FaultKind::Uninitialized],
    },
    Case {
        name: "grid_wait",
        body: "@
               store(params.out + me, load(params.in + t));",
        correct: "grid_wait();",
        broken: "",
        faults: &[FaultKind::BeforeGridWait],
    },
    Case {
        name: "grid_wait_of_one_thread",
        body: "if (t == 0) grid_wait();
               @
               store(params.out + me, load(params.in + t));",
        correct: "block_sync();",
        broken: "",
        faults: &[FaultKind::BeforeGridWait],
    },
    Case {
        name: "blocks_write_one_word",
        body: "grid_wait();
               store(params.out + @, t);",
        correct: "me",
        broken: "t",
        faults: &[FaultKind::Race],
    },
    Case {
        name: "last_block",
        body: "grid_wait();
               store(params.out + me, me);
               @
               block_sync();
               if (t == 0) {
                   u32 before = atomic_add(params.counter, 1);
                   fence_device();
                   store_shared(base, before);
               }
               block_sync();
               if (load_shared<u32>(base) == 1) {
                   u32 other = load(params.out + (me ^ 64));
                   block_sync();
                   store(params.out + (me ^ 64), other + 1);
               }",
        correct: "fence_device();",
        broken: "",
        faults: &[FaultKind::Race],
    },
    Case {
        name: "last_block_of_one_thread",
        body: "grid_wait();
               store(params.out + me, me);
               block_sync();
               if (t == 0) {
                   fence_device();
                   u32 before = atomic_add(params.counter, 1);
                   @
                   store_shared(base, before);
                   if (before == 1) store(params.counter, 0u);
               }
               block_sync();
               if (load_shared<u32>(base) == 1) load(params.out + (me ^ 64));",
        correct: "fence_device();",
        broken: "",
        faults: &[FaultKind::Race],
    },
    Case {
        name: "unequal_barriers",
        body: "block_sync();
               if (@) block_sync();",
        correct: "true",
        broken: "warp_idx() == 0",
        faults: &[FaultKind::Deadlock],
    },
    Case {
        name: "barrier_counts",
        body: "barrier_sync(1, t < 32 ? 64 : @);",
        correct: "64",
        broken: "32",
        faults: &[FaultKind::Barrier],
    },
    Case {
        name: "divergent_shuffle",
        body: "u32 value = t;
               if (@) value = shfl(value, 3);
               store_shared(base + t * 4, value);
               warp_sync();",
        correct: "true",
        broken: "t % 32 < 16",
        faults: &[FaultKind::Divergent],
    },
    Case {
        name: "return_before_a_collective",
        body: "if (t >= @) return;
               shfl_xor(t, 1);",
        correct: "32",
        broken: "40",
        faults: &[FaultKind::Divergent],
    },
];

/// One bulk copy, and the wait for it or not.
const BULK_EXIT: &str = "
    if (t == 0) {
        mbarrier_init(base, 1);
        fence_mbarrier_init();
    }
    grid_wait();
    block_sync();
    if (t == 0) {
        mbarrier_arrive_expect(base, 1024);
        cp_async_bulk(base + 1024, params.in, 1024, base);
    }
    [exit]
";

const BULK_EXITS: &[(&str, Option<FaultKind>)] = &[
    ("mbarrier_wait(base, 0);", None),
    // The thread that copies does not wait.
    ("if (t == 40) mbarrier_wait(base, 0);", None),
    ("if (t >= 32) mbarrier_wait(base, 0);", None),
    ("", Some(FaultKind::NotAwaited)),
    ("mbarrier_wait(base, 1);", Some(FaultKind::NotAwaited)),
    (
        "mbarrier_wait(base, 0); block_sync(); if (t == 0) mbarrier_arrive_expect(base, 16);",
        Some(FaultKind::Mbarrier),
    ),
    (
        "mbarrier_wait(base, 0);
         block_sync();
         if (t == 0) {
             mbarrier_arrive_expect(base, 16);
             mbarrier_arrive(base);
         }",
        Some(FaultKind::Mbarrier),
    ),
];

/// Two stages of bulk copies: `full` at `base`, `empty` at `base + 8`, data at `base + 1024`.
const BULK: &str = "
    u32 full = base, empty = base + 8, data = base + 1024;
    if (t == 0) {
        mbarrier_init(full, 1);
        mbarrier_init(empty, 2);
        [init]
    }
    [sync]
    grid_wait();
    u32 sum = 0;
    for (u32 i = 0; i < 4; i++) {
        if (t == 0) {
            if (i > 0) { [empty] }
            mbarrier_arrive_expect(full, [bytes]);
            cp_async_bulk(data, params.in + i * 256, 1024, full);
        }
        [full]
        sum += load_shared<u32>(data + (t ^ 32) * 4);
        [lanes]
        if (t % 32 == 0) mbarrier_arrive(empty);
    }
    store(params.out + me, sum);
";

/// Part of `BULK`, what replaces it, the fault.
const BULK_PARTS: &[(&str, &str)] = &[
    ("init", "fence_mbarrier_init();"),
    ("sync", "block_sync();"),
    ("empty", "mbarrier_wait(empty, (i - 1) % 2);"),
    ("bytes", "1024"),
    ("full", "mbarrier_wait(full, i % 2);"),
    ("lanes", "warp_sync();"),
];

const BULK_FAULTS: &[(&str, &str, &[FaultKind])] = &[
    ("init", "", &[FaultKind::Mbarrier]),
    // Used before the init, or without an order after it.
    ("sync", "", &[FaultKind::Mbarrier, FaultKind::Race]),
    ("empty", "", &[FaultKind::Race, FaultKind::NotAwaited, FaultKind::Deadlock]),
    (
        "empty",
        "mbarrier_wait(empty, i % 2);",
        &[FaultKind::Race, FaultKind::NotAwaited, FaultKind::Deadlock],
    ),
    ("bytes", "2048", &[FaultKind::Deadlock]),
    ("bytes", "512", &[FaultKind::Deadlock]),
    // Before the copy was issued, nothing was ever there.
    ("full", "", &[FaultKind::NotAwaited, FaultKind::Uninitialized]),
    ("full", "mbarrier_wait(full, 1);", &[FaultKind::NotAwaited, FaultKind::Uninitialized]),
    (
        "full",
        "if (t % 32 == 0) mbarrier_wait(full, i % 2);",
        &[FaultKind::NotAwaited, FaultKind::Uninitialized, FaultKind::Race],
    ),
    ("lanes", "", &[FaultKind::Race]),
    (
        "lanes",
        "warp_sync(); mbarrier_arrive(empty);",
        &[FaultKind::Mbarrier, FaultKind::Race, FaultKind::Deadlock],
    ),
];

fn kernel(name: &str, body: &str) -> String {
    format!("KERNEL({name}, Params, 64, 1) {{ {START} {body} }}\n")
}

fn bulk_kernel(name: &str, replaced: &str, by: &str) -> String {
    let mut body = BULK.to_string();
    for (part, text) in BULK_PARTS {
        body = body.replace(&format!("[{part}]"), if *part == replaced { by } else { text });
    }
    kernel(name, &body)
}

fn compile_all(kernels: &[(String, String)]) -> Library {
    let text: String = kernels.iter().map(|(_, text)| text.as_str()).collect();
    let text = format!("{PRELUDE}{text}");
    let sources: Vec<Source> =
        kernels.iter().map(|(name, _)| Source::new(name, text.as_str())).collect();
    compile(&sources).unwrap_or_else(|e| panic!("{e}"))
}

fn device(seed: u64) -> (Emulator, Params) {
    let mut device = emulator(seed);
    let values: Vec<u32> = (0..1024).collect();
    let input = upload(&mut device, &values, Access::ReadOnly);
    let out = device.alloc(128 * 4, Access::ReadWrite);
    let counter = upload(&mut device, &[0_u32], Access::ReadWrite);
    (device, Params::default().u64(input).u64(out).u64(counter).u32(128).u32(0))
}

fn run(library: &Library, symbol: &str, seed: u64) -> Result<Report, Fault> {
    let (mut device, params) = device(seed);
    let launch = Launch { grid: [2, 1], block: 64, shared_bytes: 4096 };
    device.launch(library, symbol, launch, &params.0)
}

#[test]
fn each_is_found_and_its_twin_passes() {
    let mut kernels = Vec::new();
    for Case { name, body, correct, broken, .. } in CASES {
        let good = format!("{name}_correct");
        let bad = format!("{name}_broken");
        kernels.push((good.clone(), kernel(&good, &body.replace('@', correct))));
        kernels.push((bad.clone(), kernel(&bad, &body.replace('@', broken))));
    }
    let library = compile_all(&kernels);
    let mut wrong = Vec::new();
    for case in CASES {
        for seed in 0..20 {
            if let Err(fault) = run(&library, &format!("{}_correct", case.name), seed) {
                wrong.push(format!("{}, seed {seed}, correct: {fault}", case.name));
                break;
            }
            match run(&library, &format!("{}_broken", case.name), seed) {
                Ok(_) => wrong.push(format!("{}, seed {seed}: not found", case.name)),
                Err(fault) if case.faults.contains(&fault.kind) => continue,
                Err(fault) => wrong.push(format!("{}, seed {seed}: {fault}", case.name)),
            }
            break;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn bulk_copies() {
    let mut kernels = vec![("bulk".to_string(), bulk_kernel("bulk", "", ""))];
    for (i, (part, by, _)) in BULK_FAULTS.iter().enumerate() {
        let name = format!("bulk_{i}");
        kernels.push((name.clone(), bulk_kernel(&name, part, by)));
    }
    let library = compile_all(&kernels);
    let mut wrong = Vec::new();
    for seed in 0..20 {
        let (mut device, params) = device(seed);
        let launch = Launch { grid: [1, 1], block: 64, shared_bytes: 4096 };
        if let Err(fault) = device.launch(&library, "bulk", launch, &params.0) {
            panic!("seed {seed}: {fault}");
        }
        let out = u64::from_le_bytes(params.0[8..16].try_into().unwrap());
        let sums = to_u32(&device.read(out, 64 * 4).unwrap());
        for (t, sum) in sums.iter().enumerate() {
            assert_eq!(*sum as usize, (t ^ 32) * 4 + 256 * 6);
        }
        for (i, (part, by, kinds)) in BULK_FAULTS.iter().enumerate() {
            match run(&library, &format!("bulk_{i}"), seed) {
                Ok(_) => wrong.push(format!("[{part}] = {by:?}, seed {seed}: not found")),
                Err(fault) if kinds.contains(&fault.kind) => {}
                Err(fault) => wrong.push(format!("[{part}] = {by:?}, seed {seed}: {fault}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn bulk_copies_at_the_end_of_a_block() {
    let kernels: Vec<(String, String)> = BULK_EXITS
        .iter()
        .enumerate()
        .map(|(i, (exit, _))| {
            let name = format!("bulk_exit_{i}");
            (name.clone(), kernel(&name, &BULK_EXIT.replace("[exit]", exit)))
        })
        .collect();
    let library = compile_all(&kernels);
    for seed in 0..20 {
        for (i, (exit, expected)) in BULK_EXITS.iter().enumerate() {
            let result = run(&library, &format!("bulk_exit_{i}"), seed);
            let found = result.as_ref().err().map(|fault| fault.kind);
            assert_eq!(found, *expected, "{exit:?}, seed {seed}: {result:?}");
        }
    }
}

#[test]
fn a_report_says_where_and_who() {
    let body = "store_shared(base + t * 4, t);
                warp_sync();
                store_shared(base + (t ^ 32) * 4, t);";
    let library = compile_all(&[("told".into(), kernel("told", body))]);
    let fault = run(&library, "told", 1).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Race);
    for part in [
        "write of 4 bytes at shared offset ",
        "write by thread",
        "source:",
        "in told, block (",
        "thread ",
    ] {
        assert!(fault.message.contains(part), "{part:?} is missing in: {fault}");
    }
}

#[test]
fn memory_that_was_freed() {
    let library = compile_all(&[(
        "freed".into(),
        kernel("freed", "grid_wait(); store(params.out + me, load(params.in + t));"),
    )]);
    let (mut device, params) = device(1);
    device.free(u64::from_le_bytes(params.0[..8].try_into().unwrap()));
    let launch = Launch { grid: [2, 1], block: 64, shared_bytes: 0 };
    let fault = device.launch(&library, "freed", launch, &params.0).unwrap_err();
    assert_eq!(fault.kind, FaultKind::OutOfBounds, "{fault}");
}

#[test]
fn launches_that_a_driver_refuses() {
    let library = compile_all(&[("nothing".into(), kernel("nothing", ""))]);
    let (mut device, params) = device(1);
    let good = Launch { grid: [1, 1], block: 64, shared_bytes: 0 };
    assert!(device.launch(&library, "nothing", good, &params.0).is_ok());
    for (launch, bytes) in [
        (Launch { block: 96, ..good }, 32),
        (Launch { block: 33, ..good }, 32),
        (Launch { grid: [0, 1], ..good }, 32),
        (Launch { shared_bytes: 300_000, ..good }, 32),
        (good, 24),
    ] {
        let fault = device.launch(&library, "nothing", launch, &params.0[..bytes]).unwrap_err();
        assert_eq!(fault.kind, FaultKind::Launch, "{fault}");
    }
    let fault = device.launch(&library, "unknown", good, &params.0).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Launch, "{fault}");
    let error = compile(&[Source::new("broken", "KERNEL(broken, int, 32, 1) { syntax error }")]);
    assert!(error.unwrap_err().to_string().contains("error"));
}
