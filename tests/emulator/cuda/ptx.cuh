// The functions of `templates/common/ptx.cuh`, on the CPU: the same names, the same results, and
// every rule that the device leaves to the programmer checked.

#pragma once
#include "emulator.hpp"
#include "number.hpp"

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i32 = int32_t;

#define DEVICE inline
#define UNROLL
#define NO_UNROLL
#define KERNEL(name, Params, threads, blocks)                                                      \
    static void name##_body(const Params& params);                                                 \
    extern "C" const emulator::Kernel* name() {                                                    \
        static const emulator::Kernel kernel = {                                                   \
            [](const void* params) { name##_body(*static_cast<const Params*>(params)); },          \
            sizeof(Params), threads};                                                              \
        return &kernel;                                                                            \
    }                                                                                              \
    static void name##_body(const Params& params)

struct alignas(8) u32x2 {
    u32 x, y;
};
struct alignas(16) u32x4 {
    u32 x, y, z, w;
};

namespace ptx {

using emulator::here;
using emulator::Site;

// --- where a thread is -------------------------------------------------------------------------

DEVICE u32 thread_idx() { return emulator::thread_idx(); }
DEVICE u32 lane_idx() { return emulator::thread_idx() % 32; }
DEVICE u32 warp_idx(Site site = here()) {
    emulator::warp_converge(site);
    return emulator::thread_idx() / 32;
}
DEVICE u32 block_idx() { return emulator::block_idx_x(); }
DEVICE u32 block_idx_y() { return emulator::block_idx_y(); }
DEVICE u32 num_blocks() { return emulator::num_blocks_x(); }

// --- bits ----------------------------------------------------------------------------------------

DEVICE float as_float(u32 bits) { return number::bit_cast<float>(bits); }
DEVICE u32 as_bits(float value) { return number::bit_cast<u32>(value); }

template <u32 TABLE> DEVICE u32 lop3(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (u32 i = 0; i < 8; i++) {
        if (TABLE >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    }
    return d;
}

DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
    u64 bytes = a | u64(b) << 32;
    u32 d = 0;
    for (u32 i = 0; i < 4; i++) {
        u32 select = selector >> (4 * i);
        u32 byte = u32(bytes >> (8 * (select & 7))) & 0xff;
        // Bit 3 asks for copies of the byte's sign.
        if (select & 8) byte = byte & 0x80 ? 0xff : 0;
        d |= byte << (8 * i);
    }
    return d;
}

// --- numbers -------------------------------------------------------------------------------------

DEVICE u32 cvt_f16x2(float first, float second) {
    return number::round_pair<number::F16>(first, second);
}
DEVICE u32 cvt_bf16x2(float first, float second) {
    return number::round_pair<number::BF16>(first, second);
}
DEVICE float cvt_f32_f16(u16 value) { return number::widen<number::F16>(value); }

DEVICE i32 cvt_rni_s32(float value) {
    if (value != value) return 0;
    if (value >= 0x1p31f) return INT32_MAX;
    if (value < -0x1p31f) return INT32_MIN;
    return i32(nearbyintf(value));
}

DEVICE float cvt_rni_f32(float value) { return nearbyintf(value); }

DEVICE float ex2(float x) { return number::flush(exp2f(number::flush(x))); }
DEVICE float lg2(float x) { return number::flush(log2f(number::flush(x))); }
DEVICE float rcp(float x) { return number::flush(1.0f / number::flush(x)); }
DEVICE float rsqrt(float x) { return number::flush(1.0f / sqrtf(number::flush(x))); }

DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float max(float a, float b) { return fmaxf(a, b); }
DEVICE float min(float a, float b) { return fminf(a, b); }
DEVICE float abs(float a) { return fabsf(a); }

DEVICE u32 add_f16x2(u32 a, u32 b) {
    return number::on_pairs<number::F16>(a, b, 0, [](double x, double y, double) { return x + y; });
}
DEVICE u32 sub_f16x2(u32 a, u32 b) {
    return number::on_pairs<number::F16>(a, b, 0, [](double x, double y, double) { return x - y; });
}
DEVICE u32 mul_f16x2(u32 a, u32 b) {
    return number::on_pairs<number::F16>(a, b, 0, [](double x, double y, double) { return x * y; });
}
DEVICE double fma_to_odd(double x, double y, double z) { return number::add_to_odd(x * y, z); }
DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
    return number::on_pairs<number::F16>(a, b, c, fma_to_odd);
}
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    return number::on_pairs<number::BF16>(a, b, c, fma_to_odd);
}

// --- threads of a warp, of a block, of a grid ----------------------------------------------------

