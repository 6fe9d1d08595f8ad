// Argument checks of the raw ops. The Python layer has checked what a user can get wrong; these guard the
// kernels against a caller of torch.ops.gpkernels. Each names the argument, what was wanted and what was got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "philox.h"

namespace gpkernels {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), strides = a.strides(), other_sizes = b.sizes(), other_strides = b.strides();
  if (sizes.size() != other_sizes.size()) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != other_sizes[d]) return false;
    if (sizes[d] > 1 && strides[d] != other_strides[d]) return false;
  }
  return true;
}

// True when a size-B leading dimension steps over blocks of dense memory in (channels, spatial) order.
inline bool is_channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  if (sizes.size() < 3) return false;
  int64_t expected = sizes[1];
  if (sizes[1] > 1 && strides[1] != 1) return false;
  for (size_t d = sizes.size() - 1; d >= 2; --d) {
    if (sizes[d] > 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return sizes[0] <= 1 || strides[0] == expected;
}

inline const char* device_name(DeviceType device) {
  return device == DeviceType::CPU ? "CPU" : "CUDA";
}

inline void check_device(const char* name, const Tensor& x, DeviceType device) {
  STD_TORCH_CHECK(x.device().type() == device, name, ": wanted a ", device_name(device),
                  " tensor, got one on another device");
}

inline void check_dense(const char* name, const Tensor& x, DeviceType device = DeviceType::CPU) {
  check_device(name, x, device);
  STD_TORCH_CHECK(x.dim() >= 1, name, ": wanted at least one dimension, got none");
  STD_TORCH_CHECK(x.is_contiguous() || is_channels_last(x), name,
                  ": wanted contiguous or channels_last memory, got another layout");
}

inline void check_like(const char* name, const Tensor& x, const char* other_name, const Tensor& other,
                       DeviceType device = DeviceType::CPU) {
  check_device(name, x, device);
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type(), name, ": wanted the dtype of ", other_name, ", got another");
  STD_TORCH_CHECK(same_layout(x, other), name, ": wanted the shape and strides of ", other_name, ", got others");
}

// A contiguous vector that belongs to `of`: eps, norms, upstream gradients of one value a group.
inline void check_vector(const char* name, const Tensor& v, int64_t length, ScalarType dtype,
                         DeviceType device = DeviceType::CPU) {
  check_device(name, v, device);
  STD_TORCH_CHECK(v.scalar_type() == dtype, name, ": wanted the accumulation dtype, got another");
  STD_TORCH_CHECK(v.is_contiguous() && v.numel() == length, name, ": wanted ", length, " contiguous elements, got ",
                  v.numel());
}

inline void check_seed(const Tensor& seed, DeviceType device) {
  STD_TORCH_CHECK(seed.device().type() == device && seed.scalar_type() == ScalarType::Long && seed.is_contiguous() &&
                      seed.numel() == 2,
                  "seed: wanted a contiguous int64 ", device_name(device), " tensor of 2 elements, got ", seed.numel(),
                  " elements");
}

inline Seed read_seed(const Tensor& seed) {
  check_seed(seed, DeviceType::CPU);
  const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
  return {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1])};
}

// The dtype in which sums and per-sample values are kept: float64 for float64, float32 for everything else.
inline ScalarType accumulation_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class E>
E checked_enum(const char* name, int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code < static_cast<int64_t>(E::count), name, ": wanted a code below ",
                  static_cast<int64_t>(E::count), ", got ", code);
  return static_cast<E>(code);
}

}  // namespace gpkernels
