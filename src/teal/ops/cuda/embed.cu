// A token, where the kernels of the blocks read it: its embedding, its position, and the rotation there.
//
// Macros: HIDDEN, HEAD_DIM (multiples of 8), and those of common.cuh. One block.

// token, position [1]; embeddings [vocabulary, HIDDEN]; cosines, sines [positions, HEAD_DIM] -> hidden [HIDDEN],
// own_position [1], cosine, sine [HEAD_DIM].
struct Arguments {
    const long long *token, *position;
    const u16 *embeddings, *cosines, *sines;
    u16* hidden;
    long long* own_position;
    u16 *cosine, *sine;
};

template <int SIZE>
__device__ __forceinline__ void copy_row(u16* to, const u16* table, long long row) {
    for (int chunk = threadIdx.x; chunk < SIZE / 8; chunk += THREADS)
        ((uint4*)to)[chunk] = ((const uint4*)(table + row * SIZE))[chunk];
}

extern "C" __global__ void __launch_bounds__(THREADS) embed(const __grid_constant__ Arguments arguments) {
    const long long token = *arguments.token, position = *arguments.position;
    if (threadIdx.x == 0) *arguments.own_position = position;
    copy_row<HEAD_DIM>(arguments.cosine, arguments.cosines, position);
    copy_row<HEAD_DIM>(arguments.sine, arguments.sines, position);
    copy_row<HIDDEN>(arguments.hidden, arguments.embeddings, token);
}
