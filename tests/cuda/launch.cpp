// A kernel on the emulator, behind C functions. kernel.inc is its source; KERNEL its name.
#include "emulator.h"
#include "kernel.inc"

#define EXPORTED extern "C" __attribute__((visibility("default")))

static Arguments launched;

EXPORTED const char* run_kernel(const Arguments* arguments, int grid, int cluster, long shared_bytes, int order) {
    launched = *arguments;
    emulator::readable_count = 0;
#if defined INPUT
    for (int i = 0; i < launched.count; i++)
        emulator::allow_reading(launched.projections[i].weight, 2l * CHANNELS * launched.projections[i].outputs);
#elif defined CHANNELS
    emulator::allow_reading(launched.weight, 2l * CHANNELS * launched.outputs);
#elif defined HEADS
    const long cache = 2l * KV_HEADS * launched.capacity * HEAD_DIM;
    emulator::allow_reading(launched.keys, cache), emulator::allow_reading(launched.values, cache);
#endif
    return emulator::run(grid, THREADS, cluster, shared_bytes, order, [] { KERNEL(launched); });
}
EXPORTED long arguments_size() { return sizeof(Arguments); }
#if defined NOTHING_SHARED
EXPORTED long shared_size() { return 0; }
#else
EXPORTED long shared_size() { return sizeof(Shared); }
#endif
