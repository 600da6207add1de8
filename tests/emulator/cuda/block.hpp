// A block that runs: its threads as fibers, its barriers, its shared memory, and the launch it
// belongs to.
//
// Fibers give way only where they wait. Which warp goes on, and which of its lanes, is drawn from
// the seed.

#pragma once
#include <stdio.h>

#include <map>
#include <string>

#include "fiber.hpp"
#include "memory.hpp"
#include "report.hpp"

namespace emulator {

class Random {
public:
    explicit Random(uint64_t seed) : state(seed) {}
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    // One of the bits of `mask`, which is not 0.
    uint32_t bit_of(uint32_t mask) {
        uint32_t turn = next() % 32;
        uint32_t turned = turn ? mask >> turn | mask << (32 - turn) : mask;
        return (uint32_t(__builtin_ctz(turned)) + turn) % 32;
    }
    template <class T> void shuffle(std::vector<T>& items) {
        for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[next() % i]);
    }

private:
    uint64_t state;
};

enum class Wait { NONE, COLLECTIVE, BARRIER, MBARRIER };

// A copy of 4 or 16 bytes under way, by one thread.
struct Copy {
    uint32_t shared;
    const void* source;
    uint32_t size, bytes;
    uint16_t place;
};

struct Thread {
    Context context;
    uint32_t index = 0;
    bool exited = false;
    // What it waits for, and where.
    Wait wait = Wait::NONE;
    uint32_t wait_id = 0;
    uint32_t wait_parity = 0;
    Site site = {"", 0};
    // Its part of a collective.
    const void* operands = nullptr;

    Tick tick = 0;
    // The warp's, or `own` since it learned something alone.
    Clock* clock = nullptr;
    Clock own;
    bool grid_waited = false;
    // Releases that its atomics saw since its last fence.
    std::vector<uint32_t> observed;

    // Copies under way in the order of issue, and how many each committed group has.
    std::vector<Copy> copies;
    std::vector<size_t> groups;
    size_t num_committed = 0;
};

struct Warp {
    Clock clock;
    // Lanes that can go on, that have come to the collective, that have ended.
    uint32_t ready = 0, arrived = 0, exited = 0;
    const char* operation = nullptr;
    Site site = {"", 0};
    BankCounter banks;
};

struct Barrier {
    uint32_t expected = 0;
    uint32_t warps = 0;
    uint32_t num_arrived = 0;
};

struct BulkCopy {
    uint32_t shared;
    const void* source;
    uint32_t bytes;
    uint16_t place;
};

struct Mbarrier {
    uint32_t address;
    uint32_t num_arrivals;
    int32_t pending;
    int64_t num_bytes = 0;
    uint32_t phase = 0;
    bool fenced = false;
    uint32_t initializer;
    Stamp init;
    // Of the phase that runs, and of the one before.
    Clock arriving, completed;
    std::vector<BulkCopy> copies;
};

// An atomic, and what it lets others know of its block: what fences published before it.
struct Release {
    Tick base;
    Coverage published;
    uint32_t thread;
    Tick tick;
};

struct Grid {
    uint32_t x, y;
};

struct SharedMemory {
    std::vector<uint8_t> bytes;
    std::vector<uint8_t> states;
    Cells cells;
};

// All that a launch and its blocks share.
struct Launch {
    const char* symbol;
    const Kernel* kernel;
    const void* params;
    Grid grid;
    GlobalMemory* memory;
    Random* random;
    Stacks* stacks;
    Tick base;
    Places places;
    std::vector<Release> releases;
    // Releases by the counter they went through.
    std::map<uint64_t, std::vector<uint32_t>> chains;
    std::vector<SharedAccesses> accesses;
    bool grid_waited = false;
    bool dependents_launched = false;
    uint64_t num_mma = 0;
    Fault fault = Fault::NONE;
    std::string message;

    void add_passes(uint16_t place, Passes passes) {
        if (accesses.size() < places.size()) accesses.resize(places.size(), {nullptr, 0, 0, 0});
        Site site = places.site(place);
        accesses[place].file = site.file;
        accesses[place].line = site.line;
        accesses[place].num_passes += passes.taken;
        accesses[place].num_passes_min += passes.least;
    }
};

