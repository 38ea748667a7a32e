// Projections of one token: y = W where(|x| > threshold, x, 0) + bias, a cluster of blocks per tile of columns (see
// common.cuh), with what stands before and after it in a decoder: norm or silu(gate) * up, and the residual.
//
// Macros: CHANNELS (K), TILE_WIDTH (chunks of a tile), INPUT (0 plain, 1 normalized, 2 gated), and those of common.cuh.

// Weight [K, outputs], threshold [] or [K], biases [outputs] or null, y [outputs].
struct Projection {
    const u16* weight;
    const float* threshold;
    const u16 *bias, *sparse_bias;
    u16* y;
    int outputs, threshold_each;
};

// `count` projections of the same input side by side: x [K] or, gated, gate [K] followed by up [K]; norm [K] where it is
// normalized; residual [outputs] is added, or null. What the next projections read first, their thresholds and their
// norm, is fetched from memory meanwhile: `bytes` of it from each of `next` on, 0 for none.
struct Arguments {
    Projection projections[3];
    const u16 *x, *norm, *residual;
    const char* next[4];
    int next_bytes[4];
    int count;
    float eps;
};

enum { PLAIN, NORMALIZED, GATED };
constexpr int PART = CHANNELS / CLUSTER;
using PartInputs = Inputs<PART>;
using OneTile = Tile<TILE_WIDTH>;
using PartList = List<OneTile, PART>;
static_assert(DEPTH >= 2, "two slots hold a thread's sums");

struct Shared {
    alignas(16) uint4 slots[DEPTH * THREADS];
    Total<OneTile>::Received received;
    float squares[WARPS];
    u32 counts[WARPS];
    alignas(16) u32 list[PartList::LENGTH];
};

// silu(gate) * up, rounded where models round, of the part `rank`.
__device__ __forceinline__ PartInputs gated(const Arguments& arguments, int rank) {
    PartInputs gate, up;
    await_previous_kernel();
    gate.read(arguments.x + rank * PART);
    up.read(arguments.x + CHANNELS + rank * PART);
#pragma unroll
    for (int v = 0; v < PartInputs::VECTORS; v++)
        gate.set(v, [&](int i) {
            const float g = to_float(gate.get(v, i));
            return rounded(g / (1.f + __expf(-g))) * to_float(up.get(v, i));
        });
    return gate;
}

extern "C" __global__ void __launch_bounds__(THREADS) projection(const __grid_constant__ Arguments arguments) {
    extern __shared__ uint4 dynamic_shared[];
    Shared& shared = *(Shared*)dynamic_shared;
    allow_next_kernel();
    const int rank = (int)blockIdx.x % CLUSTER, first = rank * PART;
    int tile = (int)blockIdx.x / CLUSTER, which = 0;
    for (; which + 1 < arguments.count; which++) {
        const int tiles = divided_up(arguments.projections[which].outputs, OneTile::COLUMNS);
        if (tile < tiles) break;
        tile -= tiles;
    }
    const Projection& p = arguments.projections[which];
    const int outputs = p.outputs;
    const OneTile at(smaller(TILE_WIDTH, outputs / 8 - tile * TILE_WIDTH));
    const Threshold threshold(p.threshold, p.threshold_each != 0);
    const bool all = threshold.keeps_all();
    const u16* corner = p.weight + (u64)first * outputs + 8 * (tile * TILE_WIDTH + at.chunk);
    Stream<OneTile> stream(shared.slots, (const char*)corner, 2 * outputs, at);
    if (all) stream.start_all(PART);
    if (rank == 0 && threadIdx.x == 0) shared.received.mailbox.open(4 * (CLUSTER - 1) * OneTile::COLUMNS);
    cluster_arrive();
    if (blockIdx.x == 0)
#pragma unroll
        for (int i = 0; i < 4; i++)
            for (int at = 128 * threadIdx.x; at < arguments.next_bytes[i]; at += 128 * THREADS)
                prefetch_l2(arguments.next[i] + at);
    uint2 bounds[PartInputs::VECTORS];
#pragma unroll
    for (int v = 0; v < PartInputs::VECTORS; v++)
        if (PartInputs::channel(v) < PART) bounds[v] = threshold.bounds(first + PartInputs::channel(v));
    const int column = tile * OneTile::COLUMNS + (int)threadIdx.x;
    const bool finishes = rank == 0 && (int)threadIdx.x < OneTile::COLUMNS && column < outputs;
    const u16 bias = finishes && p.bias ? p.bias[column] : 0;
    const u16 sparse_bias = finishes && p.sparse_bias ? p.sparse_bias[column] : 0;

    PartInputs x;
    if constexpr (INPUT == NORMALIZED) {
        x = normalized<CHANNELS>(arguments.x, arguments.norm, arguments.eps, rank, shared.squares);
    } else if constexpr (INPUT == GATED) {
        x = gated(arguments, rank);
    } else {
        await_previous_kernel();
        x.read(arguments.x + first);
    }
    const PartList list(x, bounds, all, stream, shared.list, shared.counts);
    const u16 residual = finishes && arguments.residual ? arguments.residual[column] : 0;
    cluster_wait();
    float sums[8] = {};
    stream.run(sums, list.entries, list.count);
    const Total<OneTile> total(sums, at, shared.slots, shared.received, rank);
    if (!finishes) return;
    const float value = total.sum + to_float(bias) + to_float(sparse_bias);
    p.y[column] = to_bits(arguments.residual ? to_float(residual) + rounded(value) : value);
}
