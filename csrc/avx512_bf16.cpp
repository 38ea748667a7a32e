// AVX-512 with BF16: where inputs are bfloat16, int4 weights are multiplied two channels at a time.
#include <immintrin.h>

#include "instruction_set.h"

namespace teal {
namespace {

#include "avx512.inc"
#include "kernels.inc"

// Words that hold four nibbles of one channel beside four of the next are looked up as pairs of bfloat16, and a pair is
// multiplied by both channels' inputs at once: half the lookups and products of `Widened<Int4>`, equally exact.
template <int kNumRows>
struct Paired {
  using Format = Int4;
  static constexpr int rows = kNumRows;
  static constexpr int wide = 16 / rows, narrow = 8;
  static constexpr bool has_single = false;

  template <int kVectors>
  static void strip(const Tile& tile, const Kept& kept, int64_t begin, int64_t end, int64_t first, float* sums,
                    int64_t stride, Prefetcher& prefetch) {
    Prefetcher prefetcher = prefetch;
    constexpr int kLines = kVectors / 8;
    constexpr uint16_t kValues[] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,   // -8 ... -1
                                    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};  // 0 ... 7
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kValues));
    const __m512i values = _mm512_broadcast_i64x4(half);  // twice: a lookup sees five bits, of which the last is foreign
    __m512 sum[rows][kVectors] = {};
    const uint8_t* runs = tile.runs + first / 8 * TEAL_LINE_BYTES;
    for (int64_t i = begin; i < end; i += 2) {
      const int64_t next = i + 1 < end ? i + 1 : i;
      const uint8_t* run = runs + kept.channels[i] * tile.run_bytes;
      const uint8_t* next_run = runs + kept.channels[next] * tile.run_bytes;
      prefetcher.template advance<kLines>();
      if (next != i) prefetcher.template advance<kLines>();
      __m512bh x[rows];
      for (int row = 0; row < rows; ++row) {
        const uint32_t low = float_to_bits(kept.values[i * rows + row]) >> 16;
        const uint32_t high = next == i ? 0 : float_to_bits(kept.values[next * rows + row]) & 0xffff0000;
        x[row] = (__m512bh)_mm512_set1_epi32(int(low | high));
      }
#pragma GCC unroll 2
      for (int line = 0; line < kLines; ++line) {
        const __m512i a = _mm512_loadu_si512(run + line * TEAL_LINE_BYTES);
        const __m512i b = _mm512_loadu_si512(next_run + line * TEAL_LINE_BYTES);
        const __m512i pairs[] = {_mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)),
                                 _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b)};
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
          const __m512i places = _mm512_srli_epi16(pairs[v / 4], unsigned(v % 4 * 4));
          const __m512bh weight = (__m512bh)_mm512_permutexvar_epi16(places, values);
#pragma GCC unroll 2
          for (int row = 0; row < rows; ++row)
            sum[row][line * 8 + v] = _mm512_dpbf16_ps(sum[row][line * 8 + v], weight, x[row]);
        }
      }
    }
    const uint16_t* scales = tile.scales + kept.channels[begin] / TEAL_GROUP * tile.tile_outputs + first * kWidth;
    for (int row = 0; row < rows; ++row)
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + row * stride + (first + v) * kWidth;
        const Vector scale = Vector::load_bfloat16(scales + v * kWidth);
        Vector::multiply_add(scale, Vector{sum[row][v]}, Vector::load(to)).store(to);
      }
    prefetch = prefetcher;
  }
};

constexpr InstructionSet with_pairs() {
  InstructionSet set = TEAL_INSTRUCTION_SET("avx512_bf16");
  set.multiply_bfloat16[TEAL_INT4][0] = multiply_tile<Paired<1>>;
  set.multiply_bfloat16[TEAL_INT4][1] = multiply_tile<Paired<2>>;
  return set;
}

}  // namespace

const InstructionSet avx512_bf16 = with_pairs();

}  // namespace teal
