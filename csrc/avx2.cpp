// AVX2 with FMA and F16C.
#include <immintrin.h>

#include "instruction_set.h"

namespace teal {
namespace {

struct Vector {
  static constexpr int width = 8;
  static constexpr int accumulators = 8;
  __m256 v;

  static Vector fill(float x) { return {_mm256_set1_ps(x)}; }
  static Vector load(const void* p) { return {_mm256_loadu_ps(static_cast<const float*>(p))}; }
  static Vector load_bfloat16(const void* p) {
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vector load_float16(const void* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
  }
  static Vector load_int8(const void* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))))};
  }
  static Vector load_int4(const void* p, int shift) {
    const __m256i words = _mm256_srli_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)), shift);
    const __m256i nibbles = _mm256_and_si256(words, _mm256_set1_epi32(15));
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(nibbles, _mm256_set1_epi32(8)))};
  }

  void store(void* p) const { _mm256_storeu_ps(static_cast<float*>(p), v); }
  void store_bfloat16(void* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    nearest = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
    const __m128i low = _mm256_castsi256_si128(nearest), high = _mm256_extracti128_si256(nearest, 1);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
  void store_float16(void* p) const {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static Vector multiply_add(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vector clamp(Vector x, float low, float high) {
    return {_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x.v))};
  }
  Vector operator+(Vector b) const { return {_mm256_add_ps(v, b.v)}; }
  Vector operator*(Vector b) const { return {_mm256_mul_ps(v, b.v)}; }
  Vector operator/(Vector b) const { return {_mm256_div_ps(v, b.v)}; }
  Vector nearest() const { return {_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  Vector times_power_of_two(Vector power) const {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(v, _mm256_castsi256_ps(exponent))};
  }
  float total() const {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }

  static void read(const void* data, int64_t lines, uint64_t* checksum) {
    const __m256i* half = static_cast<const __m256i*>(data);
    __m256i sum[4] = {};
    for (int64_t i = 0; i + 4 <= 2 * lines; i += 4)
      for (int k = 0; k < 4; ++k) sum[k] = _mm256_xor_si256(sum[k], _mm256_loadu_si256(half + i + k));
    uint64_t words[4];
    for (int k = 1; k < 4; ++k) sum[0] = _mm256_xor_si256(sum[0], sum[k]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), sum[0]);
    *checksum = words[0] + words[1] + words[2] + words[3];
  }
};

#include "kernels.inc"

}  // namespace

const InstructionSet avx2 = TEAL_INSTRUCTION_SET("avx2");

}  // namespace teal
