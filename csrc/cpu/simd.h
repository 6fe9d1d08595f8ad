// What the CPU kernels share: function multiversioning and deterministic parallel work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "../dtypes.h"

// A hot loop is compiled for three x86-64 levels and chosen once, when the library is loaded. ifunc resolvers
// run before a sanitizer's runtime is up, so a sanitizer build has the baseline only.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define GPK_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define GPK_HAS_MULTIVERSION 1
#else
#define GPK_MULTIVERSION
#define GPK_HAS_MULTIVERSION 0
#endif

namespace gpkernels::cpu {

// Elements in a unit of work. Partial sums are kept per unit and added in order, so results do not depend on
// the number of threads.
constexpr int64_t kChunk = 16384;

inline int64_t chunks_of(int64_t length) {
  return (length + kChunk - 1) / kChunk;
}

// Runs f(row, chunk, begin, end) over [0, rows) x [0, length) cut into chunks of kChunk elements.
template <class F>
void for_each_chunk(int64_t rows, int64_t length, const F& f) {
  const int64_t chunks = chunks_of(length);
  const int64_t elements = std::max<int64_t>(1, std::min(length, kChunk));
  const int64_t grain = std::max<int64_t>(1, 2 * kChunk / elements);
  torch::stable::parallel_for(0, rows * chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / chunks, chunk = task % chunks, begin = chunk * kChunk;
      f(row, chunk, begin, std::min(begin + kChunk, length));
    }
  });
}

}  // namespace gpkernels::cpu
