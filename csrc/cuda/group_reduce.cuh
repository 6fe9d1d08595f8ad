// Reductions over the groups of a tensor (csrc/penalty_derivatives.h) in one launch, or two where a group is spread
// over blocks or a value over all groups is wanted.
//
// A Term gives what each element adds to its group's State; an Epilogue takes the State of a whole group, writes what
// belongs to the group and returns what the group adds to the value over all groups; kTotal is false where there is no
// such value.
#pragma once

#include <cstdint>

#include "../penalty_derivatives.h"
#include "reduce.cuh"
#include "unit.cuh"

namespace gpkernels::cuda {

// How a reduction is laid out on the grid: a function of shape, dtype and alignment only, never of the device, so that
// its sums are the same everywhere.
struct ReducePlan {
  Groups groups;
  bool columns;  // groups lie across memory (inner > 1): a thread takes whole columns, or every `slices`-th element
  bool aligned;
  int lanes;             // rows: threads that share a row: a power of two up to a warp, or the block
  int slices;            // columns: threads that share a column
  int64_t splits;        // rows: blocks that share a row
  int64_t split_length;  // elements of a row a block takes
  int64_t blocks;
};

constexpr int64_t kMaxBlocks = 4096;    // of a grid that strides: several waves on any GPU
constexpr int64_t kSplitBlocks = 1024;  // wanted where rows are split
constexpr int kSlices = 8;

template <class T>
ReducePlan plan_reduce(Groups groups, bool pointers_aligned) {
  ReducePlan plan{groups, groups.inner != 1, false, kThreads, 1, 1, groups.reduce, 1};
  if (plan.columns) {
    plan.aligned = pointers_aligned && groups.inner % kUnit<T> == 0;
    plan.slices = groups.reduce >= 4 * kSlices ? kSlices : 1;
    const int64_t columns = groups.count() / (plan.aligned ? kUnit<T> : 1);
    plan.blocks = at_most(ceil_div(columns, kThreads / plan.slices), kMaxBlocks);
  } else {
    plan.aligned = pointers_aligned && groups.reduce % kUnit<T> == 0;
    const int64_t units = groups.reduce / (plan.aligned ? kUnit<T> : 1);
    if (units <= 8 * kWarp)
      for (plan.lanes = 1; plan.lanes < kWarp && 2 * plan.lanes < units;) plan.lanes *= 2;
    const int64_t wanted =
        at_most(ceil_div(kSplitBlocks, groups.outer > 0 ? groups.outer : 1), groups.reduce / kTile<T>);
    if (plan.lanes == kThreads && wanted > 1) {
      plan.split_length = ceil_div(ceil_div(groups.reduce, wanted), kUnit<T>) * kUnit<T>;
      plan.splits = ceil_div(groups.reduce, plan.split_length);
    }
    const int64_t tiles = ceil_div(groups.outer * plan.splits, kThreads / plan.lanes);
    plan.blocks = plan.splits > 1 ? tiles : at_most(tiles, kMaxBlocks);
  }
  if (plan.blocks < 1) plan.blocks = 1;  // the value over no groups is written too
  return plan;
}

// Doubles that hold the parts of any Term: two a split, or one a block.
inline int64_t reduce_scratch(const ReducePlan& plan) {
  if (plan.splits > 1) return 2 * plan.groups.outer * plan.splits;
  return plan.blocks > 1 ? plan.blocks : 0;
}

// Adds up `total` over the block; one block of many leaves a part.
template <class Epilogue>
__device__ __forceinline__ void finish_block(double total, const Epilogue& epilogue, double* parts) {
  if constexpr (Epilogue::kTotal) {
    if (!epilogue.has_total()) return;
    total = fold_lanes<SumFold<double>>(total, kThreads);
    if (threadIdx.x != 0) return;
    if (gridDim.x == 1)
      epilogue.write_total(total);
    else
      parts[blockIdx.x] = total;
  }
}

// What one of `lanes` threads takes of elements [begin, end) of a row: every lanes-th unit or element.
template <class Term>
__device__ __forceinline__ typename Term::Fold::State fold_part(const Term& term, int64_t begin, int64_t end, int lane,
                                                                int lanes, bool aligned, typename Term::A norm) {
  using T = typename Term::T;
  typename Term::Fold::State states[kUnit<T>];
#pragma unroll
  for (int j = 0; j < kUnit<T>; ++j) states[j] = Term::Fold::identity();
  if (aligned) {
#pragma unroll 2
    for (int64_t i = begin + lane * kUnit<T>; i < end; i += lanes * kUnit<T>)
      term.template add<kUnit<T>>(states, i, &norm, 0);
  } else {
#pragma unroll 4
    for (int64_t i = begin + lane; i < end; i += lanes) term.template add<1>(states, i, &norm, 0);
  }
#pragma unroll
  for (int j = 1; j < kUnit<T>; ++j) states[0] = Term::Fold::merge(states[0], states[j]);
  return states[0];
}

template <class Term, class Epilogue>
__global__ void __launch_bounds__(kThreads)
    reduce_rows(Term term, Epilogue epilogue, ReducePlan plan, typename Term::Fold::State* states, double* parts) {
  using Fold = typename Term::Fold;
  const int lane = threadIdx.x % plan.lanes;
  const int pieces_per_block = kThreads / plan.lanes;
  const int64_t pieces = plan.groups.outer * plan.splits;
  double total = 0;
  for (int64_t first = int64_t(blockIdx.x) * pieces_per_block; first < pieces;
       first += int64_t(gridDim.x) * pieces_per_block) {
    const int64_t piece = first + threadIdx.x / plan.lanes;
    const bool active = piece < pieces;
    const int64_t row = plan.splits == 1 ? piece : piece / plan.splits;
    typename Fold::State state = Fold::identity();
    if (active) {
      const int64_t begin = (piece - row * plan.splits) * plan.split_length;
      const int64_t end =
          begin + plan.split_length < plan.groups.reduce ? begin + plan.split_length : plan.groups.reduce;
      const int64_t offset = row * plan.groups.reduce;
      state = fold_part(term, offset + begin, offset + end, lane, plan.lanes, plan.aligned, term.norm_of(row));
    }
    state = fold_lanes<Fold>(state, plan.lanes);
    if (!active || lane != 0) continue;
    if (plan.splits > 1)
      states[piece] = state;
    else
      total += epilogue(row, state);
  }
  if (plan.splits == 1) finish_block(total, epilogue, parts);
}

// Combines the states of split rows, a warp a row. One block.
template <class Fold, class Epilogue>
__global__ void __launch_bounds__(kThreads)
    finish_rows(const typename Fold::State* states, Epilogue epilogue, int64_t rows, int64_t splits) {
  const int lane = threadIdx.x % kWarp;
  double total = 0;
  for (int64_t row = threadIdx.x / kWarp; row < rows; row += kThreads / kWarp) {
    typename Fold::State state = Fold::identity();
    for (int64_t s = lane; s < splits; s += kWarp) state = Fold::merge(state, states[row * splits + s]);
    state = fold_lanes<Fold>(state, kWarp);
    if (lane == 0) total += epilogue(row, state);
  }
  finish_block(total, epilogue, nullptr);
}

// kWidth neighbouring columns a thread. The slices of a column are threads of one block.
template <int kWidth, class Term, class Epilogue>
__device__ __forceinline__ double fold_columns(const Term& term, const Epilogue& epilogue, const ReducePlan& plan,
                                               typename Term::Fold::State* shared) {
  using Fold = typename Term::Fold;
  const Groups groups = plan.groups;
  const int columns_per_block = kThreads / plan.slices;
  const int slice = threadIdx.x / columns_per_block;
  const int64_t row_columns = groups.inner / kWidth, columns = groups.outer * row_columns;
  double total = 0;
  for (int64_t first = int64_t(blockIdx.x) * columns_per_block; first < columns;
       first += int64_t(gridDim.x) * columns_per_block) {
    const int64_t column = first + threadIdx.x % columns_per_block;
    const bool active = column < columns;
    const int64_t group = column * kWidth;
    typename Fold::State states[kWidth];
    typename Term::A norms[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) states[j] = Fold::identity();
    if (active) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) norms[j] = term.norm_of(group + j);
      const int64_t outer = column / row_columns;
      const int64_t offset = outer * groups.reduce * groups.inner + (group - outer * groups.inner);
#pragma unroll 4
      for (int64_t r = slice; r < groups.reduce; r += plan.slices)
        term.template add<kWidth>(states, offset + r * groups.inner, norms, 1);
    }
    if (plan.slices > 1) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kWidth; ++j) shared[threadIdx.x * kWidth + j] = states[j];
      __syncthreads();
      if (slice == 0)
        for (int other = 1; other < plan.slices; ++other)
