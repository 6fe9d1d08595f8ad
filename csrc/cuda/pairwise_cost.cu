// pairwise_cost: C(margin ||real - fake||_1 + loss_real - loss_fake) for pairs of samples (Qi 2020), and its backward.
#include "../pairwise_cost.h"

#include <cmath>

#include "group_reduce.cuh"
#include "kernels.h"

namespace gpkernels::cuda {
namespace {

template <class T_>
struct DistanceTerm {
  using T = T_;
  using A = acc_t<T>;
  using Fold = SumFold<A>;
  const T* real;
  const T* fake;

  __device__ __forceinline__ A norm_of(int64_t) const {
    return A(0);
  }
  template <int kCount>
  __device__ __forceinline__ void add(A* states, int64_t i, const A*, int) const {
    const Unit<T, kCount> r = load<T, kCount>(real + i), f = load<T, kCount>(fake + i);
#pragma unroll
    for (int j = 0; j < kCount; ++j) states[j] += std::fabs(A(r.item[j]) - A(f.item[j]));
  }
};

template <class A>
struct CostEpilogue {
  static constexpr bool kTotal = false;
  const A* loss_real;
  const A* loss_fake;
  A margin, slope;
  A* cost;
  A* delta;
  A* slope_at;

  __device__ __forceinline__ double operator()(int64_t sample, A distance) const {
    const PairCost<A> pair = pair_cost(distance, loss_real[sample], loss_fake[sample], margin, slope);
    cost[sample] = pair.cost;
    delta[sample] = pair.delta;
    slope_at[sample] = pair.slope_at;
    return 0;
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads)
    pair_backward(const A* grad_cost, const A* slope_at, A* grad_real, A* grad_fake, int64_t batch) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= batch) return;
  const A grad = grad_cost[i] * slope_at[i];
  grad_real[i] = grad;
  grad_fake[i] = -grad;
}

}  // namespace

int64_t pairwise_cost_scratch(ScalarType dtype, int64_t batch, int64_t elements) {
  int64_t doubles = 0;
  dispatch_floating("pairwise_cost", dtype, [&](auto tag) {
    for (const bool aligned : {false, true}) {
      const ReducePlan plan = plan_reduce<decltype(tag)>({batch, elements, 1}, aligned);
      if (plan.splits > 1 && reduce_scratch(plan) > doubles) doubles = reduce_scratch(plan);
    }
  });
  return doubles;
}

void launch_pairwise_cost(ScalarType dtype, const PairCall& call, double* scratch, cudaStream_t stream) {
  if (call.batch == 0) return;
  dispatch_floating("pairwise_cost", dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const DistanceTerm<T> term{static_cast<const T*>(call.real), static_cast<const T*>(call.fake)};
    const CostEpilogue<A> epilogue{static_cast<const A*>(call.loss_real),
                                   static_cast<const A*>(call.loss_fake),
                                   A(call.margin),
                                   A(call.slope),
                                   static_cast<A*>(call.cost),
                                   static_cast<A*>(call.delta),
                                   static_cast<A*>(call.slope_at)};
    launch_reduce_rows(term, epilogue,
                       plan_reduce<T>({call.batch, call.elements, 1}, all_aligned(call.real, call.fake)), scratch,
                       stream);
  });
}

void launch_pairwise_cost_backward(ScalarType dtype, const void* grad_cost, const void* slope_at, void* grad_real,
                                   void* grad_fake, int64_t batch, cudaStream_t stream) {
  if (batch == 0) return;
  dispatch_floating("pairwise_cost_backward", dtype, [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    launch(pair_backward<A>, ceil_div(batch, kThreads), stream, static_cast<const A*>(grad_cost),
           static_cast<const A*>(slope_at), static_cast<A*>(grad_real), static_cast<A*>(grad_fake), batch);
  });
}

}  // namespace gpkernels::cuda
