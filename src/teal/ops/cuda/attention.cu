// Attention of one token: rotary embedding of its queries and key (normalized first where the model does), its place in
// the cache, and softmax over the cached positions. A block per key head and share of the positions; a warp takes 16 of
// them in a step, multiplies them with all query heads by matrix instructions, and keeps a softmax of its own. The last
// block of a head to finish adds up the shares, in order.
//
// The position, the rotation and what is cached were there before the token's first kernel: the first keys and values
// are on their way while the queries are still being computed.
//
// Macros: HEADS, KV_HEADS, HEAD_DIM, NORM_QK, MAX_SHARES, and those of common.cuh.

// qkv [(HEADS + 2 KV_HEADS) * HEAD_DIM]; norms [HEAD_DIM]; cosine, sine [HEAD_DIM] at the token's position [1]; caches
// [KV_HEADS, capacity, HEAD_DIM]; window: how many positions a token sees, 0 for all; attended [HEADS * HEAD_DIM];
// partial [KV_HEADS, MAX_SHARES, PARTIAL] and arrivals [KV_HEADS] belong to the kernel, arrivals zero before the first
// launch.
struct Arguments {
    const u16 *qkv, *norm_q, *norm_k, *cosine, *sine;
    const long long* position;
    u16 *keys, *values, *attended;
    float* partial;
    u32* arrivals;
    int capacity, window, undivided, positions_per_share;  // one block takes up to `undivided` positions
    float eps;
};

constexpr int GROUP = HEADS / KV_HEADS;          // query heads that share a key head
constexpr int EIGHTS = divided_up(GROUP, 8);     // of query heads: the columns of a product of matrices
constexpr int CHUNKS = HEAD_DIM / 8;             // of 8 dimensions
constexpr int TILES = HEAD_DIM / 16, STEP = 16;  // dimensions, and positions of a step, that a product takes
constexpr int PARTIAL = GROUP * (HEAD_DIM + 4);  // what a share gives: sums, then largest scores, weights and padding
constexpr int HALF = HEAD_DIM / 2, TURNS = divided_up(HALF, 32);
constexpr int SWIZZLE = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;  // chunks that change places
constexpr int MOST_PARTS = WARPS > MAX_SHARES ? WARPS : MAX_SHARES;
constexpr float LEAST = -1e30f;  // finite, so that differences are no NaN
static_assert(HEAD_DIM % 16 == 0 && EIGHTS <= 2, "this head layout is not supported");

struct Shared {
    union {  // a warp's own
        uint4 slots[2][STEP][CHUNKS];      // keys and values on their way
        float sums[GROUP][HEAD_DIM + 4];  // rows of 16 bytes, so that no two lanes meet in a bank
    } warps[WARPS];
    alignas(16) u16 query[8 * EIGHTS][HEAD_DIM + 8];
    alignas(16) u16 key[HEAD_DIM], value[HEAD_DIM];  // of this token
    float largest[GROUP][WARPS], weight[GROUP][WARPS];
    float scales[GROUP][MOST_PARTS], most[GROUP], total[GROUP];
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
    // A head of q or k by one warp: normalized where the model does, and rotated; put(dimension, bits) takes the result.
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
            put(i, to_bits(a * cosine[0][turn] - b * sine[0][turn]));
            put(i + HALF, to_bits(b * cosine[1][turn] + a * sine[1][turn]));
        }
    }
};

// The keys or the values of a warp's step. Chunks change places so that those of 8 positions are in different banks.
struct Positions {
    uint4 (*slots)[CHUNKS];
    const u16* cache;  // [capacity, HEAD_DIM]
    int cached, end;   // positions
    __device__ __forceinline__ uint4* of(int row, int chunk) const { return &slots[row][chunk ^ (row % SWIZZLE)]; }
    // Starts reading STEP positions from `first` on, if there is such a step; what is not cached is zero.
    __device__ __forceinline__ void start(int first) const {
        const int lane = threadIdx.x % 32;
        const uint4* from = (const uint4*)(cache + (u64)first * HEAD_DIM);
#pragma unroll
        for (int task = lane; task < STEP * CHUNKS && first < end; task += 32) {
            const int row = task / CHUNKS;
            if (first + row < cached)
                start_copy(of(row, task % CHUNKS), (const char*)(from + task));
            else
                *of(row, task % CHUNKS) = make_uint4(0, 0, 0, 0);
        }
        end_group();
    }
    __device__ __forceinline__ void put(int row, const u16* from) const {
        for (int chunk = (int)threadIdx.x % 32; chunk < CHUNKS; chunk += 32) *of(row, chunk) = ((const uint4*)from)[chunk];
    }
};

