// What the derivatives of phi(||g||) need of one group. With n the norm of the group, s = dn/dg its direction,
// p the upstream gradient of phi(n), G the tangent, d = <G, s>:
//   backward         p phi'(n) s
//   double backward  in g: p [phi''(n) d s + (l2 only) phi'(n)/n (G - d s)],   in p: phi'(n) d
#pragma once

#include "host_device.h"
#include "penalty_math.h"

namespace gpkernels {

// Element (o, r, i) of the gradient lies at (o * reduce + r) * inner + i and belongs to group o * inner + i.
struct Groups {
  int64_t outer, reduce, inner;
  GPK_HD int64_t count() const {
    return outer * inner;
  }
};

// An unscaled direction of the norm at g: s = direction(g) * n for l2, direction(g) for l1, and for linf
// direction(g) divided by the number of elements that attain the norm.
template <class A>
GPK_HD A direction(Norm norm, A g, A n) {
  if (norm == Norm::l2) return g;
  const A sign = static_cast<A>((g > 0) - (g < 0));
  return norm == Norm::l1 || g == n || g == -n ? sign : A(0);
}

// The factor of direction(g) in the backward. `ties` is 1 but for linf.
template <class A>
GPK_HD A first_factor(Form form, Norm norm, A target, A n, A ties, A upstream) {
  const Phi<A> f = phi(form, n, target);
  return upstream * (norm == Norm::l2 ? phi_first_over_n(f, n) : f.first) / ties;
}

template <class A>
struct SecondFactors {
  A along_tangent, along_direction, in_upstream;
};

// The factors of G and of direction(g) in the double backward, and its derivative in p. `dot` is <G, direction(g)>.
template <class A>
GPK_HD SecondFactors<A> second_factors(Form form, Norm norm, A target, A n, A ties, A upstream, A dot) {
  const Phi<A> f = phi(form, n, target);
  if (norm != Norm::l2) return {A(0), upstream * f.second * dot / (ties * ties), f.first * dot / ties};
  const A ratio = phi_first_over_n(f, n);
  return {upstream * ratio, n != 0 ? upstream * (f.second - ratio) * (dot / n) / n : A(0), ratio * dot};
}

}  // namespace gpkernels
