// The emulator: device memory and launches, as C functions for Rust. One translation unit.

#include "access.cpp"
#include "block.cpp"
#include "device.cpp"

using namespace emulator;

namespace {

struct Emulator {
    GlobalMemory memory;
    Random random;
    Stacks stacks;
    Tick tick = 0;
    // Of the last launch.
    std::string message;
    std::vector<SharedAccesses> accesses;

    explicit Emulator(uint64_t seed) : random(seed) {}
};

struct Report {
    uint32_t fault;
    uint32_t grid_waited;
    const char* message;
    const SharedAccesses* accesses;
    uint64_t num_accesses;
    uint64_t num_mma;
};

struct LaunchRequest {
    const char* symbol;
    const Kernel* kernel;
    const void* params;
    uint32_t grid_x, grid_y, num_threads, shared_bytes;
};

void run_blocks(Emulator& emulator, Launch& launch, const LaunchRequest& request) {
    Block block(launch, request.num_threads, request.shared_bytes);
    std::vector<uint32_t> order(size_t(request.grid_x) * request.grid_y);
    for (size_t i = 0; i < order.size(); i++) order[i] = uint32_t(i);
    launch.random->shuffle(order);
    block.base = launch.base;
    for (uint32_t i : order) {
        block.run(i % request.grid_x, i / request.grid_x);
        if (launch.fault != Fault::NONE) break;
        block.base = block.max_tick + 1;
    }
    emulator.tick = block.max_tick + 1;
}

}  // namespace

extern "C" {

Emulator* emulator_new(uint64_t seed) { return new Emulator(seed); }
void emulator_delete(Emulator* emulator) { delete emulator; }

uint64_t emulator_alloc(Emulator* emulator, uint64_t num_bytes, uint32_t access) {
    return emulator->memory.allocate(num_bytes, Access(access));
}

// False where the bytes are not inside a live allocation.
bool emulator_write(Emulator* emulator, uint64_t address, const uint8_t* bytes, uint64_t size) {
    Allocation* allocation = emulator->memory.find(address);
    int64_t offset = GlobalMemory::offset(address);
    if (!allocation || !allocation->live) return false;
    if (!GlobalMemory::within(*allocation, offset, size)) return false;
    if (size == 0) return true;
    memcpy(&allocation->bytes[size_t(offset)], bytes, size);
    memset(&allocation->states[size_t(offset)], READY, size);
    return true;
}

// How many of the bytes, from the first, are there and were written; those are read.
uint64_t emulator_read(Emulator* emulator, uint64_t address, uint8_t* bytes, uint64_t size) {
    Allocation* allocation = emulator->memory.find(address);
    int64_t offset = GlobalMemory::offset(address);
    if (!allocation || !allocation->live) return 0;
    if (!GlobalMemory::within(*allocation, offset, size)) return 0;
    uint64_t count = 0;
    while (count < size && allocation->states[size_t(offset) + count] == READY) count++;
    if (count) memcpy(bytes, &allocation->bytes[size_t(offset)], count);
    return count;
}

// What was written is uninitialized again.
bool emulator_poison(Emulator* emulator, uint64_t address, uint64_t size) {
    Allocation* allocation = emulator->memory.find(address);
    int64_t offset = GlobalMemory::offset(address);
    if (!allocation || !allocation->live) return false;
    if (!GlobalMemory::within(*allocation, offset, size)) return false;
    if (size == 0) return true;
    memset(&allocation->bytes[size_t(offset)], POISON, size);
    memset(&allocation->states[size_t(offset)], POISONED, size);
    return true;
}

bool emulator_free(Emulator* emulator, uint64_t address) {
    Allocation* allocation = emulator->memory.find(address);
    if (!allocation || !allocation->live || GlobalMemory::offset(address) != 0) return false;
    allocation->live = false;
    allocation->bytes = {};
    allocation->states = {};
    allocation->cells = {};
    return true;
}

void emulator_launch(Emulator* emulator, const LaunchRequest* request, Report* report) {
    // NOTE: a launch takes a few ticks for each time that its blocks synchronize.
    if (emulator->tick > ~Tick(0) / 2) {
        emulator->memory.forget_accesses();
        emulator->tick = 0;
    }
    Launch launch;
    launch.symbol = request->symbol;
    launch.kernel = request->kernel;
    launch.params = request->params;
    launch.grid = {request->grid_x, request->grid_y};
    launch.memory = &emulator->memory;
    launch.random = &emulator->random;
    launch.stacks = &emulator->stacks;
    launch.base = emulator->tick;
    if (emulator->stacks.get(request->num_threads - 1)) {
        run_blocks(*emulator, launch, *request);
    } else {
        launch.fault = Fault::LAUNCH;
        launch.message = "no memory for the stacks of the threads";
    }
    emulator->message = launch.message;
    emulator->accesses.clear();
    for (const SharedAccesses& access : launch.accesses) {
        if (access.file) emulator->accesses.push_back(access);
    }
    *report = {uint32_t(launch.fault),     launch.grid_waited,
               emulator->message.c_str(),  emulator->accesses.data(),
               emulator->accesses.size(),  launch.num_mma};
}

}  // extern "C"
