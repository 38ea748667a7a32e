// AVX-512 with BF16: where inputs are bfloat16, bfloat16 and int4 weights are multiplied two channels at a time.
#include <immintrin.h>

#include "instruction_set.h"

namespace teal {
namespace {

#include "avx512.inc"
#include "kernels.inc"

// Two kept channels and, as pairs, their inputs. The last of an odd number is paired with itself, times zero, and `single`.
template <int kNumRows>
struct Pair {
  const uint8_t *run, *next_run;
  uint32_t x[kNumRows];
  bool single;

  Pair() = default;
  Pair(const Tile& tile, const Kept& kept, int64_t i, int64_t end) : single(i + 1 == end) {
    const int64_t next = single ? i : i + 1;
    run = tile.runs + kept.channels[i] * tile.run_bytes;
    next_run = tile.runs + kept.channels[next] * tile.run_bytes;
    for (int row = 0; row < kNumRows; ++row) {
      const uint32_t high = single ? 0 : float_to_bits(kept.values[next * kNumRows + row]) & 0xffff0000;
      x[row] = float_to_bits(kept.values[i * kNumRows + row]) >> 16 | high;
    }
  }
};

// What the kernels for pairs have in common.
template <int kNumRows>
struct OfPairs {
  using Step = Pair<kNumRows>;
  static constexpr int rows = kNumRows, channels = 2;
  static constexpr bool has_single = false;
  static Step step(const Tile& tile, const Kept& kept, int64_t i, int64_t end) { return {tile, kept, i, end}; }

  // Calls `multiply(step, x)` for each pair of a strip, with the inputs of all rows, and asks for what comes later:
  // `soon` is where in its run.
  template <int kLines, class Function>
  static inline void each(const Strip<Step>& strip, int64_t soon, Prefetcher& prefetch, Function multiply) {
    Prefetcher prefetcher = prefetch;  // a copy can be kept in registers
    const Block<Step>& block = *strip.block;
    for (int64_t i = 0; i < block.count; ++i) {
      const Step& step = block.steps[i];
      prefetcher.template advance<kLines>();
      prefetcher.template advance<kLines>();
      ask<kLines>(strip.soon[i].run + soon);
      ask<kLines>(strip.soon[i].next_run + soon);
      __m512bh x[rows];
      for (int row = 0; row < rows; ++row) x[row] = (__m512bh)_mm512_set1_epi32(int(step.x[row]));
      multiply(step, x);
    }
    prefetch = prefetcher;
  }
};

// Weights of two channels side by side, multiplied by both channels' inputs at once: a third of the instructions of
// `Widened<BFloat16>`. The instruction takes subnormal numbers, below 1.2e-38, for zeros.
template <int kNumRows>
struct PairedBFloat16 : OfPairs<kNumRows> {
  using Format = BFloat16;
  using Step = Pair<kNumRows>;
  static constexpr int rows = kNumRows, wide = rows > 4 ? 2 : rows > 2 ? 4 : 8, narrow = 2;

  template <int kVectors>
  static void multiply(const Tile& tile, const Strip<Step>& strip, float* sums, int64_t stride, Prefetcher& prefetch) {
    constexpr int kLines = kVectors / 2;
    const int64_t first = strip.first, at = bytes<BFloat16>(first), soon = bytes<BFloat16>(strip.soon_first);
    __m512 sum[rows][kVectors] = {};
    const auto pair = [&](const Step& step, const __m512bh(&x)[rows]) {
      const __mmask16 paired = step.single ? 0 : 0xffff;  // a weight that is not finite must not meet a zero
#pragma GCC unroll 4
      for (int line = 0; line < kLines; ++line) {
        const __m512i a = _mm512_loadu_si512(step.run + at + line * TEAL_LINE_BYTES);
        const __m512i b = _mm512_maskz_loadu_epi32(paired, step.next_run + at + line * TEAL_LINE_BYTES);
        const __m512bh halves[] = {(__m512bh)_mm512_unpacklo_epi16(a, b), (__m512bh)_mm512_unpackhi_epi16(a, b)};
#pragma GCC unroll 8
        for (int row = 0; row < rows; ++row)
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half)
            sum[row][2 * line + half] = _mm512_dpbf16_ps(sum[row][2 * line + half], halves[half], x[row]);
      }
    };
    OfPairs<rows>::template each<kLines>(strip, soon, prefetch, pair);
    // Unpacking has put the first four of every eight outputs into one vector, the others into the next.
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m512* of = sum[row] + v / 2 * 2;
        float* to = sums + row * stride + (first + v) * kWidth;
        (Vector::load(to) + Vector{_mm512_permutex2var_ps(of[0], v % 2 ? high : low, of[1])}).store(to);
      }
  }
};

// Words that hold four nibbles of one channel beside four of the next are looked up as pairs of bfloat16: half the
// lookups and products of `Widened<Int4>`, equally exact.
template <int kNumRows>
struct PairedInt4 : OfPairs<kNumRows> {
  using Format = Int4;
  using Step = Pair<kNumRows>;
  static constexpr int rows = kNumRows, wide = 16 / rows, narrow = 8;

  template <int kVectors>
  static void multiply(const Tile& tile, const Strip<Step>& strip, float* sums, int64_t stride, Prefetcher& prefetch) {
    constexpr int kLines = kVectors / 8;
    constexpr uint16_t kValues[] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,   // -8 ... -1
                                    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};  // 0 ... 7
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kValues));
    const __m512i values = _mm512_broadcast_i64x4(half);  // twice: lookups see five bits, of which the last is foreign
    const int64_t first = strip.first, at = bytes<Int4>(first), soon = bytes<Int4>(strip.soon_first);
    __m512 sum[rows][kVectors] = {};
    const auto pair = [&](const Step& step, const __m512bh(&x)[rows]) {
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
    };
    OfPairs<rows>::template each<kLines>(strip, soon, prefetch, pair);
#pragma GCC unroll 2
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {  // unpacking has put even words before odd ones
        const __m512* of = sum[row] + v / 8 * 8 + v % 4 * 2;
        const Vector total{v % 8 < 4 ? _mm512_shuffle_ps(of[0], of[1], 0x88) : _mm512_shuffle_ps(of[0], of[1], 0xdd)};
        add_block(tile, strip.block->scales, first + v, total, sums + row * stride + (first + v) * kWidth);
      }
  }
};

constexpr InstructionSet with_pairs() {
  InstructionSet set = TEAL_INSTRUCTION_SET("avx512_bf16");
  const MultiplyTile bfloat16[] = {
      multiply_tile<PairedBFloat16<1>>, multiply_tile<PairedBFloat16<2>>, multiply_tile<PairedBFloat16<3>>,
      multiply_tile<PairedBFloat16<4>>, multiply_tile<PairedBFloat16<5>>, multiply_tile<PairedBFloat16<6>>,
      multiply_tile<PairedBFloat16<7>>, multiply_tile<PairedBFloat16<8>>};
  for (int row = 0; row < TEAL_MAX_ROWS; ++row) set.multiply_bfloat16[TEAL_BFLOAT16][row] = bfloat16[row];
  set.multiply_bfloat16[TEAL_INT4][0] = multiply_tile<PairedInt4<1>>;
  set.multiply_bfloat16[TEAL_INT4][1] = multiply_tile<PairedInt4<2>>;
  return set;
}

}  // namespace

const InstructionSet avx512_bf16 = with_pairs();

}  // namespace teal
