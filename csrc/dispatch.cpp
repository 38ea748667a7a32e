// Which instruction set serves: the best one that this processor runs, unless the caller names another.
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <string>

#include "instruction_set.h"
#include "team.h"

namespace teal {
namespace {

bool runs_here(const InstructionSet& set) {
#if defined(TEAL_X86)
  __builtin_cpu_init();
  if (&set == &avx512_bf16 && !__builtin_cpu_supports("avx512bf16")) return false;
  if (&set == &avx512_bf16 || &set == &avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (&set == &avx2)  // every processor with AVX2 converts halves
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &set == &portable;
}

#if defined(TEAL_X86)
const InstructionSet* const kAll[] = {&avx512_bf16, &avx512, &avx2, &portable};
#else
const InstructionSet* const kAll[] = {&portable};
#endif

const InstructionSet* best() {
  for (const InstructionSet* set : kAll)
    if (runs_here(*set)) return set;
  return &portable;
}

std::atomic<const InstructionSet*> current{nullptr};

}  // namespace

const InstructionSet& chosen() {
  const InstructionSet* set = current.load(std::memory_order_acquire);
  if (set == nullptr) current.store(set = best(), std::memory_order_release);
  return *set;
}

}  // namespace teal

extern "C" {

int teal_interface(void) { return TEAL_INTERFACE; }

const char* teal_instruction_sets(void) {
  static const std::string names = [] {
    std::string text;
    for (const teal::InstructionSet* set : teal::kAll)
      if (teal::runs_here(*set)) text += (text.empty() ? "" : " ") + std::string(set->name);
    return text;
  }();
  return names.c_str();
}

const char* teal_chosen_instruction_set(void) { return teal::chosen().name; }

int teal_choose_instruction_set(const char* name) {
  if (name == nullptr) return TEAL_BAD_ARGUMENT;
  for (const teal::InstructionSet* set : teal::kAll) {
    if (strcmp(set->name, name) != 0) continue;
    if (!teal::runs_here(*set)) return TEAL_UNSUPPORTED;
    teal::current.store(set, std::memory_order_release);
    return TEAL_OK;
  }
  return TEAL_UNKNOWN_NAME;
}

int teal_threads(void) { return teal::threads(); }

}  // extern "C"
