// How every kernel is launched: one-dimensional grids of kThreads, on a given stream, checked.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>

#include "../host_device.h"

namespace gpkernels::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

GPK_HD int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

GPK_HD int64_t at_most(int64_t a, int64_t limit) {
  return a < limit ? a : limit;
}

// `blocks` is below 2^31: a kernel that could need more strides over its grid.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, const Arguments&... arguments) {
#if defined(__CUDACC__)
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);
#else
  launch_on_host(blocks, kThreads, [&] { kernel(arguments...); });
#endif
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace gpkernels::cuda
