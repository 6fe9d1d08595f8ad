// The CUDA implementations that csrc/cuda/registration.cpp binds to the schemas of gpkernels/ops/_library.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

// The tests build these sources for the host as well, as a library of another name on CPU tensors.
#ifndef GPK_LIBRARY
#define GPK_LIBRARY gpkernels
#define GPK_DEVICE CUDA
#endif

namespace gpkernels::cuda {

using torch::stable::Tensor;

// sampling_ops.cpp
Tensor interpolate(const Tensor& real, const Tensor& fake, const std::optional<Tensor>& eps,
                   const std::optional<Tensor>& seed, bool per_element);
std::tuple<Tensor, Tensor> interpolate_backward(const Tensor& grad_out, const std::optional<Tensor>& eps,
                                                const std::optional<Tensor>& seed, bool per_element, bool need_real,
                                                bool need_fake);
Tensor perturb(const Tensor& real, const std::optional<Tensor>& sigma, double scale, int64_t noise, const Tensor& seed);
Tensor perturb_backward(const Tensor& grad_out, double scale, int64_t noise, const Tensor& seed);

// penalty_ops.cpp
std::tuple<Tensor, Tensor> grad_norm_penalty(const Tensor& grad, int64_t form, double target, int64_t norm,
                                             int64_t axes, int64_t reduction);
Tensor grad_norm_penalty_backward(const Tensor& grad_out, const Tensor& grad, const Tensor& saved, int64_t form,
                                  double target, int64_t norm, int64_t axes, int64_t reduction);
std::tuple<Tensor, Tensor> grad_norm_penalty_double_backward(const Tensor& grad_grad, const Tensor& grad_out,
                                                             const Tensor& grad, const Tensor& saved, int64_t form,
                                                             double target, int64_t norm, int64_t axes,
                                                             int64_t reduction);

// pairwise_ops.cpp
std::tuple<Tensor, Tensor, Tensor> pairwise_cost(const Tensor& real, const Tensor& fake, const Tensor& loss_real,
                                                 const Tensor& loss_fake, double margin, double slope);
std::tuple<Tensor, Tensor> pairwise_cost_backward(const Tensor& grad_cost, const Tensor& slope_at);

// norm_ops.cpp
std::tuple<Tensor, Tensor, Tensor> norm_act_backward(const Tensor& grad_out, const Tensor& x,
                                                     const std::optional<Tensor>& z, const Tensor& mean,
                                                     const Tensor& rstd, const std::optional<Tensor>& weight,
                                                     int64_t groups, double slope, bool need_affine);
std::tuple<Tensor, Tensor, Tensor> norm_act_double_backward(const Tensor& tangent, const Tensor& grad_out,
                                                            const Tensor& x, const std::optional<Tensor>& z,
                                                            const Tensor& mean, const Tensor& rstd,
                                                            const std::optional<Tensor>& weight, int64_t groups,
                                                            double slope);

// spectral_ops.cpp
Tensor spectral_norm_iterate(const std::vector<Tensor>& weights, std::vector<Tensor> u, std::vector<Tensor> v,
                             const std::vector<int64_t>& dims, int64_t iterations, double eps);
std::tuple<Tensor, Tensor> spectral_norm_update(const std::vector<Tensor>& weights, std::vector<Tensor> u,
                                                std::vector<Tensor> v, std::vector<Tensor> results,
                                                const std::vector<int64_t>& dims, const std::vector<double>& targets,
                                                int64_t iterations, double eps);
std::vector<Tensor> spectral_norm_scale(const std::vector<Tensor>& weights, const Tensor& sigma,
                                        const std::vector<double>& targets, double eps);
std::vector<Tensor> spectral_norm_scale_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                                                 const Tensor& vectors, const Tensor& sigma,
                                                 const std::vector<int64_t>& dims, const std::vector<double>& targets,
                                                 double eps);

}  // namespace gpkernels::cuda
