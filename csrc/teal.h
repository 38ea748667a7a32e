/* The C interface of the CPU kernels: raw pointers, no framework. Every function that can fail returns 0 or an error. */
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define TEAL_EXPORT __declspec(dllexport)
#else
#define TEAL_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TEAL_INTERFACE 2 /* raised with every change of this file; the caller compares */
#define TEAL_MAX_ROWS 8
#define TEAL_GROUP 128       /* input channels that share an int4 scale */
#define TEAL_LINE_BYTES 64   /* a tile's run of one channel is a multiple of this */
#define TEAL_PHASES 16

typedef enum { TEAL_FLOAT32 = 0, TEAL_BFLOAT16 = 1, TEAL_FLOAT16 = 2, TEAL_INT8 = 3, TEAL_INT4 = 4 } teal_format;

typedef enum {
  TEAL_OK = 0,
  TEAL_BAD_ARGUMENT = 1,   /* a null pointer, a size out of range, an unknown format */
  TEAL_OUT_OF_MEMORY = 2,
  TEAL_UNKNOWN_NAME = 3,
  TEAL_UNSUPPORTED = 4,    /* this processor lacks the instructions */
} teal_status;

/* A weight [outputs N, inputs K] as tiles [ceil(N / T), K, T]: a tile holds, for each input channel, the weights of T
 * outputs as one contiguous run. Outputs beyond N are padding. Alignment is not required.
 * int4: a run is lines of 64 bytes for 128 outputs; nibble i of the 32-bit word w is output 16 i + w, plus 8. */
typedef struct {
  const void* tiles;
  const void* scales; /* int8: float32 [N]; int4: bfloat16 [ceil(N / T), ceil(K / 128), T]; others: null */
  int64_t outputs, inputs, tile_outputs;
  int32_t format; /* teal_format */
} teal_weight;

/* y = W where(|x| > threshold, x, 0) + bias + sparse_bias. */
typedef struct {
  teal_weight weight;
  const float* threshold;   /* [K], or one value */
  int64_t threshold_stride; /* 1, or 0 for one value */
  const void* bias;         /* [N] in the format of the activations, or null */
  const void* sparse_bias;  /* the same */
} teal_projection;

/* One decoder block; norms [hidden], query and key norms [head_dim] or null, all in `format`. */
typedef struct {
  teal_projection query, key, value, output, gate, up, down;
  const void *input_norm, *mlp_norm, *query_norm, *key_norm;
  int64_t hidden, intermediate, heads, kv_heads, head_dim;
  int64_t window; /* positions a token sees, itself included; 0 for all */
  float epsilon;
  int32_t format; /* of activations, norms, biases and the KV cache: float32, bfloat16 or float16 */
} teal_block;

/* One token for each of `rows` sequences. Strides in elements. */
typedef struct {
  int64_t rows;
  const void* hidden; /* [rows, hidden], contiguous; result goes to `out`, the same shape */
  void* out;
  void *const *keys, *const *values; /* of each block: [rows, kv_heads, positions, head_dim] */
  int64_t sequence_stride, head_stride, position_stride;
  const int64_t* positions; /* [rows] */
  const void *cos, *sin;    /* [rows, head_dim], contiguous */
  double* phase_seconds;    /* null, or [TEAL_PHASES]: seconds spent in each phase are added */
} teal_step;

TEAL_EXPORT int teal_interface(void);

/* The instruction sets this build has and this processor runs, best first, separated by spaces. */
TEAL_EXPORT const char* teal_instruction_sets(void);
TEAL_EXPORT const char* teal_chosen_instruction_set(void);
TEAL_EXPORT int teal_choose_instruction_set(const char* name);

/* Threads that a call will use: those of the OpenMP runtime that this library shares with its process; 0 without. */
TEAL_EXPORT int teal_threads(void);

/* x [rows, K] with `row_stride` elements between rows -> y [rows, N] contiguous, 1 <= rows <= TEAL_MAX_ROWS. */
TEAL_EXPORT int teal_sparse_gemv(const teal_projection* projection, int32_t format, const void* x, int64_t rows,
                                 int64_t row_stride, void* y);

/* All blocks, of the same sizes, for one token per sequence; writes the token's keys and values into the cache. */
TEAL_EXPORT int teal_decode_blocks(const teal_block* blocks, int64_t count, const teal_step* step);
TEAL_EXPORT const char* teal_phase_name(int phase); /* null beyond the last */

/* A plain read of `bytes` by all threads, for the bandwidth to measure against. Returns a checksum. */
TEAL_EXPORT uint64_t teal_read(const void* data, int64_t bytes);

#ifdef __cplusplus
}
#endif
