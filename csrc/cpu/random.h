// Random numbers for the CPU kernels: element i takes word i % 4 of Philox block i / 4, in memory order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../philox.h"

namespace gpkernels::cpu {

// Writes the 4 * blocks numbers that start at `first_block`.
using Fill = void (*)(float* out, Seed seed, uint64_t first_block, int64_t blocks);

void fill_uniform(float* out, Seed seed, uint64_t first_block, int64_t blocks);
void fill_uniform_symmetric(float* out, Seed seed, uint64_t first_block, int64_t blocks);
void fill_normal(float* out, Seed seed, uint64_t first_block, int64_t blocks);

inline Fill fill_of(Noise noise) {
  return noise == Noise::normal ? fill_normal : fill_uniform_symmetric;
}

inline float uniform_at(Seed seed, int64_t i) {
  return uniform(philox4x32_10(seed, static_cast<uint64_t>(i / 4)).word[i % 4]);
}

// Runs f(offset, length, numbers) over [begin, end) with the numbers of those elements, a stack buffer at a
// time. `begin` is a multiple of 4.
template <class F>
void with_numbers(Fill fill, Seed seed, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kBlocks = 128;
  alignas(64) float numbers[4 * kBlocks];
  for (int64_t i = begin; i < end; i += 4 * kBlocks) {
    const int64_t length = std::min(4 * kBlocks, end - i);
    fill(numbers, seed, static_cast<uint64_t>(i / 4), (length + 3) / 4);
    f(i, length, static_cast<const float*>(numbers));
  }
}

}  // namespace gpkernels::cpu
