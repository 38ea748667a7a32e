// Runs a CUDA kernel on a CPU, to test what it computes and how its threads wait for each other. Every CUDA thread is a
// fiber that runs until it must wait: at a barrier or a shuffle, or for mail.
//
// Stricter than a GPU where a GPU would hide a mistake: shared memory starts as NaN in every format; what is copied
// asynchronously is NaN until it is awaited, and words arrive only when all that a mailbox expects have been sent; no
// thread of a block may skip a barrier, none of a warp a shuffle. The `order` in which they get their turn (0 first warp to
// last, 1 last to first, others at random) must not change a bit.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define EMULATED 1
#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x; };
static Index threadIdx, blockIdx;

namespace emulator {
constexpr int MOST_FIBERS = 8192, MOST_BLOCKS = MOST_FIBERS / 32, MOST_RANGES = 16, MOST_COPIES = 32;
constexpr size_t STACK = (32 << 10) + 576, GUARD = 4 << 10;
constexpr unsigned char CANARY = 0xa5, POISON = 0xff;

enum State { READY, AT_BARRIER, AT_SHUFFLE, AT_CLUSTER_BARRIER, AT_MAILBOX, EXITED };

// Where `size` threads meet. A thread may go on once `phase` is no longer what it was when the thread arrived.
struct Meeting {
    int size, arrived;
    unsigned phase;
    unsigned arrive() {
        const unsigned before = phase;
        if (++arrived == size) arrived = 0, phase++;
        return before;
    }
};
struct Letter {
    long place;  // in shared memory
    float word;
};
struct Block {
    Meeting barrier;
    char* memory;  // GUARD bytes, the shared memory, GUARD bytes
    char* shared() const { return memory + GUARD; }
    int alive;
    long mailbox;  // its place in shared memory, or -1
    Meeting letters;
    std::vector<Letter> held;  // until all have come
};
struct Warp {
    Meeting shuffle;
    uint32_t values[2][32][6];  // of this exchange and the one before, which some lanes may not have read yet
};
struct Copy {
    char* to;
    const char* from;
    unsigned group;
};
struct Fiber {
    jmp_buf place;
    ucontext_t entry;
    bool started, arrived;  // arrived: at the cluster's barrier, and has not waited there yet
    unsigned cluster_phase, cluster_barriers, groups;
    int thread, block, copies_count;  // block: among those that run
    Copy copies[MOST_COPIES];
    int number() const;
};
struct Waiting {  // of a fiber: what for
    State state;
    unsigned phase;
    Meeting* meeting;
    bool over() const { return state == READY || (state != EXITED && meeting->phase != phase); }
};
struct Range {
    const char *begin, *end;
};

static Fiber* fibers;
static Waiting waiting[MOST_FIBERS];
static char* stacks;
static Fiber* running;
static Block blocks[MOST_BLOCKS];
static Warp warps[MOST_FIBERS / 32];
static Meeting cluster_meetings[MOST_BLOCKS];
static jmp_buf scheduler;
static size_t shared_size;
static int first_block, cluster_size;  // the blocks that run are those from the first on
static uint32_t random_state;
static void (*body)();
static Range readable[MOST_RANGES];
static int readable_count;
static char failure[400];

inline int Fiber::number() const { return (int)(this - fibers); }
static int random_below(int n) {
    random_state = random_state * 1664525u + 1013904223u;
    return (int)((uint64_t)random_state * n >> 32);
}
[[noreturn]] static void leave() { _longjmp(scheduler, 1); }
[[noreturn]] static void fail(const char* what) {
    snprintf(failure, sizeof failure, "%s (block %d, thread %d)", what, first_block + running->block, running->thread);
    leave();
}
__attribute__((noinline)) static void wait(State state, Meeting* meeting, unsigned phase) {
    if (meeting->phase != phase) return;
    waiting[running->number()] = {state, phase, meeting};
    if (_setjmp(running->place) == 0) leave();
}
static void start() {
    body();
    if (running->copies_count) fail("a thread exits before its copies have arrived");
    if (running->arrived) fail("a thread arrives at the cluster's barrier and never waits there");
    waiting[running->number()].state = EXITED;
    blocks[running->block].alive--;
    leave();
}
// Lets a fiber run until it waits or exits.
__attribute__((noinline)) static void resume(Fiber* fiber) {
    running = fiber;
    threadIdx.x = fiber->thread;
    blockIdx.x = first_block + fiber->block;
    waiting[fiber->number()].state = READY;
    if (_setjmp(scheduler)) return;
    if (fiber->started) _longjmp(fiber->place, 1);
    fiber->started = true;
    setcontext(&fiber->entry);
}
// Lets those lanes of a warp that are in the mask run once each; returns whether any could.
static bool turn_of(int warp, bool backwards, uint32_t mask = 0xffffffffu) {
    bool any = false;
    for (int i = 0; i < 32 && !*failure; i++) {
        const int lane = backwards ? 31 - i : i, fiber = 32 * warp + lane;
        if (!(mask >> lane & 1) || !waiting[fiber].over()) continue;
        resume(fibers + fiber);
        any = true;
    }
    return any;
}
// Each warp runs as far as it can, then the next.
static void run_in_order(int warp_count, bool backwards) {
    for (bool progress = true; progress && !*failure;) {
        progress = false;
        for (int i = 0; i < warp_count; i++)
            while (turn_of(backwards ? warp_count - 1 - i : i, backwards)) progress = true;
    }
}
// One block at random after the other has some turns, in each of which one warp at random runs; in the last turn, only
// some of its lanes do.
static void run_at_random(int block_count, int block_warps) {
    const int warp_count = block_count * block_warps;
    int block = 0, turns = 0;
    for (bool progress = true; progress && !*failure;) {
        if (turns == 0) block = random_below(block_count), turns = 1 << random_below(10);
        const uint32_t mask = --turns ? 0xffffffffu : random_below(1 << 30) * 5u;
        progress = false;
        const int own = block_warps * block, offset = random_below(block_warps);
        for (int i = 0; i < block_warps && !progress; i++)
            progress = turn_of(own + (offset + i) % block_warps, false, mask);
        if (progress) continue;
        turns = 0;
        for (int i = 0; i < warp_count && !progress; i++)  // the other blocks first
            progress = turn_of((own + block_warps + i) % warp_count, false);
    }
}
static void check_canaries(const Block& block) {
    for (size_t i = 0; i < GUARD; i++) {
        const bool below = (unsigned char)block.memory[i] != CANARY;
        if (!below && (unsigned char)block.shared()[shared_size + i] == CANARY) continue;
        snprintf(failure, sizeof failure, "block %d writes %s its shared memory", first_block + int(&block - blocks),
                 below ? "below" : "beyond");
        return;
    }
}
static void check_exited(int fiber_count) {
    int counts[EXITED + 1] = {};
    for (int i = 0; i < fiber_count; i++) counts[waiting[i].state]++;
    if (counts[EXITED] == fiber_count || *failure) return;
    snprintf(failure, sizeof failure,
             "deadlock from block %d on: %d threads wait at __syncthreads, %d at a shuffle, %d at the cluster's "
             "barrier, %d for mail; %d have exited",
             first_block, counts[AT_BARRIER], counts[AT_SHUFFLE], counts[AT_CLUSTER_BARRIER], counts[AT_MAILBOX],
             counts[EXITED]);
}
// Runs blocks from `first_block` on together.
static void run_blocks(int block_count, int threads, int order) {
    const int fiber_count = block_count * threads, warp_count = fiber_count / 32;
    for (int i = 0; i < block_count; i++) {
        Block& block = blocks[i];
        memset(block.memory, CANARY, shared_size + 2 * GUARD);
        memset(block.shared(), POISON, shared_size);
        block.barrier = {threads, 0, 0};
        block.alive = threads;
        block.mailbox = -1, block.held.clear();
        cluster_meetings[i / cluster_size] = {cluster_size * threads, 0, 0};
    }
    for (int i = 0; i < warp_count; i++) warps[i].shuffle = {32, 0, 0};
    for (int i = 0; i < fiber_count; i++) {
        Fiber& fiber = fibers[i];
        waiting[i].state = READY;
        fiber.started = fiber.arrived = false;
        fiber.cluster_barriers = fiber.groups = 0, fiber.copies_count = 0;
        fiber.thread = i % threads, fiber.block = i / threads;
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = stacks + i * STACK;
        fiber.entry.uc_stack.ss_size = STACK;
        fiber.entry.uc_link = nullptr;
        makecontext(&fiber.entry, start, 0);
    }
    if (order > 1)
        run_at_random(block_count, threads / 32);
    else
        run_in_order(warp_count, order == 1);
    for (int i = 0; i < block_count; i++) check_canaries(blocks[i]);
    check_exited(fiber_count);
}
// Runs `grid` blocks: cluster after cluster or, at random, as many together as there are fibers for. Returns what went
// wrong, or "".
static const char* run(int grid, int threads, int cluster, size_t shared_bytes, int order, void (*kernel)()) {
    *failure = 0;
    if (threads % 32 || threads > 1024 || cluster > 8 || grid % cluster) return "a launch that no GPU accepts";
    if (!fibers) {
        fibers = (Fiber*)malloc(sizeof(Fiber) * MOST_FIBERS);
        stacks = (char*)malloc(STACK * MOST_FIBERS);
    }
    body = kernel, cluster_size = cluster, shared_size = (shared_bytes + 15) / 16 * 16, random_state = order;
    const int most = order > 1 ? MOST_FIBERS / (cluster * threads) * cluster : cluster;
    const int together = grid < most ? grid : most, rounds = (grid + together - 1) / together;
    for (int i = 0; i < together; i++)
        blocks[i].memory = (char*)aligned_alloc(256, (shared_size + 2 * GUARD + 255) / 256 * 256);
    for (int i = 0; i < rounds && !*failure; i++) {
        first_block = together * (order == 1 ? rounds - 1 - i : i);
        run_blocks(grid - first_block < together ? grid - first_block : together, threads, order);
    }
    for (int i = 0; i < together; i++) free(blocks[i].memory);
    return failure;
}

static uint4* shared_memory() { return (uint4*)blocks[running->block].shared(); }
static void check_shared(const void* address, size_t bytes) {
    const char* shared = blocks[running->block].shared();
    if ((const char*)address < shared || (const char*)address + bytes > shared + shared_size)
        fail("a copy or a message goes to an address out of shared memory");
}
// Asynchronous copies may read from there.
static void allow_reading(const void* begin, size_t bytes) {
    readable[readable_count++] = {(const char*)begin, (const char*)begin + bytes};
}
using Values = const uint32_t[32][6];
// What every lane of the warp brings.
template <int COUNT>
Values& exchange(const uint32_t (&own)[COUNT]) {
    Warp& warp = warps[running->number() / 32];
    uint32_t(&values)[32][6] = warp.values[warp.shuffle.phase % 2];
    memcpy(values[running->thread % 32], own, 4 * COUNT);
    wait(AT_SHUFFLE, &warp.shuffle, warp.shuffle.arrive());
    return values;
}
template <class T>
T shuffle(uint32_t mask, T value, int from) {
    static_assert(sizeof(T) == 4, "words only");
    if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
    uint32_t bits[1];
    memcpy(bits, &value, 4);
    memcpy(&value, exchange(bits)[from], 4);
    return value;
}
}  // namespace emulator

