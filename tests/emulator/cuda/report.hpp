// What a launch tells: the rule that was broken, or what was counted.

#pragma once
#include <stdint.h>

#include <algorithm>
#include <string>
#include <vector>

#include "emulator.hpp"

namespace emulator {

// In the order of `FaultKind` in Rust.
enum class Fault : uint32_t {
    NONE,
    OUT_OF_BOUNDS,
    MISALIGNED,
    READ_ONLY,
    UNINITIALIZED,
    NOT_AWAITED,
    RACE,
    BEFORE_GRID_WAIT,
    DIVERGENT,
    DEADLOCK,
    BARRIER,
    MBARRIER,
    LAUNCH,
};

// Accesses to shared memory at one place of the source.
struct SharedAccesses {
    const char* file;
    uint32_t line;
    // Passes through the banks, and how many there had been without conflicts.
    uint64_t num_passes;
    uint64_t num_passes_min;
};

// The places of a kernel's source that were seen, by number.
class Places {
public:
    Places() : table(SIZE, {nullptr, 0, 0}) {}

    uint16_t number(Site site) {
        size_t i = (reinterpret_cast<uintptr_t>(site.file) * 31 + site.line) % SIZE;
        while (table[i].file && !(table[i].file == site.file && table[i].line == site.line)) {
            i = (i + 1) % SIZE;
        }
        if (!table[i].file) {
            // NOTE: place 0 is "unknown"; so is all that does not fit.
            if (sites.size() + 1 >= SIZE / 2) return 0;
            sites.push_back(site);
            table[i] = {site.file, site.line, uint16_t(sites.size())};
        }
        return table[i].number;
    }

    std::string text(uint16_t place) const {
        if (place == 0 || place > sites.size()) return "an unknown place";
        return text(sites[place - 1]);
    }
    static std::string text(Site site) {
        return std::string(site.file) + ":" + std::to_string(site.line);
    }
    Site site(uint16_t place) const { return place == 0 ? Site{"", 0} : sites[place - 1]; }
    size_t size() const { return sites.size() + 1; }

private:
    static constexpr size_t SIZE = 4096;
    struct Entry {
        const char* file;
        uint32_t line;
        uint16_t number;
    };
    std::vector<Entry> table;
    std::vector<Site> sites;
};

// Passes that the accesses of one warp instruction take through 32 banks of 4 bytes.
// `addresses` of the lanes in `mask`; 8 and 16 bytes a lane go in 2 and 4 parts of the warp.
struct Passes {
    uint32_t taken, least;
};
inline Passes count_passes(const uint32_t* addresses, uint32_t mask, uint32_t size) {
    uint32_t lanes = size == 16 ? 8 : size == 8 ? 16 : 32;
    uint32_t words = size < 4 ? 1 : size / 4;
    Passes passes = {0, 0};
    for (uint32_t first = 0; first < 32; first += lanes) {
        uint32_t seen[32][32], counts[32] = {}, most = 0;
        for (uint32_t lane = first; lane < first + lanes; lane++) {
            if (!(mask >> lane & 1)) continue;
            for (uint32_t i = 0; i < words; i++) {
                uint32_t word = addresses[lane] / 4 + i, bank = word % 32;
                uint32_t* end = seen[bank] + counts[bank];
                if (std::find(seen[bank], end, word) != end) continue;
                *end = word;
                most = std::max(most, ++counts[bank]);
            }
        }
        passes.taken += most;
        passes.least += most > 0;
    }
    return passes;
}

// The shared accesses of one warp since its last collective. The n-th access of each lane at a
// place belongs to one instruction.
class BankCounter {
public:
    void access(uint16_t place, uint32_t lane, uint32_t address, uint32_t size) {
        if (records.size() <= place) records.resize(place + 1);
        Record& record = records[place];
        if (record.instructions.empty()) active.push_back(place);
        size_t n = record.counts[lane]++;
        if (record.instructions.size() <= n) record.instructions.push_back({0, size, {}});
        Instruction& instruction = record.instructions[n];
        instruction.mask |= 1u << lane;
        instruction.addresses[lane] = address;
    }

    template <class Add> void flush(Add add) {
        for (uint16_t place : active) {
            Record& record = records[place];
            for (const Instruction& i : record.instructions) {
                add(place, count_passes(i.addresses, i.mask, i.size));
            }
            record.instructions.clear();
            std::fill(record.counts, record.counts + 32, 0);
        }
        active.clear();
    }

private:
    struct Instruction {
        uint32_t mask, size;
        uint32_t addresses[32];
    };
    struct Record {
        std::vector<Instruction> instructions;
        uint32_t counts[32] = {};
    };
    std::vector<Record> records;
    std::vector<uint16_t> active;
};

}  // namespace emulator
