// interpolate: out = eps real + (1 - eps) fake  (Gulrajani et al. 2017, Algorithm 1, line 6), and its
// adjoint.
#include "../checks.h"
#include "data.h"
#include "empty.h"
#include "kernels.h"
#include "random.h"
#include "simd.h"

namespace gpkernels::cpu {
namespace {

template <class T>
GPK_MULTIVERSION void blend(const T* real, const T* fake, T* out, int64_t n, acc_t<T> eps) {
  using A = acc_t<T>;
  const A rest = A(1) - eps;
  for (int64_t i = 0; i < n; ++i) out[i] = T(eps * A(real[i]) + rest * A(fake[i]));
}

template <class T>
GPK_MULTIVERSION void blend_each(const T* real, const T* fake, T* out, int64_t n, const float* eps) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < n; ++i) out[i] = T(A(eps[i]) * A(real[i]) + (A(1) - A(eps[i])) * A(fake[i]));
}

template <class T>
GPK_MULTIVERSION void scale(const T* x, T* out, int64_t n, acc_t<T> factor) {
  for (int64_t i = 0; i < n; ++i) out[i] = T(factor * acc_t<T>(x[i]));
}

template <class T>
GPK_MULTIVERSION void scale_each(const T* x, T* out, int64_t n, const float* eps, bool complement) {
  using A = acc_t<T>;
  if (complement)
    for (int64_t i = 0; i < n; ++i) out[i] = T((A(1) - A(eps[i])) * A(x[i]));
  else
    for (int64_t i = 0; i < n; ++i) out[i] = T(A(eps[i]) * A(x[i]));
}

// Where eps comes from: given, one a sample; drawn, one a sample; or drawn, one an element.
struct EpsSource {
  const void* given;  // acc_t<T>[batch], or null
  Seed seed;
  bool per_element;

  template <class T>
  acc_t<T> at(int64_t sample) const {
    return given != nullptr ? static_cast<const acc_t<T>*>(given)[sample] : acc_t<T>(uniform_at(seed, sample));
  }
};

EpsSource eps_source(const Tensor& like, const std::optional<Tensor>& eps, const std::optional<Tensor>& seed,
                     bool per_element) {
  STD_TORCH_CHECK(eps.has_value() != seed.has_value(), "eps, seed: wanted exactly one of the two, got ",
                  eps.has_value() ? "both" : "neither");
  STD_TORCH_CHECK(!(eps.has_value() && per_element), "per_element: wanted a seed, got eps");
  if (seed.has_value()) return {nullptr, read_seed(*seed), per_element};
  check_vector("eps", *eps, like.size(0), accumulation_dtype(like));
  return {eps->const_data_ptr(), {}, false};
}

struct SampleSize {
  int64_t batch, elements;
};

SampleSize sample_size(const Tensor& x) {
  const int64_t batch = x.size(0);
  return {batch, batch == 0 ? 0 : x.numel() / batch};
}

}  // namespace

Tensor interpolate(const Tensor& real, const Tensor& fake, const std::optional<Tensor>& eps,
                   const std::optional<Tensor>& seed, bool per_element) {
  check_dense("real", real);
  check_like("fake", fake, "real", real);
  const EpsSource source = eps_source(real, eps, seed, per_element);
  Tensor out = new_result_like(real);
  dispatch_floating("interpolate", real.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* r = data<T>(real);
    const T* f = data<T>(fake);
    T* o = mutable_data<T>(out);
    if (source.per_element) {
      for_each_chunk(1, real.numel(), [&](int64_t, int64_t, int64_t begin, int64_t end) {
        with_numbers(fill_uniform, source.seed, begin, end, [&](int64_t i, int64_t n, const float* numbers) {
          blend_each<T>(r + i, f + i, o + i, n, numbers);
        });
      });
      return;
    }
    const SampleSize size = sample_size(real);
    for_each_chunk(size.batch, size.elements, [&](int64_t row, int64_t, int64_t begin, int64_t end) {
      const int64_t i = row * size.elements + begin;
      blend<T>(r + i, f + i, o + i, end - begin, source.at<T>(row));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> interpolate_backward(const Tensor& grad_out, const std::optional<Tensor>& eps,
                                                const std::optional<Tensor>& seed, bool per_element, bool need_real,
                                                bool need_fake) {
  check_dense("grad_out", grad_out);
  const EpsSource source = eps_source(grad_out, eps, seed, per_element);
  auto output = [&](bool wanted) {
    return wanted ? new_result_like(grad_out) : new_result({0}, grad_out.scalar_type());
  };
  Tensor grad_real = output(need_real), grad_fake = output(need_fake);
  dispatch_floating("interpolate_backward", grad_out.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* g = data<T>(grad_out);
    T* r = need_real ? mutable_data<T>(grad_real) : nullptr;
    T* f = need_fake ? mutable_data<T>(grad_fake) : nullptr;
    if (source.per_element) {
      for_each_chunk(1, grad_out.numel(), [&](int64_t, int64_t, int64_t begin, int64_t end) {
        with_numbers(fill_uniform, source.seed, begin, end, [&](int64_t i, int64_t n, const float* numbers) {
          if (r != nullptr) scale_each<T>(g + i, r + i, n, numbers, false);
          if (f != nullptr) scale_each<T>(g + i, f + i, n, numbers, true);
        });
      });
      return;
    }
    const SampleSize size = sample_size(grad_out);
    for_each_chunk(size.batch, size.elements, [&](int64_t row, int64_t, int64_t begin, int64_t end) {
      const int64_t i = row * size.elements + begin;
      const acc_t<T> e = source.at<T>(row);
      if (r != nullptr) scale<T>(g + i, r + i, end - begin, e);
      if (f != nullptr) scale<T>(g + i, f + i, end - begin, acc_t<T>(1) - e);
    });
  });
  return {grad_real, grad_fake};
}

}  // namespace gpkernels::cpu
