// What the CUDA kernels share: 16-bit floating point, copies that bypass registers, sums over a block, the list of kept
// channels, the stream over their weights, and the sums over a tile. Compiled at run time by NVRTC, without any header.
//
// Macros: BF16 (else fp16), THREADS per block, DEPTH (16-byte loads that a thread keeps in flight), CLUSTER (blocks
// that share an output tile).
//
// Weights are channel-major [K, N]. A cluster of blocks owns a tile of columns, in chunks of 8 (16 bytes): each of its
// blocks takes an equal part of the K channels, lists those that are kept, and streams their weights; a warp reads one
// or more whole rows of the tile at a time. The sums of warps and blocks are added in a fixed order, without atomics
// or workspace: the same bits every run.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARPS = THREADS / 32;
constexpr u32 ALL = 0xffffffffu;

#ifndef EMULATED  // the tests run these kernels on a CPU with their own versions of what follows

__device__ __forceinline__ float to_float(u16 bits) {
#if BF16
    return __uint_as_float((u32)bits << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
#endif
}

__device__ __forceinline__ u16 to_bits(float f) {
    u16 bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#endif
    return bits;
}

// Weights, 16 bytes from memory to shared memory, past L1. Copies form groups, awaited in order.
__device__ __forceinline__ void start_copy(uint4* shared, const char* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(source)
                 : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATER>
__device__ __forceinline__ void await_groups() {  // all groups but the LATER last ones
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// What other blocks wrote: past L1.
__device__ __forceinline__ float load_fresh(const float* address) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
    return v;
}
__device__ __forceinline__ float4 load_fresh(const float4* address) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

// Dependent launch: the kernel after this one may be set up; the results of the one before are needed from here on.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if CLUSTER > 1
// Blocks of a cluster: a barrier in two halves.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// A block's mailbox for words that other blocks of its cluster send, `bytes` altogether. One thread opens it, before
// the block arrives at the cluster's barrier; the others send after they have waited there, and may then exit.
struct Mailbox {
    u64 barrier;
    __device__ __forceinline__ u32 address() const { return (u32)__cvta_generic_to_shared(&barrier); }
    __device__ __forceinline__ void open(u32 bytes) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address()) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
    }
    // A word for the memory of block 0, at the place that it has here.
    __device__ __forceinline__ void send(float* place, float v) const {
        u32 there, barrier_there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"((u32)__cvta_generic_to_shared(place)));
        asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(barrier_there) : "r"(address()));
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
                     ::"r"(there), "f"(v), "r"(barrier_there)
                     : "memory");
    }
    __device__ __forceinline__ void await() const {
        asm volatile(
            "{\n.reg .pred done;\nagain:\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
            "@!done bra again;\n}" ::"r"(address())
            : "memory");
    }
};
#else
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
struct Mailbox {
    __device__ __forceinline__ void open(u32) {}
    __device__ __forceinline__ void send(float*, float) const {}
    __device__ __forceinline__ void await() const {}
};
#endif

