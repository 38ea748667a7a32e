// One token through all blocks of a decoder, in one launch: every multiprocessor runs one block of threads, and the
// blocks hand activations to each other through memory, without barriers: each value travels with a 16-bit tag that
// tells which phase of which step wrote it, and readers poll until all tags match. A tagged buffer is written again
// two decoder blocks later, when everyone is known to have read it.
//
// Phases of a decoder block: norm, q, k, v | rotary, cache write, attention | o, residual | norm, gate, up, SiLU |
// down, residual. Weights are read while the inputs are awaited, as far as they are sure to be needed (no threshold)
// or allowed to be in vain (AHEAD).
//
// Macros: HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, EPS, NORM_QK, WIDTH_QKV, WIDTH_O, WIDTH_GATE, WIDTH_DOWN
// (chunks of a tile), AHEAD (weights a thread reads before it knows whether they are needed, at most DEPTH), MAX_SHARES
// (of the positions, for the size of buffers), and those of common.cuh.

constexpr int QUERY = HEADS * HEAD_DIM, KEY = KV_HEADS * HEAD_DIM, QKV = QUERY + 2 * KEY;
constexpr int GROUP = HEADS / KV_HEADS;  // query heads that share a key head
constexpr int PARTIAL = GROUP * (HEAD_DIM + 2);  // what one share of the positions gives: sums, maxima, weights
constexpr int TILE_POSITIONS = 1024;             // scored at a time
constexpr int SLACK = 16;                        // one of so many tiles may be missing when polling begins

// One projection: weights [K, N], thresholds, biases [N] or null.
struct Projection {
    const u16* weight;
    const float* threshold;
    const u16* bias;
    const u16* sparse_bias;
    u64 threshold_each;
    __device__ float biased(float sum, int column) const {
        if (bias) sum += to_float(bias[column]);
        if (sparse_bias) sum += to_float(sparse_bias[column]);
        return sum;
    }
};

// One decoder block. Norms [HIDDEN] and [HEAD_DIM]; caches [KV_HEADS, capacity, HEAD_DIM]; window 0 sees all.
enum { OF_Q, OF_K, OF_V, OF_O, OF_GATE, OF_UP, OF_DOWN, PROJECTIONS };
struct Block {
    Projection projections[PROJECTIONS];
    const u16 *norm_attention, *norm_mlp, *norm_q, *norm_k;
    u16 *keys, *values;
    u64 window;
};

// Tagged activations; two sets, for even and odd decoder blocks.
struct Buffers {
    u32 qkv[QKV], attended[QUERY], middle[HIDDEN], product[INTERMEDIATE], hidden[HIDDEN];
    u64 partial[KV_HEADS * MAX_SHARES * PARTIAL];
    u32 arrivals[8];  // how many tiles were ever published, by phase: a hint that polling will soon succeed
};

// Kept between launches, zero before the first. `epoch` counts launches.
struct State {
    Buffers buffers[2];
    u32 epoch, finished;
};

// What a block of threads knows of a decoder block: read one decoder block ahead.
struct Known {
    Block block;
    float thresholds[PROJECTIONS];  // the first or only one
    __device__ __forceinline__ const Projection& projection(int p) const { return block.projections[p]; }
    __device__ __forceinline__ Threshold threshold(int p) const {
        const Projection& projection = block.projections[p];
        const bool each = projection.threshold_each != 0;
        return {each ? projection.threshold : thresholds + p, each};
    }
    __device__ __forceinline__ void read(const Block* source) {
        constexpr int WORDS = sizeof(Block) / sizeof(u64);
        for (int i = threadIdx.x; i < WORDS; i += THREADS) ((u64*)&block)[i] = ((const u64*)source)[i];
        if (threadIdx.x < PROJECTIONS) thresholds[threadIdx.x] = *source->projections[threadIdx.x].threshold;
    }
};

struct Shared {
    Known known[3];  // of this decoder block, the next, and the last, with which some threads may still be busy
    alignas(16) uint4 slots[DEPTH * THREADS];
    Exchange exchange;
    float scratch[2][WARPS];
    u32 counts[WARPS];
    alignas(16) u32 list[1];  // to the end of dynamic shared memory
};

