// grad_norm_penalty: phi(||g||) over groups of a critic's gradient, reduced; with first and second derivative
// (csrc/penalty_derivatives.h has the formulas).
#include "../checks.h"
#include "../group_shapes.h"
#include "data.h"
#include "empty.h"
#include "groups.h"
#include "kernels.h"
#include "phi_run.h"
#include "simd.h"

#include <cmath>

namespace gpkernels::cpu {
namespace {

template <class T>
struct AbsTerm {
  const T* x;
  [[gnu::always_inline]] acc_t<T> operator()(int64_t i, int64_t) const {
    return std::abs(acc_t<T>(x[i]));
  }
};

// u * direction(x)
template <Norm kNorm, class T>
struct DotTerm {
  const T* u;
  const T* x;
  const acc_t<T>* norms;
  [[gnu::always_inline]] acc_t<T> operator()(int64_t i, int64_t group) const {
    using A = acc_t<T>;
    return A(u[i]) * direction(kNorm, A(x[i]), kNorm == Norm::linf ? norms[group] : A(0));
  }
};

// 1 where the element attains the norm of its group.
template <class T>
struct TieTerm {
  const T* x;
  const acc_t<T>* norms;
  [[gnu::always_inline]] acc_t<T> operator()(int64_t i, int64_t group) const {
    using A = acc_t<T>;
    return std::abs(A(x[i])) == norms[group] ? A(1) : A(0);
  }
};

// out = along_tangent[group] * tangent + along_direction[group] * direction(x); without tangent, the second
// term.
template <Norm kNorm, bool kTangent, class T>
struct Combine {
  using A = acc_t<T>;
  const T* tangent;
  const T* x;
  const A* norms;
  const A* along_tangent;
  const A* along_direction;
  [[gnu::always_inline]] T operator()(int64_t i, int64_t group) const {
    A value = along_direction[group] * direction(kNorm, A(x[i]), kNorm == Norm::linf ? norms[group] : A(0));
    if constexpr (kTangent) value += along_tangent[group] * A(tangent[i]);
    return T(value);
  }
};

template <class F>
void dispatch_norm(Norm norm, F&& f) {
  switch (norm) {
    case Norm::l2:
      return f(std::integral_constant<Norm, Norm::l2>());
    case Norm::l1:
      return f(std::integral_constant<Norm, Norm::l1>());
    default:
      return f(std::integral_constant<Norm, Norm::linf>());
  }
}

// Everything the three entry points decode and check in the same way.
struct Call {
  Form form;
  Norm norm;
  Axes axes;
  Reduction reduction;
  double target;
  Groups groups;

  Call(const Tensor& grad, int64_t form_, double target_, int64_t norm_, int64_t axes_, int64_t reduction_)
      : form(checked_enum<Form>("form", form_)),
        norm(checked_enum<Norm>("norm", norm_)),
        axes(checked_enum<Axes>("axes", axes_)),
        reduction(checked_enum<Reduction>("reduction", reduction_)),
        target(target_) {
    check_dense("grad", grad);
    groups = groups_of(grad, axes);
  }

  // The weight of one group in the reduced value.
  double weight() const {
    return reduction == Reduction::mean ? 1.0 / static_cast<double>(groups.count()) : 1.0;
  }

  // d value / d phi(n_group), from the upstream gradient.
  template <class A>
  A upstream(const A* grad_out, int64_t group) const {
    return reduction == Reduction::none ? grad_out[group] : grad_out[0] * static_cast<A>(weight());
  }

  // Rows of the saved tensor: the norms and, for linf, how many elements attain them.
  int64_t saved_rows() const {
    return norm == Norm::linf ? 2 : 1;
  }

  void check_saved(const Tensor& grad, const Tensor& grad_out, const Tensor& saved) const {
    const ScalarType dtype = accumulation_dtype(grad);
    check_vector("grad_out", grad_out, reduction == Reduction::none ? groups.count() : 1, dtype);
    check_vector("saved", saved, saved_rows() * groups.count(), dtype);
  }
};

// How many elements of the group share its direction: the second row of `saved` for linf (at least 1), else 1.
template <Norm kNorm, class A>
A ties_of(const A* saved, int64_t group, int64_t count) {
  return kNorm == Norm::linf ? std::max(saved[count + group], A(1)) : A(1);
}

}  // namespace

std::tuple<Tensor, Tensor> grad_norm_penalty(const Tensor& grad, int64_t form, double target, int64_t norm,
                                             int64_t axes, int64_t reduction) {
  const Call call(grad, form, target, norm, axes, reduction);
  const ScalarType dtype = accumulation_dtype(grad);
  std::vector<int64_t> shape = groups_shape(grad, call.axes);
  Tensor value = call.reduction == Reduction::none ? new_result(shape, dtype) : new_result({}, dtype);
  shape.insert(shape.begin(), call.saved_rows());
  Tensor saved = new_result(shape, dtype);
  dispatch_floating("grad_norm_penalty", grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const T* x = data<T>(grad);
    A* n = mutable_data<A>(saved);
    A* v = mutable_data<A>(value);
    const int64_t count = call.groups.count();
    dispatch_norm(call.norm, [&](auto kind) {
      constexpr Norm kNorm = decltype(kind)::value;
      if constexpr (kNorm == Norm::linf) {
        reduce_groups<Max, A>(call.groups, AbsTerm<T>{x}, n);
        reduce_groups<Sum, A>(call.groups, TieTerm<T>{x, n}, n + count);
      } else {
        reduce_groups<Sum, A>(call.groups, DotTerm<kNorm, T>{x, x, nullptr}, n);
      }
    });
    const A k = static_cast<A>(call.target);
    const bool reduced = call.reduction != Reduction::none;
    std::vector<A> values(reduced ? count : 0);
    A* y = reduced ? values.data() : v;
    std::vector<double> partial(chunks_of(count), 0.0);
    for_each_chunk(1, count, [&](int64_t, int64_t chunk, int64_t begin, int64_t end) {
      if (call.norm == Norm::l2) sqrt_run(n + begin, end - begin);
      phi_run<Part::value>(call.form, n + begin, k, end - begin, y + begin);
      if (reduced) partial[chunk] = sum_run(y + begin, end - begin);
    });
    if (reduced) *v = static_cast<A>(sum_run(partial.data(), partial.size()) * call.weight());
  });
  return {value, saved};
}

