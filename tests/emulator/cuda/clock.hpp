// Who knows of whose accesses: vector clocks.
//
// Each thread has a tick, which grows where it synchronizes. An access leaves a stamp (tick,
// thread, place). A thread's clock says up to which tick it knows the accesses of every warp, and
// of single lanes beyond that. An earlier access is ordered before a thread's next one where the
// clock covers its stamp.

#pragma once
#include <stdint.h>

#include <algorithm>
#include <vector>

namespace emulator {

constexpr uint32_t LANES = 32;
constexpr uint32_t WARPS_MAX = 32;
constexpr uint32_t MBARRIERS_MAX = 64;
// A clock's sources: warps, then the data that bulk copies bring for an mbarrier.
constexpr uint32_t SOURCES_MAX = WARPS_MAX + MBARRIERS_MAX;

// tick (32 bits), place (16), who (16): a thread or an mbarrier, and flags.
using Stamp = uint64_t;
using Tick = uint32_t;

constexpr uint32_t WHO = 0x3ff;
// Several lanes of the warp.
constexpr uint32_t SEVERAL = 0x400;
constexpr uint32_t ATOMIC = 0x800;
constexpr uint32_t ASYNC = 0x1000;
// Threads of other blocks, too.
constexpr uint32_t FOREIGN = 0x2000;

inline Stamp make_stamp(Tick tick, uint16_t place, uint32_t who) {
    return uint64_t(tick) << 32 | uint64_t(place) << 16 | who;
}
inline Tick tick_of(Stamp stamp) { return stamp >> 32; }
inline uint16_t place_of(Stamp stamp) { return stamp >> 16; }
inline uint32_t flags_of(Stamp stamp) { return stamp & 0xffff; }
inline uint32_t who_of(Stamp stamp) { return stamp & WHO; }

struct LaneTick {
    uint32_t thread;
    Tick tick;
};

struct Clock {
    // Known of every warp.
    Tick floor = 0;
    Tick all[SOURCES_MAX] = {};
    std::vector<LaneTick> lanes;
    // Releases of other blocks that were acquired, sorted.
    std::vector<uint32_t> releases;
    bool grid_waited = false;

    void start(Tick base) {
        floor = base;
        std::fill(all, all + SOURCES_MAX, base);
        lanes.clear();
        releases.clear();
        grid_waited = false;
    }

    void update_floor(uint32_t num_warps) { floor = *std::min_element(all, all + num_warps); }

    bool covers(uint32_t source, Tick tick) const { return all[source] >= tick; }

    bool covers_lane(uint32_t thread, Tick tick) const {
        if (covers(thread / LANES, tick)) return true;
        for (const LaneTick& lane : lanes) {
            if (lane.thread == thread && lane.tick >= tick) return true;
        }
        return false;
    }

    void add_lane(uint32_t thread, Tick tick) {
        if (covers(thread / LANES, tick)) return;
        for (LaneTick& lane : lanes) {
            if (lane.thread == thread) {
                lane.tick = std::max(lane.tick, tick);
                return;
            }
        }
        lanes.push_back({thread, tick});
    }

    void add_release(uint32_t release) {
        auto place = std::lower_bound(releases.begin(), releases.end(), release);
        if (place == releases.end() || *place != release) releases.insert(place, release);
    }

    void join(const Clock& other) {
        for (uint32_t i = 0; i < SOURCES_MAX; i++) all[i] = std::max(all[i], other.all[i]);
        for (const LaneTick& lane : other.lanes) add_lane(lane.thread, lane.tick);
        for (uint32_t release : other.releases) add_release(release);
        grid_waited |= other.grid_waited;
        drop_covered();
    }

    // Lanes that are known no further than their warp; 32 lanes at the same tick are their warp.
    void drop_covered() {
        if (lanes.empty()) return;
        for (uint32_t warp = 0; warp < WARPS_MAX; warp++) raise_warp(warp);
        auto covered = [&](const LaneTick& lane) {
            return covers(lane.thread / LANES, lane.tick);
        };
        lanes.erase(std::remove_if(lanes.begin(), lanes.end(), covered), lanes.end());
    }

private:
    void raise_warp(uint32_t warp) {
        uint32_t count = 0;
        Tick lowest = ~Tick(0);
        for (const LaneTick& lane : lanes) {
            if (lane.thread / LANES != warp) continue;
            count++;
            lowest = std::min(lowest, lane.tick);
        }
        if (count == LANES) all[warp] = std::max(all[warp], lowest);
    }
};

}  // namespace emulator
