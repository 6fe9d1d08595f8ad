// norm_act where a group is neighbouring columns of a matrix (BandPlan).
#pragma once

#include "norm_pass.cuh"
#include "norm_plan.h"

namespace gpkernels::cuda {

// The place of a thread in a band: kWidth columns of it, and every slices-th row.
template <int kWidth>
struct BandPlace {
  int64_t first_column;
  int across, slices, columns;  // threads across the band, along it; and its columns
  int column, slice;
  bool active;

  __device__ __forceinline__ BandPlace(const BandPlan& plan, int band) {
    const int part = plan.bands_a_group == 1 ? 0 : band / plan.bands_a_group;
    const int64_t end = plan.bands_a_group == 1 ? plan.columns : (part + 1) * plan.width;
    first_column = part * plan.width + int64_t(band - part * plan.bands_a_group) * plan.band_columns;
    across = plan.band_columns / kWidth;
    slices = kThreads / across;
    columns = static_cast<int>(at_most(plan.band_columns, end - first_column));
    column = static_cast<int>(threadIdx.x) % across * kWidth;
    slice = static_cast<int>(threadIdx.x) / across;
    active = slice < slices && column < columns;
  }
};

// The sum over the slices of what the threads of each hold for kWidth columns: column t's for thread t.
template <int kWidth, class A>
__device__ __forceinline__ A fold_slices(const A (&values)[kWidth], int across, int slices, A* space) {
  constexpr int kPart = 16;
  const int thread = threadIdx.x, slice = thread / across, columns = across * kWidth;
  __syncthreads();
  if (slice < slices) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) space[thread * kWidth + j] = values[j];
  }
  __syncthreads();
  A sum = A(0);
  if (thread >= columns) return sum;
  for (int s = 0; s < slices;) {  // by parts, which costs fewer digits
    A part = A(0);
    for (const int end = s + kPart < slices ? s + kPart : slices; s < end; ++s) part += space[s * columns + thread];
    sum += part;
  }
  return sum;
}

// The sum over each `run` of neighbouring threads below `count`, for every thread of it.
template <class A>
__device__ __forceinline__ A fold_neighbours(A value, int run, int count, A* space) {
  int lanes = 1;
  while (lanes < kWarp && run % (2 * lanes) == 0) lanes *= 2;
  value = fold_lanes<SumFold<A>>(value, lanes);
  if (lanes == run) return value;
  const int thread = threadIdx.x, first = thread / run * run;
  __syncthreads();
  space[thread] = value;
  __syncthreads();
  A sum = A(0);
  if (thread < count)
    for (int i = 0; i < run; i += lanes) sum += space[first + i];
  return sum;
}