static inline void __syncthreads() {
    emulator::Meeting& barrier = emulator::blocks[emulator::running->block].barrier;
    emulator::wait(emulator::AT_BARRIER, &barrier, barrier.arrive());
}
static inline void __syncwarp() { emulator::exchange<1>({0}); }
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int step) {
    return emulator::shuffle(mask, value, threadIdx.x % 32 ^ step);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int from) {
    return emulator::shuffle(mask, value, from % 32);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int step) {
    const int lane = threadIdx.x % 32;
    return emulator::shuffle(mask, value, lane >= step ? lane - step : lane);
}
static inline uint32_t __ballot_sync(uint32_t mask, bool vote) {
    if (mask != 0xffffffffu) emulator::fail("a vote of a part of a warp");
    emulator::Values& votes = emulator::exchange<1>({vote});
    uint32_t lanes = 0;
    for (int i = 0; i < 32; i++) lanes |= votes[i][0] << i;
    return lanes;
}
static inline int __popc(uint32_t v) { return __builtin_popcount(v); }
static inline float __uint_as_float(uint32_t v) {
    float f;
    memcpy(&f, &v, 4);
    return f;
}
static inline uint32_t __float_as_uint(float f) {
    uint32_t v;
    memcpy(&v, &f, 4);
    return v;
}
static inline uint32_t atomicAdd(uint32_t* address, uint32_t v) {
    const uint32_t old = *address;
    *address += v;
    return old;
}
static inline void __threadfence() {}
#define rsqrtf(x) (1.f / std::sqrt((float)(x)))  // some C libraries declare these two names
#define __expf(x) std::exp((float)(x))

