// Plain C++ for any processor; compilers turn the loops over lanes into whatever vectors there are.
#include "instruction_set.h"

namespace teal {
namespace {

inline float half_to_float(uint16_t half);
inline uint16_t float_to_half(float value);

struct Vector {
  static constexpr int width = 8;
  static constexpr int accumulators = 4;
  float lane[width];

  template <class Function>
  static Vector of(Function function) {
    Vector result;
    for (int i = 0; i < width; ++i) result.lane[i] = function(i);
    return result;
  }
  template <class Element>
  static Element element(const void* p, int i) {
    Element value;
    __builtin_memcpy(&value, static_cast<const char*>(p) + i * int(sizeof value), sizeof value);
    return value;
  }
  static float from_bits(uint32_t bits) { return element<float>(&bits, 0); }
  static uint32_t to_bits(float value) { return element<uint32_t>(&value, 0); }

  static Vector fill(float x) {
    return of([=](int) { return x; });
  }
  static Vector load(const void* p) {
    return of([=](int i) { return element<float>(p, i); });
  }
  static Vector load_bfloat16(const void* p) {
    return of([=](int i) { return from_bits(uint32_t(element<uint16_t>(p, i)) << 16); });
  }
  static Vector load_float16(const void* p) {
    return of([=](int i) { return half_to_float(element<uint16_t>(p, i)); });
  }
  static Vector load_int8(const void* p) {
    return of([=](int i) { return float(element<int8_t>(p, i)); });
  }
  static Vector load_int4(const void* p, int shift) {
    return of([=](int i) { return float(int(element<uint32_t>(p, i) >> shift & 15) - 8); });
  }

  void store(void* p) const { __builtin_memcpy(p, lane, sizeof lane); }
  void store_bfloat16(void* p) const {
    uint16_t narrowed[width];
    for (int i = 0; i < width; ++i) {
      const uint32_t bits = to_bits(lane[i]);
      narrowed[i] = uint16_t(lane[i] != lane[i] ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    __builtin_memcpy(p, narrowed, sizeof narrowed);
  }
  void store_float16(void* p) const {
    uint16_t narrowed[width];
    for (int i = 0; i < width; ++i) narrowed[i] = float_to_half(lane[i]);
    __builtin_memcpy(p, narrowed, sizeof narrowed);
  }

  static Vector multiply_add(Vector a, Vector b, Vector c) {
    return of([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static Vector clamp(Vector x, float low, float high) {
    return of([&](int i) { return x.lane[i] < low ? low : x.lane[i] > high ? high : x.lane[i]; });
  }
  Vector operator+(Vector b) const {
    return of([&](int i) { return lane[i] + b.lane[i]; });
  }
  Vector operator*(Vector b) const {
    return of([&](int i) { return lane[i] * b.lane[i]; });
  }
  Vector operator/(Vector b) const {
    return of([&](int i) { return lane[i] / b.lane[i]; });
  }
  Vector nearest() const {  // of numbers below 2^22, which is all it is asked
    return of([&](int i) { return (lane[i] + 12582912.0f) - 12582912.0f; });
  }
  Vector times_power_of_two(Vector power) const {
    return of([&](int i) {
      const float whole = power.lane[i] == power.lane[i] ? power.lane[i] : 0.0f;
      return lane[i] * from_bits(uint32_t(int(whole) + 127) << 23);
    });
  }
  float total() const {
    float sum = 0;
    for (float x : lane) sum += x;
    return sum;
  }

  static void read(const void* data, int64_t lines, uint64_t* checksum) {
    uint64_t sum[8] = {};
    for (int64_t i = 0; i < lines; ++i)
      for (int k = 0; k < 8; ++k)
        sum[k] ^= element<uint64_t>(static_cast<const char*>(data) + i * TEAL_LINE_BYTES, k);
    *checksum = 0;
    for (uint64_t word : sum) *checksum += word;
  }
};

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return Vector::from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  const float scaled = Vector::from_bits(magnitude << 13) * 0x1p112f;  // exact, subnormal halves included
  return Vector::from_bits(sign | Vector::to_bits(scaled));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = Vector::to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to more than 65504
  if (magnitude < 0x38800000)  // subnormal: the sum's last place is 2^-24
    return uint16_t(sign | (Vector::to_bits(Vector::from_bits(magnitude) + 0.5f) - 0x3f000000));
  return uint16_t(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - 0x1c000));
}

#include "kernels.inc"

}  // namespace

const InstructionSet portable = TEAL_INSTRUCTION_SET("portable");

}  // namespace teal
