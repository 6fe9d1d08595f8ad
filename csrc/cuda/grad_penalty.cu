// grad_norm_penalty: phi(||g||) over groups of a critic's gradient, reduced; with first and second derivative
// (csrc/penalty_derivatives.h has the formulas).
#include <cmath>
#include <type_traits>

#include "group_reduce.cuh"
#include "kernels.h"

namespace gpkernels::cuda {
namespace {

// What an element of the gradient adds to the norm of its group; the root of l2 is left to the epilogue.
template <class T_, bool kPeak>
struct NormTerm {
  using T = T_;
  using A = acc_t<T>;
  using Fold = std::conditional_t<kPeak, PeakFold<A>, SumFold<A>>;
  const T* x;
  bool square;

  __device__ __forceinline__ A norm_of(int64_t) const {
    return A(0);
  }
  template <int kCount>
  __device__ __forceinline__ void add(typename Fold::State* states, int64_t i, const A*, int) const {
    const Unit<T, kCount> unit = load<T, kCount>(x + i);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const A value = A(unit.item[j]);
      if constexpr (kPeak)
        states[j] = Fold::merge(states[j], {std::fabs(value), A(1)});
      else
        states[j] += square ? value * value : std::fabs(value);
    }
  }
};

// tangent * direction(x)
template <class T_>
struct DotTerm {
  using T = T_;
  using A = acc_t<T>;
  using Fold = SumFold<A>;
  const T* tangent;
  const T* x;
  const A* norms;
  Norm norm;

  __device__ __forceinline__ A norm_of(int64_t group) const {
    return norm == Norm::linf ? norms[group] : A(0);
  }
  // `step` is 1 where each item has a norm of its own, 0 where they share one.
  template <int kCount>
  __device__ __forceinline__ void add(A* states, int64_t i, const A* norms_of_items, int step) const {
    const Unit<T, kCount> u = load<T, kCount>(tangent + i), unit = load<T, kCount>(x + i);
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      states[j] += A(u.item[j]) * direction(norm, A(unit.item[j]), norms_of_items[step * j]);
  }
};

// What every kernel knows of the penalty and its upstream gradient.
template <class A>
struct GroupContext {
  PenaltyOptions options;
  const A* grad_out;
  const A* saved;

  __device__ __forceinline__ A norm(int64_t group) const {
    return saved[group];
  }
  // How many elements of the group share its direction: the second row of `saved` for linf (at least 1), else 1.
  __device__ __forceinline__ A ties(int64_t group) const {
    if (options.norm != Norm::linf) return A(1);
    const A count = saved[options.groups.count() + group];
    return count > A(1) ? count : A(1);
  }
  __device__ __forceinline__ A upstream(int64_t group) const {
    return options.reduction == Reduction::none ? grad_out[group] : grad_out[0] * A(options.weight);
  }
};

// The epilogues share this end: value = one value a group, or their weighted sum.
template <class A>
struct ValueEpilogue {
  static constexpr bool kTotal = true;
  PenaltyOptions options;
  A* value;

  GPK_HD bool has_total() const {
    return options.reduction != Reduction::none;
  }
  __device__ __forceinline__ void write_total(double total) const {
    *value = A(total * options.weight);
  }
  __device__ __forceinline__ double keep(int64_t group, A y) const {
    if (has_total()) return static_cast<double>(y);
    value[group] = y;
    return 0;
  }
};

template <class A>
struct NormEpilogue : ValueEpilogue<A> {
  using ValueEpilogue<A>::options;
  A* saved;

  __device__ __forceinline__ double operator()(int64_t group, A sum) const {
    return finish(group, options.norm == Norm::l2 ? std::sqrt(sum) : sum);
  }
  __device__ __forceinline__ double operator()(int64_t group, Peak<A> peak) const {
    saved[options.groups.count() + group] = peak.max == peak.max ? peak.count : A(0);
    return finish(group, peak.max);
  }
  __device__ __forceinline__ double finish(int64_t group, A n) const {
    saved[group] = n;
    return this->keep(group, phi(options.form, n, A(options.target)).value);
  }
};

template <class A>
struct DotEpilogue : ValueEpilogue<A> {
  using ValueEpilogue<A>::options;
  GroupContext<A> context;
  A* dots;

