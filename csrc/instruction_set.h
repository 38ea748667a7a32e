// What a translation unit compiled for one instruction set gives to the rest, and nothing else.
// Those units include no standard templates: the linker could pick their copy for a processor that cannot run it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "teal.h"

namespace teal {

// The kept input channels of a call in ascending order, with each row's input: values [count, rows].
struct Kept {
  const int32_t* channels;
  const float* values;
  int64_t count;
  int64_t following;  // channels after these that are multiplied next, for prefetches
};

// One tile of a weight: runs [K, T] with `run_bytes` from channel to channel.
struct Tile {
  const uint8_t* runs;
  int64_t run_bytes;
  int64_t outputs;         // of the tile's T, those that exist
  const uint16_t* scales;  // int4: bfloat16 [ceil(K / 128), T]
  int64_t tile_outputs;    // T
};

// sums [rows, stride] = the products of the kept channels with the tile; writes whole lines of outputs.
using MultiplyTile = void (*)(const Tile& tile, const Kept& kept, float* sums, int64_t stride);

struct InstructionSet {
  const char* name;
  MultiplyTile multiply[5][TEAL_MAX_ROWS];           // [teal_format][rows - 1]
  MultiplyTile multiply_bfloat16[5][TEAL_MAX_ROWS];  // for values that are bfloat16, where that is faster, or null
  // Of x [count] those with not (|x| <= threshold); channels and values have room for count + 16. Returns how many.
  int64_t (*compact)(const float* x, const float* threshold, int64_t threshold_stride, int64_t count,
                     int32_t* channels, float* values);
  void (*widen)(int32_t format, const void* from, float* to, int64_t count);
  void (*narrow)(int32_t format, const float* from, void* to, int64_t count);
  void (*round)(int32_t format, float* x, int64_t count);  // to the values that `format` has
  // to = x / rms(x) * weight, rounded to `format` before and after the product with weight.
  void (*rms_norm)(int32_t format, const float* x, const void* weight, float epsilon, float* to, int64_t count);
  void (*gated)(const float* gate, const float* up, float* to, int64_t count);  // silu(gate) * up
  float (*dot)(const float* a, const float* b, int64_t count);
  void (*add_scaled)(const float* x, float factor, float* to, int64_t count);  // to += factor * x
  void (*exponentials)(float* x, float subtract, int64_t count);               // x = exp(x - subtract)
  void (*read)(const void* data, int64_t lines, uint64_t* checksum);
};

const InstructionSet& chosen();

extern const InstructionSet portable;
#if defined(TEAL_X86)
extern const InstructionSet avx2, avx512, avx512_bf16;
#endif

}  // namespace teal