// Four 8 x 8 matrices of 16-bit numbers; a lane gives the address of one of their 32 rows. Lane l gets of each the
// numbers [l / 4][2 (l % 4)] and [l / 4][2 (l % 4) + 1]; of the transposed, [2 (l % 4)][l / 4] and [2 (l % 4) + 1][l / 4].
__device__ __forceinline__ void load_matrices(u32 (&pairs)[4], const uint4* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&pairs)[4], const uint4* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}
// Such a matrix, transposed.
__device__ __forceinline__ u32 transposed(u32 pair) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}
// sums [16, 8] += a [16, 16] b [16, 8]: a as load_matrices gives its quarters, [0, 0], [8, 0], [0, 8] and [8, 8], and b as
// load_transposed gives its halves, first of BS. Of the sums, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4)
// and the next.
template <int BS>
__device__ __forceinline__ void multiply_matrices(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[BS]) {
#if BF16
#define MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif
    asm volatile(MULTIPLY " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The magnitude, as bits, of the smallest 16-bit number above a threshold of at least 0.
__device__ __forceinline__ u32 bits_above(float threshold) {
#if BF16
    return (__float_as_uint(threshold) >> 16 & 0x7fff) + 1;
#else
    u16 bits;
    asm("cvt.rz.f16.f32 %0, %1;" : "=h"(bits) : "f"(threshold));
    return (u32)(bits & 0x7fff) + 1;
#endif
}

#endif

__device__ __forceinline__ u16 low(u32 pair) { return (u16)(pair & 0xffffu); }
__device__ __forceinline__ u16 high(u32 pair) { return (u16)(pair >> 16); }
__device__ __forceinline__ u32 pair_of(u16 first, u16 second) { return (u32)first | ((u32)second << 16); }
__device__ __forceinline__ float rounded(float f) { return to_float(to_bits(f)); }

__device__ __forceinline__ void multiply_add(float (&sums)[8], uint4 weights, float x) {
    sums[0] += to_float(low(weights.x)) * x;
    sums[1] += to_float(high(weights.x)) * x;
    sums[2] += to_float(low(weights.y)) * x;
    sums[3] += to_float(high(weights.y)) * x;
    sums[4] += to_float(low(weights.z)) * x;
    sums[5] += to_float(high(weights.z)) * x;
    sums[6] += to_float(low(weights.w)) * x;
    sums[7] += to_float(high(weights.w)) * x;
}

__device__ __forceinline__ float warp_sum(float v) {
    for (int step = 16; step > 0; step >>= 1) v += __shfl_xor_sync(ALL, v, step);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
    for (int step = 16; step > 0; step >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL, v, step));
    return v;
}

// The sum of v over the block; scratch [WARPS] must not be in use.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    v = warp_sum(v);
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    return warp_sum(lane < WARPS ? scratch[lane] : 0.f);
}

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int divided_up(int a, int b) { return (a + b - 1) / b; }

// One threshold per projection or, if each, one per channel. Dropped: |x| <= threshold, so NaN is kept.
struct Threshold {
    const float* value;
    bool each;
    float first;
    __device__ __forceinline__ Threshold(const float* value, bool each) : value(value), each(each), first(value[0]) {}
    // Whether everything is kept, known without looking at x.
    __device__ __forceinline__ bool keeps_all() const { return !each && !(first >= 0.f); }
    __device__ __forceinline__ static u32 least_kept(float threshold) {
        return threshold >= 0.f ? bits_above(threshold) : 0;
    }
    // The least magnitudes to keep of channels `from` to from + 3.
    __device__ __forceinline__ uint2 bounds(int from) const {
        const u32 least = 0x00010001u * least_kept(first);
        if (!each) return make_uint2(least, least);
        const float* t = value + from;
        return make_uint2(least_kept(t[0]) | least_kept(t[1]) << 16, least_kept(t[2]) | least_kept(t[3]) << 16);
    }
};
// For two 16-bit numbers and two least magnitudes to keep (at most 0x8000): 1 in bits 0 and 16 where kept.
__device__ __forceinline__ u32 kept_of(u32 numbers, u32 least) {
    return ((((numbers & 0x7fff7fffu) | 0x80008000u) - least) >> 15) & 0x00010001u;
}
__device__ __forceinline__ uint2 kept_of(uint2 numbers, uint2 least) {
    return make_uint2(kept_of(numbers.x, least.x), kept_of(numbers.y, least.y));
}
// As the bits of one number, the first the lowest.
__device__ __forceinline__ u32 nibble_of(uint2 kept) {
    return (kept.x | kept.x >> 15 | kept.y << 2 | kept.y >> 13) & 15;
}