  __device__ __forceinline__ double operator()(int64_t group, A dot) const {
    dots[group] = dot;
    const SecondFactors<A> factors = second_factors(options.form, options.norm, A(options.target), context.norm(group),
                                                    context.ties(group), A(0), dot);
    return this->keep(group, factors.in_upstream);
  }
};

// result = tangent * along_tangent + direction(x) * along_direction, the factors of an element's group.
template <class A>
struct Factors {
  A along_tangent, along_direction, norm;
};

template <class T_>
struct FirstMap {
  using T = T_;
  using A = acc_t<T>;
  static constexpr bool kTangent = false;
  GroupContext<A> context;
  const T* x;
  T* out;

  __device__ __forceinline__ Factors<A> factors(int64_t group) const {
    const PenaltyOptions& o = context.options;
    const A n = context.norm(group);
    return {A(0), first_factor(o.form, o.norm, A(o.target), n, context.ties(group), context.upstream(group)), n};
  }
};

template <class T_>
struct SecondMap {
  using T = T_;
  using A = acc_t<T>;
  static constexpr bool kTangent = true;
  GroupContext<A> context;
  const T* x;
  T* out;
  const T* tangent;
  const A* dots;

  __device__ __forceinline__ Factors<A> factors(int64_t group) const {
    const PenaltyOptions& o = context.options;
    const A n = context.norm(group);
    const SecondFactors<A> f =
        second_factors(o.form, o.norm, A(o.target), n, context.ties(group), context.upstream(group), dots[group]);
    return {f.along_tangent, f.along_direction, n};
  }
};

// The kCount elements from i on. `step` is 1 where each has factors of its own, 0 where they share one.
template <int kCount, class Map>
__device__ __forceinline__ void map_items(const Map& map, int64_t i, const Factors<typename Map::A>* factors,
                                          int step) {
  using T = typename Map::T;
  using A = typename Map::A;
  const Norm norm = map.context.options.norm;
  const Unit<T, kCount> x = load<T, kCount>(map.x + i);
  A values[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const Factors<A>& f = factors[step * j];
    values[j] = f.along_direction * direction(norm, A(x.item[j]), f.norm);
  }
  if constexpr (Map::kTangent) {
    if (norm == Norm::l2) {
      const Unit<T, kCount> tangent = load<T, kCount>(map.tangent + i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) values[j] += factors[step * j].along_tangent * A(tangent.item[j]);
    }
  }
  Unit<T, kCount> result;
#pragma unroll
  for (int j = 0; j < kCount; ++j) result.item[j] = T(values[j]);
  store(map.out + i, result);
}

template <class Map>
__global__ void __launch_bounds__(kThreads) map_rows(Map map, int64_t length, int64_t numel, bool aligned) {
  using T = typename Map::T;
  Factors<typename Map::A> factors{};
  int64_t row_end = 0;
  const auto seek = [&](int64_t i) {
    if (i < row_end) return;
    const int64_t row = i / length;
    row_end = (row + 1) * length;
    factors = map.factors(row);
  };
#pragma unroll 1
  for (int u = 0; u < kUnitsPerThread; ++u) {
    const int64_t begin = unit_start<T>(blockIdx.x, u);
    if (begin >= numel) return;
    seek(begin);
    if (aligned && begin + kUnit<T> <= row_end) {
      map_items<kUnit<T>>(map, begin, &factors, 0);
      continue;
    }
    const int64_t end = begin + kUnit<T> < numel ? begin + kUnit<T> : numel;
#pragma unroll 1
    for (int64_t i = begin; i < end; ++i) {
      seek(i);
      map_items<1>(map, i, &factors, 0);
    }
  }
}

template <int kWidth, class Map>
__device__ __forceinline__ void map_column(const Map& map, Groups groups, int slices) {
  const int columns_per_block = kThreads / slices;
  const int64_t row_columns = groups.inner / kWidth;
  const int64_t column = int64_t(blockIdx.x) * columns_per_block + threadIdx.x % columns_per_block;
  if (column >= groups.outer * row_columns) return;
  const int64_t group = column * kWidth, outer = column / row_columns;
  Factors<typename Map::A> factors[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) factors[j] = map.factors(group + j);
  const int64_t offset = outer * groups.reduce * groups.inner + (group - outer * groups.inner);
#pragma unroll 2
  for (int64_t r = threadIdx.x / columns_per_block; r < groups.reduce; r += slices)
    map_items<kWidth>(map, offset + r * groups.inner, factors, 1);
}

template <class Map>
__global__ void __launch_bounds__(kThreads, 4) map_columns(Map map, int slices, bool aligned) {
  if (aligned)
    map_column<kUnit<typename Map::T>>(map, map.context.options.groups, slices);
  else
    map_column<1>(map, map.context.options.groups, slices);
}

template <class Map>
void launch_map(const Map& map, bool aligned, cudaStream_t stream) {
  using T = typename Map::T;
  const Groups groups = map.context.options.groups;
  const int64_t numel = groups.count() * groups.reduce;
  if (numel == 0) return;
  if (groups.inner == 1) {
    launch(map_rows<Map>, ceil_div(numel, kTile<T>), stream, map, groups.reduce, numel, aligned);
    return;
  }
  aligned = aligned && groups.inner % kUnit<T> == 0;
  const int slices = groups.reduce >= 4 * kSlices ? kSlices : 1;
  const int64_t columns = groups.count() / (aligned ? kUnit<T> : 1);
  launch(map_columns<Map>, ceil_div(columns, kThreads / slices), stream, map, slices, aligned);
}

}  // namespace

