// The most likely token, the first of equals, by one cluster.
//
// Macros: those of common.cuh.

// logits [count]; token takes the choice, checked too unless a logit is infinite or NaN: then `invalid`.
struct Arguments {
    const u16* logits;
    long long *token, *checked;
    long long invalid;
    int count;
};

struct Shared {
    u32 best[WARPS], place[WARPS];
    Mailbox mailbox;
    float received[2][CLUSTER];  // the bits of each block's best and its place
};

constexpr u16 EXPONENT = BF16 ? 0x7f80 : 0x7c00;
constexpr u32 NOT_FINITE = 0x10000;  // ranks above every number

// Orders 16-bit numbers as unsigned ones.
__device__ __forceinline__ u32 rank_of(u16 bits) {
    if ((bits & EXPONENT) == EXPONENT) return NOT_FINITE;
    if ((bits & 0x7fff) == 0) return 0x8000;  // zeros are equal
    return bits & 0x8000 ? (u16)~bits : (bits | 0x8000);
}

struct Best {
    u32 rank, place;
    __device__ __forceinline__ void take(u32 other, u32 at) {
        if (other > rank || (other == rank && at < place)) rank = other, place = at;
    }
    __device__ __forceinline__ void over_warp() {
#pragma unroll
        for (int step = 16; step > 0; step >>= 1) {
            const u32 other = __shfl_xor_sync(ALL, rank, step), at = __shfl_xor_sync(ALL, place, step);
            take(other, at);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) greedy(const __grid_constant__ Arguments arguments) {
    extern __shared__ uint4 dynamic_shared[];
    Shared& shared = *(Shared*)dynamic_shared;
    const int rank = blockIdx.x;
    if (rank == 0 && threadIdx.x == 0) shared.mailbox.open(2 * 4 * (CLUSTER - 1));
    cluster_arrive();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunks = arguments.count / 8;
    const int thread = rank * THREADS + (int)threadIdx.x;
    await_previous_kernel();
    Best best{0, 0xffffffffu};
#pragma unroll 4
    for (int chunk = thread; chunk < chunks; chunk += CLUSTER * THREADS) {
        const uint4 eight = ((const uint4*)arguments.logits)[chunk];
        const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int i = 0; i < 8; i++)
            best.take(rank_of(i % 2 ? high(pairs[i / 2]) : low(pairs[i / 2])), 8 * chunk + i);
    }
    for (int i = 8 * chunks + thread; i < arguments.count; i += CLUSTER * THREADS)
        best.take(rank_of(arguments.logits[i]), i);
    best.over_warp();
    if (lane == 0) shared.best[warp] = best.rank, shared.place[warp] = best.place;
    __syncthreads();
    cluster_wait();
    if (warp > 0) return;
    best = lane < WARPS ? Best{shared.best[lane], shared.place[lane]} : Best{0, 0xffffffffu};
    best.over_warp();
    if (lane > 0) return;
    if (rank > 0) {
        shared.mailbox.send(&shared.received[0][rank], __uint_as_float(best.rank));
        shared.mailbox.send(&shared.received[1][rank], __uint_as_float(best.place));
        return;
    }
    shared.mailbox.await();
    for (int other = 1; other < CLUSTER; other++)
        best.take(__float_as_uint(shared.received[0][other]), __float_as_uint(shared.received[1][other]));
    *arguments.token = best.place;
    *arguments.checked = best.rank == NOT_FINITE ? arguments.invalid : best.place;
}