__device__ __forceinline__ bool is_fresh(uint4 words, u32 tag) {
    return (((words.x ^ tag) | (words.y ^ tag) | (words.z ^ tag) | (words.w ^ tag)) >> 16) == 0;
}

// Waits, quietly, until `arrivals` is close to `expected`: many threads that poll slow down those that still work.
__device__ __forceinline__ void await_most(const u32* arrivals, u32 expected) {
    if (threadIdx.x == 0) {
        u32 spins = 0;
        while ((int)(load_shared_word(arrivals) - expected) < 0) check_patience(spins);
    }
    __syncthreads();
}

// This thread's inputs out of tagged vectors; `tag` is in the upper 16 bits. Each of several parts of `channels`.
template <int VECTORS, int PARTS>
__device__ __forceinline__ void await(Inputs<VECTORS> (&x)[PARTS], const u32* words, int channels, u32 tag) {
    uint4 read[PARTS][VECTORS];
    u32 spins = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int v = 0; v < VECTORS; v++)
            if (x[part].channel(v) < channels)
                read[part][v] = load_shared_words(words + part * channels + x[part].channel(v));
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int v = 0; v < VECTORS; v++)
            if (x[part].channel(v) < channels) {
                uint4& r = read[part][v];
                while (!is_fresh(r, tag)) {
                    r = load_shared_words(words + part * channels + x[part].channel(v));
                    check_patience(spins);
                }
                x[part].pairs[v] = make_uint2(pair_of(low(r.x), low(r.y)), pair_of(low(r.z), low(r.w)));
            }
}
__device__ __forceinline__ u16 await_word(const u32* word, u32 tag) {
    u32 read = load_shared_word(word), spins = 0;
    while ((read ^ tag) >> 16) {
        read = load_shared_word(word);
        check_patience(spins);
    }
    return low(read);
}
__device__ __forceinline__ float await_float(const u64* word, u32 tag) {
    u64 read = load_shared_long(word);
    u32 spins = 0;
    while ((u32)(read >> 32) != tag) {
        read = load_shared_long(word);
        check_patience(spins);
    }
    return __uint_as_float((u32)read);
}
__device__ __forceinline__ void publish(u32* words, int i, u32 tag, float value) {
    store_shared_word(words + i, tag | to_bits(value));
}

// x / rms(x) * weight, rounded where the model rounds, of the part `rank` of x. weight [HIDDEN].
constexpr int HIDDEN_PART = HIDDEN / CLUSTER;
using HiddenInputs = Inputs<vectors_of(HIDDEN_PART)>;
__device__ __forceinline__ HiddenInputs normalize(const HiddenInputs (&parts)[CLUSTER], int rank, const u16* weight,
                                                  float* scratch) {
    constexpr int VECTORS = vectors_of(HIDDEN_PART);
    HiddenInputs x = parts[0], scales;
    scales.read(weight + rank * HIDDEN_PART, HIDDEN_PART);
    float squares = 0.f;
#pragma unroll
    for (int part = 0; part < CLUSTER; part++) {
        if (part == rank) x = parts[part];
#pragma unroll
        for (int v = 0; v < VECTORS; v++)
            if (x.channel(v) < HIDDEN_PART)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float f = to_float(parts[part].get(v, i));
                    squares += f * f;
                }
    }
    const float scale = rsqrtf(block_sum(squares, scratch) / HIDDEN + EPS);
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        u16 bits[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            bits[i] = to_bits(to_float(scales.get(v, i)) * rounded(to_float(x.get(v, i)) * scale));
        x.pairs[v] = make_uint2(pair_of(bits[0], bits[1]), pair_of(bits[2], bits[3]));
    }
    return x;
}

__device__ __forceinline__ int channels_ahead(const Threshold& t) { return t.keeps_all() ? DEPTH : AHEAD; }
// hidden [HIDDEN] -> result [HIDDEN]; position [1]; cosine and sine [HEAD_DIM] at that position; caches hold
// `capacity` positions; attention splits the positions among up to `shares` blocks with `positions_per_share` each.
struct Launch {
    const Block* blocks;
    const u16* hidden;
    u16* result;
    const long long* position;
    const u16 *cosine, *sine;
    State* state;
    int block_count, capacity, shares, positions_per_share;
};

