// AVX-512 (F, BW, DQ, VL) with FMA and F16C.
#include <immintrin.h>

#include "instruction_set.h"

namespace teal {
namespace {

#include "avx512.inc"
#include "kernels.inc"

}  // namespace

const InstructionSet avx512 = TEAL_INSTRUCTION_SET("avx512");

}  // namespace teal
