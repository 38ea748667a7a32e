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
  struct Step {
    const uint8_t *run, *next_run;
    uint32_t x[kNumRows];  // the inputs of both
  };
  static constexpr int rows = kNumRows, channels = 2;
  static constexpr int wide = 16 / rows, narrow = 8;
  static constexpr bool has_single = false;

  // The last of an odd number of channels is paired with itself, times zero.
  static Step step(const Tile& tile, const Kept& kept, int64_t i, int64_t end) {
    const int64_t next = i + 1 < end ? i + 1 : i;
    Step step{tile.runs + kept.channels[i] * tile.run_bytes, tile.runs + kept.channels[next] * tile.run_bytes, {}};
    for (int row = 0; row < rows; ++row) {
      const uint32_t high = next == i ? 0 : float_to_bits(kept.values[next * rows + row]) & 0xffff0000;
      step.x[row] = float_to_bits(kept.values[i * rows + row]) >> 16 | high;
    }
    return step;
  }

  template <int kVectors>
  static void multiply(const Tile& tile, const Strip<Step>& strip, float* sums, int64_t stride, Prefetcher& prefetch) {
    constexpr int kLines = kVectors / 8;
    constexpr uint16_t kValues[] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,   // -8 ... -1
                                    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};  // 0 ... 7
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kValues));
    const __m512i values = _mm512_broadcast_i64x4(half);  // twice: lookups see five bits, of which the last is foreign
    Prefetcher prefetcher = prefetch;
    const Block<Step>& block = *strip.block;
    const int64_t first = strip.first, at = bytes<Int4>(first), soon = bytes<Int4>(strip.soon_first);
    __m512 sum[rows][kVectors] = {};
    for (int64_t i = 0; i < block.count; ++i) {
      const Step& step = block.steps[i];
      prefetcher.template advance<kLines>();
      prefetcher.template advance<kLines>();
      ask<kLines>(strip.soon[i].run + soon);
      ask<kLines>(strip.soon[i].next_run + soon);
      __m512bh x[rows];
      for (int row = 0; row < rows; ++row) x[row] = (__m512bh)_mm512_set1_epi32(int(step.x[row]));
#pragma GCC unroll 2
      for (int line = 0; line < kLines; ++line) {
        const __m512i a = _mm512_loadu_si512(step.run + at + line * TEAL_LINE_BYTES);
        const __m512i b = _mm512_loadu_si512(step.next_run + at + line * TEAL_LINE_BYTES);
        const __m512i words[] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
          const __m512i places = _mm512_srli_epi16(words[v % 2], unsigned(v / 2 * 4));
          const __m512bh weight = (__m512bh)_mm512_permutexvar_epi16(places, values);
#pragma GCC unroll 2
          for (int row = 0; row < rows; ++row)
            sum[row][line * 8 + v] = _mm512_dpbf16_ps(sum[row][line * 8 + v], weight, x[row]);
        }
      }
    }
#pragma GCC unroll 2
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {  // unpacking has put even words before odd ones
        const __m512* of = sum[row] + v / 8 * 8 + v % 4 * 2;
        const Vector total{v % 8 < 4 ? _mm512_shuffle_ps(of[0], of[1], 0x88) : _mm512_shuffle_ps(of[0], of[1], 0xdd)};
        add_block(tile, block.scales, first + v, total, sums + row * stride + (first + v) * kWidth);
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