Tensor grad_norm_penalty_backward(const Tensor& grad_out, const Tensor& grad, const Tensor& saved, int64_t form,
                                  double target, int64_t norm, int64_t axes, int64_t reduction) {
  const Call call(grad, form, target, norm, axes, reduction);
  call.check_saved(grad, grad_out, saved);
  Tensor grad_grad = new_result_like(grad);
  dispatch_floating("grad_norm_penalty_backward", grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const T* x = data<T>(grad);
    const A* n = data<A>(saved);
    const A* p = data<A>(grad_out);
    T* out = mutable_data<T>(grad_grad);
    dispatch_norm(call.norm, [&](auto kind) {
      constexpr Norm kNorm = decltype(kind)::value;
      const A k = static_cast<A>(call.target);
      const int64_t count = call.groups.count();
      std::vector<A> along(count);
      for_each_chunk(1, count, [&](int64_t, int64_t, int64_t begin, int64_t end) {
        constexpr Part kPart = kNorm == Norm::l2 ? Part::first_over_n : Part::first;
        phi_run<kPart>(call.form, n + begin, k, end - begin, along.data() + begin);
        for (int64_t i = begin; i < end; ++i) along[i] *= call.upstream(p, i) / ties_of<kNorm>(n, i, count);
      });
      map_groups(call.groups, Combine<kNorm, false, T>{nullptr, x, n, nullptr, along.data()}, out);
    });
  });
  return grad_grad;
}

std::tuple<Tensor, Tensor> grad_norm_penalty_double_backward(const Tensor& grad_grad, const Tensor& grad_out,
                                                             const Tensor& grad, const Tensor& saved, int64_t form,
                                                             double target, int64_t norm, int64_t axes,
                                                             int64_t reduction) {
  const Call call(grad, form, target, norm, axes, reduction);
  call.check_saved(grad, grad_out, saved);
  check_like("grad_grad", grad_grad, "grad", grad);
  Tensor out_grad = new_result_like(grad);
  Tensor out_grad_out = new_result_like(grad_out);
  dispatch_floating("grad_norm_penalty_double_backward", grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const T* tangent = data<T>(grad_grad);
    const T* x = data<T>(grad);
    const A* n = data<A>(saved);
    const A* p = data<A>(grad_out);
    A* q = mutable_data<A>(out_grad_out);
    T* out = mutable_data<T>(out_grad);
    const int64_t count = call.groups.count();
    dispatch_norm(call.norm, [&](auto kind) {
      constexpr Norm kNorm = decltype(kind)::value;
      const A k = static_cast<A>(call.target);
      std::vector<A> along_direction(count), along_tangent(count), dot(count);
      reduce_groups<Sum, A>(call.groups, DotTerm<kNorm, T>{tangent, x, n}, dot.data());
      const bool reduced = call.reduction != Reduction::none;
      std::vector<double> partial(chunks_of(count), 0.0);
      for_each_chunk(1, count, [&](int64_t, int64_t chunk, int64_t begin, int64_t end) {
        constexpr Part kPart = kNorm == Norm::l2 ? Part::first_over_n : Part::first;
        phi_run<kPart>(call.form, n + begin, k, end - begin, along_tangent.data() + begin);
        phi_run<Part::second>(call.form, n + begin, k, end - begin, along_direction.data() + begin);
        for (int64_t i = begin; i < end; ++i) {
          const A upstream = call.upstream(p, i), slope = along_tangent[i], curvature = along_direction[i];
          const A d = dot[i] / ties_of<kNorm>(n, i, count);
          dot[i] = slope * d;
          if constexpr (kNorm == Norm::l2) {
            along_tangent[i] = upstream * slope;
            along_direction[i] = n[i] != 0 ? upstream * (curvature - slope) * (d / n[i]) / n[i] : A(0);
          } else {
            along_direction[i] = upstream * curvature * d / ties_of<kNorm>(n, i, count);
          }
        }
        if (reduced)
          partial[chunk] = sum_run(dot.data() + begin, end - begin);
        else
          std::copy(dot.data() + begin, dot.data() + end, q + begin);
      });
      if (reduced) *q = static_cast<A>(sum_run(partial.data(), partial.size()) * call.weight());
      constexpr bool kTangent = kNorm == Norm::l2;
      map_groups(call.groups, Combine<kNorm, kTangent, T>{tangent, x, n, along_tangent.data(), along_direction.data()},
                 out);
    });
  });
  return {out_grad, out_grad_out};
}

}  // namespace gpkernels::cpu
