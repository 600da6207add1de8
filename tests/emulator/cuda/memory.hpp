// Global and shared memory with a shadow: which bytes are initialized, and who touched them last.

#pragma once
#include <string.h>

#include <vector>

#include "clock.hpp"

namespace emulator {

// Of a byte.
constexpr uint8_t POISONED = 0;
constexpr uint8_t READY = 1;
// The destination of a copy under way.
constexpr uint8_t PENDING = 2;
// Belongs to an mbarrier.
constexpr uint8_t MBARRIER_BYTE = 3;

// What unwritten memory holds: NaN in every format.
constexpr uint8_t POISON = 0xff;

inline bool all_states(const uint8_t* states, size_t size, uint8_t wanted) {
    size_t i = 0;
    for (; i + 8 <= size; i += 8) {
        uint64_t eight;
        memcpy(&eight, states + i, 8);
        if (eight != wanted * uint64_t(0x0101010101010101)) return false;
    }
    for (; i < size; i++) {
        if (states[i] != wanted) return false;
    }
    return true;
}

// Stamps of runs of 4 bytes, or of single bytes once an access is smaller. Each cell has one stamp
// of its last write and `num_readers` of its last reads.
struct Cells {
    uint32_t shift = 2;
    uint32_t num_readers = 1;
    std::vector<Stamp> writes;
    std::vector<Stamp> reads;
    // Global memory: the warps whose reads the stamp stands for.
    std::vector<uint32_t> reader_warps;

    void resize(size_t num_bytes, uint32_t readers, bool with_warps) {
        size_t num_cells = (num_bytes + (size_t(1) << shift) - 1) >> shift;
        num_readers = readers;
        writes.assign(num_cells, 0);
        reads.assign(num_cells * readers, 0);
        if (with_warps) reader_warps.assign(num_cells, 0);
    }

    void split() {
        writes = repeat(writes, 1);
        reads = repeat(reads, num_readers);
        reader_warps = repeat(reader_warps, 1);
        shift = 0;
    }

    size_t first(size_t offset) const { return offset >> shift; }
    size_t end(size_t offset, size_t size) const {
        return (offset + size + (size_t(1) << shift) - 1) >> shift;
    }

private:
    template <class T>
    static std::vector<T> repeat(const std::vector<T>& cells, size_t width) {
        std::vector<T> split;
        split.reserve(cells.size() * 4);
        for (size_t i = 0; i < cells.size(); i += width) {
            for (int copy = 0; copy < 4; copy++) {
                split.insert(split.end(), cells.begin() + i, cells.begin() + i + width);
            }
        }
        return split;
    }
};

// In the order of `Access` in Rust.
enum class Access : uint32_t { CONSTANT, READ_ONLY, READ_WRITE };

// Addresses of allocation i are (i + 1) · 2⁴⁰ + 2³⁹ and up: no overrun reaches another one.
struct Allocation {
    static constexpr uint32_t SHIFT = 40;
    static constexpr uint64_t MIDDLE = uint64_t(1) << 39;

    Access access;
    bool live = true;
    std::vector<uint8_t> bytes;
    std::vector<uint8_t> states;
    Cells cells;

    Allocation(size_t size, Access how)
        : access(how), bytes(size, POISON), states(size, POISONED) {}
};

class GlobalMemory {
public:
    uint64_t allocate(size_t size, Access access) {
        allocations.emplace_back(size, access);
        return (uint64_t(allocations.size()) << Allocation::SHIFT) + Allocation::MIDDLE;
    }

    // Null where the address is in none.
    Allocation* find(uint64_t address) {
        uint64_t i = address >> Allocation::SHIFT;
        return i == 0 || i > allocations.size() ? nullptr : &allocations[i - 1];
    }

    // Negative before the allocation.
    static int64_t offset(uint64_t address) {
        return int64_t(address & ((uint64_t(1) << Allocation::SHIFT) - 1)) -
               int64_t(Allocation::MIDDLE);
    }

    static bool within(const Allocation& allocation, int64_t offset, size_t size) {
        return offset >= 0 && uint64_t(offset) + size <= allocation.bytes.size();
    }

    // Forgets all accesses, so that ticks may start again.
    void forget_accesses() {
        for (Allocation& allocation : allocations) allocation.cells = {};
    }

private:
    std::vector<Allocation> allocations;
};

}  // namespace emulator
