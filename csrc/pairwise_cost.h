// The cost of a pair in the loss-sensitive family (Qi 2020), and its derivative. Written once for CPU and CUDA.
#pragma once

#include "host_device.h"

namespace gpkernels {

// delta = margin * distance, a = delta + loss_real - loss_fake, cost = C(a) = max(a, slope a) for slope <= 1, and
// slope_at = C'(a), which at 0 is 1.
template <class A>
struct PairCost {
  A cost, delta, slope_at;
};

template <class A>
GPK_HD PairCost<A> pair_cost(A distance, A loss_real, A loss_fake, A margin, A slope) {
  const A delta = margin * distance, a = delta + loss_real - loss_fake;
  return {a >= 0 ? a : slope * a, delta, a >= 0 ? A(1) : slope};
}

}  // namespace gpkernels
