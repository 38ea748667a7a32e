// One projection of two to eight tokens: row r of y = W where(|x_r| > threshold, x_r, 0) + bias, each row with a mask of
// its own. The channels that any row keeps are listed once and their weights read once; matrix instructions multiply
// them with all rows, of which they always take eight, some of them zero: a weight that is not finite makes every row NaN,
// also one that drops its channel.
//
// Macros: CHANNELS (K), TILE_WIDTH (chunks of a tile, a multiple of 8), TOKENS (at most so many; 2, 4 or 8), and those of
// common.cuh; DEPTH is the number of steps whose weights a warp keeps in flight. A cluster owns a tile as in
// projection.cu. A warp takes 8 chunks of it and 16 entries of the list in a step; the sums of warps and blocks are added
// in a fixed order.

// Weight [K, outputs], threshold [] or [K], bias [outputs] or null, x [rows, K], y [rows, outputs].
struct Arguments {
    const u16* weight;
    const float* threshold;
    const u16 *bias, *x;
    u16* y;
    int outputs, threshold_each, rows;
};

constexpr int STEP = 16, CHUNKS = 8;  // list entries and chunks of a step
constexpr int PART = CHANNELS / CLUSTER, COLUMNS = 8 * TILE_WIDTH;
constexpr int SETS = TILE_WIDTH / CHUNKS, SET_WARPS = WARPS / SETS;  // warps that share columns
constexpr int MOST_HEAD = PART / 2 / STEP;  // steps that are read before the masks are known
constexpr int HEAD = (MOST_HEAD < DEPTH * SET_WARPS ? MOST_HEAD : DEPTH * SET_WARPS) * STEP;
constexpr int STRIDE = 8 * CHUNKS + 4;  // of a row among sums, so that no two lanes meet in a bank
constexpr int FINISHED = divided_up(COLUMNS * TOKENS, THREADS);  // outputs of a thread of the cluster's first block
using PartInputs = Inputs<PART>;
static_assert(TILE_WIDTH % CHUNKS == 0 && WARPS % SETS == 0 && DEPTH >= 2, "this tile is not supported");

struct Shared {
    union {
        uint4 slots[DEPTH][STEP][CHUNKS];  // weights on their way
        float sums[TOKENS][STRIDE];
    } of_warp[WARPS];
    Mailbox mailbox;
    float received[CLUSTER > 1 ? CLUSTER - 1 : 1][TOKENS][COLUMNS];  // of the blocks but the first
    alignas(16) u16 inputs[TOKENS][PART + 8];  // zero where a row drops the channel, and from PART on
    alignas(16) u16 list[PART + STEP];         // channels
    u32 counts[WARPS];
};

// The rows' inputs that a thread holds, and which of their channels are kept by which row.
struct Rows {
    PartInputs x[TOKENS];
    __device__ __forceinline__ Rows(const Arguments& arguments, int first) {
#pragma unroll
        for (int row = 0; row < TOKENS; row++) {
#pragma unroll
            for (int v = 0; v < PartInputs::VECTORS; v++) x[row].pairs[v] = make_uint2(0, 0);
            if (row < arguments.rows) x[row].read(arguments.x + (u64)row * CHANNELS + first);
        }
    }
    // Sets what the threshold drops to zero, and returns the channels that any row keeps: 4 bits for each vector.
    __device__ __forceinline__ u32 drop(Threshold threshold, int first, int rows) {
        u32 nibbles = 0;
#pragma unroll
        for (int v = 0; v < PartInputs::VECTORS; v++) {
            const int channel = PartInputs::channel(v);
            if (channel >= PART) continue;
            const uint2 bounds = threshold.bounds(first + channel);
            uint2 any = make_uint2(0, 0);
#pragma unroll
            for (int row = 0; row < TOKENS; row++) {
                uint2& pair = x[row].pairs[v];
                const uint2 kept = row < rows ? kept_of(pair, bounds) : make_uint2(0, 0);
                pair.x &= kept.x * 0xffffu, pair.y &= kept.y * 0xffffu;
                any.x |= kept.x, any.y |= kept.y;
            }
            nibbles |= nibble_of(any) << (4 * v);
        }
        return nibbles;
    }
    __device__ __forceinline__ void put(Shared& shared) const {
#pragma unroll
        for (int v = 0; v < PartInputs::VECTORS; v++)
#pragma unroll
            for (int row = 0; row < TOKENS; row++)
                if (PartInputs::channel(v) < PART) *(uint2*)&shared.inputs[row][PartInputs::channel(v)] = x[row].pairs[v];
        if (threadIdx.x < 8)
#pragma unroll
            for (int row = 0; row < TOKENS; row++) shared.inputs[row][PART + threadIdx.x] = 0;
    }
};

