// Uninitialised CPU tensors for results. The stable ABI's own empty_like and new_empty look their op up by name and box
// its arguments at every call, about 1 us; this shim function goes straight to the allocator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace gpkernels::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Like a dense tensor: its shape, strides and dtype.
inline Tensor empty_like(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty_strided(x.dim(), x.sizes().data(), x.strides().data(), dtype);
}

// Contiguous.
inline Tensor empty(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  std::vector<int64_t> strides(dim);
  ...
}

}  // namespace gpkernels::cpu
