// One function per PTX instruction, and nothing else: the only file of the templates that contains
// inline assembly or names a CUDA built-in. The tests replace it by a file with the same functions
// that runs them on the CPU, which is why templates reach memory, threads and barriers through it
// alone: no `threadIdx`, no `__shared__`, no dereferenced device pointer.
//
// Shared memory is one dynamic array; its addresses are `u32` byte offsets as `ld.shared` takes
// them, starting at `shared_base()`. Every access is aligned to its size.
//
// Source of all semantics: NVIDIA's PTX ISA.

#pragma once
#include <stdint.h>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i32 = int32_t;

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
// The entry function of a kernel: its name, launch parameters, threads a block and the number of
// blocks that must fit on a multiprocessor.
#define KERNEL(name, Params, threads, blocks)                                                      \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                  \
        name(const __grid_constant__ Params params)

// What loads and stores move at once.
struct alignas(8) u32x2 {
    u32 x, y;
};
struct alignas(16) u32x4 {
    u32 x, y, z, w;
};

namespace ptx {

// --- where a thread is -------------------------------------------------------------------------

DEVICE u32 thread_idx() { return threadIdx.x; }
DEVICE u32 lane_idx() { return threadIdx.x & 31; }
// The same in all lanes, and known to be so by the compiler.
DEVICE u32 warp_idx() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }
DEVICE u32 block_idx() { return blockIdx.x; }
DEVICE u32 block_idx_y() { return blockIdx.y; }
DEVICE u32 num_blocks() { return gridDim.x; }

// --- bits ----------------------------------------------------------------------------------------

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float value) { return __float_as_uint(value); }

template <u32 TABLE> DEVICE u32 lop3(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return d;
}

DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

// --- numbers -------------------------------------------------------------------------------------

// Round to nearest even; `first` in the low half.
DEVICE u32 cvt_f16x2(float first, float second) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(second), "f"(first));
    return d;
}

DEVICE u32 cvt_bf16x2(float first, float second) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(second), "f"(first));
    return d;
}

DEVICE float cvt_f32_f16(u16 value) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(value));
    return d;
}

// Round to nearest even.
DEVICE i32 cvt_rni_s32(float value) {
    i32 d;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(d) : "f"(value));
    return d;
}

// To the nearest integer, ties to even.
DEVICE float cvt_rni_f32(float value) {
    float d;
    asm("cvt.rni.f32.f32 %0, %1;" : "=f"(d) : "f"(value));
    return d;
}

