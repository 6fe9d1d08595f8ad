// norm_act where a group is runs of contiguous elements (RunPlan).
#pragma once

#include "norm_pass.cuh"
#include "norm_plan.h"

namespace gpkernels::cuda {

// A team of `lanes` threads takes every teams-th run of a piece. kElements: the channel changes with the element.
template <int kWidth, bool kElements, class Pass>
__device__ __forceinline__ void piece_of_runs(const Pass& pass, const RunPlan& plan, Stage stage) {
  using A = typename Pass::A;
  const int thread = threadIdx.x % plan.group_threads, lane = thread % plan.lanes, team = thread / plan.lanes;
  const int teams = plan.group_threads / plan.lanes;
  const int pieces = plan.pieces();
  const int64_t index = int64_t(blockIdx.x) * (kThreads / plan.group_threads) + threadIdx.x / plan.group_threads;
  const bool active = index < plan.groups * pieces;
  const int64_t group = active ? index / pieces : 0;
  const int piece = active ? static_cast<int>(index - group * pieces) : 0;
  const int run_piece = piece / plan.length_pieces, length_piece = piece % plan.length_pieces;
  const int64_t first_run = int64_t(run_piece) * plan.piece_runs, first = int64_t(length_piece) * plan.piece_length;
  const int runs = static_cast<int>(at_most(plan.piece_runs, plan.runs - first_run));
  const int length = static_cast<int>(at_most(plan.piece_length, plan.length - first));
  const int64_t offset = group * plan.group_stride + first_run * plan.run_stride + first;
  const int64_t sample = group / plan.groups_a_sample;
  const bool by_run = !kElements && plan.channels == Along::run;
  const int64_t channel =
      (group - sample * plan.groups_a_sample) * plan.channels_a_group + (kElements ? first
                                                                         : by_run  ? first_run
                                                                                   : 0);  // the piece's first
  const auto gamma_of = [&](int run) { return kElements ? A(1) : pass.gamma(channel + (by_run ? run : 0)); };
  const auto gammas_of = [&](A gamma, int i) {
    Unit<A, kWidth> gammas;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) gammas.item[j] = gamma;
    if (kElements && pass.weight != nullptr) gammas = load<A, kWidth>(pass.weight + channel + i);
    return gammas;
  };

  A sums[Pass::kSums] = {};
  if (stage == Stage::map) {
    for (int p = threadIdx.x; p < pieces; p += kThreads) pass.add_part(sums, group * pieces + p);
  } else if (active) {
    const A mean = pass.mean[group];
#pragma unroll 1
    for (int run = team; run < runs; run += teams) {
      const A gamma = gamma_of(run);
      const int64_t begin = offset + run * plan.run_stride;
#pragma unroll 1
      for (int i = lane * kWidth; i < length; i += plan.lanes * kWidth) {
        const auto gammas = gammas_of(gamma, i);
        const auto items = pass.template read<kWidth>(begin + i);
        A unit[Pass::kSums] = {};
#pragma unroll
        for (int j = 0; j < kWidth; ++j) pass.add(unit, items, j, mean, pass.batch ? A(1) : gammas.item[j]);
#pragma unroll
        for (int k = 0; k < Pass::kSums; ++k) sums[k] += unit[k];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < Pass::kSums; ++k) sums[k] = fold_lanes<SumFold<A>>(sums[k], plan.group_threads);
  if (stage == Stage::sums) {
    if (active && thread == 0) pass.keep_sums(sums, group, piece, pieces);
    return;
  }

  const typename Pass::Moments moments = pass.moments_of(sums, group);
  const auto moments_at = [&](int) { return moments; };
  if (active && thread == 0 && piece == 0) pass.write_channel_of_batch(sums, group);
  const bool adds_channels = by_run && pass.maps_channels();
#pragma unroll 1
  for (int run = team; run - team < runs; run += teams) {
    A channel_sums[Pass::kChannelSums] = {};
    if (active && run < runs) {
      const A gamma = gamma_of(run);
      const int64_t begin = offset + run * plan.run_stride;
#pragma unroll 1
      for (int i = lane * kWidth; i < length; i += plan.lanes * kWidth) {
        const auto gammas = gammas_of(gamma, i);
        const auto gamma_at = [&](int j) { return gammas.item[j]; };
        A unit[1][Pass::kChannelSums] = {};
        pass.map(begin + i, pass.template read<kWidth>(begin + i), moments_at, gamma_at, unit, 0);
#pragma unroll
        for (int k = 0; k < Pass::kChannelSums; ++k) channel_sums[k] += unit[0][k];
      }
    }
    if constexpr (!kElements) {
      if (!adds_channels) continue;
#pragma unroll
      for (int k = 0; k < Pass::kChannelSums; ++k) {
        const A sum = fold_lanes<SumFold<A>>(channel_sums[k], plan.lanes);
        if (active && run < runs && lane == 0)
          pass.write_channel(k, sample * plan.length_pieces + length_piece, channel + run, sum);
      }
    }
  }
}

template <class Pass>
__global__ void __launch_bounds__(kThreads, 3) norm_runs(Pass pass, RunPlan plan, Stage stage) {
  constexpr int kItems = kRunItems<typename Pass::T>;
  const bool elements = plan.channels == Along::element;
  if (kItems > 1 && elements && plan.wide)
    piece_of_runs<kItems, true>(pass, plan, stage);
  else if (elements)
    piece_of_runs<1, true>(pass, plan, stage);
  else if (kItems > 1 && plan.wide)
    piece_of_runs<kItems, false>(pass, plan, stage);
  else
    piece_of_runs<1, false>(pass, plan, stage);
}

}  // namespace gpkernels::cuda
