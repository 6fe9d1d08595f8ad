// perturb: out = real + scale sigma noise  (Kodali et al. 2017, section 2.3), and its adjoint in sigma.
#include "kernels.h"
#include "random.cuh"
#include "reduce.cuh"
#include "unit.cuh"

namespace gpkernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) add_noise(const T* real, const acc_t<T>* sigma, double scale, Noise noise,
                                                      const int64_t* seed_words, T* out, int64_t numel, bool aligned) {
  using A = acc_t<T>;
  const Seed seed = read_seed(seed_words);
  const A factor = A(scale) * (sigma != nullptr ? *sigma : A(1));
#pragma unroll 1
  for (int u = 0; u < kUnitsPerThread; ++u) {
    const int64_t i = unit_start<T>(blockIdx.x, u);
    if (i >= numel) return;
    float numbers[kUnit<T>];
    draw_noise(numbers, noise, seed, i);
    if (aligned && i + kUnit<T> <= numel) {
      Unit<T> x = load(real + i);
#pragma unroll
      for (int j = 0; j < kUnit<T>; ++j) x.item[j] = T(A(x.item[j]) + factor * A(numbers[j]));
      store(out + i, x);
    } else {
#pragma unroll
      for (int j = 0; j < kUnit<T>; ++j)
        if (i + j < numel) out[i + j] = T(A(real[i + j]) + factor * A(numbers[j]));
    }
  }
}

// One part of scale <grad_out, noise> a block, or where there is one block the whole of it.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dot_noise(const T* grad_out, double scale, Noise noise, const int64_t* seed_words, acc_t<T>* grad_sigma,
              double* parts, int64_t numel, bool aligned) {
  using A = acc_t<T>;
  const Seed seed = read_seed(seed_words);
  A lanes[kUnit<T>] = {};
  for (int64_t tile = blockIdx.x; tile * kTile<T> < numel; tile += gridDim.x) {
#pragma unroll 1
    for (int u = 0; u < kUnitsPerThread; ++u) {
      const int64_t i = unit_start<T>(tile, u);
      if (i >= numel) break;
      float numbers[kUnit<T>];
      draw_noise(numbers, noise, seed, i);
      if (aligned && i + kUnit<T> <= numel) {
        const Unit<T> g = load(grad_out + i);
#pragma unroll
        for (int j = 0; j < kUnit<T>; ++j) lanes[j] += A(g.item[j]) * A(numbers[j]);
      } else {
#pragma unroll
        for (int j = 0; j < kUnit<T>; ++j)
          if (i + j < numel) lanes[j] += A(grad_out[i + j]) * A(numbers[j]);
      }
    }
  }
  double sum = 0;
#pragma unroll
  for (int j = 0; j < kUnit<T>; ++j) sum += static_cast<double>(lanes[j]);
  sum = fold_lanes<SumFold<double>>(sum, kThreads);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    *grad_sigma = A(scale * sum);
  else
    parts[blockIdx.x] = sum;
}

// Enough blocks to fill a GPU, whichever it is: the parts of a sum do not depend on the device.
constexpr int64_t kMaxParts = 1024;

template <class T>
int64_t dot_blocks(int64_t numel) {
  const int64_t tiles = ceil_div(numel, kTile<T>);
  return tiles < 1 ? 1 : tiles < kMaxParts ? tiles : kMaxParts;
}

}  // namespace

void launch_perturb(ScalarType dtype, const void* real, const void* sigma, double scale, Noise noise,
                    const int64_t* seed, void* out, int64_t numel, cudaStream_t stream) {
  dispatch_floating("perturb", dtype, [&](auto tag) {
    using T = decltype(tag);
    if (numel == 0) return;
    launch(add_noise<T>, ceil_div(numel, kTile<T>), stream, static_cast<const T*>(real),
           static_cast<const acc_t<T>*>(sigma), scale, noise, seed, static_cast<T*>(out), numel,
           all_aligned(real, out));
  });
}

int64_t perturb_backward_scratch(ScalarType dtype, int64_t numel) {
  int64_t blocks = 0;
  dispatch_floating("perturb_backward", dtype, [&](auto tag) { blocks = dot_blocks<decltype(tag)>(numel); });
  return blocks == 1 ? 0 : blocks;
}

void launch_perturb_backward(ScalarType dtype, const void* grad_out, double scale, Noise noise, const int64_t* seed,
                             void* grad_sigma, double* scratch, int64_t numel, cudaStream_t stream) {
  dispatch_floating("perturb_backward", dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const int64_t blocks = dot_blocks<T>(numel);
    A* result = static_cast<A*>(grad_sigma);
    launch(dot_noise<T>, blocks, stream, static_cast<const T*>(grad_out), scale, noise, seed, result, scratch, numel,
           all_aligned(grad_out));
    if (blocks > 1) launch(finish_sum<A>, 1, stream, scratch, blocks, scale, result);
  });
}

}  // namespace gpkernels::cuda