// What common.cuh writes in PTX.

static inline float to_float(uint16_t bits) {
#if BF16
    return __uint_as_float((uint32_t)bits << 16);
#else
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = (uint32_t)(bits & 0x7fff) << 13;
    if (magnitude >= 0x0f800000) return __uint_as_float(sign | magnitude | 0x7f800000);  // infinity, NaN
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
#endif
}
static inline uint16_t to_bits(float f) {  // to nearest, ties to even
    if (f != f) return 0x7fff;
    const uint32_t v = __float_as_uint(f);
#if BF16
    return (uint16_t)((v + 0x7fff + (v >> 16 & 1)) >> 16);
#else
    const uint32_t sign = v >> 16 & 0x8000, magnitude = v & 0x7fffffff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000)  // subnormal: the sum is rounded to a multiple of 2^-24
        return sign | (__float_as_uint(__uint_as_float(magnitude) + .5f) - 0x3f000000);
    return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
#endif
}
static inline uint32_t bits_above(float threshold) {
#if BF16
    return (__float_as_uint(threshold) >> 16 & 0x7fff) + 1;
#else
    const uint16_t bits = to_bits(threshold) & 0x7fff;
    return (uint32_t)bits + (to_float(bits) > threshold ? 0 : 1);
#endif
}

static inline void start_copy(uint4* shared, const char* source) {
    emulator::Fiber& fiber = *emulator::running;
    emulator::check_shared(shared, 16);
    if ((uintptr_t)source % 16) emulator::fail("a copy from an address that is no multiple of 16");
    bool allowed = false;
    for (int i = 0; i < emulator::readable_count; i++)
        allowed |= source >= emulator::readable[i].begin && source + 16 <= emulator::readable[i].end;
    if (!allowed) emulator::fail("a copy from memory that is not a weight's");
    if (fiber.copies_count == emulator::MOST_COPIES) emulator::fail("too many copies on their way");
    memset(shared, emulator::POISON, 16);
    fiber.copies[fiber.copies_count++] = {(char*)shared, source, fiber.groups};
}
static inline void end_group() { emulator::running->groups++; }
template <int LATER>
void await_groups() {
    emulator::Fiber& fiber = *emulator::running;
    int kept = 0;
    for (int i = 0; i < fiber.copies_count; i++) {
        const emulator::Copy copy = fiber.copies[i];
        if (copy.group + LATER < fiber.groups)
            memcpy(copy.to, copy.from, 16);
        else
            fiber.copies[kept++] = copy;
    }
    fiber.copies_count = kept;
}
template <bool TRANSPOSED>
void load_pairs(uint32_t (&pairs)[4], const uint4* row) {
    emulator::check_shared(row, 16);
    const char* shared = (char*)emulator::shared_memory();
    emulator::Values& rows = emulator::exchange<1>({uint32_t((const char*)row - shared)});
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) {
        uint32_t two[2];
        for (int k = 0; k < 2; k++) {
            const int r = TRANSPOSED ? lane % 4 * 2 + k : lane / 4, c = TRANSPOSED ? lane / 4 : lane % 4 * 2 + k;
            two[k] = ((const uint16_t*)(shared + rows[8 * i + r][0]))[c];
        }
        pairs[i] = two[0] | two[1] << 16;
    }
}
static inline void load_matrices(uint32_t (&pairs)[4], const uint4* row) { load_pairs<false>(pairs, row); }
static inline void load_transposed(uint32_t (&pairs)[4], const uint4* row) { load_pairs<true>(pairs, row); }
static inline uint32_t transposed(uint32_t pair) {
    emulator::Values& pairs = emulator::exchange<1>({pair});
    const int lane = threadIdx.x % 32;
    uint32_t two[2];
    for (int k = 0; k < 2; k++) two[k] = pairs[(lane % 4 * 2 + k) * 4 + lane / 8][0] >> lane / 4 % 2 * 16 & 0xffff;
    return two[0] | two[1] << 16;
}
template <int BS>
void multiply_matrices(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[BS]) {
    emulator::Values& pairs = emulator::exchange<6>({a[0], a[1], a[2], a[3], b[0], b[1]});
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const uint32_t one = pairs[lane / 4 * 4 + k % 8 / 2][i / 2 + k / 8 * 2],
                           two = pairs[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2][4 + k / 8];
            sums[i] += to_float(uint16_t(one >> k % 2 * 16)) * to_float(uint16_t(two >> k % 2 * 16));
        }
}
static inline void prefetch_l2(const void*) {}
static inline float load_fresh(const float* address) { return *address; }
static inline float4 load_fresh(const float4* address) { return *address; }
static inline void allow_next_kernel() {}
static inline void await_previous_kernel() {}

