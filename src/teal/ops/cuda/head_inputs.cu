// What a sparse LM head reads: the final norm of the hidden state, the smallest inputs set to zero.
//
// Macros: HIDDEN, and those of common.cuh. One block.

// hidden, norm [HIDDEN] -> x [HIDDEN] without its `dropped` smallest magnitudes (at least one) and those equal to the
// largest of them; all of x where that is NaN.
struct Arguments {
    const u16 *hidden, *norm;
    u16* x;
    int dropped;
    float eps;
};

struct Shared {
    float scratch[2][WARPS];
};

extern "C" __global__ void __launch_bounds__(THREADS) head_inputs(const __grid_constant__ Arguments arguments) {
    extern __shared__ uint4 dynamic_shared[];
    Shared& shared = *(Shared*)dynamic_shared;
    using X = Inputs<HIDDEN>;
    allow_next_kernel();
    X x = normalized<HIDDEN>(arguments.hidden, arguments.norm, arguments.eps, 0, shared.scratch[0]);
    // The least bound that `dropped` magnitudes do not exceed, bit by bit. NaN is above all numbers.
    u32 bound = 0;
    for (int bit = 14; bit >= 0; bit--) {
        const u32 below = bound | ((1u << bit) - 1);  // the largest bound without this bit
        int reach = 0;
#pragma unroll
        for (int v = 0; v < X::VECTORS; v++)
            if (X::channel(v) < HIDDEN)
#pragma unroll
                for (int i = 0; i < 4; i++) reach += (x.get(v, i) & 0x7fffu) <= below;
        // A count is exact in float32; two buffers, as a warp may be one round ahead.
        if (block_sum((float)reach, shared.scratch[(bit + 1) % 2]) < (float)arguments.dropped) bound |= 1u << bit;
    }
    const bool drops = bound <= (BF16 ? 0x7f80u : 0x7c00u);
#pragma unroll
    for (int v = 0; v < X::VECTORS; v++)
        if (X::channel(v) < HIDDEN) {
            u16 kept[4];
#pragma unroll
            for (int i = 0; i < 4; i++) kept[i] = drops && (x.get(v, i) & 0x7fffu) <= bound ? 0 : x.get(v, i);
            *(uint2*)(arguments.x + X::channel(v)) = make_uint2(pair_of(kept[0], kept[1]), pair_of(kept[2], kept[3]));
        }
}