constexpr int TILES_Q = divided_up(QUERY / 8, WIDTH_QKV), TILES_KV = divided_up(KEY / 8, WIDTH_QKV),
              TILES_QKV = TILES_Q + 2 * TILES_KV, TILES_O = divided_up(HIDDEN / 8, WIDTH_O), TILES_GATE = divided_up(INTERMEDIATE / 8, WIDTH_GATE),
              TILES_DOWN = divided_up(HIDDEN / 8, WIDTH_DOWN);
enum { QKV_PHASE, ATTENTION_PHASE, O_PHASE, GATE_UP_PHASE, DOWN_PHASE, PHASES };

// Where a launch stands: decoder block `index`; `phase` numbers its first phase, over all launches.
struct Turn {
    const Launch& launch;
    Shared& shared;
    int index, position;
    u32 epoch, phase, tiles;  // `tiles` counts those of the cluster in this launch
    __device__ __forceinline__ static int cluster() { return (int)blockIdx.x / CLUSTER; }
    __device__ __forceinline__ static int clusters() { return (int)gridDim.x / CLUSTER; }
    __device__ __forceinline__ static int rank() { return (int)blockIdx.x % CLUSTER; }
    __device__ __forceinline__ const Known& known() const { return shared.known[index % 3]; }
    __device__ __forceinline__ Buffers& buffers() const { return launch.state->buffers[index & 1]; }
    __device__ __forceinline__ u32 tag(int which) const { return (phase + which) << 16; }
    // Each tile of a phase is announced by every block of its cluster.
    __device__ __forceinline__ void announce(int which) const {
        if (threadIdx.x == 0) add_shared_word(&buffers().arrivals[which], 1);
    }
    // Waits until nearly all of the `tiles` of phase `which` are announced, of this decoder block or, if `last`, of
    // the one before.
    __device__ __forceinline__ void await_most(int which, int tiles, bool last = false) const {
        const int parity = (index & 1) ^ (last ? 1 : 0);
        const u32 per_launch = (u32)(launch.block_count + 1 - parity) / 2, now = (u32)(index - (last ? 1 : 0)) / 2 + 1;
        const u32 all = (epoch * per_launch + now) * (u32)tiles;
        ::await_most(&launch.state->buffers[parity].arrivals[which], all - (u32)tiles / SLACK);
    }
    // The hidden state that enters this decoder block.
    __device__ __forceinline__ const u32* before() const { return launch.state->buffers[(index & 1) ^ 1].hidden; }
    __device__ __forceinline__ float before_at(int c) const {
        return to_float(index == 0 ? launch.hidden[c] : await_word(before() + c, tag(-1)));
    }
};

// The inputs of a phase are 1 / CLUSTER of these channels for each block of a cluster.
__device__ __forceinline__ int channels_of(int phase) {
    return (phase == O_PHASE ? QUERY : phase == DOWN_PHASE ? INTERMEDIATE : HIDDEN) / CLUSTER;
}
constexpr int MOST_CHANNELS =
    (QUERY > INTERMEDIATE ? QUERY > HIDDEN ? QUERY : HIDDEN : INTERMEDIATE > HIDDEN ? INTERMEDIATE : HIDDEN) / CLUSTER;
using PhaseInputs = Inputs<vectors_of(MOST_CHANNELS)>;

