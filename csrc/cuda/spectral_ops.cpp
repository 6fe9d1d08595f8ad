// spectral_norm's raw ops on torch tensors: checks, results, and the launches on torch's current stream.
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <vector>

#include "../checks.h"
#include "../spectral_shapes.h"
#include "device.h"
#include "kernels.h"
#include "ops.h"

namespace gpkernels::cuda {
namespace {

void check_where_weights_are(const char* name, const std::vector<Tensor>& tensors, const std::vector<Tensor>& weights) {
  for (const Tensor& x : tensors) check_same_device(name, x, "weights", weights[0]);
}

// The layers of weights that are checked, with shapes, u and v where there are dims.
std::vector<SpectralLayer> layers_of(const std::vector<Tensor>& weights) {
  check_where_weights_are("weights", weights, weights);
  std::vector<SpectralLayer> layers(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(weights[i].numel() > 0, "weights: wanted no empty one, got one without elements");
    layers[i].outer = layers[i].rows = 1;
    layers[i].inner = weights[i].numel();
    layers[i].target = 1;
    layers[i].weight = weights[i].const_data_ptr();
  }
  return layers;
}

// With shapes, which are checked.
std::vector<SpectralLayer> layers_of(const std::vector<Tensor>& weights, const std::vector<SpectralShape>& shapes) {
  constexpr int64_t kRows = 1024, kMost = std::numeric_limits<int>::max() - kRows;  // offsets within a tile are int
  std::vector<SpectralLayer> layers = layers_of(weights);
  for (size_t i = 0; i < layers.size(); ++i) {
    const SpectralShape& shape = shapes[i];
    STD_TORCH_CHECK(shape.rows <= kMost && shape.cols() <= kMost,
                    "weights: wanted fewer than 2^31 rows and columns, got ", shape.rows, " and ", shape.cols());
    STD_TORCH_CHECK(shape.outer == 1 || shape.inner == 1 || shape.rows * (shape.inner + kRows) <= kMost,
                    "weights: wanted fewer than 2^31 elements behind an index of dimensions before dims, got ",
                    shape.rows * shape.inner);
    layers[i].outer = shape.outer, layers[i].rows = shape.rows, layers[i].inner = shape.inner;
  }
  return layers;
}

// With u and v, which a call is going to move.
std::vector<SpectralLayer> moving_layers(const std::vector<Tensor>& weights, const std::vector<SpectralShape>& shapes,
                                         std::vector<Tensor>& u, std::vector<Tensor>& v, int64_t iterations) {
  std::vector<SpectralLayer> layers = layers_of(weights, shapes);
  check_where_weights_are("u", u, weights);
  check_where_weights_are("v", v, weights);
  STD_TORCH_CHECK(iterations >= 0, "iterations: wanted at least 0, got ", iterations);
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].u = u[i].mutable_data_ptr();
    layers[i].v = v[i].mutable_data_ptr();
  }
  return layers;
}

// Moves them, also to `copies` unless it is null, and returns sigma.
Tensor iterated(const std::vector<Tensor>& weights, const std::vector<SpectralLayer>& layers, int64_t iterations,
                double eps, void* copies, const OnDevice& device) {
  const ScalarType dtype = weights[0].scalar_type();
  Tensor sigma = torch::stable::new_empty(weights[0], {static_cast<int64_t>(weights.size())}, spectral_dtype(weights));
  Tensor scratch = torch::stable::new_empty(weights[0], {spectral_iterate_scratch(dtype, layers)}, ScalarType::Double);
  launch_spectral_iterate(dtype, layers, iterations, eps, sigma.mutable_data_ptr(), copies, doubles(scratch),
                          device.stream());
  return sigma;
}

void check_sigma(const Tensor& sigma, const std::vector<Tensor>& weights) {
  check_vector("sigma", sigma, static_cast<int64_t>(weights.size()), spectral_dtype(weights), kDevice);
  check_same_device("sigma", sigma, "weights", weights[0]);
}

// A result for each layer, which has its target.
std::vector<Tensor> results_of(std::vector<SpectralLayer>& layers, const std::vector<Tensor>& weights,
                               const std::vector<double>& targets) {
  std::vector<Tensor> results;
  for (size_t i = 0; i < layers.size(); ++i) {
    results.push_back(torch::stable::empty_like(weights[i]));
    layers[i].out = results[i].mutable_data_ptr();
    layers[i].target = targets[i];
  }
  return results;
}

}  // namespace

