// interpolate and perturb on torch tensors: checks, results, and the launch on torch's current stream.
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "device.h"
#include "kernels.h"
#include "ops.h"

namespace gpkernels::cuda {
namespace {

const int64_t* seed_words(const char* name, const Tensor& like, const Tensor& seed) {
  check_seed(seed, kDevice);
  check_same_device("seed", seed, name, like);
  return static_cast<const int64_t*>(seed.const_data_ptr());
}

EpsSource eps_source(const char* name, const Tensor& like, const std::optional<Tensor>& eps,
                     const std::optional<Tensor>& seed, bool per_element) {
  STD_TORCH_CHECK(eps.has_value() != seed.has_value(), "eps, seed: wanted exactly one of the two, got ",
                  eps.has_value() ? "both" : "neither");
  STD_TORCH_CHECK(!(eps.has_value() && per_element), "per_element: wanted a seed, got eps");
  if (seed.has_value()) return {nullptr, seed_words(name, like, *seed), per_element};
  check_vector("eps", *eps, like.size(0), accumulation_dtype(like), kDevice);
  check_same_device("eps", *eps, name, like);
  return {eps->const_data_ptr(), nullptr, false};
}

int64_t elements_of_a_sample(const Tensor& x) {
  return x.size(0) == 0 ? 0 : x.numel() / x.size(0);
}

}  // namespace

Tensor interpolate(const Tensor& real, const Tensor& fake, const std::optional<Tensor>& eps,
                   const std::optional<Tensor>& seed, bool per_element) {
  check_dense("real", real, kDevice);
  check_like("fake", fake, "real", real, kDevice);
  check_same_device("fake", fake, "real", real);
  const EpsSource source = eps_source("real", real, eps, seed, per_element);
  const OnDevice device(real);
  Tensor out = torch::stable::empty_like(real);
  launch_interpolate(real.scalar_type(), real.const_data_ptr(), fake.const_data_ptr(), out.mutable_data_ptr(), source,
                     real.size(0), elements_of_a_sample(real), device.stream());
  return out;
}

std::tuple<Tensor, Tensor> interpolate_backward(const Tensor& grad_out, const std::optional<Tensor>& eps,
                                                const std::optional<Tensor>& seed, bool per_element, bool need_real,
                                                bool need_fake) {
  check_dense("grad_out", grad_out, kDevice);
  const EpsSource source = eps_source("grad_out", grad_out, eps, seed, per_element);
  const OnDevice device(grad_out);
  const auto output = [&](bool wanted) {
    return wanted ? torch::stable::empty_like(grad_out) : torch::stable::new_empty(grad_out, {0});
  };
  Tensor grad_real = output(need_real), grad_fake = output(need_fake);
  if (need_real || need_fake)
    launch_interpolate_backward(grad_out.scalar_type(), grad_out.const_data_ptr(),
                                need_real ? grad_real.mutable_data_ptr() : nullptr,
                                need_fake ? grad_fake.mutable_data_ptr() : nullptr, source, grad_out.size(0),
                                elements_of_a_sample(grad_out), device.stream());
  return {grad_real, grad_fake};
}

Tensor perturb(const Tensor& real, const std::optional<Tensor>& sigma, double scale, int64_t noise,
               const Tensor& seed) {
  check_dense("real", real, kDevice);
  const Noise kind = checked_enum<Noise>("noise", noise);
  const int64_t* words = seed_words("real", real, seed);
  if (sigma.has_value()) {
    check_vector("sigma", *sigma, 1, accumulation_dtype(real), kDevice);
    check_same_device("sigma", *sigma, "real", real);
  }
  const OnDevice device(real);
  Tensor out = torch::stable::empty_like(real);
  launch_perturb(real.scalar_type(), real.const_data_ptr(), sigma.has_value() ? sigma->const_data_ptr() : nullptr,
                 scale, kind, words, out.mutable_data_ptr(), real.numel(), device.stream());
  return out;
}

Tensor perturb_backward(const Tensor& grad_out, double scale, int64_t noise, const Tensor& seed) {
  check_dense("grad_out", grad_out, kDevice);
  const Noise kind = checked_enum<Noise>("noise", noise);
  const int64_t* words = seed_words("grad_out", grad_out, seed);
  const OnDevice device(grad_out);
  const ScalarType dtype = grad_out.scalar_type();
  Tensor grad_sigma = torch::stable::new_empty(grad_out, {}, accumulation_dtype(grad_out));
  Tensor scratch =
      torch::stable::new_empty(grad_out, {perturb_backward_scratch(dtype, grad_out.numel())}, ScalarType::Double);
  launch_perturb_backward(dtype, grad_out.const_data_ptr(), scale, kind, words, grad_sigma.mutable_data_ptr(),
                          doubles(scratch), grad_out.numel(), device.stream());
  return grad_sigma;
}

}  // namespace gpkernels::cuda
