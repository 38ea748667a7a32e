// Attention of one token: rotary embedding of its queries and key (normalized first where the model does), its place in
// the cache, and softmax over the cached positions. A block per key head and share of the positions; the last block of
// a head to finish adds up the shares, in order.
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
constexpr int TILE_POSITIONS = 1024;             // scored at a time
constexpr int LANES = HEAD_DIM / 8;            // threads that hold one key or value
constexpr int AT_ONCE = GROUP % 4 == 0 ? 4 : GROUP % 3 == 0 ? 3 : GROUP % 2 == 0 ? 2 : 1;  // query heads of a thread
constexpr int AT_A_TIME = 4;                   // keys or values of a thread on their way
constexpr int SETS = GROUP / AT_ONCE;          // warps split into sets, each for AT_ONCE heads
constexpr int SET_WARPS = WARPS / SETS;
constexpr int SET_LANES = SET_WARPS * 32 / LANES;  // positions that a set scores at a time
static_assert(SET_WARPS > 0 && 32 % LANES == 0 && HEAD_DIM % 8 == 0, "this head layout is not supported");


struct Shared {
    float query[GROUP * HEAD_DIM];
    float scores[GROUP * TILE_POSITIONS];
    float sums[SETS * SET_WARPS * HEAD_DIM];
    float largest[GROUP], weight[GROUP], rescale[GROUP];
    u32 is_last;
};

