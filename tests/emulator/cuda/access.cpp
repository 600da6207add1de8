// Accesses of the running thread to memory: bounds, alignment, initialization, order.

#include "block.hpp"

namespace emulator {

static std::string bytes_text(size_t size) { return std::to_string(size) + " bytes"; }

// --- order -----------------------------------------------------------------------------------------

// Of an access in this block: ordered before what the running thread does next?
bool Block::ordered(Stamp stamp, bool warp_wide) const {
    Tick tick = tick_of(stamp);
    const Clock& clock = *self->clock;
    if (tick <= clock.floor) return true;
    uint32_t flags = flags_of(stamp), who = who_of(stamp);
    if (flags & ASYNC) return clock.covers(WARPS_MAX + who, tick);
    if (flags & SEVERAL) return clock.covers(who / LANES, tick);
    if (who == self->index && !warp_wide) return true;
    return clock.covers_lane(who, tick);
}

// The same of an access anywhere in the launch.
bool Block::ordered_globally(Stamp stamp) const {
    Tick tick = tick_of(stamp);
    if (tick <= launch.base) return true;
    if (tick > base) return ordered(stamp, false);
    uint32_t flags = flags_of(stamp), who = who_of(stamp);
    for (uint32_t i : self->clock->releases) {
        const Release& release = launch.releases[i];
        if (tick <= release.base) continue;
        if (flags & ATOMIC ? release.thread == who && release.tick >= tick
            : flags & SEVERAL ? release.published.covers(who / LANES, tick)
                              : release.published.covers_lane(who, tick)) {
            return true;
        }
    }
    return false;
}

std::string Block::describe(Stamp stamp, bool write) const {
    std::string text = flags_of(stamp) & ATOMIC ? "atomic" : write ? "write" : "read";
    if (flags_of(stamp) & ASYNC) {
        text += " by a bulk copy for mbarrier " + std::to_string(who_of(stamp));
    } else {
        text += " by thread " + std::to_string(who_of(stamp));
    }
    if (tick_of(stamp) <= base) text += " of another block";
    return text + " at " + launch.places.text(place_of(stamp));
}

void Block::race(Site site, const std::string& what, Stamp earlier, bool earlier_write) {
    fail(Fault::RACE, site,
         what + " is not ordered after the " + describe(earlier, earlier_write));
}

// --- shared memory ---------------------------------------------------------------------------------

uint8_t* Block::shared_at(uint32_t address, size_t size, Site site, const char* what) {
    uint32_t offset = address - SHARED_BASE;
    if (address < SHARED_BASE || offset + size > shared.bytes.size()) {
        fail(Fault::OUT_OF_BOUNDS, site,
             std::string(what) + " of " + bytes_text(size) + " at offset " +
                 std::to_string(int64_t(address) - int64_t(SHARED_BASE)) + " of " +
                 bytes_text(shared.bytes.size()) + " of shared memory");
    }
    return &shared.bytes[offset];
}

static std::string shared_text(const char* what, uint32_t offset, uint32_t size) {
    return std::string(what) + " of " + bytes_text(size) + " at shared offset " +
           std::to_string(offset);
}

void Block::note_shared_read(uint32_t offset, uint32_t size, Site site, bool warp_wide) {
    Cells& cells = shared.cells;
    if (size < 4 && cells.shift) cells.split();
    uint32_t warp = self->index / LANES;
    Tick known = self->clock->all[warp];
    uint32_t who = self->index | (warp_wide ? SEVERAL : 0);
    Stamp mine = make_stamp(self->tick, launch.places.number(site), who);
    for (size_t i = cells.first(offset), end = cells.end(offset, size); i < end; i++) {
        if (!ordered(cells.writes[i], warp_wide)) {
            race(site, shared_text("read", offset, size), cells.writes[i], true);
        }
        Stamp& read = cells.reads[i * num_warps + warp];
        bool replace = tick_of(read) <= known || flags_of(read) == self->index;
        read = replace ? mine : std::max(read, mine) | SEVERAL;
    }
}

void Block::note_shared_write(uint32_t offset, uint32_t size, Site site) {
    Cells& cells = shared.cells;
    if (size < 4 && cells.shift) cells.split();
    Stamp mine = make_stamp(self->tick, launch.places.number(site), self->index);
    for (size_t i = cells.first(offset), end = cells.end(offset, size); i < end; i++) {
        if (!ordered(cells.writes[i], false)) {
            race(site, shared_text("write", offset, size), cells.writes[i], true);
        }
        for (uint32_t w = 0; w < num_warps; w++) {
            Stamp read = cells.reads[i * num_warps + w];
            if (!ordered(read, false)) race(site, shared_text("write", offset, size), read, false);
        }
        cells.writes[i] = mine;
    }
}

const uint8_t* Block::read_shared(uint32_t address, uint32_t size, Site site, bool warp_wide) {
    const uint8_t* bytes = shared_at(address, size, site, "read");
    uint32_t offset = address - SHARED_BASE;
    if (address % size) {
        fail(Fault::MISALIGNED, site, shared_text("read", offset, size));
    }
    const uint8_t* states = &shared.states[offset];
    if (!all_states(states, size, READY)) {
        for (uint32_t i = 0; i < size; i++) {
            if (states[i] == PENDING) {
                fail(Fault::NOT_AWAITED, site,
                     shared_text("read", offset, size) +
                         ": a copy to it is under way and was not waited for");
            }
            if (states[i] == MBARRIER_BYTE) {
                fail(Fault::MBARRIER, site, shared_text("read", offset, size) + ": an mbarrier");
            }
        }
        fail(Fault::UNINITIALIZED, site,
             shared_text("read", offset, size) + ", which the block never wrote");
    }
    note_shared_read(offset, size, site, warp_wide);
    return bytes;
}

uint8_t* Block::write_shared(uint32_t address, uint32_t size, Site site) {
    uint8_t* bytes = shared_at(address, size, site, "write");
    uint32_t offset = address - SHARED_BASE;
    uint8_t* states = &shared.states[offset];
    for (uint32_t i = 0; i < size; i++) {
        if (states[i] == PENDING) {
            fail(Fault::NOT_AWAITED, site,
                 shared_text("write", offset, size) + ": a copy to it is under way");
        }
        if (states[i] == MBARRIER_BYTE) {
            fail(Fault::MBARRIER, site, shared_text("write", offset, size) + ": an mbarrier");
        }
    }
    note_shared_write(offset, size, site);
    return bytes;
}

// --- global memory ---------------------------------------------------------------------------------

static std::string global_text(const char* what, uint64_t address, size_t size) {
    return std::string(what) + " of " + bytes_text(size) + " at byte " +
           std::to_string(GlobalMemory::offset(address)) + " of allocation " +
           std::to_string(address >> Allocation::SHIFT);
}

Allocation& Block::global_at(uint64_t address, size_t size, size_t align, Site site,
                             const char* what) {
    Allocation* allocation = launch.memory->find(address);
    if (!allocation) {
        char text[64];
        snprintf(text, sizeof text, " at address 0x%llx, which was never allocated",
                 static_cast<unsigned long long>(address));
        fail(Fault::OUT_OF_BOUNDS, site, std::string(what) + " of " + bytes_text(size) + text);
    }
    if (!allocation->live) {
        fail(Fault::OUT_OF_BOUNDS, site, global_text(what, address, size) + ", which was freed");
    }
    if (!GlobalMemory::within(*allocation, GlobalMemory::offset(address), size)) {
        fail(Fault::OUT_OF_BOUNDS, site,
             global_text(what, address, size) + ", which has " +
                 bytes_text(allocation->bytes.size()));
    }
    if (address % align) fail(Fault::MISALIGNED, site, global_text(what, address, size));
    return *allocation;
}

const uint8_t* Block::read_global(uint64_t address, uint32_t size, uint32_t align, Cache cache,
                                  Site site) {
    Allocation& allocation = global_at(address, size, align, site, "read");
    size_t offset = size_t(GlobalMemory::offset(address));
    if (allocation.access != Access::CONSTANT && !self->grid_waited) {
        fail(Fault::BEFORE_GRID_WAIT, site,
             global_text("read", address, size) +
                 ", which the kernel before may still write: no grid_wait came before");
    }
    if (!all_states(&allocation.states[offset], size, READY)) {
        fail(Fault::UNINITIALIZED, site,
             global_text("read", address, size) + ", which was never written");
    }
    if (allocation.access == Access::READ_WRITE) {
        note_global_read(allocation, offset, size, cache, site);
    }
    return &allocation.bytes[offset];
}

uint8_t* Block::write_global(uint64_t address, uint32_t size, Site site, bool atomic) {
    const char* what = atomic ? "atomic" : "write";
    Allocation& allocation = global_at(address, size, size, site, what);
    size_t offset = size_t(GlobalMemory::offset(address));
    if (allocation.access != Access::READ_WRITE) {
        fail(Fault::READ_ONLY, site, global_text(what, address, size) + ", which is read-only");
    }
    if (!self->grid_waited) {
        fail(Fault::BEFORE_GRID_WAIT, site,
             global_text(what, address, size) +
                 ", which the kernel before may still use: no grid_wait came before");
    }
    if (atomic && !all_states(&allocation.states[offset], size, READY)) {
        fail(Fault::UNINITIALIZED, site,
             global_text(what, address, size) + ", which was never written");
    }
    note_global_write(allocation, offset, size, site, atomic);
    memset(&allocation.states[offset], READY, size);
    return &allocation.bytes[offset];
}

static void prepare(Cells& cells, const Allocation& allocation, size_t size) {
    if (cells.writes.empty()) cells.resize(allocation.bytes.size(), 1, true);
    if (size < 4 && cells.shift) cells.split();
}

static std::string cell_text(const char* what, size_t offset, size_t size) {
    return std::string(what) + " of " + bytes_text(size) + " at byte " + std::to_string(offset) +
           " of its allocation";
}

void Block::note_global_read(Allocation& allocation, size_t offset, size_t size, Cache cache,
                             Site site) {
    Cells& cells = allocation.cells;
    prepare(cells, allocation, size);
    uint32_t warp = self->index / LANES;
    Stamp mine = make_stamp(self->tick, launch.places.number(site), self->index);
    for (size_t i = cells.first(offset), end = cells.end(offset, size); i < end; i++) {
        Stamp write = cells.writes[i];
        bool constant = cache == Cache::CONSTANT;
        if (constant ? tick_of(write) > launch.base : !ordered_globally(write)) {
            race(site, cell_text(constant ? "constant read" : "read", offset, size), write, true);
        }
        Stamp& read = cells.reads[i];
        if (tick_of(read) <= base) {
            uint32_t foreign = tick_of(read) > launch.base ? FOREIGN : 0;
            read = mine | foreign;
            cells.reader_warps[i] = 1u << warp;
        } else if ((flags_of(read) & ~FOREIGN) == self->index || ordered(read, false)) {
            read = mine | (read & FOREIGN);
            cells.reader_warps[i] = 1u << warp;
        } else {
            read = std::max(read, mine) | SEVERAL | (read & FOREIGN);
            cells.reader_warps[i] |= 1u << warp;
        }
    }
}

void Block::note_global_write(Allocation& allocation, size_t offset, size_t size, Site site,
                              bool atomic) {
    Cells& cells = allocation.cells;
    prepare(cells, allocation, size);
    const char* what = atomic ? "atomic" : "write";
    uint32_t who = self->index | (atomic ? ATOMIC : 0);
    Stamp mine = make_stamp(self->tick, launch.places.number(site), who);
    for (size_t i = cells.first(offset), end = cells.end(offset, size); i < end; i++) {
        Stamp write = cells.writes[i], read = cells.reads[i];
        if (!(atomic && flags_of(write) & ATOMIC) && !ordered_globally(write)) {
            race(site, cell_text(what, offset, size), write, true);
        }
        if (tick_of(read) > launch.base) {
            bool foreign = tick_of(read) <= base || flags_of(read) & FOREIGN;
            bool safe = true;
            if (foreign && self->clock->releases.empty()) safe = false;
            if (tick_of(read) > base && flags_of(read) & SEVERAL) {
                for (uint32_t w = 0; w < num_warps; w++) {
                    bool reader = cells.reader_warps[i] >> w & 1;
                    if (reader && !self->clock->covers(w, tick_of(read))) safe = false;
                }
            } else if (!ordered_globally(read)) {
                safe = false;
            }
            if (!safe) race(site, cell_text(what, offset, size), read, false);
        }
        cells.writes[i] = mine;
    }
}

}  // namespace emulator