class Block {
public:
    Launch& launch;
    uint32_t x = 0, y = 0;
    Tick base = 0, max_tick = 0;
    uint32_t num_threads, num_warps;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[16];
    std::vector<Mbarrier> mbarriers;
    SharedMemory shared;
    Context scheduler;
    uint32_t ready_warps = 0, current_warp = 0;
    uint32_t num_exited = 0;

    Block(Launch& of, uint32_t num, uint32_t shared_bytes)
        : launch(of), num_threads(num), num_warps(num / LANES), threads(num), warps(num_warps) {
        shared.bytes.resize(shared_bytes);
        shared.cells.resize(shared_bytes, num_warps, false);
    }

    // Runs block (x, y) to its end or first fault.
    void run(uint32_t block_x, uint32_t block_y);

    // The launch has failed. In a fiber, `fail` also ends it: no fiber is resumed.
    void record(Fault fault, Site site, const std::string& message);
    [[noreturn]] void fail(Fault fault, Site site, const std::string& message);

    // The thread waits until it is woken.
    void wait(Wait what, uint32_t id, Site site);
    void wake(Thread& thread);
    void unready(const Thread& thread);
    void wake_warp(uint32_t warp, uint32_t lanes);
    void exit_thread();

    // Meets all lanes; the last one computes for all with `compute`.
    template <class Compute>
    void collective(const char* operation, Site site, const void* operands, Compute compute);
    bool arrive(const char* operation, Site site, const void* operands);

    void sync_warp(uint32_t warp);
    void sync_warps(uint32_t mask);
    void barrier_sync(uint32_t id, uint32_t count, Site site);
    void acquire(const Clock& clock);
    Clock& own_clock();
    void release_into(Clock& clock);

    Mbarrier& mbarrier(uint32_t address, Site site);
    void complete_phase(Mbarrier& barrier);
    void deliver(Mbarrier& barrier);

    // --- accesses
    uint8_t* shared_at(uint32_t address, size_t size, Site site, const char* what);
    void note_shared_read(uint32_t offset, uint32_t size, Site site, bool warp_wide);
    void note_shared_write(uint32_t offset, uint32_t size, Site site);
    const uint8_t* read_shared(uint32_t address, uint32_t size, Site site, bool warp_wide);
    uint8_t* write_shared(uint32_t address, uint32_t size, Site site);
    Allocation& global_at(uint64_t address, size_t size, size_t align, Site site, const char* what);
    const uint8_t* read_global(uint64_t address, uint32_t size, uint32_t align, Cache cache,
                               Site site);
    uint8_t* write_global(uint64_t address, uint32_t size, Site site, bool atomic);
    void note_global_read(Allocation& allocation, size_t offset, size_t size, Cache cache,
                          Site site);
    void note_global_write(Allocation& allocation, size_t offset, size_t size, Site site,
                           bool atomic);
    bool ordered(Stamp stamp, bool warp_wide) const;
    bool ordered_globally(Stamp stamp) const;
    [[noreturn]] void race(Site site, const std::string& what, Stamp earlier, bool earlier_write);

    std::string describe(Stamp stamp, bool write) const;

private:
    void start_threads();
    void finish();
    void switch_to_next();
    Thread* next_ready();
    void report_deadlock();
    static void fiber_main();
};

// NOTE: found without a call; the few bytes fit into what the loader keeps for such libraries.
#define INITIAL_EXEC __attribute__((tls_model("initial-exec")))
extern __thread Block* block INITIAL_EXEC;
extern __thread Thread* self INITIAL_EXEC;

template <class Compute>
void Block::collective(const char* operation, Site site, const void* operands, Compute compute) {
    if (!arrive(operation, site, operands)) {
        wait(Wait::COLLECTIVE, 0, site);
        return;
    }
    uint32_t index = self->index / LANES;
    Warp& warp = warps[index];
    compute(&threads[index * LANES], warp);
    warp.arrived = 0;
    warp.banks.flush([this](uint16_t place, Passes passes) { launch.add_passes(place, passes); });
    wake_warp(index, ~(1u << self->index % LANES));
}

}  // namespace emulator