// Awaits the block's part of a phase's inputs, normalized where that comes first.
__device__ __forceinline__ PhaseInputs take_inputs(const Turn& turn, int phase) {
    const Buffers& buffers = turn.buffers();
    PhaseInputs x[1];
    if (phase == O_PHASE || phase == DOWN_PHASE) {
        const int source = phase == O_PHASE ? ATTENTION_PHASE : GATE_UP_PHASE, channels = channels_of(phase);
        const u32* words = phase == O_PHASE ? buffers.attended : buffers.product;
        turn.await_most(source, phase == O_PHASE ? KV_HEADS : CLUSTER * TILES_GATE);
        await(x, words + turn.rank() * channels, channels, turn.tag(source));
        return x[0];
    }
    HiddenInputs parts[CLUSTER];
    if (phase == QKV_PHASE && turn.index == 0) {
#pragma unroll
        for (int part = 0; part < CLUSTER; part++)
            parts[part].read(turn.launch.hidden + part * HIDDEN_PART, HIDDEN_PART);
    } else {
        const bool first = phase == QKV_PHASE;
        turn.await_most(first ? DOWN_PHASE : O_PHASE, CLUSTER * (first ? TILES_DOWN : TILES_O), first);
        await(parts, first ? turn.before() : buffers.middle, HIDDEN_PART, turn.tag(first ? -1 : O_PHASE));
    }
    const Block& block = turn.known().block;
    const HiddenInputs normalized =
        normalize(parts, turn.rank(), phase == QKV_PHASE ? block.norm_attention : block.norm_mlp, turn.shared.scratch[phase != QKV_PHASE]);
#pragma unroll
    for (int v = 0; v < vectors_of(HIDDEN_PART); v++) x[0].pairs[v] = normalized.pairs[v];
    return x[0];
}

// A tile of outputs: which projection, its number of outputs, the tile's number in it.
struct Part {
    int which, outputs, tile;
    __device__ __forceinline__ Part(int phase, int number) : which(OF_Q), outputs(QUERY), tile(number) {
        if (phase == O_PHASE) which = OF_O, outputs = HIDDEN;
        if (phase == DOWN_PHASE) which = OF_DOWN, outputs = HIDDEN;
        if (phase == GATE_UP_PHASE) which = OF_GATE, outputs = INTERMEDIATE;
        if (phase == QKV_PHASE && number >= TILES_Q) {
            tile -= TILES_Q, which = OF_K, outputs = KEY;
            if (tile >= TILES_KV) tile -= TILES_KV, which = OF_V;
        }
    }
};

// What becomes of a sum, and of gate's and up's: the bias, the residual, SiLU; then everyone may have it.
__device__ __forceinline__ void give(const Turn& turn, int phase, const Part& part, int c, const Total& total) {
    const Known& known = turn.known();
    Buffers& buffers = turn.buffers();
    float value = known.projection(part.which).biased(total.sums[0], c);
    u32* words = buffers.qkv + (part.which == OF_Q ? 0 : part.which == OF_K ? QUERY : QUERY + KEY);
    if (phase == O_PHASE) {
        words = buffers.middle;
        value = turn.before_at(c) + rounded(value);
    } else if (phase == GATE_UP_PHASE) {
        words = buffers.product;
        const float gate = rounded(value), up = rounded(known.projection(OF_UP).biased(total.sums[1], c));
        value = rounded(gate / (1.f + __expf(-gate))) * up;
    } else if (phase == DOWN_PHASE) {
        words = buffers.hidden;
        value = to_float(await_word(buffers.middle + c, turn.tag(O_PHASE))) + rounded(value);
        if (turn.index == turn.launch.block_count - 1) {
            turn.launch.result[c] = to_bits(value);
            return;
        }
    }
    publish(words, c, turn.tag(phase), value);
}