Tensor spectral_norm_iterate(const std::vector<Tensor>& weights, std::vector<Tensor> u, std::vector<Tensor> v,
                             const std::vector<int64_t>& dims, int64_t iterations, double eps) {
  const auto shapes = checked_spectral_shapes(weights, u, v, dims, kDevice);
  const std::vector<SpectralLayer> layers = moving_layers(weights, shapes, u, v, iterations);
  const OnDevice device(weights[0]);
  return iterated(weights, layers, iterations, eps, nullptr, device);
}

std::tuple<Tensor, Tensor> spectral_norm_update(const std::vector<Tensor>& weights, std::vector<Tensor> u,
                                                std::vector<Tensor> v, std::vector<Tensor> results,
                                                const std::vector<int64_t>& dims, const std::vector<double>& targets,
                                                int64_t iterations, double eps) {
  const auto shapes = checked_spectral_shapes(weights, u, v, dims, kDevice);
  const SpectralVectors places(shapes);
  std::vector<SpectralLayer> layers = moving_layers(weights, shapes, u, v, iterations);
  check_layers("targets", targets.size(), layers.size());
  check_layers("results", results.size(), layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    check_like("results", results[i], "weights", weights[i], kDevice);
    layers[i].out = results[i].mutable_data_ptr();
    layers[i].target = targets[i];
    layers[i].place = places.u[i];
  }
  check_where_weights_are("results", results, weights);
  const OnDevice device(weights[0]);
  Tensor vectors = torch::stable::new_empty(weights[0], {places.size}, spectral_dtype(weights));
  Tensor sigma = iterated(weights, layers, iterations, eps, vectors.mutable_data_ptr(), device);
  launch_spectral_scale(weights[0].scalar_type(), layers, eps, sigma.const_data_ptr(), device.stream());
  return {sigma, vectors};
}

std::vector<Tensor> spectral_norm_scale(const std::vector<Tensor>& weights, const Tensor& sigma,
                                        const std::vector<double>& targets, double eps) {
  check_layers("targets", targets.size(), weights.size());
  if (weights.empty()) return {};
  check_weights(weights, kDevice);
  std::vector<SpectralLayer> layers = layers_of(weights);
  check_sigma(sigma, weights);
  const OnDevice device(weights[0]);
  std::vector<Tensor> results = results_of(layers, weights, targets);
  launch_spectral_scale(weights[0].scalar_type(), layers, eps, sigma.const_data_ptr(), device.stream());
  return results;
}

std::vector<Tensor> spectral_norm_scale_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                                                 const Tensor& vectors, const Tensor& sigma,
                                                 const std::vector<int64_t>& dims, const std::vector<double>& targets,
                                                 double eps) {
  const std::vector<SpectralShape> shapes = checked_spectral_shapes(weights, vectors, dims, kDevice);
  check_same_device("vectors", vectors, "weights", weights[0]);
  const SpectralVectors places(shapes);
  std::vector<SpectralLayer> layers = layers_of(weights, shapes);
  char* const first = static_cast<char*>(const_cast<void*>(vectors.const_data_ptr()));
  check_layers("grads", grads.size(), layers.size());
  check_layers("targets", targets.size(), layers.size());
  check_sigma(sigma, weights);
  for (size_t i = 0; i < layers.size(); ++i) {
    check_like("grads", grads[i], "weights", weights[i], kDevice);
    STD_TORCH_CHECK(grads[i].is_contiguous(), "grads: wanted contiguous memory, got another layout");
    layers[i].grad = grads[i].const_data_ptr();
    layers[i].u = first + places.u[i] * vectors.element_size();
    layers[i].v = first + places.v[i] * vectors.element_size();
  }
  check_where_weights_are("grads", grads, weights);
  const OnDevice device(weights[0]);
  const ScalarType dtype = weights[0].scalar_type();
  std::vector<Tensor> results = results_of(layers, weights, targets);
  Tensor scratch = torch::stable::new_empty(weights[0], {spectral_backward_scratch(dtype, layers)}, ScalarType::Double);
  launch_spectral_scale_backward(dtype, layers, eps, sigma.const_data_ptr(), doubles(scratch), device.stream());
  return results;
}

}  // namespace gpkernels::cuda