DEVICE u32 shfl_xor(u32 value, u32 mask, Site site = here()) {
    return emulator::shuffle(value, lane_idx() ^ mask, site);
}
DEVICE u32 shfl(u32 value, u32 lane, Site site = here()) {
    return emulator::shuffle(value, lane % 32, site);
}
DEVICE float shfl_xor(float value, u32 mask, Site site = here()) {
    return as_float(shfl_xor(as_bits(value), mask, site));
}
DEVICE float shfl(float value, u32 lane, Site site = here()) {
    return as_float(shfl(as_bits(value), lane, site));
}

DEVICE bool any(bool condition, Site site = here()) { return emulator::any(condition, site); }
DEVICE void warp_sync(Site site = here()) { emulator::warp_sync(site); }
DEVICE void block_sync(Site site = here()) { emulator::block_sync(site); }
DEVICE void barrier_sync(u32 barrier, u32 num_threads, Site site = here()) {
    emulator::barrier_sync(barrier, num_threads, site);
}
DEVICE void fence_device(Site site = here()) { emulator::fence_device(site); }
DEVICE u32 atomic_add(u32* address, u32 value, Site site = here()) {
    return emulator::atomic_add(address, value, site);
}
DEVICE void grid_wait() { emulator::grid_wait(); }
DEVICE void grid_launch_dependents() { emulator::grid_launch_dependents(); }

// --- memory --------------------------------------------------------------------------------------

template <class T> DEVICE T load_from(const void* memory) {
    T value;
    memcpy(&value, memory, sizeof(T));
    return value;
}

template <class T> DEVICE T load(const T* address, Site site = here()) {
    return load_from<T>(
        emulator::global_read(address, sizeof(T), emulator::Cache::DEFAULT, site));
}
template <class T> DEVICE void store(T* address, T value, Site site = here()) {
    memcpy(emulator::global_write(address, sizeof(T), site), &value, sizeof(T));
}
template <class T> DEVICE T load_constant(const T* address, Site site = here()) {
    return load_from<T>(
        emulator::global_read(address, sizeof(T), emulator::Cache::CONSTANT, site));
}
DEVICE u32x4 load_streamed(const u32x4* address, Site site = here()) {
    return load_constant(address, site);
}

DEVICE u32 shared_base() { return emulator::SHARED_BASE; }
template <class T> DEVICE T load_shared(u32 address, Site site = here()) {
    return load_from<T>(emulator::shared_read(address, sizeof(T), site));
}
template <class T> DEVICE void store_shared(u32 address, T value, Site site = here()) {
    memcpy(emulator::shared_write(address, sizeof(T), site), &value, sizeof(T));
}

// --- asynchronous copies -------------------------------------------------------------------------

DEVICE void cp_async_16(u32 shared, const void* source, u32 bytes = 16, Site site = here()) {
    emulator::cp_async(shared, source, 16, bytes, site);
}
DEVICE void cp_async_4(u32 shared, const void* source, u32 bytes = 4, Site site = here()) {
    emulator::cp_async(shared, source, 4, bytes, site);
}
DEVICE void cp_async_commit() { emulator::cp_async_commit(); }
template <u32 PENDING> DEVICE void cp_async_wait(Site site = here()) {
    emulator::cp_async_wait(PENDING, site);
}

DEVICE void mbarrier_init(u32 barrier, u32 num_arrivals, Site site = here()) {
    emulator::mbarrier_init(barrier, num_arrivals, site);
}
DEVICE void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }
DEVICE void mbarrier_arrive(u32 barrier, Site site = here()) {
    emulator::mbarrier_arrive(barrier, 0, site);
}
DEVICE void mbarrier_arrive_expect(u32 barrier, u32 bytes, Site site = here()) {
    emulator::mbarrier_arrive(barrier, bytes, site);
}
DEVICE void mbarrier_wait(u32 barrier, u32 parity, Site site = here()) {
    emulator::mbarrier_wait(barrier, parity, site);
}
DEVICE void cp_async_bulk(u32 shared, const void* source, u32 bytes, u32 barrier,
                          Site site = here()) {
    emulator::cp_async_bulk(shared, source, bytes, barrier, site);
}

// --- matrices ------------------------------------------------------------------------------------

DEVICE void ldmatrix_x4(u32 (&d)[4], u32 address, Site site = here()) {
    emulator::ldmatrix_x4(d, address, false, site);
}
DEVICE void ldmatrix_x4_trans(u32 (&d)[4], u32 address, Site site = here()) {
    emulator::ldmatrix_x4(d, address, true, site);
}
DEVICE u32 movmatrix_trans(u32 a, Site site = here()) {
    return emulator::movmatrix_trans(a, site);
}
DEVICE void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                             Site site = here()) {
    emulator::mma_m16n8k16(d, a, b, emulator::Half::F16, site);
}
DEVICE void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                              Site site = here()) {
    emulator::mma_m16n8k16(d, a, b, emulator::Half::BF16, site);
}

}  // namespace ptx