// Lists the channels below HEAD, then the kept ones from there on, then PART, which has no input, as often as fills a
// step; puts the inputs beside. Returns the number of steps.
__device__ __forceinline__ int list_union(const Arguments& arguments, Threshold threshold, int first, Shared& shared) {
    Rows rows(arguments, first);
    u32 nibbles = rows.drop(threshold, first, arguments.rows);
    rows.put(shared);
#pragma unroll
    for (int v = 0; v < PartInputs::VECTORS; v++) {
        const int channel = PartInputs::channel(v);  // HEAD is a multiple of 4
        if (channel >= HEAD) continue;
        nibbles &= ~(15u << (4 * v));
#pragma unroll
        for (int i = 0; i < 4; i++) shared.list[channel + i] = (u16)(channel + i);
    }
    const Scan scan(__popc(nibbles), shared.counts);
    int next = HEAD + (int)scan.before;
#pragma unroll
    for (int v = 0; v < PartInputs::VECTORS; v++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (nibbles >> (4 * v + i) & 1) shared.list[next++] = (u16)(PartInputs::channel(v) + i);
    const int count = HEAD + (int)scan.total;
    if (threadIdx.x < STEP) shared.list[count + threadIdx.x] = (u16)PART;
    __syncthreads();
    return divided_up(count, STEP);
}

// The inputs of a step as multiply_matrices takes them: the second matrix, of whose columns a row of tokens is one.
__device__ __forceinline__ void read_inputs(u32 (&x)[2], const Shared& shared, int step) {
    const int row = (int)threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 two = *(const u32*)&shared.list[step * STEP + 8 * half + 2 * (threadIdx.x % 4)];
        x[half] = row < TOKENS ? pair_of(shared.inputs[row][low(two)], shared.inputs[row][high(two)]) : 0;
    }
}

