// The functions of emulator.hpp, for the running thread.

#include "block.hpp"
#include "number.hpp"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace emulator {

uint32_t thread_idx() { return self->index; }
uint32_t block_idx_x() { return block->x; }
uint32_t block_idx_y() { return block->y; }
uint32_t num_blocks_x() { return block->launch.grid.x; }

// --- threads ---------------------------------------------------------------------------------------

void warp_sync(Site site) {
    block->collective("warp_sync", site, nullptr,
                      [](Thread*, Warp&) { block->sync_warp(self->index / LANES); });
}

void warp_converge(Site site) {
    block->collective("warp_idx", site, nullptr, [](Thread*, Warp&) {});
}

struct Shuffle {
    uint32_t value, source_lane;
    uint32_t* result;
};

uint32_t shuffle(uint32_t value, uint32_t source_lane, Site site) {
    uint32_t result;
    Shuffle mine = {value, source_lane % LANES, &result};
    block->collective("a shuffle", site, &mine, [](Thread* lanes, Warp&) {
        auto of = [lanes](uint32_t lane) {
            return static_cast<const Shuffle*>(lanes[lane].operands);
        };
        for (uint32_t i = 0; i < LANES; i++) *of(i)->result = of(of(i)->source_lane)->value;
    });
    return result;
}

struct Any {
    bool condition;
    bool* result;
};

bool any(bool condition, Site site) {
    bool result;
    Any mine = {condition, &result};
    block->collective("any", site, &mine, [](Thread* lanes, Warp&) {
        bool found = false;
        for (uint32_t i = 0; i < LANES; i++) {
            found |= static_cast<const Any*>(lanes[i].operands)->condition;
        }
        for (uint32_t i = 0; i < LANES; i++) {
            *static_cast<const Any*>(lanes[i].operands)->result = found;
        }
    });
    return result;
}

void barrier_sync(uint32_t barrier, uint32_t num_threads, Site site) {
    block->barrier_sync(barrier, num_threads, site);
}
void block_sync(Site site) { block->barrier_sync(0, block->num_threads, site); }

void fence_device(Site) {
    Clock& clock = block->own_clock();
    // What atomics saw before the fence is ordered before what comes after it.
    for (uint32_t i : self->observed) {
        const Release& release = block->launch.releases[i];
        bool same_block = release.base == block->base;
        if (same_block) clock.add(release.published);
        else clock.add_release(i);
    }
    self->observed.clear();
    clock.update_floor(block->num_warps);
    clock.published.add(clock);
    clock.published.add_lane(self->index, self->tick);
    clock.has_published = true;
    self->tick++;
    block->max_tick = std::max(block->max_tick, self->tick);
}

uint32_t atomic_add(uint32_t* address, uint32_t value, Site site) {
    uint64_t number = reinterpret_cast<uint64_t>(address);
    uint8_t* bytes = block->write_global(number, 4, site, true);
    uint32_t old;
    memcpy(&old, bytes, 4);
    uint32_t sum = old + value;
    memcpy(bytes, &sum, 4);

    Launch& launch = block->launch;
    std::vector<uint32_t>& chain = launch.chains[number];
    self->observed.insert(self->observed.end(), chain.begin(), chain.end());
    chain.push_back(uint32_t(launch.releases.size()));
    // NOTE: also what other threads published, where a barrier came between.
    launch.releases.push_back(
        {block->base, self->clock->published, self->index, self->tick});
    self->tick++;
    block->max_tick = std::max(block->max_tick, self->tick);
    return old;
}

void grid_wait() { self->grid_waited = true; }
void grid_launch_dependents() { block->launch.dependents_launched = true; }

// --- memory ----------------------------------------------------------------------------------------

const void* global_read(const void* address, uint32_t size, Cache cache, Site site) {
    return block->read_global(reinterpret_cast<uint64_t>(address), size, size, cache, site);
}

void* global_write(void* address, uint32_t size, Site site) {
    return block->write_global(reinterpret_cast<uint64_t>(address), size, site, false);
}

static void count_banks(uint32_t address, uint32_t size, Site site) {
    block->warps[self->index / LANES].banks.access(block->launch.places.number(site),
                                                   self->index % LANES, address, size);
}

const void* shared_read(uint32_t address, uint32_t size, Site site) {
    const void* bytes = block->read_shared(address, size, site, false);
    count_banks(address, size, site);
    return bytes;
}

void* shared_write(uint32_t address, uint32_t size, Site site) {
    uint8_t* bytes = block->write_shared(address, size, site);
    if (address % size) {
        block->fail(Fault::MISALIGNED, site,
                    "write of " + std::to_string(size) + " bytes at shared offset " +
                        std::to_string(address - SHARED_BASE));
    }
    memset(&block->shared.states[address - SHARED_BASE], READY, size);
    count_banks(address, size, site);
    return bytes;
}