int64_t penalty_scratch(ScalarType dtype, const PenaltyOptions& options) {
  int64_t doubles = 0;
  dispatch_floating("grad_norm_penalty", dtype, [&](auto tag) {
    using T = decltype(tag);
    for (const bool aligned : {false, true}) {
      const int64_t wanted = reduce_scratch(plan_reduce<T>(options.groups, aligned));
      if (wanted > doubles) doubles = wanted;
    }
  });
  return doubles;
}

void launch_penalty(ScalarType dtype, const PenaltyOptions& options, const void* grad, void* value, void* saved,
                    double* scratch, cudaStream_t stream) {
  dispatch_floating("grad_norm_penalty", dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const T* x = static_cast<const T*>(grad);
    const NormEpilogue<A> epilogue{{options, static_cast<A*>(value)}, static_cast<A*>(saved)};
    const ReducePlan plan = plan_reduce<T>(options.groups, all_aligned(grad));
    if (options.norm == Norm::linf)
      launch_reduce<A>(NormTerm<T, true>{x, false}, epilogue, plan, scratch, stream);
    else
      launch_reduce<A>(NormTerm<T, false>{x, options.norm == Norm::l2}, epilogue, plan, scratch, stream);
  });
}

void launch_penalty_backward(ScalarType dtype, const PenaltyOptions& options, const void* grad_out, const void* grad,
                             const void* saved, void* grad_grad, cudaStream_t stream) {
  dispatch_floating("grad_norm_penalty_backward", dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const GroupContext<A> context{options, static_cast<const A*>(grad_out), static_cast<const A*>(saved)};
    launch_map(FirstMap<T>{context, static_cast<const T*>(grad), static_cast<T*>(grad_grad)},
               all_aligned(grad, grad_grad), stream);
  });
}

void launch_penalty_double_backward(ScalarType dtype, const PenaltyOptions& options, const void* grad_grad,
                                    const void* grad_out, const void* grad, const void* saved, void* out_grad,
                                    void* out_grad_out, void* dots, double* scratch, cudaStream_t stream) {
  dispatch_floating("grad_norm_penalty_double_backward", dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const T* tangent = static_cast<const T*>(grad_grad);
    const T* x = static_cast<const T*>(grad);
    A* dot = static_cast<A*>(dots);
    const GroupContext<A> context{options, static_cast<const A*>(grad_out), static_cast<const A*>(saved)};
    launch_reduce<A>(DotTerm<T>{tangent, x, context.saved, options.norm},
                     DotEpilogue<A>{{options, static_cast<A*>(out_grad_out)}, context, dot},
                     plan_reduce<T>(options.groups, all_aligned(grad_grad, grad)), scratch, stream);
    launch_map(SecondMap<T>{context, x, static_cast<T*>(out_grad), tangent, dot},
               all_aligned(grad_grad, grad, out_grad), stream);
  });
}

}  // namespace gpkernels::cuda