// The 16-bit inputs that a thread holds of K channels: VECTORS of 4 channels, vector v from
// channel(v) = 4 (threadIdx.x + v THREADS) on.
template <int K>
struct Inputs {
    static constexpr int VECTORS = divided_up(K / 4, THREADS);
    static_assert(K % 4 == 0 && VECTORS <= 8, "more threads are needed");
    uint2 pairs[VECTORS];
    __device__ __forceinline__ static int channel(int v) { return 4 * ((int)threadIdx.x + v * THREADS); }
    __device__ __forceinline__ u16 get(int v, int i) const {
        const u32 pair = i < 2 ? pairs[v].x : pairs[v].y;
        return i % 2 ? high(pair) : low(pair);
    }
    // Vector v becomes value(i), rounded, for i = 0 ... 3.
    template <class Value>
    __device__ __forceinline__ void set(int v, Value value) {
        const u16 bits[4] = {to_bits(value(0)), to_bits(value(1)), to_bits(value(2)), to_bits(value(3))};
        pairs[v] = make_uint2(pair_of(bits[0], bits[1]), pair_of(bits[2], bits[3]));
    }
    __device__ __forceinline__ void read(const u16* values) {
#pragma unroll
        for (int v = 0; v < VECTORS; v++)
            if (channel(v) < K) pairs[v] = *(const uint2*)(values + channel(v));
    }
};

// x / rms(x) * norm, rounded where models round: of K channels, the part that block `rank` of the cluster takes. Awaits the
// previous kernel, of which x is a result; scratch [WARPS] must not be in use.
template <int K>
__device__ __forceinline__ Inputs<K / CLUSTER> normalized(const u16* all, const u16* norms, float eps, int rank,
                                                          float* scratch) {
    using PartInputs = Inputs<K / CLUSTER>;
    constexpr int PART = K / CLUSTER;
    PartInputs parts[CLUSTER], norm, x;
    norm.read(norms + rank * PART);
    await_previous_kernel();
#pragma unroll
    for (int part = 0; part < CLUSTER; part++) parts[part].read(all + part * PART);
    float squares = 0.f;
#pragma unroll
    for (int part = 0; part < CLUSTER; part++) {
        if (part == rank) x = parts[part];
#pragma unroll
        for (int v = 0; v < PartInputs::VECTORS; v++)
            if (PartInputs::channel(v) < PART)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float f = to_float(parts[part].get(v, i));
                    squares += f * f;
                }
    }
    const float scale = rsqrtf(block_sum(squares, scratch) / K + eps);
#pragma unroll
    for (int v = 0; v < PartInputs::VECTORS; v++)
        x.set(v, [&](int i) { return to_float(norm.get(v, i)) * rounded(to_float(x.get(v, i)) * scale); });
    return x;
}

// Exclusive sums of `mine` over the block's threads, and the total. scratch [WARPS] must not be in use.
struct Scan {
    u32 before, total;
    __device__ __forceinline__ Scan(u32 mine, u32* scratch) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        u32 upto = mine;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
            const u32 other = __shfl_up_sync(ALL, upto, step);
            if (lane >= step) upto += other;
        }
        if (lane == 31) scratch[warp] = upto;
        __syncthreads();
        u32 warps = lane < WARPS ? scratch[lane] : 0;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
            const u32 other = __shfl_up_sync(ALL, warps, step);
            if (lane >= step) warps += other;
        }
        total = __shfl_sync(ALL, warps, 31);
        const u32 earlier = __shfl_sync(ALL, warps, warp ? warp - 1 : 0);
        before = (warp ? earlier : 0) + upto - mine;
    }
};

// A tile of WIDTH chunks and what a thread does for it: a chunk of the columns, and every STRIDE-th entry of the list,
// from `first` on.
template <int WIDTH>
struct Tile {
    static_assert(WIDTH <= 32, "a warp reads whole rows of the tile");
    static constexpr int ROWS = 32 / WIDTH, STRIDE = ROWS * WARPS, COLUMNS = 8 * WIDTH;
    int chunk, row, first;
    bool active;
    // `chunks` of the tile exist (the last tile may be narrower).
    __device__ __forceinline__ explicit Tile(int chunks) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        chunk = lane % WIDTH, row = lane / WIDTH, first = warp * ROWS + row;
        active = row < ROWS && chunk < chunks;
    }
};

