// Attention of one token: rotary embedding of its queries and key (normalized first where the model does), its place in
// the cache, and softmax over the cached positions. A block per key head and share of the positions; each of its warps
// keeps a softmax of its own over every so many of them. The last block of a head to finish adds up the shares, in order.
//
// The position, the rotation and what is cached were there before the token's first kernel: the first keys and values
// are on their way while the queries are still being computed.
//
// Macros: HEADS, KV_HEADS, HEAD_DIM, NORM_QK, MAX_SHARES, and those of common.cuh.

// qkv [(HEADS + 2 KV_HEADS) * HEAD_DIM]; norms [HEAD_DIM]; cosine, sine [HEAD_DIM] at the token's position [1]; caches
// [KV_HEADS, capacity, HEAD_DIM]; window: how many positions a token sees, 0 for all; attended [HEADS * HEAD_DIM];
// partial and arrivals [KV_HEADS] belong to the kernel, arrivals zero before the first launch.
struct Arguments {
    const u16 *qkv, *norm_q, *norm_k, *cosine, *sine;
    const long long* position;
    u16 *keys, *values, *attended;
    float* partial;
    u32* arrivals;
    int capacity, window, positions_per_share;
    float eps;
};

constexpr int GROUP = HEADS / KV_HEADS;          // query heads that share a key head
constexpr int PARTIAL = GROUP * (HEAD_DIM + 2);  // what a share gives: sums, then largest scores and weights
constexpr int HALF = HEAD_DIM / 2, TURNS = divided_up(HALF, 32);
constexpr int LANES = HEAD_DIM / 8;            // threads that hold one key or value
constexpr int AT_ONCE = GROUP % 4 == 0 ? 4 : GROUP % 3 == 0 ? 3 : GROUP % 2 == 0 ? 2 : 1;  // query heads of a thread
constexpr int AT_A_TIME = 2, AHEAD = 3;        // positions that a thread takes together, and how often ahead
constexpr int SETS = GROUP / AT_ONCE;          // warps split into sets, each for AT_ONCE heads
constexpr int SET_WARPS = WARPS / SETS;
constexpr int SET_LANES = SET_WARPS * 32 / LANES;  // positions that a set scores at a time
constexpr float LEAST = -1e30f;                    // finite, so that differences are no NaN
static_assert(SET_WARPS > 0 && 32 % LANES == 0 && HEAD_DIM % 8 == 0, "this head layout is not supported");

struct Shared {
    union {
        uint4 slots[AHEAD][2 * AT_A_TIME][THREADS];  // of keys and values on their way; a thread uses its own only
        float sums[AT_ONCE][SETS * SET_WARPS][HEAD_DIM];
    };
    alignas(16) float query[GROUP * HEAD_DIM];
    float largest[AT_ONCE][SETS * SET_WARPS], weight[AT_ONCE][SETS * SET_WARPS];
    alignas(16) u16 key[HEAD_DIM], value[HEAD_DIM];  // of this token
    u32 is_last;
};

// Cosines and sines of the dimensions that a lane rotates: `first` and HALF after it, HALF being the pair's distance.
struct Rotation {
    float cosine[2][TURNS], sine[2][TURNS];
    __device__ __forceinline__ explicit Rotation(const Arguments& arguments) {
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = (int)threadIdx.x % 32 + 32 * turn, at = i + half * HALF;
                cosine[half][turn] = i < HALF ? to_float(arguments.cosine[at]) : 0.f;
                sine[half][turn] = i < HALF ? to_float(arguments.sine[at]) : 0.f;
            }
    }
    // A head of q or k by one warp: normalized where the model does, and rotated; put(dimension, value) takes the result.
    template <class Put>
    __device__ __forceinline__ void rotate(const u16* head, const u16* norm, float eps, Put put) const {
        const int lane = threadIdx.x % 32;
        float first[TURNS], second[TURNS];
        float squares = 0.f;
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int i = lane + 32 * turn;
            first[turn] = i < HALF ? to_float(head[i]) : 0.f;
            second[turn] = i < HALF ? to_float(head[i + HALF]) : 0.f;
            squares += first[turn] * first[turn] + second[turn] * second[turn];
        }
        const float scale = NORM_QK ? rsqrtf(warp_sum(squares) / HEAD_DIM + eps) : 1.f;
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int i = lane + 32 * turn;
            if (i >= HALF) continue;
            float a = first[turn], b = second[turn];
            if (NORM_QK) {
                a = rounded(to_float(norm[i]) * rounded(a * scale));
                b = rounded(to_float(norm[i + HALF]) * rounded(b * scale));
            }
            put(i, rounded(a * cosine[0][turn] - b * sine[0][turn]));
            put(i + HALF, rounded(b * cosine[1][turn] + a * sine[1][turn]));
        }
    }
};