template <int kWidth, class Pass>
__device__ __forceinline__ void write_channels(const Pass& pass, const BandPlace<kWidth>& place, int64_t part,
                                               const typename Pass::A (&sums)[kWidth][Pass::kChannelSums],
                                               typename Pass::A* space) {
  using A = typename Pass::A;
  const int thread = threadIdx.x;
#pragma unroll
  for (int k = 0; k < Pass::kChannelSums; ++k) {
    A values[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[j] = sums[j][k];
    const A sum = fold_slices<kWidth>(values, place.across, place.slices, space);
    if (thread < place.columns) pass.write_channel(k, part, place.first_column + thread, sum);
  }
}

// Calls visit(row, i, items) for the rows of a thread's slice, its items in the first row being from `first` on.
template <int kWidth, class Pass, class Visit>
__device__ __forceinline__ void each_row(const Pass& pass, const BandPlace<kWidth>& place, int rows, int64_t first,
                                         int64_t row_stride, const Visit& visit) {
  constexpr int kRows = kColumnRows<typename Pass::T>;
  if (!place.active) return;
  const int64_t stride = place.slices * row_stride;
  int64_t i = first + place.slice * row_stride;
#pragma unroll 1
  for (int row = place.slice; row < rows; row += kRows * place.slices, i += kRows * stride) {
    typename Pass::template Items<kWidth> items[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const bool within = row + u * place.slices < rows;
      items[u] = pass.template read<kWidth>(within ? i + u * stride : i);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u)
      if (row + u * place.slices < rows) visit(row + u * place.slices, i + u * stride, items[u]);
  }
}

template <class Pass>
struct BandSpace {
  using A = typename Pass::A;
  alignas(16) A moments[Pass::Moments::kCount][kBandColumns];
  A gammas[kBandColumns];
  A fold[kThreads * kColumnItems<typename Pass::T>];
};

template <int kWidth, class Pass>
__device__ __forceinline__ void piece_of_band(const Pass& pass, const BandPlan& plan, Stage stage,
                                              BandSpace<Pass>& space) {
  using A = typename Pass::A;
  const int index = blockIdx.x / plan.bands, band = blockIdx.x % plan.bands;
  const int outer = index / plan.row_pieces, row_piece = index % plan.row_pieces;
  const int piece = row_piece * plan.bands_a_group + band % plan.bands_a_group;
  const BandPlace<kWidth> place(plan, band);
  const int64_t first_row = int64_t(row_piece) * plan.piece_rows;
  const int rows = static_cast<int>(at_most(plan.piece_rows, plan.rows - first_row));
  const int64_t first = (int64_t(outer) * plan.rows + first_row) * plan.columns + place.first_column + place.column;
  // Neighbouring columns of one group; thread t owns column t.
  const int run = plan.bands_a_group == 1 ? static_cast<int>(plan.width) : place.columns, own = threadIdx.x;
  const int64_t first_group = int64_t(outer) * (plan.columns / plan.width) + place.first_column / plan.width;
  const int64_t own_group = first_group + own / run;
  const bool owns = own < place.columns, first_of_group = owns && own % run == 0;

  if (owns) {
    space.moments[mean_x][own] = pass.mean[own_group];
    space.gammas[own] = pass.gamma(pass.batch ? own_group : place.first_column + own);
  }
  __syncthreads();

  A sums[Pass::kSums] = {};
  if (stage == Stage::map) {
    const int slices = kThreads / place.columns, slice = own / place.columns;
    if (slice < slices) {
      const int64_t parts = (first_group + own % place.columns / run) * plan.pieces();
      for (int p = slice; p < plan.pieces(); p += slices) pass.add_part(sums, parts + p);
    }
#pragma unroll
    for (int k = 0; k < Pass::kSums; ++k) {
      const A values[1] = {sums[k]};
      sums[k] = fold_slices<1>(values, place.columns, slices, space.fold);
    }
  } else {
    A columns[kWidth][Pass::kSums] = {};
    each_row(pass, place, rows, first, plan.columns, [&](int, int64_t, const auto& items) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) pass.add(columns[j], items, j, space.moments[mean_x][place.column + j], A(1));
    });
    const A gamma = owns && !pass.batch ? space.gammas[own] : A(1);
#pragma unroll
    for (int k = 0; k < Pass::kSums; ++k) {
      A values[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[j] = columns[j][k];
      const A sum = fold_slices<kWidth>(values, place.across, place.slices, space.fold);
      sums[k] = fold_neighbours(k == sum_b || k == sum_b_xc ? sum : gamma * sum, run, place.columns, space.fold);
    }
  }
  if (stage == Stage::sums) {
    if (first_of_group) pass.keep_sums(sums, own_group, piece, plan.pieces());
    return;
  }

  if (owns) {
    const typename Pass::Moments moments = pass.moments_of(sums, own_group);
#pragma unroll
    for (int m = 0; m < Pass::Moments::kCount; ++m) space.moments[m][own] = moments.at[m];
  }
  if (first_of_group && piece == 0) pass.write_channel_of_batch(sums, own_group);
  __syncthreads();
  const auto moments_at = [&](int j) {
    typename Pass::Moments moments;
#pragma unroll
    for (int m = 0; m < Pass::Moments::kCount; ++m) moments.at[m] = space.moments[m][place.column + j];
    return moments;
  };
  const auto gamma_at = [&](int j) { return space.gammas[place.column + j]; };
  A channels[kWidth][Pass::kChannelSums] = {};
  each_row(pass, place, rows, first, plan.columns,
           [&](int, int64_t i, const auto& items) { pass.map(i, items, moments_at, gamma_at, channels, 1); });
  if (pass.maps_channels())
    write_channels<kWidth>(pass, place, int64_t(outer) * plan.row_pieces + row_piece, channels, space.fold);
}

template <class Pass>
__global__ void __launch_bounds__(kThreads, 3) norm_bands(Pass pass, BandPlan plan, Stage stage) {
  __shared__ BandSpace<Pass> space;
  constexpr int kItems = kColumnItems<typename Pass::T>;
  if (kItems > 1 && plan.wide)
    piece_of_band<kItems>(pass, plan, stage, space);
  else
    piece_of_band<1>(pass, plan, stage, space);
}

// The map for groups of a sample's channels without pixels, whose moments are known: the channels are the columns.
template <int kWidth, class Pass>
__device__ __forceinline__ void band_of_samples(const Pass& pass, const BandPlan& plan, typename Pass::A* space) {
  using A = typename Pass::A;
  const int row_piece = blockIdx.x / plan.bands, band = blockIdx.x % plan.bands;
  const int64_t first_row = int64_t(row_piece) * plan.piece_rows;
  const int rows = static_cast<int>(at_most(plan.piece_rows, plan.rows - first_row));
  const BandPlace<kWidth> place(plan, band);
  const int64_t column = place.first_column + place.column;
  const int64_t groups_a_sample = plan.columns / plan.width;
  const int64_t first_group = first_row * groups_a_sample + column / plan.width;
  A channels[kWidth][Pass::kChannelSums] = {};
  A gammas[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) gammas[j] = place.active ? pass.gamma(column + j) : A(1);
  const auto gamma_at = [&](int j) { return gammas[j]; };
  each_row(pass, place, rows, first_row * plan.columns + column, plan.columns,
           [&](int row, int64_t i, const auto& items) {
             const typename Pass::Moments moments = pass.moments[first_group + row * groups_a_sample];
             pass.map(i, items, [&](int) { return moments; }, gamma_at, channels, 1);
           });
  write_channels<kWidth>(pass, place, row_piece, channels, space);
}

template <class Pass>
__global__ void __launch_bounds__(kThreads, 3) norm_samples(Pass pass, BandPlan plan) {
  constexpr int kItems = kColumnItems<typename Pass::T>;
  __shared__ typename Pass::A space[kThreads * kItems];
  if (kItems > 1 && plan.wide)
    band_of_samples<kItems>(pass, plan, space);
  else
    band_of_samples<1>(pass, plan, space);
}

}  // namespace gpkernels::cuda
