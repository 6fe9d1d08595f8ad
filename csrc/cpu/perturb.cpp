// perturb: out = real + scale sigma noise  (Kodali et al. 2017, section 2.3), and its adjoint in sigma.
#include "../checks.h"
#include "data.h"
#include "empty.h"
#include "kernels.h"
#include "random.h"
#include "simd.h"

namespace gpkernels::cpu {
namespace {

template <class T>
GPK_MULTIVERSION void add_scaled(const T* x, const float* noise, T* out, int64_t n, acc_t<T> factor) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < n; ++i) out[i] = T(A(x[i]) + factor * A(noise[i]));
}

template <class T>
GPK_MULTIVERSION acc_t<T> dot_with(const T* x, const float* noise, int64_t n) {
  using A = acc_t<T>;
  A lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) lane[j] += A(x[i + j]) * A(noise[i + j]);
  for (; i < n; ++i) lane[0] += A(x[i]) * A(noise[i]);
  A sum = 0;
  for (int j = 0; j < 16; ++j) sum += lane[j];
  return sum;
}

}  // namespace

Tensor perturb(const Tensor& real, const std::optional<Tensor>& sigma, double scale, int64_t noise,
               const Tensor& seed) {
  check_dense("real", real);
  const Fill fill = fill_of(checked_enum<Noise>("noise", noise));
  const Seed words = read_seed(seed);
  if (sigma.has_value()) check_vector("sigma", *sigma, 1, accumulation_dtype(real));
  Tensor out = new_result_like(real);
  dispatch_floating("perturb", real.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const A factor = A(scale) * (sigma.has_value() ? *data<A>(*sigma) : A(1));
    const T* x = data<T>(real);
    T* o = mutable_data<T>(out);
    for_each_chunk(1, real.numel(), [&](int64_t, int64_t, int64_t begin, int64_t end) {
      with_numbers(fill, words, begin, end, [&](int64_t i, int64_t n, const float* numbers) {
        add_scaled<T>(x + i, numbers, o + i, n, factor);
      });
    });
  });
  return out;
}

Tensor perturb_backward(const Tensor& grad_out, double scale, int64_t noise, const Tensor& seed) {
  check_dense("grad_out", grad_out);
  const Fill fill = fill_of(checked_enum<Noise>("noise", noise));
  const Seed words = read_seed(seed);
  Tensor grad_sigma = new_result({}, accumulation_dtype(grad_out));
  dispatch_floating("perturb_backward", grad_out.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const T* g = data<T>(grad_out);
    std::vector<double> partial(chunks_of(grad_out.numel()), 0.0);
    for_each_chunk(1, grad_out.numel(), [&](int64_t, int64_t chunk, int64_t begin, int64_t end) {
      with_numbers(fill, words, begin, end, [&](int64_t i, int64_t n, const float* numbers) {
        partial[chunk] += static_cast<double>(dot_with<T>(g + i, numbers, n));
      });
    });
    double sum = 0;
    for (double p : partial) sum += p;
    *mutable_data<A>(grad_sigma) = static_cast<A>(scale * sum);
  });
  return grad_sigma;
}

}  // namespace gpkernels::cpu
