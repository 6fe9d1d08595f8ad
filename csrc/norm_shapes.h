// Which elements a normalisation's statistics cover, and the checks of its raw ops' arguments: what the CPU and CUDA
// entry points share.
#pragma once

#include <cstdint>
#include <optional>

#include "checks.h"

namespace gpkernels {

// Element (n, c, s) lies at (n * channels * pixels) + c * channel_stride + s * pixel_stride.
struct NormShape {
  int64_t batch, channels, pixels;
  int64_t groups;  // of a sample; 0 for the statistics of the batch, one a channel
  int64_t channel_stride, pixel_stride;

  int64_t numel() const {
    return batch * channels * pixels;
  }
  int64_t statistics() const {
    return groups == 0 ? channels : batch * groups;
  }
  // Elements that share one mean.
  int64_t group_size() const {
    return pixels * (groups == 0 ? batch : channels / groups);
  }
};

inline NormShape norm_shape(const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(x.dim() >= 2, "x: wanted at least 2 dimensions, got ", x.dim());
  NormShape shape{x.size(0), x.size(1), 1, groups, 1, 1};
  for (int64_t d = 2; d < x.dim(); ++d) shape.pixels *= x.size(d);
  STD_TORCH_CHECK(groups >= 0 && (groups == 0 || shape.channels % groups == 0), "groups: wanted 0 or a divisor of the ",
                  shape.channels, " channels, got ", groups);
  if (x.is_contiguous())
    shape.channel_stride = shape.pixels;
  else
    shape.pixel_stride = shape.channels;
  return shape;
}

// Checks what both ops are given and returns the shape.
inline NormShape checked_norm_shape(const Tensor& grad_out, const Tensor& x, const std::optional<Tensor>& z,
                                    const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& weight,
                                    int64_t groups, DeviceType device = DeviceType::CPU) {
  check_dense("x", x, device);
  const NormShape shape = norm_shape(x, groups);
  const ScalarType dtype = accumulation_dtype(x);
  check_like("grad_out", grad_out, "x", x, device);
  if (z.has_value()) check_like("z", *z, "x", x, device);
  check_vector("mean", mean, shape.statistics(), dtype, device);
  check_vector("rstd", rstd, shape.statistics(), dtype, device);
  if (weight.has_value()) check_vector("weight", *weight, shape.channels, dtype, device);
  return shape;
}

}  // namespace gpkernels