// The weights of a warp's steps on their way: of each step a lane copies one chunk of every fourth entry. Chunks change
// places so that 8 entries' are in different banks.
struct Weights {
    uint4 (*slots)[STEP][CHUNKS];
    const char* column;
    u32 row_bytes;
    bool active;
    __device__ __forceinline__ Weights(const Arguments& arguments, int first, int from, uint4 (*slots)[STEP][CHUNKS])
        : slots(slots), row_bytes(2 * arguments.outputs) {
        const int chunk = from + (int)threadIdx.x % CHUNKS;
        column = (const char*)(arguments.weight + (u64)first * arguments.outputs + 8 * chunk);
        active = 8 * chunk < arguments.outputs;
    }
    __device__ __forceinline__ uint4* of(int i, int entry, int chunk) const {
        return &slots[i % DEPTH][entry][chunk ^ (entry % CHUNKS)];
    }
    // Starts reading for the warp's i-th step, if there is that step; without a list entries are channels.
    __device__ __forceinline__ void start(int i, int step, int steps, const u16* list) const {
        const int lane = threadIdx.x % 32;
        if (active && step < steps)
#pragma unroll
            for (int k = lane / CHUNKS; k < STEP; k += 32 / CHUNKS) {
                const int entry = step * STEP + k;
                const int channel = list ? smaller(list[entry], PART - 1) : entry;
                start_copy(of(i, k, lane % CHUNKS), column + (u64)channel * row_bytes);
            }
        end_group();
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) rows(const __grid_constant__ Arguments arguments) {
    extern __shared__ uint4 dynamic_shared[];
    Shared& shared = *(Shared*)dynamic_shared;
    allow_next_kernel();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, set = warp % SETS, own = warp / SETS;
    const int rank = (int)blockIdx.x % CLUSTER, first = rank * PART, tile = (int)blockIdx.x / CLUSTER;
    const int outputs = arguments.outputs;
    Weights weights(arguments, first, tile * TILE_WIDTH + set * CHUNKS, shared.of_warp[warp].slots);
    for (int i = 0; i < DEPTH; i++) weights.start(i, own + i * SET_WARPS, HEAD / STEP, nullptr);
    if (rank == 0 && threadIdx.x == 0) shared.mailbox.open(4 * (CLUSTER - 1) * COLUMNS * arguments.rows);
    cluster_arrive();

    await_previous_kernel();
    const Threshold threshold(arguments.threshold, arguments.threshold_each != 0);
    const int steps = list_union(arguments, threshold, first, shared);
    if (HEAD < DEPTH * SET_WARPS * STEP)  // few channels: the head is not as long as it could be
        for (int i = 0; i < DEPTH; i++) {
            const int step = own + i * SET_WARPS;
            if (step >= HEAD / STEP) weights.start(i, step, steps, shared.list);
        }
    cluster_wait();
    float sums[CHUNKS / 2][4] = {};
    for (int i = 0, step = own; step < steps; i++, step += SET_WARPS) {
        await_groups<DEPTH - 1>();
        __syncwarp();
        u32 x[2];
        read_inputs(x, shared, step);
#pragma unroll
        for (int two = 0; two < CHUNKS; two += 2) {
            u32 pairs[4];
            load_transposed(pairs, weights.of(i, lane % 8 + lane / 16 * 8, two + lane / 8 % 2));
            multiply_matrices(sums[two / 2], pairs, x);
        }
        __syncwarp();
        weights.start(i, step + DEPTH * SET_WARPS, steps, shared.list);
    }
    await_groups<0>();
    __syncwarp();
#pragma unroll
    for (int two = 0; two < CHUNKS / 2; two++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (lane % 4 * 2 < TOKENS)
                shared.of_warp[warp].sums[lane % 4 * 2 + i % 2][two * 16 + lane / 4 + i / 2 * 8] = sums[two][i];
    __syncthreads();
    float totals[FINISHED] = {};
#pragma unroll
    for (int i = 0; i < FINISHED; i++) {
        const int task = (int)threadIdx.x + i * THREADS, c = task % COLUMNS, r = task / COLUMNS;
        if (r >= arguments.rows) continue;
#pragma unroll
        for (int w = 0; w < SET_WARPS; w++)
            totals[i] += shared.of_warp[w * SETS + c / (8 * CHUNKS)].sums[r][c % (8 * CHUNKS)];
        if (rank > 0) shared.mailbox.send(&shared.received[rank - 1][r][c], totals[i]);
    }
    if (rank > 0) return;  // and make room for the next kernel
    shared.mailbox.await();
#pragma unroll
    for (int i = 0; i < FINISHED; i++) {
        const int task = (int)threadIdx.x + i * THREADS, c = task % COLUMNS, r = task / COLUMNS;
        const int column = tile * COLUMNS + c;
        if (r >= arguments.rows || column >= outputs) continue;
        float value = totals[i];
#pragma unroll
        for (int other = 1; other < CLUSTER; other++) value += shared.received[other - 1][r][c];
        if (arguments.bias) value += to_float(arguments.bias[column]);
        arguments.y[(u64)r * outputs + column] = to_bits(value);
    }
}
