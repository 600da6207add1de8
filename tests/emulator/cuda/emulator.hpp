// What an emulated kernel calls. Each function checks the access or the synchronization, reports a
// fault where the kernel breaks a rule, and otherwise does what the device would do.

#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emulator {

// A place in the kernel's source.
struct Site {
    const char* file;
    uint32_t line;
};

// As a default argument: the place of the call.
constexpr Site here(const char* file = __builtin_FILE(), uint32_t line = __builtin_LINE()) {
    return {file, line};
}

// What an emulated library exports for one kernel.
struct Kernel {
    void (*run)(const void* params);
    uint32_t num_param_bytes;
    uint32_t num_threads;
};

// --- threads -------------------------------------------------------------------------------------

uint32_t thread_idx();
uint32_t block_idx_x();
uint32_t block_idx_y();
uint32_t num_blocks_x();

// Collectives: all 32 lanes of the warp, at the same place of the source.
void warp_sync(Site site);
void warp_converge(Site site);
uint32_t shuffle(uint32_t value, uint32_t source_lane, Site site);
bool any(bool condition, Site site);
// All of `num_threads` threads, whole warps.
void barrier_sync(uint32_t barrier, uint32_t num_threads, Site site);
void block_sync(Site site);

void fence_device(Site site);
uint32_t atomic_add(uint32_t* address, uint32_t value, Site site);
void grid_wait();
void grid_launch_dependents();

// --- memory --------------------------------------------------------------------------------------

enum class Cache { DEFAULT, CONSTANT };

// Where the bytes are, in the memory of this machine.
const void* global_read(const void* address, uint32_t size, Cache cache, Site site);
void* global_write(void* address, uint32_t size, Site site);
constexpr uint32_t SHARED_BASE = 1024;
const void* shared_read(uint32_t address, uint32_t size, Site site);
void* shared_write(uint32_t address, uint32_t size, Site site);

// --- asynchronous copies -------------------------------------------------------------------------

void cp_async(uint32_t shared, const void* source, uint32_t size, uint32_t bytes, Site site);
void cp_async_commit();
void cp_async_wait(uint32_t num_pending, Site site);

void mbarrier_init(uint32_t barrier, uint32_t num_arrivals, Site site);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes, Site site);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Site site);
void cp_async_bulk(uint32_t shared, const void* source, uint32_t bytes, uint32_t barrier,
                   Site site);

// --- matrices ------------------------------------------------------------------------------------

void ldmatrix_x4(uint32_t* d, uint32_t address, bool transposed, Site site);
uint32_t movmatrix_trans(uint32_t a, Site site);
enum class Half { F16, BF16 };
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Half half, Site site);

}  // namespace emulator