// A thread's stream of weights: 8 columns (from `column` in row 0) of one list entry after the other, DEPTH of them on
// their way to shared memory, so that they take no registers. slots [DEPTH][THREADS]; a thread uses its own only.
template <class Tile>
struct Stream {
    uint4* slots;
    const char* column;
    u32 row_bytes;
    const Tile& tile;
    int started = 0;  // copies, at most DEPTH

    __device__ __forceinline__ Stream(uint4* all_slots, const char* column, u32 row_bytes, const Tile& tile)
        : slots(all_slots + threadIdx.x), column(column), row_bytes(row_bytes), tile(tile) {}
    __device__ __forceinline__ void start(int slot, u32 channel, bool exists) {
        if (exists) start_copy(slots + slot * THREADS, column + (u64)channel * row_bytes);
        end_group();
    }
    __device__ __forceinline__ void start(int slot, const u32* list, int entry, int count) {
        start(slot, entry < count ? list[entry] >> 16 : 0, entry < count);
    }
    // Starts reading for entries that will be the first channels, in order.
    __device__ __forceinline__ void start_all(int channels) {
        if (!tile.active) return;
        for (; started < DEPTH; started++) {
            const int channel = tile.first + started * Tile::STRIDE;
            start(started, channel, channel < channels);
        }
    }
    // Starts reading for this thread's first COUNT entries of the list.
    template <int COUNT>
    __device__ __forceinline__ void start_listed(const u32* list) {
        if (!tile.active) return;
#pragma unroll
        for (int i = 0; i < COUNT; i++) start(i, list[tile.first + i * Tile::STRIDE] >> 16, true);
        started = COUNT;
    }
    // sums[8] += weights times x over this thread's entries of the list.
    __device__ __forceinline__ void run(float (&sums)[8], const u32* list, int count) {
        if (!tile.active) return;
        for (int i = started; i < DEPTH; i++) start(i, list, tile.first + i * Tile::STRIDE, count);
        for (int entry = tile.first; entry < count;)
#pragma unroll
            for (int i = 0; i < DEPTH; i++, entry += Tile::STRIDE) {
                await_groups<DEPTH - 1>();
                if (entry < count) multiply_add(sums, slots[i * THREADS], to_float(low(list[entry])));
                start(i, list, entry + DEPTH * Tile::STRIDE, count);
            }
        await_groups<0>();
    }
};

// The kept ones of K channels: entry = channel << 16 | bits of x, in an order that depends on x, K and THREADS only.
//
// If all are kept, those whose weights are on their way already come first, in order. Else each warp first lists some of
// its own (EARLY for each of its rows of the tile, at most one of a thread; channel 0 times zero where it keeps fewer)
// and starts reading their weights, while the block counts the others.
template <class Tile, int K>
struct List {
    static constexpr int MOST_EARLY = 16;  // entries of a warp
    static constexpr int EARLY = MOST_EARLY / Tile::ROWS < DEPTH ? MOST_EARLY / Tile::ROWS : DEPTH;
    static constexpr int LENGTH = K + EARLY * Tile::STRIDE;
    using X = Inputs<K>;
    u32* entries;  // [LENGTH]
    int count;

