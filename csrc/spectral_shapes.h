// How spectral_norm sees a weight as a matrix, and the checks of its raw ops' arguments: what the CPU and CUDA entry
// points share.
#pragma once

#include <cstdint>
#include <vector>

#include "checks.h"
#include "spectral_vectors.h"

namespace gpkernels {

// A contiguous weight as (outer, rows, inner): row r of the matrix W is the elements (a, r, b), its column a * inner +
// b.
struct SpectralShape {
  int64_t outer, rows, inner;

  int64_t cols() const {
    return outer * inner;
  }
  int64_t numel() const {
    return outer * rows * inner;
  }
};

inline SpectralShape spectral_shape(const Tensor& weight, int64_t dim) {
  const auto sizes = weight.sizes();
  STD_TORCH_CHECK(dim >= 0 && dim < static_cast<int64_t>(sizes.size()), "dims: wanted a dimension of a weight of ",
                  sizes.size(), " dimensions, got ", dim);
  SpectralShape shape{1, sizes[dim], 1};
  for (int64_t d = 0; d < dim; ++d) shape.outer *= sizes[d];
  for (size_t d = dim + 1; d < sizes.size(); ++d) shape.inner *= sizes[d];
  STD_TORCH_CHECK(shape.numel() > 0, "weights: wanted no empty one, got one without elements");
  return shape;
}

inline void check_layers(const char* name, size_t got, size_t layers) {
  STD_TORCH_CHECK(got == layers, name, ": wanted one for each of the ", layers, " weights, got ", got);
}

// Contiguous, and alike in dtype and device.
inline void check_weights(const std::vector<Tensor>& weights, DeviceType device = DeviceType::CPU) {
  for (const Tensor& w : weights) {
    check_device("weights", w, device);
    STD_TORCH_CHECK(w.scalar_type() == weights[0].scalar_type(), "weights: wanted one dtype, got several");
    STD_TORCH_CHECK(w.is_contiguous(), "weights: wanted contiguous memory, got another layout");
  }
}

// Checks weights, u, v and dims, and returns the shapes.
inline std::vector<SpectralShape> checked_spectral_shapes(const std::vector<Tensor>& weights,
                                                          const std::vector<Tensor>& u, const std::vector<Tensor>& v,
                                                          const std::vector<int64_t>& dims,
                                                          DeviceType device = DeviceType::CPU) {
  const size_t layers = weights.size();
  STD_TORCH_CHECK(layers > 0, "weights: wanted at least one, got none");
  check_layers("u", u.size(), layers);
  check_layers("v", v.size(), layers);
  check_layers("dims", dims.size(), layers);
  check_weights(weights, device);
  std::vector<SpectralShape> shapes;
  shapes.reserve(layers);
  for (size_t i = 0; i < layers; ++i) {
    const SpectralShape shape = spectral_shape(weights[i], dims[i]);
    check_vector("u", u[i], shape.rows, accumulation_dtype(weights[i]), device);
    check_vector("v", v[i], shape.cols(), accumulation_dtype(weights[i]), device);
    shapes.push_back(shape);
  }
  return shapes;
}

// Where u and v of each layer begin in the `vectors` of a group, which hold them one after the other.
struct SpectralVectors {
  std::vector<int64_t> u, v;
  int64_t size = 0;

  explicit SpectralVectors(const std::vector<SpectralShape>& shapes) {
    auto next = [&](int64_t length) {
      const int64_t begin = size;
      size += padded_vector(length);
      return begin;
    };
    for (const SpectralShape& shape : shapes) {
      u.push_back(next(shape.rows));
      v.push_back(next(shape.cols()));
    }
  }
};

// Checks weights, vectors and dims, and returns the shapes.
inline std::vector<SpectralShape> checked_spectral_shapes(const std::vector<Tensor>& weights, const Tensor& vectors,
                                                          const std::vector<int64_t>& dims,
                                                          DeviceType device = DeviceType::CPU) {
  STD_TORCH_CHECK(!weights.empty(), "weights: wanted at least one, got none");
  check_layers("dims", dims.size(), weights.size());
  check_weights(weights, device);
  std::vector<SpectralShape> shapes;
  shapes.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) shapes.push_back(spectral_shape(weights[i], dims[i]));
  check_vector("vectors", vectors, SpectralVectors(shapes).size, accumulation_dtype(weights[0]), device);
  return shapes;
}

// The dtype in which a group's u, v and sigma are kept.
inline ScalarType spectral_dtype(const std::vector<Tensor>& weights) {
  return weights.empty() ? ScalarType::Float : accumulation_dtype(weights[0]);
}

}  // namespace gpkernels