DEVICE float ex2(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

DEVICE float lg2(float x) {
    float d;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

DEVICE float rcp(float x) {
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

DEVICE float rsqrt(float x) {
    float d;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float max(float a, float b) { return fmaxf(a, b); }
DEVICE float min(float a, float b) { return fminf(a, b); }
DEVICE float abs(float a) { return fabsf(a); }

// Arithmetic on pairs.
DEVICE u32 add_f16x2(u32 a, u32 b) {
    u32 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

DEVICE u32 sub_f16x2(u32 a, u32 b) {
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

DEVICE u32 mul_f16x2(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// The only bfloat16 arithmetic that sm_80 has.
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// --- threads of a warp, of a block, of a grid ----------------------------------------------------

DEVICE u32 shfl_xor(u32 value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE u32 shfl(u32 value, u32 lane) { return __shfl_sync(0xffffffffu, value, lane); }
DEVICE float shfl_xor(float value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE float shfl(float value, u32 lane) { return __shfl_sync(0xffffffffu, value, lane); }

// Whether `condition` holds in any lane.
DEVICE bool any(bool condition) { return __any_sync(0xffffffffu, condition); }

DEVICE void warp_sync() { __syncwarp(); }
// All threads of the block.
DEVICE void block_sync() { __syncthreads(); }
// `num_threads` threads of the block, whole warps; barrier 0 is `block_sync`'s.
DEVICE void barrier_sync(u32 barrier, u32 num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// Orders this thread's accesses to global memory before and after it, for the whole device.
DEVICE void fence_device() { __threadfence(); }
// Returns the old value.
DEVICE u32 atomic_add(u32* address, u32 value) { return atomicAdd(address, value); }

// Programmatic dependent launch: until `grid_wait`, what earlier kernels wrote must not be read;
// after `grid_launch_dependents` in all blocks, the next kernel may start. No-ops below sm_90.
DEVICE void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- memory --------------------------------------------------------------------------------------

// T is u8, u16, u32, u64, i32, float, u32x2 or u32x4.

template <class T> DEVICE T load(const T* address) { return *address; }
template <class T> DEVICE void store(T* address, T value) { *address = value; }

// What no thread writes while the kernel runs.
template <class T> DEVICE T load_constant(const T* address) {
    if constexpr (sizeof(T) == 16) {
        uint4 v = __ldg(reinterpret_cast<const uint4*>(address));
        return T{v.x, v.y, v.z, v.w};
    } else if constexpr (sizeof(T) == 8 && __is_class(T)) {
        uint2 v = __ldg(reinterpret_cast<const uint2*>(address));
        return T{v.x, v.y};
    } else {
        return __ldg(address);
    }
}

// As `load_constant`, 16 bytes that are read once: kept out of L1, first to leave L2.
DEVICE u32x4 load_streamed(const u32x4* address) {
    u32x4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

DEVICE u32 shared_base() {
    extern __shared__ __align__(1024) u8 shared_memory[];
    return u32(__cvta_generic_to_shared(shared_memory));
}

template <class T> DEVICE T load_shared(u32 address) {
    return *reinterpret_cast<const T*>(__cvta_shared_to_generic(address));
}

template <class T> DEVICE void store_shared(u32 address, T value) {
    *reinterpret_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

// --- asynchronous copies, global → shared, per thread --------------------------------------------

// 16 bytes, past L1. Where `bytes` is less, the rest of the 16 becomes zero; 0 reads nothing, but
// `source` must be a valid address.
DEVICE void cp_async_16(u32 shared, const void* source, u32 bytes = 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared),
                 "l"(source), "r"(bytes)
                 : "memory");
}

// 4 bytes.
DEVICE void cp_async_4(u32 shared, const void* source, u32 bytes = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(source),
                 "r"(bytes)
                 : "memory");
}

// Closes the group of copies issued since the last commit.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the `PENDING` latest groups of this thread are under way. Other threads see
// the data after a barrier.
template <u32 PENDING> DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- asynchronous bulk copies, sm_90 and later ---------------------------------------------------

// An mbarrier is 8 bytes of shared memory.
DEVICE void mbarrier_init(u32 barrier, u32 num_arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

// Makes inits visible to the asynchronous copies.
DEVICE void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier)
                 : "memory");
}

// Arrives, and makes the phase wait for `bytes` more bytes of bulk copies.
DEVICE void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(
                     barrier),
                 "r"(bytes)
                 : "memory");
#endif
}

// Waits for the end of the phase of this parity (0 for the first, 1 for the second, 0, …).
DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#endif
}

// `bytes`, a multiple of 16, from a 16-byte aligned address, announced to `barrier`.
DEVICE void cp_async_bulk(u32 shared, const void* source, u32 bytes, u32 barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(source), "r"(bytes), "r"(barrier)
                 : "memory");
#endif
}

// --- matrices ------------------------------------------------------------------------------------

// Four 8×8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
// Register j of lane i holds elements 2 (i % 4) and + 1 of row i / 4 of matrix j.
DEVICE void ldmatrix_x4(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// The matrices transposed.
DEVICE void ldmatrix_x4_trans(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// An 8×8 matrix of 16-bit elements, lane i holding elements 2 (i % 4) and + 1 of row i / 4,
// transposed.
DEVICE u32 movmatrix_trans(u32 a) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// d += a · b with a [16, 16], b [16, 8], d [16, 8]. With g = lane / 4 and t = lane % 4:
//   a: rows g, g + 8, g, g + 8 and columns 2t, + 1 (registers 0, 1) and 2t + 8, + 9 (2, 3)
//   b: rows 2t, + 1 (register 0) and 2t + 8, + 9 (1) of column g
//   d: columns 2t, + 1 of row g (0, 1) and of row g + 8 (2, 3)
DEVICE void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace ptx
