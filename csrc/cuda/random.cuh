// Random numbers for the CUDA kernels: element i takes word i % 4 of Philox block i / 4, in memory order.
#pragma once

#include "../philox.h"
#include "kernels.h"

namespace gpkernels::cuda {

__device__ __forceinline__ Seed read_seed(const int64_t* words) {
  return {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1])};
}

__device__ __forceinline__ float uniform_at(Seed seed, int64_t i) {
  const Philox4 draw = philox4x32_10(seed, static_cast<uint64_t>(i / 4));
  const uint32_t low = i % 2 == 0 ? draw.word[0] : draw.word[1];
  const uint32_t high = i % 2 == 0 ? draw.word[2] : draw.word[3];
  return uniform(i % 4 < 2 ? low : high);
}

// The numbers of elements i .. i + kCount - 1; i and kCount are multiples of 4.
template <int kCount>
__device__ __forceinline__ void draw_uniform(float (&numbers)[kCount], Seed seed, int64_t i) {
#pragma unroll
  for (int b = 0; b < kCount / 4; ++b) {
    const Philox4 draw = philox4x32_10(seed, static_cast<uint64_t>(i / 4 + b));
#pragma unroll
    for (int w = 0; w < 4; ++w) numbers[4 * b + w] = uniform(draw.word[w]);
  }
}

template <int kCount>
__device__ __forceinline__ void draw_noise(float (&numbers)[kCount], Noise noise, Seed seed, int64_t i) {
#pragma unroll
  for (int b = 0; b < kCount / 4; ++b) {
    const Philox4 draw = philox4x32_10(seed, static_cast<uint64_t>(i / 4 + b));
    if (noise == Noise::normal) {
      normal_pair(draw.word[0], draw.word[1], &numbers[4 * b], &numbers[4 * b + 1]);
      normal_pair(draw.word[2], draw.word[3], &numbers[4 * b + 2], &numbers[4 * b + 3]);
    } else {
#pragma unroll
      for (int w = 0; w < 4; ++w) numbers[4 * b + w] = uniform_symmetric(draw.word[w]);
    }
  }
}

}  // namespace gpkernels::cuda