// The projections of a phase: the whole block at one tile or, for gate and up, half of its warps at a tile of each. One
// function for all of them, so that its code stays in the instruction cache.
__device__ __noinline__ void project(Turn& turn, int phase) {
    Shared& shared = turn.shared;
    const Known& known = turn.known();
    const int channels = channels_of(phase), first = turn.rank() * channels;
    const int teams = phase == GATE_UP_PHASE ? 2 : 1, team = (int)threadIdx.x / (THREADS / teams);
    const int width = phase == QKV_PHASE ? WIDTH_QKV : phase == O_PHASE ? WIDTH_O : phase == GATE_UP_PHASE ? WIDTH_GATE : WIDTH_DOWN;
    const int tiles = phase == QKV_PHASE ? TILES_QKV : phase == O_PHASE ? TILES_O : phase == GATE_UP_PHASE ? TILES_GATE : TILES_DOWN;
    int listed = -1, counts[2] = {0, 0};
#pragma unroll 1
    for (int tile = turn.cluster(); tile < tiles; tile += turn.clusters()) {
        const Part part(phase, tile);
        const Threshold thresholds[2] = {known.threshold(part.which), known.threshold(part.which + teams - 1)};
        const int ahead = channels_ahead(thresholds[team]);
        const Tile at(width, smaller(width, part.outputs / 8 - part.tile * width), WARPS / teams);
        const u16* weight = known.projection(part.which + team).weight;
        Stream stream(shared.slots, weight + (u64)first * part.outputs + 8 * (part.tile * width + at.chunk),
                      2 * part.outputs, at, ahead, channels);
        if (part.which != listed) {
            for (int t = 0; t < teams; t++) thresholds[t].prefetch(first, channels);
            const PhaseInputs x = take_inputs(turn, phase);
            const int heads[2] = {smaller(channels, channels_ahead(thresholds[0]) * at.stride),
                                  smaller(channels, channels_ahead(thresholds[1]) * at.stride)};
            list_kept(x, channels, thresholds, first, heads, teams, shared.list, shared.counts, counts);
            listed = part.which;
        }
        float sums[8] = {};
        stream.run(sums, shared.list + team * channels, team ? counts[1] : counts[0]);
        const Total total(sums, at, teams, shared.slots, shared.exchange, turn.rank(), ++turn.tiles);
        const int c = 8 * part.tile * width + total.column;
        if (total.mine && c < part.outputs) give(turn, phase, part, c, total);
        turn.announce(phase);
    }
}

// ---- attention -----------------------------------------------------------------------------------------------

constexpr int LANES = HEAD_DIM / 8;            // threads that hold one key or value
constexpr int AT_ONCE = GROUP % 4 == 0 ? 4 : GROUP % 3 == 0 ? 3 : GROUP % 2 == 0 ? 2 : 1;  // query heads of a thread
constexpr int SETS = GROUP / AT_ONCE;          // warps split into sets, each for AT_ONCE heads
constexpr int SET_WARPS = WARPS / SETS;
constexpr int SET_LANES = SET_WARPS * 32 / LANES;  // positions that a set scores at a time
static_assert(SET_WARPS > 0 && 32 % LANES == 0 && HEAD_DIM % 8 == 0, "this head layout is not supported");

struct AttentionShared {  // over Shared.list
    float query[GROUP * HEAD_DIM];
    float scores[GROUP * TILE_POSITIONS];
    float sums[SETS * SET_WARPS * HEAD_DIM];
    float largest[GROUP], weight[GROUP], rescale[GROUP];
};

// A head of q or k: awaited, normalized where the model does, rotated; thread i < HEAD_DIM / 2 of the warp's `lane`s
// holds dimensions i and i + HEAD_DIM / 2 in turn; put(i, value) takes the result.
template <class Put>
__device__ __forceinline__ void take_head(const u32* words, u32 tag, const u16* norm, const u16* cosine,
                                          const u16* sine, Put put) {
    constexpr int HALF = HEAD_DIM / 2, TURNS = (HALF + 31) / 32;
    const int lane = threadIdx.x % 32;
    float first[TURNS], second[TURNS];
    float squares = 0.f;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int i = lane + 32 * turn;
        first[turn] = i < HALF ? to_float(await_word(words + i, tag)) : 0.f;
        second[turn] = i < HALF ? to_float(await_word(words + i + HALF, tag)) : 0.f;
        squares += first[turn] * first[turn] + second[turn] * second[turn];
    }
    const float scale = norm ? rsqrtf(warp_sum(squares) / HEAD_DIM + EPS) : 1.f;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int i = lane + 32 * turn;
        if (i >= HALF) continue;
        float a = first[turn], b = second[turn];
        if (norm) {
            a = rounded(to_float(norm[i]) * rounded(a * scale));
            b = rounded(to_float(norm[i + HALF]) * rounded(b * scale));
        }
        put(i, rounded(a * to_float(cosine[i]) - b * to_float(sine[i])));
        put(i + HALF, rounded(b * to_float(cosine[i + HALF]) + a * to_float(sine[i + HALF])));
    }
}