// --- copies of a thread ------------------------------------------------------------------------------

static void check_source(const void* source, uint32_t bytes, uint32_t align, Site site) {
    uint64_t address = reinterpret_cast<uint64_t>(source);
    if (bytes) block->read_global(address, bytes, align, Cache::DEFAULT, site);
    else block->global_at(address, 0, align, site, "copy");
}

// The destination of a copy under way: NaN, and not to be touched.
static void start_copy(uint32_t shared, uint32_t size, Site site) {
    uint8_t* bytes = block->write_shared(shared, size, site);
    memset(bytes, POISON, size);
    memset(&block->shared.states[shared - SHARED_BASE], PENDING, size);
}

void cp_async(uint32_t shared, const void* source, uint32_t size, uint32_t bytes, Site site) {
    if (shared % size || bytes > size) {
        block->fail(Fault::MISALIGNED, site,
                    "copy of " + std::to_string(bytes) + " of " + std::to_string(size) +
                        " bytes to shared address " + std::to_string(shared));
    }
    check_source(source, bytes, size, site);
    start_copy(shared, size, site);
    count_banks(shared, size, site);
    self->copies.push_back({shared, source, size, bytes, block->launch.places.number(site)});
}

void cp_async_commit() {
    self->groups.push_back(self->copies.size() - self->num_committed);
    self->num_committed = self->copies.size();
}

static void finish_copy(const Copy& copy) {
    Site site = block->launch.places.site(copy.place);
    check_source(copy.source, copy.bytes, copy.size, site);
    uint32_t offset = copy.shared - SHARED_BASE;
    uint8_t* bytes = &block->shared.bytes[offset];
    memset(bytes, 0, copy.size);
    if (copy.bytes) {
        uint64_t address = reinterpret_cast<uint64_t>(copy.source);
        const Allocation& from = *block->launch.memory->find(address);
        memcpy(bytes, &from.bytes[size_t(GlobalMemory::offset(address))], copy.bytes);
    }
    memset(&block->shared.states[offset], READY, copy.size);
    // Written now, by this thread: others have to synchronize with it.
    Cells& cells = block->shared.cells;
    Stamp mine = make_stamp(self->tick, copy.place, self->index);
    for (size_t i = cells.first(offset), end = cells.end(offset, copy.size); i < end; i++) {
        cells.writes[i] = mine;
    }
}

void cp_async_wait(uint32_t num_pending, Site) {
    size_t num_groups = self->groups.size();
    if (num_groups <= num_pending) return;
    size_t num_done = num_groups - num_pending, num_copies = 0;
    for (size_t i = 0; i < num_done; i++) num_copies += self->groups[i];
    for (size_t i = 0; i < num_copies; i++) finish_copy(self->copies[i]);
    self->groups.erase(self->groups.begin(), self->groups.begin() + num_done);
    self->copies.erase(self->copies.begin(), self->copies.begin() + num_copies);
    self->num_committed -= num_copies;
}

// --- mbarriers -------------------------------------------------------------------------------------

static std::string mbarrier_text(uint32_t address) {
    return "the mbarrier at shared address " + std::to_string(address);
}

void mbarrier_init(uint32_t address, uint32_t num_arrivals, Site site) {
    block->write_shared(address, 8, site);
    if (address % 8) block->fail(Fault::MISALIGNED, site, mbarrier_text(address));
    if (num_arrivals == 0 || block->mbarriers.size() == MBARRIERS_MAX) {
        block->fail(Fault::MBARRIER, site,
                    mbarrier_text(address) + " is for no arrivals, or the 65th of the block");
    }
    memset(&block->shared.states[address - SHARED_BASE], MBARRIER_BYTE, 8);
    Mbarrier barrier;
    barrier.address = address;
    barrier.num_arrivals = num_arrivals;
    barrier.pending = int32_t(num_arrivals);
    barrier.initializer = self->index;
    barrier.init = make_stamp(self->tick, block->launch.places.number(site), self->index);
    block->mbarriers.push_back(barrier);
}

void fence_mbarrier_init() {
    for (Mbarrier& barrier : block->mbarriers) {
        if (barrier.initializer == self->index) barrier.fenced = true;
    }
}

Mbarrier& Block::mbarrier(uint32_t address, Site site) {
    for (Mbarrier& barrier : mbarriers) {
        if (barrier.address != address) continue;
        if (!ordered(barrier.init, false)) {
            race(site, "use of " + mbarrier_text(address), barrier.init, true);
        }
        return barrier;
    }
    fail(Fault::MBARRIER, site, "no mbarrier at shared address " + std::to_string(address));
}