// A head of q or k by one warp: normalized where the model does, and rotated; put(dimension, value) takes the result.
template <class Put>
__device__ __forceinline__ void rotate_head(const Arguments& arguments, const u16* head, const u16* norm, Put put) {
    constexpr int HALF = HEAD_DIM / 2, TURNS = divided_up(HALF, 32);
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
    const float scale = NORM_QK ? rsqrtf(warp_sum(squares) / HEAD_DIM + arguments.eps) : 1.f;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int i = lane + 32 * turn;
        if (i >= HALF) continue;
        float a = first[turn], b = second[turn];
        if (NORM_QK) {
            a = rounded(to_float(norm[i]) * rounded(a * scale));
            b = rounded(to_float(norm[i + HALF]) * rounded(b * scale));
        }
        const u16 *cosine = arguments.cosine, *sine = arguments.sine;
        put(i, rounded(a * to_float(cosine[i]) - b * to_float(sine[i])));
        put(i + HALF, rounded(b * to_float(cosine[i + HALF]) + a * to_float(sine[i + HALF])));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attention(const __grid_constant__ Arguments arguments) {
    extern __shared__ uint4 dynamic_shared[];
    Shared& shared = *(Shared*)dynamic_shared;
    allow_next_kernel();
    await_previous_kernel();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int head = (int)blockIdx.x % KV_HEADS, share = (int)blockIdx.x / KV_HEADS;
    const int position = (int)*arguments.position, window = arguments.window;
    const int seen = window && position + 1 > window ? window : position + 1, oldest = position + 1 - seen;
    int shares = smaller(MAX_SHARES, divided_up(seen, arguments.positions_per_share));
    const int per_share = divided_up(seen, shares);
    shares = divided_up(seen, per_share);  // none is empty
    if (share >= shares) return;
    const int begin = oldest + share * per_share, end = smaller(begin + per_share, position + 1);
    u16* keys = arguments.keys + (u64)head * arguments.capacity * HEAD_DIM;
    u16* values = arguments.values + (u64)head * arguments.capacity * HEAD_DIM;
    const u16 *new_key = arguments.qkv + (HEADS + head) * HEAD_DIM, *new_value = new_key + KV_HEADS * HEAD_DIM;

    for (int task = warp; task < GROUP + 2; task += WARPS) {
        if (task < GROUP)
            rotate_head(arguments, arguments.qkv + (head * GROUP + task) * HEAD_DIM, arguments.norm_q,
                        [&](int i, float value) { shared.query[task * HEAD_DIM + i] = value * rsqrtf((float)HEAD_DIM); });
        else if (end == position + 1 && task == GROUP)
            rotate_head(arguments, new_key, arguments.norm_k,
                        [&](int i, float value) { keys[(u64)position * HEAD_DIM + i] = to_bits(value); });
        else if (end == position + 1)
            for (int i = lane; i < HEAD_DIM; i += 32) values[(u64)position * HEAD_DIM + i] = new_value[i];
    }
    for (int g = threadIdx.x; g < GROUP; g += THREADS) {
        shared.largest[g] = -__uint_as_float(0x7f800000u);
        shared.weight[g] = 0.f;
    }
    __syncthreads();

    const int set = warp / SET_WARPS;  // warps beyond the last whole set only keep the barriers
    const bool works = set < SETS;
    const int slot = ((int)threadIdx.x - set * SET_WARPS * 32) / LANES, dimension = 8 * (lane % LANES);
    float sums[AT_ONCE][8] = {};
    for (int first = begin; first < end; first += TILE_POSITIONS) {
        const int count = smaller(TILE_POSITIONS, end - first);
        if (works) {
            for (int p = slot; p < count; p += SET_LANES)  // values are wanted soon
                prefetch_l2(values + (u64)(first + p) * HEAD_DIM + dimension);
            const int rounds = divided_up(count, SET_LANES);
            for (int round = 0; round < rounds; round += AT_A_TIME) {
                uint4 key[AT_A_TIME];
#pragma unroll
                for (int r = 0; r < AT_A_TIME; r++) {
                    const int p = (round + r) * SET_LANES + slot;
                    key[r] = p < count ? *(const uint4*)(keys + (u64)(first + p) * HEAD_DIM + dimension)
                                       : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
                for (int g = 0; g < AT_ONCE; g++) {
                    const float* q = shared.query + (set * AT_ONCE + g) * HEAD_DIM + dimension;
                    float query[8];
#pragma unroll
                    for (int i = 0; i < 8; i++) query[i] = q[i];
#pragma unroll
                    for (int r = 0; r < AT_A_TIME; r++) {
                        const uint4 k = key[r];
                        float dot = to_float(low(k.x)) * query[0] + to_float(high(k.x)) * query[1] +
                                    to_float(low(k.y)) * query[2] + to_float(high(k.y)) * query[3] +
                                    to_float(low(k.z)) * query[4] + to_float(high(k.z)) * query[5] +
                                    to_float(low(k.w)) * query[6] + to_float(high(k.w)) * query[7];
#pragma unroll
                        for (int step = LANES / 2; step > 0; step >>= 1) dot += __shfl_xor_sync(ALL, dot, step);
                        const int p = (round + r) * SET_LANES + slot;
                        if (p < count && lane % LANES == 0)
                            shared.scores[(set * AT_ONCE + g) * TILE_POSITIONS + p] = dot;
                    }
                }
            }
        }
        __syncthreads();
        for (int g = warp; g < GROUP; g += WARPS) {
            float* scores = shared.scores + g * TILE_POSITIONS;
            float largest = shared.largest[g];
            for (int p = lane; p < count; p += 32) largest = fmaxf(largest, scores[p]);
            largest = warp_max(largest);
            float weight = 0.f;
            for (int p = lane; p < count; p += 32) {
                scores[p] = __expf(scores[p] - largest);
                weight += scores[p];
            }
            weight = warp_sum(weight);
            if (lane == 0) {
                shared.rescale[g] = __expf(shared.largest[g] - largest);
                shared.weight[g] = shared.weight[g] * shared.rescale[g] + weight;
                shared.largest[g] = largest;
            }
        }
        __syncthreads();
        if (works) {
#pragma unroll
            for (int g = 0; g < AT_ONCE; g++)
#pragma unroll
                for (int i = 0; i < 8; i++) sums[g][i] *= shared.rescale[set * AT_ONCE + g];
            for (int p = slot; p < count; p += AT_A_TIME * SET_LANES) {
                uint4 value[AT_A_TIME];
#pragma unroll
                for (int r = 0; r < AT_A_TIME; r++)
                    if (p + r * SET_LANES < count)
                        value[r] = *(const uint4*)(values + (u64)(first + p + r * SET_LANES) * HEAD_DIM + dimension);
#pragma unroll
                for (int r = 0; r < AT_A_TIME; r++)
                    if (p + r * SET_LANES < count)
#pragma unroll
                        for (int g = 0; g < AT_ONCE; g++)
                            multiply_add(sums[g], value[r],
                                         shared.scores[(set * AT_ONCE + g) * TILE_POSITIONS + p + r * SET_LANES]);
            }
        }
        __syncthreads();
    }

    float* partial = arguments.partial + (u64)head * MAX_SHARES * PARTIAL;
    for (int g = 0; g < AT_ONCE; g++) {  // over the lanes that hold the same dimensions, then over the set's warps
        if (works) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float sum = 0.f;  // sums[g][i], with an index the compiler knows
#pragma unroll
                for (int h = 0; h < AT_ONCE; h++) sum = h == g ? sums[h][i] : sum;
                for (int step = 16; step >= LANES; step >>= 1) sum += __shfl_xor_sync(ALL, sum, step);
                if (lane < LANES) shared.sums[warp * HEAD_DIM + dimension + i] = sum;
            }
        }
        __syncthreads();
        for (int task = threadIdx.x; task < SETS * HEAD_DIM; task += THREADS) {
            const int s = task / HEAD_DIM, d = task % HEAD_DIM, query = s * AT_ONCE + g;
            float sum = 0.f;
            for (int w = 0; w < SET_WARPS; w++) sum += shared.sums[(s * SET_WARPS + w) * HEAD_DIM + d];
            if (shares == 1)
                arguments.attended[(head * GROUP + query) * HEAD_DIM + d] = to_bits(sum / shared.weight[query]);
            else
                partial[share * PARTIAL + query * HEAD_DIM + d] = sum;
        }
        __syncthreads();
    }
    if (shares == 1) return;
    for (int g = threadIdx.x; g < GROUP; g += THREADS) {
        partial[share * PARTIAL + GROUP * HEAD_DIM + 2 * g] = shared.largest[g];
        partial[share * PARTIAL + GROUP * HEAD_DIM + 2 * g + 1] = shared.weight[g];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.is_last = atomicAdd(arguments.arrivals + head, 1u) == (u32)shares - 1;
    __syncthreads();
    if (!shared.is_last) return;
    __threadfence();
    for (int task = threadIdx.x; task < GROUP * HEAD_DIM; task += THREADS) {
        const int at = GROUP * HEAD_DIM + 2 * (task / HEAD_DIM);
        float largest = -__uint_as_float(0x7f800000u), weight = 0.f, sum = 0.f;
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
