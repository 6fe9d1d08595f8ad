// norm_act's derivatives on torch tensors: checks, results, and the launches on torch's current stream.
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../norm_shapes.h"
#include "device.h"
#include "kernels.h"
#include "ops.h"

namespace gpkernels::cuda {
namespace {

const void* pointer(const std::optional<Tensor>& x) {
  return x.has_value() ? x->const_data_ptr() : nullptr;
}

// What both orders are given, checked; without results and tangent.
NormCall checked_call(const Tensor& grad_out, const Tensor& x, const std::optional<Tensor>& z, const Tensor& mean,
                      const Tensor& rstd, const std::optional<Tensor>& weight, int64_t groups, double slope) {
  const NormShape shape = checked_norm_shape(grad_out, x, z, mean, rstd, weight, groups, kDevice);
  check_same_device("grad_out", grad_out, "x", x);
  if (z.has_value()) check_same_device("z", *z, "x", x);
  check_same_device("mean", mean, "x", x);
  check_same_device("rstd", rstd, "x", x);
  if (weight.has_value()) check_same_device("weight", *weight, "x", x);
  NormCall call{};
  call.batch = shape.batch, call.channels = shape.channels, call.pixels = shape.pixels, call.groups = groups;
  call.channels_innermost = shape.channel_stride == 1;
  call.slope = slope;
  call.grad_out = grad_out.const_data_ptr(), call.x = x.const_data_ptr(), call.z = pointer(z);
  call.mean = mean.const_data_ptr(), call.rstd = rstd.const_data_ptr(), call.weight = pointer(weight);
  return call;
}

// A channel's sum each; of nothing where x is empty.
Tensor sums_like(const Tensor& x, int64_t channels) {
  return x.numel() == 0 ? torch::stable::new_zeros(x, {channels}, accumulation_dtype(x))
                        : torch::stable::new_empty(x, {channels}, accumulation_dtype(x));
}

void run(const Tensor& x, const NormCall& call, cudaStream_t stream) {
  if (x.numel() == 0) return;
  Tensor scratch = torch::stable::new_empty(x, {norm_scratch(x.scalar_type(), call)}, ScalarType::Double);
  launch_norm(x.scalar_type(), call, doubles(scratch), stream);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> norm_act_backward(const Tensor& grad_out, const Tensor& x,
                                                     const std::optional<Tensor>& z, const Tensor& mean,
                                                     const Tensor& rstd, const std::optional<Tensor>& weight,
                                                     int64_t groups, double slope, bool need_affine) {
  NormCall call = checked_call(grad_out, x, z, mean, rstd, weight, groups, slope);
  const OnDevice device(x);
  const int64_t channels = need_affine ? call.channels : 0;
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = sums_like(x, channels), grad_bias = sums_like(x, channels);
  call.out_x = grad_x.mutable_data_ptr();
  if (need_affine) {
    call.channel_sums[0] = grad_weight.mutable_data_ptr();
    call.channel_sums[1] = grad_bias.mutable_data_ptr();
  }
  run(x, call, device.stream());
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_double_backward(const Tensor& tangent, const Tensor& grad_out,
                                                            const Tensor& x, const std::optional<Tensor>& z,
                                                            const Tensor& mean, const Tensor& rstd,
                                                            const std::optional<Tensor>& weight, int64_t groups,
                                                            double slope) {
  NormCall call = checked_call(grad_out, x, z, mean, rstd, weight, groups, slope);
  check_like("tangent", tangent, "x", x, kDevice);
  check_same_device("tangent", tangent, "x", x);
  const OnDevice device(x);
  Tensor out_tangent = torch::stable::empty_like(x), in_x = torch::stable::empty_like(x);
  Tensor in_weight = sums_like(x, call.channels);
  call.tangent = tangent.const_data_ptr();
  call.out_tangent = out_tangent.mutable_data_ptr();
  call.out_x = in_x.mutable_data_ptr();
  call.channel_sums[0] = in_weight.mutable_data_ptr();
  run(x, call, device.stream());
  return {out_tangent, in_x, in_weight};
}

}  // namespace gpkernels::cuda
