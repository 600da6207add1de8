// Threads of a block: start, scheduling, waiting, synchronization, end.

#include "block.hpp"

namespace emulator {

__thread Block* block INITIAL_EXEC;
__thread Thread* self INITIAL_EXEC;

// --- start and end ---------------------------------------------------------------------------------

void Block::fiber_main() {
    block->launch.kernel->run(block->launch.params);
    block->exit_thread();
}

void Block::start_threads() {
    for (uint32_t w = 0; w < num_warps; w++) {
        Warp& warp = warps[w];
        warp.clock.start(base);
        warp.ready = ~0u;
        warp.arrived = warp.exited = 0;
    }
    for (uint32_t i = 0; i < num_threads; i++) {
        Thread& thread = threads[i];
        thread.index = i;
        thread.exited = false;
        thread.wait = Wait::NONE;
        thread.tick = base + 1;
        thread.clock = &warps[i / LANES].clock;
        thread.grid_waited = false;
        thread.observed.clear();
        thread.copies.clear();
        thread.groups.clear();
        thread.num_committed = 0;
        make_context(&thread.context, launch.stacks->get(i), Stacks::SIZE, fiber_main);
    }
    ready_warps = num_warps == 32 ? ~0u : (1u << num_warps) - 1;
    num_exited = 0;
}

void Block::run(uint32_t block_x, uint32_t block_y) {
    x = block_x;
    y = block_y;
    max_tick = base + 1;
    std::fill(barriers, barriers + 16, Barrier());
    mbarriers.clear();
    std::fill(shared.bytes.begin(), shared.bytes.end(), POISON);
    shared.states.assign(shared.bytes.size(), POISONED);
    start_threads();
    block = this;
    self = next_ready();
    switch_context(&scheduler, &self->context);
    if (launch.fault == Fault::NONE && num_exited < num_threads) report_deadlock();
    if (launch.fault == Fault::NONE) finish();
    for (Warp& warp : warps) {
        warp.banks.flush([this](uint16_t place, Passes p) { launch.add_passes(place, p); });
    }
    block = nullptr;
}

void Block::exit_thread() {
    uint32_t index = self->index / LANES;
    Warp& warp = warps[index];
    if (warp.arrived) {
        fail(Fault::DIVERGENT, warp.site,
             std::string("other lanes wait in ") + warp.operation + ", this thread has ended");
    }
    if (!self->copies.empty()) {
        const Copy& copy = self->copies[0];
        fail(Fault::NOT_AWAITED, launch.places.site(copy.place),
             "the thread ended without waiting for this copy");
    }
    launch.grid_waited |= self->grid_waited;
    warp.exited |= 1u << self->index % LANES;
    self->exited = true;
    num_exited++;
    switch_to_next();
}

void Block::finish() {
    self = nullptr;
    for (const Mbarrier& barrier : mbarriers) {
        std::string name = "mbarrier at shared address " + std::to_string(barrier.address);
        if (!barrier.copies.empty()) {
            const BulkCopy& copy = barrier.copies[0];
            record(Fault::NOT_AWAITED, launch.places.site(copy.place),
                   "the block ended without a wait for this bulk copy on the " + name);
        } else if (barrier.num_bytes != 0) {
            record(Fault::MBARRIER, launch.places.site(place_of(barrier.init)),
                   "the block ended while the " + name + " expects " +
                       std::to_string(barrier.num_bytes) + " more bytes");
        }
    }
}

void Block::record(Fault fault, Site site, const std::string& message) {
    launch.fault = fault;
    launch.message = message + "\n  at " + Places::text(site) + "\n  in " + launch.symbol +
                     ", block (" + std::to_string(x) + ", " + std::to_string(y) + ")";
    if (self) launch.message += ", thread " + std::to_string(self->index);
}

void Block::fail(Fault fault, Site site, const std::string& message) {
    record(fault, site, message);
    // NOTE: the fiber is left as it is; kernels own nothing that would have to be dropped.
    switch_context(&self->context, &scheduler);
    __builtin_unreachable();
}

// --- scheduling ------------------------------------------------------------------------------------

Thread* Block::next_ready() {
    if (!(ready_warps >> current_warp & 1)) {
        if (ready_warps == 0) return nullptr;
        current_warp = launch.random->bit_of(ready_warps);
    }
    Warp& warp = warps[current_warp];
    uint32_t lane = launch.random->bit_of(warp.ready);
    warp.ready &= ~(1u << lane);
    if (warp.ready == 0) ready_warps &= ~(1u << current_warp);
    return &threads[current_warp * LANES + lane];
}

void Block::switch_to_next() {
    Thread* from = self;
    Thread* next = next_ready();
    if (next == from) return;
    self = next;
    switch_context(&from->context, next ? &next->context : &scheduler);
}

void Block::wait(Wait what, uint32_t id, Site site) {
    self->wait = what;
    self->wait_id = id;
    self->site = site;
    switch_to_next();
}

void Block::wake(Thread& thread) {
    thread.wait = Wait::NONE;
    uint32_t warp = thread.index / LANES;
    warps[warp].ready |= 1u << thread.index % LANES;
    ready_warps |= 1u << warp;
}

// Of the running thread: it goes on anyway.
void Block::unready(const Thread& thread) {
    uint32_t warp = thread.index / LANES;
    warps[warp].ready &= ~(1u << thread.index % LANES);
    if (warps[warp].ready == 0) ready_warps &= ~(1u << warp);
}

void Block::wake_warp(uint32_t warp, uint32_t lanes) {
    for (uint32_t lane = 0; lane < LANES; lane++) {
        if (lanes >> lane & 1) threads[warp * LANES + lane].wait = Wait::NONE;
    }
    warps[warp].ready |= lanes;
    if (lanes) ready_warps |= 1u << warp;
}

// --- who waits where ---------------------------------------------------------------------------------

static std::string wait_text(const Thread& thread, const char* operation) {
    std::string id = std::to_string(thread.wait_id);
    switch (thread.wait) {
        case Wait::COLLECTIVE: return std::string("in ") + operation;
        case Wait::BARRIER: return "at barrier " + id;
        case Wait::MBARRIER:
            return "for parity " + std::to_string(thread.wait_parity) +
                   " of the mbarrier at shared address " + id;
        default: return "for nothing";
    }
}

void Block::report_deadlock() {
    constexpr int LINES_MAX = 12;
    std::string text = "no thread can go on";
    if (num_exited) text += "; " + std::to_string(num_exited) + " threads have ended";
    int lines = 0;
    Site site = {"", 0};
    for (uint32_t i = 0; i < num_threads;) {
        const Thread& first = threads[i];
        uint32_t end = i + 1;
        auto same = [&](const Thread& other) {
            return other.exited == first.exited && other.wait == first.wait &&
                   other.wait_id == first.wait_id && other.wait_parity == first.wait_parity &&
                   other.site.line == first.site.line;
        };
        while (end < num_threads && same(threads[end])) end++;
        if (!first.exited) {
            if (site.line == 0) site = first.site;
            const char* operation = warps[i / LANES].operation;
            if (lines++ < LINES_MAX) {
                text += "\n  threads " + std::to_string(i) + " to " + std::to_string(end - 1) +
                        " wait " + wait_text(first, operation ? operation : "nothing") + ", " +
                        Places::text(first.site);
            }
        }
        i = end;
    }
    self = nullptr;
    record(Fault::DEADLOCK, site, text);
}

// --- collectives and barriers ----------------------------------------------------------------------

bool Block::arrive(const char* operation, Site site, const void* operands) {
    Warp& warp = warps[self->index / LANES];
    self->operands = operands;
    if (warp.exited) {
        fail(Fault::DIVERGENT, site,
             std::string("lanes of the warp have ended, this one came to ") + operation);
    }
    if (warp.arrived == 0) {
        warp.operation = operation;
        warp.site = site;
    } else if (warp.operation != operation || warp.site.line != site.line ||
               warp.site.file != site.file) {
        fail(Fault::DIVERGENT, site,
             std::string("this lane came to ") + operation + ", others to " + warp.operation +
                 " at " + Places::text(warp.site));
    }
    warp.arrived |= 1u << self->index % LANES;
    return warp.arrived == ~0u;
}

// All that the lanes know becomes known to each of them.
void Block::sync_warp(uint32_t index) { sync_warps(1u << index); }

void Block::sync_warps(uint32_t mask) {
    Tick tick = 0;
    Clock joined = warps[__builtin_ctz(mask)].clock;
    for (uint32_t w = 0; w < num_warps; w++) {
        if (!(mask >> w & 1)) continue;
        joined.join(warps[w].clock);
        for (uint32_t i = w * LANES; i < (w + 1) * LANES; i++) {
            Thread& thread = threads[i];
            if (thread.clock == &thread.own) joined.join(thread.own);
            joined.grid_waited |= thread.grid_waited;
            tick = std::max(tick, thread.tick);
        }
    }
    for (uint32_t w = 0; w < num_warps; w++) {
        if (mask >> w & 1) joined.all[w] = tick;
    }
    joined.drop_covered();
    joined.update_floor(num_warps);
    for (uint32_t w = 0; w < num_warps; w++) {
        if (!(mask >> w & 1)) continue;
        warps[w].clock = joined;
        for (uint32_t i = w * LANES; i < (w + 1) * LANES; i++) {
            threads[i].clock = &warps[w].clock;
            threads[i].tick = tick + 1;
            threads[i].grid_waited = joined.grid_waited;
        }
    }
    max_tick = std::max(max_tick, tick + 1);
}

void Block::barrier_sync(uint32_t id, uint32_t count, Site site) {
    if (id >= 16) fail(Fault::BARRIER, site, "barrier " + std::to_string(id) + " of 16");
    if (count == 0 || count % LANES || count > num_threads) {
        fail(Fault::BARRIER, site,
             "a barrier of " + std::to_string(count) + " threads in a block of " +
                 std::to_string(num_threads) + "; it must be whole warps");
    }
    uint32_t index = self->index / LANES;
    if (!arrive("a block barrier", site, nullptr)) {
        wait(Wait::BARRIER, id, site);
        return;
    }
    Warp& warp = warps[index];
    warp.arrived = 0;
    warp.banks.flush([this](uint16_t place, Passes p) { launch.add_passes(place, p); });
    Barrier& barrier = barriers[id];
    if (barrier.num_arrived && barrier.expected != count) {
        fail(Fault::BARRIER, site,
             "barrier " + std::to_string(id) + " is for " + std::to_string(barrier.expected) +
                 " threads elsewhere, for " + std::to_string(count) + " here");
    }
    barrier.expected = count;
    barrier.num_arrived += LANES;
    barrier.warps |= 1u << index;
    if (barrier.num_arrived < count) {
        wait(Wait::BARRIER, id, site);
        return;
    }
    uint32_t mask = barrier.warps;
    barrier = Barrier();
    sync_warps(mask);
    for (uint32_t w = 0; w < num_warps; w++) {
        if (!(mask >> w & 1)) continue;
        wake_warp(w, w == index ? ~(1u << self->index % LANES) : ~0u);
    }
}

// The running thread's, apart from its warp's.
Clock& Block::own_clock() {
    if (self->clock != &self->own) {
        self->own = *self->clock;
        self->clock = &self->own;
    }
    return self->own;
}

// What `clock` covers is ordered before what this thread does next.
void Block::acquire(const Clock& clock) {
    own_clock().join(clock);
    self->own.update_floor(num_warps);
    self->grid_waited |= clock.grid_waited;
}

// What this thread has done, and what it knows, is ordered before what acquires `clock`.
void Block::release_into(Clock& clock) {
    clock.join(*self->clock);
    clock.grid_waited |= self->grid_waited;
    clock.add_lane(self->index, self->tick);
    self->tick++;
    max_tick = std::max(max_tick, self->tick);
}

}  // namespace emulator
