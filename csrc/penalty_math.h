// phi(n), the penalty on a gradient norm n >= 0, with its first two derivatives: the native twin of
// gpkernels/ops/grad_penalty/penalties.py, row by row and in the same order. Written once for CPU and CUDA.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace gpkernels {

enum class Form : int64_t { two_sided, one_sided, one_sided_linear, maximum, linear, squared, count };
enum class Norm : int64_t { l2, l1, linf, count };
enum class Axes : int64_t { sample, pixel, batch, count };
enum class Reduction : int64_t { mean, sum, none, count };

template <class T>
struct Phi {
  T value, first, second;
};

template <class T>
GPK_HD Phi<T> phi(Form form, T n, T k) {
  const T d = n - k;
  switch (form) {
    case Form::two_sided:
      return {d * d, 2 * d, T(2)};
    case Form::one_sided:
      return {d < 0 ? T(0) : d * d, d < 0 ? T(0) : 2 * d, d < 0 ? T(0) : T(2)};
    case Form::one_sided_linear:
      return {d < 0 ? T(0) : d, d <= 0 ? T(0) : T(1), T(0)};
    case Form::maximum:
      return {d < 0 ? k : n, d <= 0 ? T(0) : T(1), T(0)};
    case Form::linear:
      return {n, T(1), T(0)};
    default:
      return {n * n, 2 * n, T(2)};
  }
}

// phi'(n) / n, the factor of g in the gradient of phi(||g||_2). At n = 0 the norm has no gradient: 0 by
// definition, unless phi'(0) = 0, where phi is smooth in g and the limit phi''(0) is right.
template <class T>
GPK_HD T phi_first_over_n(Phi<T> p, T n) {
  return n != 0 ? p.first / n : (p.first == 0 ? p.second : T(0));
}

}  // namespace gpkernels
