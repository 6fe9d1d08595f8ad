// The dtypes of the kernels and the dtype each accumulates in.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace gpkernels {

template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulation<T>::type;

// Calls f(T()) with the C++ type of the dtype.
template <class F>
void dispatch_floating(const char* op, torch::headeronly::ScalarType dtype, F&& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16());
    case ScalarType::Half:
      return f(torch::headeronly::Half());
    default:
      STD_TORCH_CHECK(false, op, ": wanted float16, bfloat16, float32 or float64, got another dtype");
  }
}

}  // namespace gpkernels