// Softmax of one query head over the positions that a thread has seen, for 8 dimensions of the values.
struct Softmax {
    float largest, weight, sums[8];
    __device__ __forceinline__ void rescale(float most) {
        const float scale = __expf(largest - most);
        largest = most;
        weight *= scale;
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i] *= scale;
    }
    // Over the lanes of a warp that hold the same dimensions.
    __device__ __forceinline__ void add_up() {
#pragma unroll
        for (int step = LANES; step < 32; step <<= 1) {
            rescale(fmaxf(largest, __shfl_xor_sync(ALL, largest, step)));
            weight += __shfl_xor_sync(ALL, weight, step);
#pragma unroll
            for (int i = 0; i < 8; i++) sums[i] += __shfl_xor_sync(ALL, sums[i], step);
        }
    }
};

__device__ __forceinline__ float dot(const float (&query)[8], uint4 key) {
    return to_float(low(key.x)) * query[0] + to_float(high(key.x)) * query[1] + to_float(low(key.y)) * query[2] +
           to_float(high(key.y)) * query[3] + to_float(low(key.z)) * query[4] + to_float(high(key.z)) * query[5] +
           to_float(low(key.w)) * query[6] + to_float(high(key.w)) * query[7];
}

extern "C" __global__ void __launch_bounds__(THREADS) attention(const __grid_constant__ Arguments arguments) {
    extern __shared__ uint4 dynamic_shared[];
    Shared& shared = *(Shared*)dynamic_shared;
    allow_next_kernel();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int head = (int)blockIdx.x % KV_HEADS, share = (int)blockIdx.x / KV_HEADS;
    const Rotation rotation(arguments);
    const int position = (int)*arguments.position, window = arguments.window;
    const int seen = window && position + 1 > window ? window : position + 1, oldest = position + 1 - seen;
    int shares = smaller(MAX_SHARES, divided_up(seen, arguments.positions_per_share));
    const int per_share = divided_up(seen, shares);
    shares = divided_up(seen, per_share);  // none is empty
    if (share >= shares) return;
    const int begin = oldest + share * per_share, end = smaller(begin + per_share, position + 1);
    const bool has_token = end == position + 1;
    const int cached = has_token ? position : end;
    u16* keys = arguments.keys + (u64)head * arguments.capacity * HEAD_DIM;
    u16* values = arguments.values + (u64)head * arguments.capacity * HEAD_DIM;

    const int set = warp / SET_WARPS;  // warps beyond the last whole set only keep the barriers
    const bool works = set < SETS;
    const int slot = ((int)threadIdx.x - set * SET_WARPS * 32) / LANES, dimension = 8 * (lane % LANES);
    // The thread's positions are begin + slot + i SET_LANES; AT_A_TIME of them form a round.
    const auto start = [&](int round) {
#pragma unroll
        for (int r = 0; r < AT_A_TIME; r++) {
            const int p = begin + slot + (round * AT_A_TIME + r) * SET_LANES;
            if (p >= cached) continue;
            uint4* to = &shared.slots[round % AHEAD][2 * r][threadIdx.x];
            start_copy(to, (const char*)(keys + (u64)p * HEAD_DIM + dimension));
            start_copy(to + THREADS, (const char*)(values + (u64)p * HEAD_DIM + dimension));
        }
        end_group();
    };
    if (works)
        for (int round = 0; round < AHEAD; round++) start(round);

    await_previous_kernel();
    const u16 *new_key = arguments.qkv + (HEADS + head) * HEAD_DIM, *new_value = new_key + KV_HEADS * HEAD_DIM;
    for (int task = warp; task < GROUP + 2; task += WARPS) {
        if (task < GROUP)
            rotation.rotate(
                arguments.qkv + (head * GROUP + task) * HEAD_DIM, arguments.norm_q, arguments.eps,
                [&](int i, float value) { shared.query[task * HEAD_DIM + i] = value * rsqrtf((float)HEAD_DIM); });
        else if (has_token && task == GROUP)
            rotation.rotate(new_key, arguments.norm_k, arguments.eps, [&](int i, float value) {
                shared.key[i] = keys[(u64)position * HEAD_DIM + i] = to_bits(value);
            });
        else if (has_token)
            for (int i = lane; i < HEAD_DIM; i += 32)
                shared.value[i] = values[(u64)position * HEAD_DIM + i] = new_value[i];
    }
    __syncthreads();

    Softmax softmax[AT_ONCE];
#pragma unroll
    for (int g = 0; g < AT_ONCE; g++) softmax[g] = {LEAST, 0.f, {}};
    if (works) {
        float query[AT_ONCE][8];
#pragma unroll
        for (int g = 0; g < AT_ONCE; g++)
#pragma unroll
            for (int i = 0; i < 8; i++) query[g][i] = shared.query[(set * AT_ONCE + g) * HEAD_DIM + dimension + i];
        for (int round = 0; begin + round * AT_A_TIME * SET_LANES < end; round++) {
            const int first = begin + slot + round * AT_A_TIME * SET_LANES;
            await_groups<AHEAD - 1>();
            float scores[AT_ONCE][AT_A_TIME];
#pragma unroll
            for (int r = 0; r < AT_A_TIME; r++) {
                const int p = first + r * SET_LANES;
                const u16* own = p < cached ? (const u16*)&shared.slots[round % AHEAD][2 * r][threadIdx.x] : shared.key + dimension;
                const uint4 key = *(const uint4*)own;
#pragma unroll
                for (int g = 0; g < AT_ONCE; g++) {
                    float score = dot(query[g], key);
#pragma unroll
                    for (int step = LANES / 2; step > 0; step >>= 1) score += __shfl_xor_sync(ALL, score, step);
                    scores[g][r] = p < end ? score : -__uint_as_float(0x7f800000u);
                }
            }
#pragma unroll
            for (int g = 0; g < AT_ONCE; g++) {
                float most = softmax[g].largest;
#pragma unroll
                for (int r = 0; r < AT_A_TIME; r++) most = fmaxf(most, scores[g][r]);
                softmax[g].rescale(most);
#pragma unroll
                for (int r = 0; r < AT_A_TIME; r++) {
                    scores[g][r] = __expf(scores[g][r] - most);
                    softmax[g].weight += scores[g][r];
                }
            }
#pragma unroll
            for (int r = 0; r < AT_A_TIME; r++) {
                const int p = first + r * SET_LANES;
                if (p >= end) continue;
                const u16* own = p < cached ? (const u16*)&shared.slots[round % AHEAD][2 * r + 1][threadIdx.x] : shared.value + dimension;
                const uint4 value = *(const uint4*)own;
#pragma unroll
                for (int g = 0; g < AT_ONCE; g++) multiply_add(softmax[g].sums, value, scores[g][r]);
            }
            start(round + AHEAD);
        }
        await_groups<0>();
    }
    __syncthreads();  // the slots become sums
    if (works) {
#pragma unroll
        for (int g = 0; g < AT_ONCE; g++) {
            softmax[g].add_up();
            if (lane < LANES) {
                float4* to = (float4*)(shared.sums[g][warp] + dimension);
                const float(&sums)[8] = softmax[g].sums;
                to[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
                to[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
            }
            if (lane == 0) shared.largest[g][warp] = softmax[g].largest, shared.weight[g][warp] = softmax[g].weight;
        }
    }
    __syncthreads();

    float* partial = arguments.partial + (u64)head * MAX_SHARES * PARTIAL;
    for (int task = threadIdx.x; task < GROUP * HEAD_DIM; task += THREADS) {
        const int query = task / HEAD_DIM, g = query % AT_ONCE, first = query / AT_ONCE * SET_WARPS;
        float largest = LEAST, weight = 0.f, sum = 0.f;
        for (int w = first; w < first + SET_WARPS; w++) largest = fmaxf(largest, shared.largest[g][w]);
#pragma unroll 4
        for (int w = first; w < first + SET_WARPS; w++) {
            const float scale = __expf(shared.largest[g][w] - largest);
            weight += shared.weight[g][w] * scale;
            sum += shared.sums[g][w][task % HEAD_DIM] * scale;
        }
        if (shares == 1) {
            arguments.attended[head * GROUP * HEAD_DIM + task] = to_bits(sum / weight);
            continue;
        }
        partial[share * PARTIAL + task] = sum;
        if (task % HEAD_DIM == 0) {
            partial[share * PARTIAL + GROUP * HEAD_DIM + 2 * query] = largest;
            partial[share * PARTIAL + GROUP * HEAD_DIM + 2 * query + 1] = weight;
        }
    }
    if (shares == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.is_last = atomicAdd(arguments.arrivals + head, 1u) == (u32)shares - 1;
    __syncthreads();
    if (!shared.is_last) return;
    __threadfence();
    for (int task = threadIdx.x; task < GROUP * HEAD_DIM; task += THREADS) {
        const int at = GROUP * HEAD_DIM + 2 * (task / HEAD_DIM);
        float largest = LEAST, weight = 0.f, sum = 0.f;
        for (int other = 0; other < shares; other++) largest = fmaxf(largest, load_fresh(partial + other * PARTIAL + at));
#pragma unroll 4
        for (int other = 0; other < shares; other++) {
            const float scale = __expf(load_fresh(partial + other * PARTIAL + at) - largest);
            sum += load_fresh(partial + other * PARTIAL + task) * scale;
            weight += load_fresh(partial + other * PARTIAL + at + 1) * scale;
        }
        arguments.attended[head * GROUP * HEAD_DIM + task] = to_bits(sum / weight);
    }
    if (threadIdx.x == 0) arguments.arrivals[head] = 0;
}