// Attention of the query heads that share key head `head`, over share `share` of the positions from `oldest` on.
__device__ __forceinline__ void attend(const Turn& turn, int head, int share, int shares, int oldest) {
    AttentionShared& shared = *(AttentionShared*)turn.shared.list;
    const Block& block = turn.known().block;
    Buffers& buffers = turn.buffers();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, position = turn.position;
    const u32 tag_qkv = turn.tag(QKV_PHASE), tag = turn.tag(ATTENTION_PHASE);
    const u32 phase = turn.phase + ATTENTION_PHASE;  // shares are not written every time: their tag is the whole phase
    const u16 *cosine = turn.launch.cosine, *sine = turn.launch.sine;
    const int per_share = divided_up(position + 1 - oldest, shares);
    const int begin = oldest + share * per_share, end = smaller(begin + per_share, position + 1);
    u16* keys = block.keys + (u64)head * turn.launch.capacity * HEAD_DIM;
    u16* values = block.values + (u64)head * turn.launch.capacity * HEAD_DIM;
    const bool newest = position >= begin && position < end;

    for (int task = warp; task < GROUP + 2; task += WARPS) {
        if (task < GROUP)
            take_head(buffers.qkv + (head * GROUP + task) * HEAD_DIM, tag_qkv, NORM_QK ? block.norm_q : nullptr, cosine,
                      sine, [&](int i, float value) { shared.query[task * HEAD_DIM + i] = value; });
        else if (newest && task == GROUP)
            take_head(buffers.qkv + QUERY + head * HEAD_DIM, tag_qkv, NORM_QK ? block.norm_k : nullptr, cosine, sine,
                      [&](int i, float value) { keys[(u64)position * HEAD_DIM + i] = to_bits(value); });
        else if (newest)
            for (int i = lane; i < HEAD_DIM; i += 32)
                values[(u64)position * HEAD_DIM + i] =
                    await_word(buffers.qkv + QUERY + KEY + head * HEAD_DIM + i, tag_qkv);
    }
    __syncthreads();

    const int set = warp / SET_WARPS;  // warps beyond the last whole set only keep the barriers
    const bool works = set < SETS;
    const int in_set = (int)threadIdx.x - set * SET_WARPS * 32;
    const int slot = in_set / LANES, dimension = 8 * (lane % LANES);
    float sums[AT_ONCE][8] = {};
    for (int g = threadIdx.x; g < GROUP; g += THREADS) {
        shared.largest[g] = -__uint_as_float(0x7f800000u);
        shared.weight[g] = 0.f;
    }
    for (int first = begin; first < end; first += TILE_POSITIONS) {
        const int count = smaller(TILE_POSITIONS, end - first);
        if (works) {
            const int rounds = divided_up(count, SET_LANES);
            for (int round = 0; round < rounds; round++) {
                const int p = round * SET_LANES + slot;
                float dots[AT_ONCE] = {};
                if (p < count) {
                    const uint4 key = *(const uint4*)(keys + (u64)(first + p) * HEAD_DIM + dimension);
#pragma unroll
                    for (int g = 0; g < AT_ONCE; g++) {
                        const float* q = shared.query + (set * AT_ONCE + g) * HEAD_DIM + dimension;
                        dots[g] = to_float(low(key.x)) * q[0] + to_float(high(key.x)) * q[1] +
                                  to_float(low(key.y)) * q[2] + to_float(high(key.y)) * q[3] +
                                  to_float(low(key.z)) * q[4] + to_float(high(key.z)) * q[5] +
                                  to_float(low(key.w)) * q[6] + to_float(high(key.w)) * q[7];
                    }
                }
#pragma unroll
                for (int g = 0; g < AT_ONCE; g++) {
                    for (int step = LANES / 2; step > 0; step >>= 1) dots[g] += __shfl_xor_sync(ALL, dots[g], step);
                    if (p < count && lane % LANES == 0)
                        shared.scores[(set * AT_ONCE + g) * TILE_POSITIONS + p] = dots[g] * rsqrtf((float)HEAD_DIM);
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
            for (int p = slot; p < count; p += SET_LANES) {
                const uint4 value = *(const uint4*)(values + (u64)(first + p) * HEAD_DIM + dimension);
#pragma unroll
                for (int g = 0; g < AT_ONCE; g++)
                    multiply_add(sums[g], value, shared.scores[(set * AT_ONCE + g) * TILE_POSITIONS + p]);
            }
        }
        __syncthreads();
    }

    u64* partial = buffers.partial + (u64)head * MAX_SHARES * PARTIAL;
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
                publish(buffers.attended, (head * GROUP + query) * HEAD_DIM + d, tag, sum / shared.weight[query]);
            else if (share)
                store_shared_long(partial + share * PARTIAL + query * HEAD_DIM + d, (u64)phase << 32 | __float_as_uint(sum));
            else
                shared.query[query * HEAD_DIM + d] = sum;  // the queries are used up
        }
        __syncthreads();
    }
    if (shares == 1) {
        turn.announce(ATTENTION_PHASE);
        return;
    }
    if (share) {
        for (int g = threadIdx.x; g < GROUP; g += THREADS) {
            u64* mine = partial + share * PARTIAL + GROUP * HEAD_DIM + 2 * g;
            store_shared_long(mine, (u64)phase << 32 | __float_as_uint(shared.largest[g]));
            store_shared_long(mine + 1, (u64)phase << 32 | __float_as_uint(shared.weight[g]));
        }
        return;
    }
    for (int task = threadIdx.x; task < GROUP * HEAD_DIM; task += THREADS) {  // the first share adds up the others
        const int query = task / HEAD_DIM;
        float largest = shared.largest[query], weight = shared.weight[query], sum = shared.query[task];
        for (int other = 1; other < shares; other++) {
            const u64* theirs = partial + other * PARTIAL;
            const float their_sum = await_float(theirs + task, phase);
            const float their_largest = await_float(theirs + GROUP * HEAD_DIM + 2 * query, phase);
            const float their_weight = await_float(theirs + GROUP * HEAD_DIM + 2 * query + 1, phase);
            const float both = fmaxf(largest, their_largest);
            const float ours = __expf(largest - both), theirs_scale = __expf(their_largest - both);
            sum = sum * ours + their_sum * theirs_scale;
            weight = weight * ours + their_weight * theirs_scale;
            largest = both;
        }
        publish(buffers.attended, head * GROUP * HEAD_DIM + task, tag, sum / weight);
    }
    turn.announce(ATTENTION_PHASE);
}

