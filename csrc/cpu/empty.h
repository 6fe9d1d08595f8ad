// Uninitialised CPU tensors for the results of an op. The stable ABI's own empty_like and new_empty look their op up by
// name and box its arguments at every call; these go to the allocator.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../checks.h"

namespace gpkernels::cpu {

using torch::headeronly::IntHeaderOnlyArrayRef;

inline Tensor new_result(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype) {
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Contiguous.
inline Tensor new_result(IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  return new_result(sizes, strides, dtype);
}

// The shape, strides and dtype of `x`, which is dense.
inline Tensor new_result_like(const Tensor& x) {
  return new_result(x.sizes(), x.strides(), x.scalar_type());
}

}  // namespace gpkernels::cpu
