// The groups of a gradient tensor, and the shape of one value for each: what the CPU and CUDA entry points share.
#pragma once

#include <vector>

#include "checks.h"
#include "penalty_derivatives.h"

namespace gpkernels {

inline Groups groups_of(const Tensor& grad, Axes axes) {
  const int64_t batch = grad.size(0), numel = grad.numel();
  if (axes == Axes::batch) return {1, numel, 1};
  if (axes == Axes::sample) return {batch, batch == 0 ? 0 : numel / batch, 1};
  STD_TORCH_CHECK(grad.dim() >= 2, "grad: wanted at least 2 dimensions for axes 'pixel', got ", grad.dim());
  const int64_t channels = grad.size(1);
  int64_t pixels = 1;
  for (int64_t d = 2; d < grad.dim(); ++d) pixels *= grad.size(d);
  if (grad.is_contiguous()) return {batch, channels, pixels};
  return {batch * pixels, channels, 1};
}

inline std::vector<int64_t> groups_shape(const Tensor& grad, Axes axes) {
  if (axes == Axes::batch) return {1};
  std::vector<int64_t> shape{grad.size(0)};
  if (axes == Axes::pixel)
    for (int64_t d = 2; d < grad.dim(); ++d) shape.push_back(grad.size(d));
  return shape;
}

}  // namespace gpkernels