__device__ __noinline__ void attention(Turn& turn) {
    const int window = (int)turn.known().block.window;
    const int seen = window && turn.position + 1 > window ? window : turn.position + 1;
    int shares = smaller(turn.launch.shares, divided_up(seen, turn.launch.positions_per_share));
    shares = divided_up(seen, divided_up(seen, shares));  // none is empty
    for (int item = blockIdx.x; item < KV_HEADS * shares; item += gridDim.x) {
        __syncthreads();
        attend(turn, item % KV_HEADS, item / KV_HEADS, shares, turn.position + 1 - seen);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(const __grid_constant__ Launch launch) {
    extern __shared__ uint4 dynamic_shared[];
    Shared& shared = *(Shared*)dynamic_shared;
    const u32 epoch = load_shared_word(&launch.state->epoch);
    const int position = (int)*launch.position, count = launch.block_count;
    shared.known[0].read(launch.blocks);
    shared.exchange.clear();
    __syncthreads();
    cluster_arrive();
    cluster_wait();
    Turn turn{launch, shared, 0, position, epoch, epoch * (u32)(count * PHASES) + 1, 0};
    for (; turn.index < count; turn.index++, turn.phase += PHASES) {
        if (turn.index + 1 < count) shared.known[(turn.index + 1) % 3].read(launch.blocks + turn.index + 1);
        project(turn, QKV_PHASE);
        attention(turn);
        project(turn, O_PHASE);
        project(turn, GATE_UP_PHASE);
        project(turn, DOWN_PHASE);
    }
    // The last block to finish turns the epoch: everyone has read it.
    if (threadIdx.x == 0 && atomicAdd(&launch.state->finished, 1u) == gridDim.x - 1) {
        store_shared_word(&launch.state->finished, 0);
        store_shared_word(&launch.state->epoch, epoch + 1);
    }
}
