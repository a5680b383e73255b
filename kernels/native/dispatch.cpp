#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace rt {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> sets{&portable};
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&avx2);
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    sets.push_back(&avx512);
  return sets;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const auto sets = available();
    const char* wanted = std::getenv("RT_ISA");
    if (wanted == nullptr || *wanted == 0) return *sets.back();
    std::string names;
    for (const Kernels* set : sets) {
      if (std::string(wanted) == set->name) return *set;
      names += std::string(names.empty() ? "" : ", ") + set->name;
    }
    throw std::runtime_error("RT_ISA is " + std::string(wanted) + "; this processor has " + names);
  }();
  return chosen;
}

}  // namespace rt
