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

// The first lane of `thread` or of a later one.
template <class Lanes> auto find(Lanes& lanes, uint32_t thread) {
    return std::lower_bound(
        lanes.begin(), lanes.end(), thread,
        [](const LaneTick& lane, uint32_t wanted) { return lane.thread < wanted; });
}

// A set of accesses: of every warp up to a tick, and of single lanes beyond that.
struct Coverage {
    Tick all[SOURCES_MAX] = {};
    // Sorted by thread.
    std::vector<LaneTick> lanes;

    bool covers(uint32_t source, Tick tick) const { return all[source] >= tick; }

    bool covers_lane(uint32_t thread, Tick tick) const {
        if (covers(thread / LANES, tick)) return true;
        auto lane = find(lanes, thread);
        return lane != lanes.end() && lane->thread == thread && lane->tick >= tick;
    }

    void add_lane(uint32_t thread, Tick tick) {
        if (covers(thread / LANES, tick)) return;
        auto lane = find(lanes, thread);
        if (lane != lanes.end() && lane->thread == thread) lane->tick = std::max(lane->tick, tick);
        else lanes.insert(lane, {thread, tick});
    }

    void add(const Coverage& other) {
        for (uint32_t i = 0; i < SOURCES_MAX; i++) all[i] = std::max(all[i], other.all[i]);
        for (const LaneTick& lane : other.lanes) add_lane(lane.thread, lane.tick);
        drop_covered();
    }

    // 32 lanes at one tick are their warp; lanes known no further than their warp say nothing.
    void drop_covered() {
        if (lanes.empty()) return;
        uint32_t counts[WARPS_MAX] = {};
        Tick lowest[WARPS_MAX];
        for (const LaneTick& lane : lanes) {
            uint32_t warp = lane.thread / LANES;
            lowest[warp] = counts[warp] ? std::min(lowest[warp], lane.tick) : lane.tick;
            counts[warp]++;
        }
        for (uint32_t warp = 0; warp < WARPS_MAX; warp++) {
            if (counts[warp] == LANES) all[warp] = std::max(all[warp], lowest[warp]);
        }
        auto covered = [this](const LaneTick& lane) {
            return covers(lane.thread / LANES, lane.tick);
        };
        lanes.erase(std::remove_if(lanes.begin(), lanes.end(), covered), lanes.end());
    }
};

// What a thread knows.
struct Clock : Coverage {
    // Known of every warp.
    Tick floor = 0;
    // The part of it that a fence has made visible to the whole device.
    Coverage published;
    bool has_published = false;
    // Releases of other blocks that were acquired, sorted.
    std::vector<uint32_t> releases;
    bool grid_waited = false;

    void start(Tick base) {
        *this = Clock();
        floor = base;
        std::fill(all, all + SOURCES_MAX, base);
    }

    void update_floor(uint32_t num_warps) { floor = *std::min_element(all, all + num_warps); }

    void add_release(uint32_t release) {
        auto place = std::lower_bound(releases.begin(), releases.end(), release);
        if (place == releases.end() || *place != release) releases.insert(place, release);
    }

    void join(const Clock& other) {
        add(other);
        if (other.has_published) published.add(other.published);
        has_published |= other.has_published;
        for (uint32_t release : other.releases) add_release(release);
        grid_waited |= other.grid_waited;
    }
};

}  // namespace emulator