// Brings the data of all copies on the barrier, in any order.
void Block::deliver(Mbarrier& barrier) {
    uint32_t index = uint32_t(&barrier - mbarriers.data());
    launch.random->shuffle(barrier.copies);
    max_tick++;
    for (const BulkCopy& copy : barrier.copies) {
        uint32_t offset = copy.shared - SHARED_BASE;
        uint64_t address = reinterpret_cast<uint64_t>(copy.source);
        const Allocation& from = *launch.memory->find(address);
        memcpy(&shared.bytes[offset], &from.bytes[size_t(GlobalMemory::offset(address))],
               copy.bytes);
        memset(&shared.states[offset], READY, copy.bytes);
        Stamp stamp = make_stamp(max_tick, copy.place, index | ASYNC);
        Cells& cells = shared.cells;
        for (size_t i = cells.first(offset), end = cells.end(offset, copy.bytes); i < end; i++) {
            cells.writes[i] = stamp;
        }
        barrier.num_bytes -= copy.bytes;
    }
    barrier.copies.clear();
    barrier.arriving.all[WARPS_MAX + index] = max_tick;
}

// Ends the phase where all have arrived and all bytes are on their way. Bytes come as late as they
// can: when a thread waits for them.
void Block::complete_phase(Mbarrier& barrier) {
    int64_t num_bytes = 0;
    for (const BulkCopy& copy : barrier.copies) num_bytes += copy.bytes;
    if (barrier.pending > 0 || barrier.num_bytes != num_bytes) return;
    std::vector<Thread*> waiting;
    for (Thread& thread : threads) {
        bool waits = thread.wait == Wait::MBARRIER && thread.wait_id == barrier.address &&
                     thread.wait_parity == (barrier.phase & 1);
        if (waits) waiting.push_back(&thread);
    }
    if (num_bytes > 0) {
        if (waiting.empty()) return;
        deliver(barrier);
    }
    barrier.completed = barrier.arriving;
    barrier.arriving = Clock();
    barrier.pending = int32_t(barrier.num_arrivals);
    barrier.phase++;
    for (Thread* thread : waiting) wake(*thread);
}

void mbarrier_arrive(uint32_t address, uint32_t expected_bytes, Site site) {
    Mbarrier& barrier = block->mbarrier(address, site);
    if (barrier.pending == 0) {
        block->fail(Fault::MBARRIER, site,
                    mbarrier_text(address) + " has had all its " +
                        std::to_string(barrier.num_arrivals) + " arrivals of this phase");
    }
    barrier.num_bytes += expected_bytes;
    block->release_into(barrier.arriving);
    barrier.pending--;
    block->complete_phase(barrier);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site site) {
    Mbarrier& barrier = block->mbarrier(address, site);
    if (parity > 1) {
        block->fail(Fault::MBARRIER, site, "parity " + std::to_string(parity) + " is not 0 or 1");
    }
    if ((barrier.phase & 1) == parity) {
        self->wait = Wait::MBARRIER;
        self->wait_id = address;
        self->wait_parity = parity;
        uint32_t phase = barrier.phase;
        block->complete_phase(barrier);
        if (barrier.phase == phase) {
            block->wait(Wait::MBARRIER, address, site);
        } else {
            // It woke itself: the bytes were all that was missing.
            block->unready(*self);
        }
    }
    block->acquire(block->mbarrier(address, site).completed);
}

void cp_async_bulk(uint32_t shared, const void* source, uint32_t bytes, uint32_t address,
                   Site site) {
    if (shared % 16 || bytes % 16 || bytes == 0) {
        block->fail(Fault::MISALIGNED, site,
                    "bulk copy of " + std::to_string(bytes) + " bytes to shared address " +
                        std::to_string(shared));
    }
    Mbarrier& barrier = block->mbarrier(address, site);
    if (!barrier.fenced) {
        block->fail(Fault::MBARRIER, site,
                    mbarrier_text(address) + " was not fenced after its init");
    }
    check_source(source, bytes, 16, site);
    start_copy(shared, bytes, site);
    barrier.copies.push_back({shared, source, bytes, block->launch.places.number(site)});
    block->complete_phase(barrier);
}

// --- matrices --------------------------------------------------------------------------------------

struct Ldmatrix {
    uint32_t* d;
    uint32_t address;
    bool transposed;
};

