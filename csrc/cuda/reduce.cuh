// Reductions of a block, always combined in the same order: results do not depend on timing.
#pragma once

#include <cstdint>

#include "launch.h"

namespace gpkernels::cuda {

template <class A>
struct SumFold {
  using State = A;
  static __device__ __forceinline__ State identity() {
    return A(0);
  }
  static __device__ __forceinline__ State merge(State a, State b) {
    return a + b;
  }
};

// The largest of some moduli, and how many of them attain it.
template <class A>
struct Peak {
  A max, count;
};

template <class A>
struct PeakFold {
  using State = Peak<A>;
  static __device__ __forceinline__ State identity() {
    return {A(0), A(0)};
  }
  static __device__ __forceinline__ State merge(State a, State b) {
    if (b.max > a.max || b.max != b.max) return b;  // a NaN stays
    if (b.max == a.max) a.count += b.count;
    return a;
  }
};

template <class A>
__device__ __forceinline__ A shuffle_xor(A value, int offset) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, offset);
}

template <class A>
__device__ __forceinline__ Peak<A> shuffle_xor(Peak<A> value, int offset) {
  return {shuffle_xor(value.max, offset), shuffle_xor(value.count, offset)};
}

// The combination over each run of `lanes` threads, a power of two up to a warp, or the whole block. Every thread of
// the block calls it with the same `lanes`, and every thread of a run gets the result.
template <class Fold>
__device__ typename Fold::State fold_lanes(typename Fold::State state, int lanes) {
  for (int offset = (lanes < kWarp ? lanes : kWarp) / 2; offset > 0; offset /= 2)
    state = Fold::merge(state, shuffle_xor(state, offset));
  if (lanes <= kWarp) return state;
  __shared__ typename Fold::State warps[kThreads / kWarp];
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = state;
  __syncthreads();
  state = warps[0];
#pragma unroll
  for (int w = 1; w < kThreads / kWarp; ++w) state = Fold::merge(state, warps[w]);
  return state;
}

// *out = factor * the sum of `count` parts. One block.
template <class A>
__global__ void __launch_bounds__(kThreads) finish_sum(const double* parts, int64_t count, double factor, A* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += parts[i];
  sum = fold_lanes<SumFold<double>>(sum, kThreads);
  if (threadIdx.x == 0) *out = A(factor * sum);
}

}  // namespace gpkernels::cuda