    // bounds [X::VECTORS]: the least magnitudes to keep; scratch [WARPS] must not be in use.
    __device__ __forceinline__ List(const X& x, const uint2 (&bounds)[X::VECTORS], bool all, Stream<Tile>& stream,
                                    u32* entries, u32* scratch)
        : entries(entries) {
        u32 nibbles = 0;  // of this thread's vectors: which channels are yet to be listed
        int head = EARLY * Tile::STRIDE;
        if (all) {
            head = smaller(K, DEPTH * Tile::STRIDE);
        } else if (EARLY > 0) {
            nibbles = list_early(x, X::channel(0) < K ? nibble_of(kept_of(x.pairs[0], bounds[0])) : 0);
            __syncwarp();
            stream.template start_listed<EARLY>(entries);
        }
#pragma unroll
        for (int v = 0; v < X::VECTORS; v++)
            if (X::channel(v) < K && (v > 0 || all || EARLY == 0))
                nibbles |= nibble_of(kept_of(x.pairs[v], bounds[v])) << (4 * v);
        if (all)
#pragma unroll
            for (int v = 0; v < X::VECTORS; v++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (X::channel(v) + i < head) {
                        put(X::channel(v) + i, x, v, i);
                        nibbles &= ~(1u << (4 * v + i));
                    }
        const Scan scan(__popc(nibbles), scratch);
        int next = head + (int)scan.before;
#pragma unroll
        for (int v = 0; v < X::VECTORS; v++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (nibbles >> (4 * v + i) & 1) put(next++, x, v, i);
        __syncthreads();
        count = head + (int)scan.total;
    }
    __device__ __forceinline__ void put(int place, const X& x, int v, int i) {
        entries[place] = (u32)(X::channel(v) + i) << 16 | x.get(v, i);
    }
    // Given the kept ones of vector 0, returns those that are not listed.
    __device__ __forceinline__ u32 list_early(const X& x, u32 nibble) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const auto place = [&](int n) { return n / Tile::ROWS * Tile::STRIDE + warp * Tile::ROWS + n % Tile::ROWS; };
        const u32 lanes = __ballot_sync(ALL, nibble != 0);
        const int before = __popc(lanes & ((1u << lane) - 1)), most = EARLY * Tile::ROWS;
        if (lane >= __popc(lanes) && lane < most) entries[place(lane)] = 0;
        if (nibble == 0 || before >= most) return nibble;
        const u32 lowest = nibble & (0 - nibble), i = (lowest >> 1) - (lowest >> 3);
        const u32 pair = i < 2 ? x.pairs[0].x : x.pairs[0].y;
        entries[place(before)] = (X::channel(0) + i) << 16 | (i % 2 ? high(pair) : low(pair));
        return nibble ^ lowest;
    }
};

// Adds up a tile over rows of a warp, warps and blocks of the cluster: thread t of the first block gets the sum of column
// t. The others leave as soon as their sums are on their way to it, and make room for the next kernel. The slots are
// scratch: a thread that has read all of its own writes there. Blocks of a cluster must have met at its barrier after
// the first one has opened its mailbox.
template <class Tile>
struct Total {
    static constexpr int COLUMNS = Tile::COLUMNS;
    static_assert(COLUMNS <= THREADS, "more threads are needed: each finishes at most one column");
    struct Received {
        Mailbox mailbox;
        float sums[CLUSTER][COLUMNS];  // by block; the first one's stay in its threads
    };
    float sum = 0.f;

    __device__ __forceinline__ Total(float (&partial)[8], const Tile& tile, uint4* slots, Received& received, int rank) {
        const int lane = threadIdx.x % 32, column = threadIdx.x;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float one = partial[i];
#pragma unroll
            for (int row = 1; row < Tile::ROWS; row++) partial[i] += __shfl_sync(ALL, one, lane + row * COLUMNS / 8);
        }
        float4* wide = (float4*)slots;  // [2][WARPS][32]: four sums of a chunk and the next four
        if (tile.row == 0) {
            wide[threadIdx.x] = make_float4(partial[0], partial[1], partial[2], partial[3]);
            wide[THREADS + threadIdx.x] = make_float4(partial[4], partial[5], partial[6], partial[7]);
        }
        __syncthreads();
        if (column >= COLUMNS) return;
        const float* of_column = (const float*)(wide + column % 8 / 4 * THREADS + column / 8) + column % 4;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += of_column[w * 32 * 4];
        if (rank > 0) {
            received.mailbox.send(&received.sums[rank][column], sum);
        } else {
            received.mailbox.await();
#pragma unroll
            for (int other = 1; other < CLUSTER; other++) sum += received.sums[other][column];
        }
    }
};
