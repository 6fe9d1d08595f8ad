// pairwise_cost: C(margin ||real - fake||_1 + loss_real - loss_fake) for pairs of samples (Qi 2020), and its backward.
#include "../pairwise_cost.h"

#include <cmath>

#include "../checks.h"
#include "data.h"
#include "empty.h"
#include "groups.h"
#include "kernels.h"
#include "simd.h"

namespace gpkernels::cpu {
namespace {

template <class T>
struct DistanceTerm {
  const T* real;
  const T* fake;
  [[gnu::always_inline]] acc_t<T> operator()(int64_t i, int64_t) const {
    return std::abs(acc_t<T>(real[i]) - acc_t<T>(fake[i]));
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> pairwise_cost(const Tensor& real, const Tensor& fake, const Tensor& loss_real,
                                                 const Tensor& loss_fake, double margin, double slope) {
  check_dense("real", real);
  check_like("fake", fake, "real", real);
  const int64_t batch = real.size(0);
  const ScalarType dtype = accumulation_dtype(real);
  check_vector("loss_real", loss_real, batch, dtype);
  check_vector("loss_fake", loss_fake, batch, dtype);
  Tensor cost = new_result({batch}, dtype), delta = new_result({batch}, dtype), slope_at = new_result({batch}, dtype);
  dispatch_floating("pairwise_cost", real.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const A* l = data<A>(loss_real);
    const A* m = data<A>(loss_fake);
    A* c = mutable_data<A>(cost);
    A* d = mutable_data<A>(delta);
    A* s = mutable_data<A>(slope_at);
    const Groups samples{batch, batch == 0 ? 0 : real.numel() / batch, 1};
    reduce_groups<Sum, A>(samples, DistanceTerm<T>{data<T>(real), data<T>(fake)}, d);
    for_each_chunk(1, batch, [&](int64_t, int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const PairCost<A> pair = pair_cost(d[i], l[i], m[i], A(margin), A(slope));
        c[i] = pair.cost, d[i] = pair.delta, s[i] = pair.slope_at;
      }
    });
  });
  return {cost, delta, slope_at};
}

std::tuple<Tensor, Tensor> pairwise_cost_backward(const Tensor& grad_cost, const Tensor& slope_at) {
  const int64_t batch = slope_at.numel();
  check_vector("slope_at", slope_at, batch, accumulation_dtype(slope_at));
  check_vector("grad_cost", grad_cost, batch, slope_at.scalar_type());
  Tensor grad_real = new_result({batch}, slope_at.scalar_type());
  Tensor grad_fake = new_result({batch}, slope_at.scalar_type());
  dispatch_floating("pairwise_cost_backward", slope_at.scalar_type(), [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    const A* p = data<A>(grad_cost);
    const A* s = data<A>(slope_at);
    A* r = mutable_data<A>(grad_real);
    A* f = mutable_data<A>(grad_fake);
    for_each_chunk(1, batch, [&](int64_t, int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        r[i] = p[i] * s[i];
        f[i] = -r[i];
      }
    });
  });
  return {grad_real, grad_fake};
}

}  // namespace gpkernels::cpu