// A warp's softmax of 8 query heads: of two of them, 2 (lane % 4) and the next, a lane has the largest score, its own
// part of the weights, and the sums of values [16 TILES, 8] as multiply_matrices gives them.
struct Softmax {
    float largest[2] = {LEAST, LEAST}, weight[2] = {}, sums[TILES][4] = {};
    // Takes the scores of two positions for each of the two heads, [position][head]; they become weights.
    __device__ __forceinline__ void take(float (&scores)[4]) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float most = fmaxf(largest[j], fmaxf(scores[j], scores[2 + j]));
#pragma unroll
            for (int step = 4; step < 32; step <<= 1) most = fmaxf(most, __shfl_xor_sync(ALL, most, step));
            const float scale = __expf(largest[j] - most);
            largest[j] = most;
#pragma unroll
            for (int i = j; i < 4; i += 2) scores[i] = __expf(scores[i] - most);
            weight[j] = weight[j] * scale + scores[j] + scores[2 + j];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) sums[tile][j] *= scale, sums[tile][2 + j] *= scale;
        }
    }
    // Writes what belongs to query heads from `head` on.
    __device__ __forceinline__ void put(int head, int warp, Shared& shared) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int step = 4; step < 32; step <<= 1) weight[j] += __shfl_xor_sync(ALL, weight[j], step);
            const int query = head + 2 * (lane % 4) + j;
            if (query >= GROUP) continue;
            if (lane < 4) shared.largest[query][warp] = largest[j], shared.weight[query][warp] = weight[j];
            float* to = shared.warps[warp].sums[query] + lane / 4;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) to[16 * tile] = sums[tile][j], to[16 * tile + 8] = sums[tile][2 + j];
        }
    }
};

// How `count` softmaxes of query head `query` become one, by one warp: what to scale them by, and the largest score and
// the weight of all.
template <class Largest, class Weight>
__device__ __forceinline__ void combine(Shared& shared, int query, int count, Largest largest, Weight weight) {
    const int lane = threadIdx.x % 32;
    float most = LEAST, total = 0.f;
    for (int i = lane; i < count; i += 32) most = fmaxf(most, largest(i));
    most = warp_max(most);
    for (int i = lane; i < count; i += 32) {
        const float scale = __expf(largest(i) - most);
        shared.scales[query][i] = scale;
        total += weight(i) * scale;
    }
    total = warp_sum(total);
    if (lane == 0) shared.most[query] = most, shared.total[query] = total;
}

