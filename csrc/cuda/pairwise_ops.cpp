// pairwise_cost on torch tensors: checks, results, and the launches on torch's current stream.
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "device.h"
#include "kernels.h"
#include "ops.h"

namespace gpkernels::cuda {
namespace {

void check_losses(const char* name, const Tensor& losses, const Tensor& real) {
  check_vector(name, losses, real.size(0), accumulation_dtype(real), kDevice);
  check_same_device(name, losses, "real", real);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> pairwise_cost(const Tensor& real, const Tensor& fake, const Tensor& loss_real,
                                                 const Tensor& loss_fake, double margin, double slope) {
  check_dense("real", real, kDevice);
  check_like("fake", fake, "real", real, kDevice);
  check_same_device("fake", fake, "real", real);
  check_losses("loss_real", loss_real, real);
  check_losses("loss_fake", loss_fake, real);
  const OnDevice device(real);
  const int64_t batch = real.size(0), elements = batch == 0 ? 0 : real.numel() / batch;
  const auto output = [&] { return torch::stable::new_empty(real, {batch}, accumulation_dtype(real)); };
  Tensor cost = output(), delta = output(), slope_at = output();
  Tensor scratch =
      torch::stable::new_empty(real, {pairwise_cost_scratch(real.scalar_type(), batch, elements)}, ScalarType::Double);
  const PairCall call{batch,
                      elements,
                      margin,
                      slope,
                      real.const_data_ptr(),
                      fake.const_data_ptr(),
                      loss_real.const_data_ptr(),
                      loss_fake.const_data_ptr(),
                      cost.mutable_data_ptr(),
                      delta.mutable_data_ptr(),
                      slope_at.mutable_data_ptr()};
  launch_pairwise_cost(real.scalar_type(), call, doubles(scratch), device.stream());
  return {cost, delta, slope_at};
}

std::tuple<Tensor, Tensor> pairwise_cost_backward(const Tensor& grad_cost, const Tensor& slope_at) {
  const int64_t batch = slope_at.numel();
  check_vector("slope_at", slope_at, batch, accumulation_dtype(slope_at), kDevice);
  check_vector("grad_cost", grad_cost, batch, slope_at.scalar_type(), kDevice);
  check_same_device("grad_cost", grad_cost, "slope_at", slope_at);
  const OnDevice device(slope_at);
  Tensor grad_real = torch::stable::empty_like(slope_at), grad_fake = torch::stable::empty_like(slope_at);
  launch_pairwise_cost_backward(slope_at.scalar_type(), grad_cost.const_data_ptr(), slope_at.const_data_ptr(),
                                grad_real.mutable_data_ptr(), grad_fake.mutable_data_ptr(), batch, device.stream());
  return {grad_real, grad_fake};
}

}  // namespace gpkernels::cuda
