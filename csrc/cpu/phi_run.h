// phi and its derivatives over runs of norms. The form is chosen once a run, so that the loop over it vectorises.
#pragma once

#include <cmath>
#include <cstdint>

#include "../penalty_math.h"
#include "simd.h"

namespace gpkernels::cpu {

enum class Part { value, first, second, first_over_n };

template <Form kForm, Part kPart, class A>
GPK_MULTIVERSION void phi_loop(const A* n, A k, int64_t count, A* out) {
  for (int64_t i = 0; i < count; ++i) {
    const Phi<A> f = phi(kForm, n[i], k);
    if constexpr (kPart == Part::value) out[i] = f.value;
    if constexpr (kPart == Part::first) out[i] = f.first;
    if constexpr (kPart == Part::second) out[i] = f.second;
    if constexpr (kPart == Part::first_over_n) out[i] = phi_first_over_n(f, n[i]);
  }
}

template <Part kPart, class A>
void phi_run(Form form, const A* n, A k, int64_t count, A* out) {
  switch (form) {
    case Form::two_sided:
      return phi_loop<Form::two_sided, kPart>(n, k, count, out);
    case Form::one_sided:
      return phi_loop<Form::one_sided, kPart>(n, k, count, out);
    case Form::one_sided_linear:
      return phi_loop<Form::one_sided_linear, kPart>(n, k, count, out);
    case Form::maximum:
      return phi_loop<Form::maximum, kPart>(n, k, count, out);
    case Form::linear:
      return phi_loop<Form::linear, kPart>(n, k, count, out);
    default:
      return phi_loop<Form::squared, kPart>(n, k, count, out);
  }
}

template <class A>
GPK_MULTIVERSION void sqrt_run(A* n, int64_t count) {
  for (int64_t i = 0; i < count; ++i) n[i] = std::sqrt(n[i]);
}

template <class A>
GPK_MULTIVERSION double sum_run(const A* x, int64_t count) {
  double lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) lane[j] += static_cast<double>(x[i + j]);
  for (int j = 0; i < count; ++i, ++j) lane[j] += static_cast<double>(x[i]);
  double sum = 0;
  for (double part : lane) sum += part;
  return sum;
}

}  // namespace gpkernels::cpu