void ldmatrix_x4(uint32_t* d, uint32_t address, bool transposed, Site site) {
    Ldmatrix mine = {d, address, transposed};
    // NOTE: every lane gets a part of every row, so the row must be known to the whole warp.
    if (address % 16 == 0) block->read_shared(address, 16, site, true);
    else block->fail(Fault::MISALIGNED, site, "matrix row at " + std::to_string(address));
    block->collective("ldmatrix", site, &mine, [&](Thread* lanes, Warp&) {
        uint16_t rows[LANES][8];
        uint32_t addresses[LANES];
        auto of = [lanes](uint32_t lane) {
            return static_cast<const Ldmatrix*>(lanes[lane].operands);
        };
        for (uint32_t i = 0; i < LANES; i++) {
            addresses[i] = of(i)->address;
            memcpy(rows[i], &block->shared.bytes[of(i)->address - SHARED_BASE], 16);
        }
        for (uint32_t i = 0; i < LANES; i++) {
            uint32_t row = i / 4, col = i % 4 * 2;
            for (uint32_t j = 0; j < 4; j++) {
                const uint16_t(*m)[8] = rows + j * 8;
                bool turned = of(i)->transposed;
                uint32_t low = turned ? m[col][row] : m[row][col];
                uint32_t high = turned ? m[col + 1][row] : m[row][col + 1];
                of(i)->d[j] = low | high << 16;
            }
        }
        uint16_t place = block->launch.places.number(site);
        block->launch.add_passes(place, count_passes(addresses, ~0u, 16));
    });
}

struct Movmatrix {
    uint32_t a;
    uint32_t* d;
};

uint32_t movmatrix_trans(uint32_t a, Site site) {
    uint32_t d;
    Movmatrix mine = {a, &d};
    block->collective("movmatrix", site, &mine, [](Thread* lanes, Warp&) {
        auto of = [lanes](uint32_t lane) {
            return static_cast<const Movmatrix*>(lanes[lane].operands);
        };
        auto element = [&of](uint32_t row, uint32_t col) {
            return of(row * 4 + col / 2)->a >> (col % 2 * 16) & 0xffff;
        };
        for (uint32_t i = 0; i < LANES; i++) {
            uint32_t row = i / 4, col = i % 4 * 2;
            *of(i)->d = element(col, row) | element(col + 1, row) << 16;
        }
    });
    return d;
}

struct Mma {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};

template <class F> static void widen_all(const uint16_t* from, float* to, uint32_t count) {
#if defined(__F16C__)
    if constexpr (F::EXPONENT == 5) {
        for (uint32_t i = 0; i < count; i += 8) {
            __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
        }
        return;
    }
#endif
    for (uint32_t i = 0; i < count; i++) to[i] = number::widen<F>(from[i]);
}

// Products of 16-bit numbers are exact in float32; each output adds its 16 in the order of k.
template <class F> static void mma(Thread* lanes) {
    alignas(32) uint16_t halves_a[16][16], halves_b[16][8];
    alignas(32) float a[16][16], b[16][8], d[16][8];
    for (uint32_t i = 0; i < LANES; i++) {
        const Mma& mine = *static_cast<const Mma*>(lanes[i].operands);
        uint32_t g = i / 4, t = i % 4 * 2;
        for (uint32_t j = 0; j < 4; j++) {
            memcpy(&halves_a[g + j % 2 * 8][t + j / 2 * 8], &mine.a[j], 4);
            d[g + j / 2 * 8][t + j % 2] = mine.d[j];
        }
        for (uint32_t j = 0; j < 2; j++) {
            halves_b[t + j * 8][g] = uint16_t(mine.b[j]);
            halves_b[t + j * 8 + 1][g] = uint16_t(mine.b[j] >> 16);
        }
    }
    widen_all<F>(halves_a[0], a[0], 256);
    widen_all<F>(halves_b[0], b[0], 128);
    for (uint32_t row = 0; row < 16; row++) {
        for (uint32_t k = 0; k < 16; k++) {
            for (uint32_t col = 0; col < 8; col++) d[row][col] += a[row][k] * b[k][col];
        }
    }
    for (uint32_t i = 0; i < LANES; i++) {
        const Mma& mine = *static_cast<const Mma*>(lanes[i].operands);
        uint32_t g = i / 4, t = i % 4 * 2;
        for (uint32_t j = 0; j < 4; j++) mine.d[j] = d[g + j / 2 * 8][t + j % 2];
    }
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Half half, Site site) {
    Mma mine = {d, a, b};
    const char* operation = half == Half::F16 ? "mma of float16" : "mma of bfloat16";
    block->collective(operation, site, &mine, [half](Thread* lanes, Warp&) {
        block->launch.num_mma++;
        half == Half::F16 ? mma<number::F16>(lanes) : mma<number::BF16>(lanes);
    });
}

}  // namespace emulator