#pragma unroll
          for (int j = 0; j < kWidth; ++j)
            states[j] = Fold::merge(states[j], shared[(threadIdx.x + other * columns_per_block) * kWidth + j]);
    }
    if (!active || slice != 0) continue;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) total += epilogue(group + j, states[j]);
  }
  return total;
}

template <class Term, class Epilogue>
__global__ void __launch_bounds__(kThreads, 3)
    reduce_columns(Term term, Epilogue epilogue, ReducePlan plan, double* parts) {
  constexpr int kWidth = kUnit<typename Term::T>;
  __shared__ typename Term::Fold::State shared[kThreads * kWidth];
  const double total =
      plan.aligned ? fold_columns<kWidth>(term, epilogue, plan, shared) : fold_columns<1>(term, epilogue, plan, shared);
  finish_block(total, epilogue, parts);
}

// Runs a reduction whose groups are rows.
template <class Term, class Epilogue>
void launch_reduce_rows(const Term& term, const Epilogue& epilogue, const ReducePlan& plan, double* scratch,
                        cudaStream_t stream) {
  using Fold = typename Term::Fold;
  using State = typename Fold::State;
  static_assert(sizeof(State) <= 2 * sizeof(double), "reduce_scratch is too small");
  State* states = reinterpret_cast<State*>(scratch);
  launch(reduce_rows<Term, Epilogue>, plan.blocks, stream, term, epilogue, plan, states, scratch);
  if (plan.splits > 1) launch(finish_rows<Fold, Epilogue>, 1, stream, states, epilogue, plan.groups.outer, plan.splits);
}

// Runs a reduction with a value over all groups, of type A.
template <class A, class Term, class Epilogue>
void launch_reduce(const Term& term, const Epilogue& epilogue, const ReducePlan& plan, double* scratch,
                   cudaStream_t stream) {
  if (plan.columns)
    launch(reduce_columns<Term, Epilogue>, plan.blocks, stream, term, epilogue, plan, scratch);
  else
    launch_reduce_rows(term, epilogue, plan, scratch, stream);
  if (plan.splits == 1 && plan.blocks > 1 && epilogue.has_total())
    launch(finish_sum<A>, 1, stream, scratch, plan.blocks, epilogue.options.weight, epilogue.value);
}

}  // namespace gpkernels::cuda