__device__ __forceinline__ void add_scaled(float4& sum, float4 more, float scale) {
    sum.x += more.x * scale, sum.y += more.y * scale, sum.z += more.z * scale, sum.w += more.w * scale;
}
__device__ __forceinline__ uint2 divided(float4 sum, float by) {
    return make_uint2(pair_of(to_bits(sum.x / by), to_bits(sum.y / by)),
                      pair_of(to_bits(sum.z / by), to_bits(sum.w / by)));
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
    int shares = seen <= arguments.undivided ? 1 : smaller(MAX_SHARES, divided_up(seen, arguments.positions_per_share));
    const int per_share = divided_up(seen, shares);
    shares = divided_up(seen, per_share);  // none is empty
    if (share >= shares) return;
    const int begin = oldest + share * per_share, end = smaller(begin + per_share, position + 1);
    const bool has_token = end == position + 1;
    const int own = begin + warp * STEP, parts = smaller(WARPS, divided_up(end - begin, STEP));
    u16* keys = arguments.keys + (u64)head * arguments.capacity * HEAD_DIM;
    u16* values = arguments.values + (u64)head * arguments.capacity * HEAD_DIM;
    const int cached = smaller(end, position);
    const Positions step_keys{shared.warps[warp].slots[0], keys, cached, end};
    const Positions step_values{shared.warps[warp].slots[1], values, cached, end};
    step_keys.start(own);
    step_values.start(own);

    await_previous_kernel();
    const u16 *new_key = arguments.qkv + (HEADS + head) * HEAD_DIM, *new_value = new_key + KV_HEADS * HEAD_DIM;
    for (int task = warp; task < 8 * EIGHTS + 2; task += WARPS) {
        if (task < GROUP)
            rotation.rotate(arguments.qkv + (head * GROUP + task) * HEAD_DIM, arguments.norm_q, arguments.eps,
                            [&](int i, u16 bits) { shared.query[task][i] = bits; });
        else if (task < 8 * EIGHTS)
            for (int i = lane; i < HEAD_DIM; i += 32) shared.query[task][i] = 0;
        else if (has_token && task == 8 * EIGHTS)
            rotation.rotate(new_key, arguments.norm_k, arguments.eps, [&](int i, u16 bits) {
                shared.key[i] = keys[(u64)position * HEAD_DIM + i] = bits;
            });
        else if (has_token)
            for (int i = lane; i < HEAD_DIM; i += 32)
                shared.value[i] = values[(u64)position * HEAD_DIM + i] = new_value[i];
    }
    __syncthreads();

    if (warp < parts) {
        u32 query[EIGHTS][TILES][2];
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    query[eight][tile][half] =
                        *(const u32*)&shared.query[8 * eight + lane / 4][16 * tile + 8 * half + 2 * (lane % 4)];
        Softmax softmax[EIGHTS];
        const float scale = rsqrtf((float)HEAD_DIM);
        for (int first = own; first < end; first += WARPS * STEP) {
            const int next = first + WARPS * STEP, token = has_token ? position - first : STEP;
            await_groups<1>();
            if (token < STEP) step_keys.put(token, shared.key);
            __syncwarp();
            float scores[EIGHTS][4] = {};
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                u32 key[4];
                load_matrices(key, step_keys.of(lane % 16, 2 * tile + lane / 16));
#pragma unroll
                for (int eight = 0; eight < EIGHTS; eight++) multiply_matrices(scores[eight], key, query[eight][tile]);
            }
            __syncwarp();
            step_keys.start(next);

            u32 weights[EIGHTS][2];
#pragma unroll
            for (int eight = 0; eight < EIGHTS; eight++) {
                float(&of)[4] = scores[eight];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    of[i] = first + lane / 4 + i / 2 * 8 < end ? of[i] * scale : -__uint_as_float(0x7f800000u);
                softmax[eight].take(of);
                weights[eight][0] = transposed(pair_of(to_bits(of[0]), to_bits(of[1])));
                weights[eight][1] = transposed(pair_of(to_bits(of[2]), to_bits(of[3])));
            }
            await_groups<1>();
            if (token < STEP) step_values.put(token, shared.value);
            __syncwarp();
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                u32 value[4];
                load_transposed(value, step_values.of(lane % 8 + lane / 16 * 8, 2 * tile + lane / 8 % 2));
#pragma unroll
                for (int eight = 0; eight < EIGHTS; eight++)
                    multiply_matrices(softmax[eight].sums[tile], value, weights[eight]);
            }
            __syncwarp();
            step_values.start(next);
        }
        await_groups<0>();
        __syncwarp();  // the slots become sums
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++) softmax[eight].put(8 * eight, warp, shared);
    }
    __syncthreads();
    for (int query = warp; query < GROUP; query += WARPS)
        combine(shared, query, parts, [&](int i) { return shared.largest[query][i]; },
                [&](int i) { return shared.weight[query][i]; });
    __syncthreads();

    float* partial = arguments.partial + (u64)head * MAX_SHARES * PARTIAL;
    u16* attended = arguments.attended + head * GROUP * HEAD_DIM;
    constexpr int FOURS = HEAD_DIM / 4;  // a thread adds up 4 dimensions
    for (int task = threadIdx.x; task < GROUP * FOURS; task += THREADS) {
        const int query = task / FOURS;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int i = 0; i < parts; i++)
            add_scaled(sum, *(const float4*)&shared.warps[i].sums[query][4 * (task % FOURS)], shared.scales[query][i]);
        if (shares == 1)
            ((uint2*)attended)[task] = divided(sum, shared.total[query]);
        else
            ((float4*)(partial + share * PARTIAL))[task] = sum;
    }
    if (shares == 1) return;
    if ((int)threadIdx.x < GROUP) {
        float* rest = partial + share * PARTIAL + GROUP * HEAD_DIM;
        rest[threadIdx.x] = shared.most[threadIdx.x], rest[GROUP + threadIdx.x] = shared.total[threadIdx.x];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.is_last = atomicAdd(arguments.arrivals + head, 1u) == (u32)shares - 1;
    __syncthreads();
    if (!shared.is_last) return;
    __threadfence();
    const float* largest = partial + GROUP * HEAD_DIM;
    for (int query = warp; query < GROUP; query += WARPS)
        combine(shared, query, shares, [&](int i) { return load_fresh(largest + i * PARTIAL + query); },
                [&](int i) { return load_fresh(largest + i * PARTIAL + GROUP + query); });
    __syncthreads();
    for (int task = threadIdx.x; task < GROUP * FOURS; task += THREADS) {
        const int query = task / FOURS;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
        for (int i = 0; i < shares; i++)
            add_scaled(sum, load_fresh((const float4*)(partial + i * PARTIAL) + task), shared.scales[query][i]);
        ((uint2*)attended)[task] = divided(sum, shared.total[query]);
    }
    if (threadIdx.x == 0) arguments.arrivals[head] = 0;
}