static inline void cluster_arrive() {
    emulator::Fiber& fiber = *emulator::running;
    if (fiber.arrived) emulator::fail("a thread arrives twice at the cluster's barrier");
    fiber.arrived = true;
    fiber.cluster_phase = emulator::cluster_meetings[fiber.block / emulator::cluster_size].arrive();
}
static inline void cluster_wait() {
    emulator::Fiber& fiber = *emulator::running;
    if (!fiber.arrived) emulator::fail("a thread waits at the cluster's barrier and has not arrived");
    emulator::Meeting* meeting = &emulator::cluster_meetings[fiber.block / emulator::cluster_size];
    emulator::wait(emulator::AT_CLUSTER_BARRIER, meeting, fiber.cluster_phase);
    fiber.arrived = false;
    fiber.cluster_barriers++;
}
struct Mailbox {
    uint64_t barrier;
    void open(uint32_t bytes) {
        emulator::Fiber& fiber = *emulator::running;
        emulator::Block& own = emulator::blocks[fiber.block];
        emulator::check_shared(this, sizeof *this);
        if (fiber.arrived || fiber.cluster_barriers) emulator::fail("a mailbox is opened too late");
        if (own.mailbox >= 0) emulator::fail("a mailbox is opened twice");
        own.mailbox = (char*)this - own.shared();
        own.letters = {int(bytes / 4), 0, bytes == 0};  // none, and all have come
    }
    void send(float* place, float word) const {
        emulator::Fiber& fiber = *emulator::running;
        const char* own = emulator::blocks[fiber.block].shared();
        emulator::Block& to = emulator::blocks[fiber.block / emulator::cluster_size * emulator::cluster_size];
        emulator::check_shared(place, 4);
        if (fiber.cluster_barriers == 0) emulator::fail("a message to a block that may not have started");
        if (to.alive == 0) emulator::fail("a message to a block that has exited");
        if (to.mailbox != (char*)this - own) emulator::fail("a message to a mailbox that is not open");
        if (to.letters.phase) emulator::fail("a message that the mailbox does not expect");
        to.held.push_back({(char*)place - own, word});
        to.letters.arrive();
        if (to.letters.phase == 0) return;
        for (const emulator::Letter& letter : to.held) *(float*)(to.shared() + letter.place) = letter.word;
    }
    void await() const {
        emulator::Block& own = emulator::blocks[emulator::running->block];
        if (own.mailbox != (char*)this - own.shared()) emulator::fail("a thread awaits a mailbox that is not open");
        emulator::wait(emulator::AT_MAILBOX, &own.letters, 0);
    }
};
