// norm_act: the first and second derivative of a normalisation with its activation.
#include "kernels.h"
#include "norm_bands.cuh"
#include "norm_runs.cuh"

namespace gpkernels::cuda {
namespace {

// The moments of groups in pieces, a warp a group.
template <class Pass>
__global__ void __launch_bounds__(kThreads) finish_moments(Pass pass, int64_t groups, int64_t pieces) {
  using A = typename Pass::A;
  const int64_t group = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  A sums[Pass::kSums] = {};
  if (group < groups)
    for (int64_t p = lane; p < pieces; p += kWarp) pass.add_part(sums, group * pieces + p);
#pragma unroll
  for (int k = 0; k < Pass::kSums; ++k) sums[k] = fold_lanes<SumFold<A>>(sums[k], kWarp);
  if (group < groups && lane == 0) pass.moments[group] = pass.moments_of(sums, group);
}

constexpr int kChannelsABlock = 8;

template <class A>
struct ChannelParts {
  const A* parts;
  A* sums[2];
  int64_t count, channels;
};

template <class A>
__global__ void __launch_bounds__(kThreads) finish_channels(ChannelParts<A> all) {
  __shared__ A space[kThreads];
  const int64_t blocks = ceil_div(all.channels, kChannelsABlock), which = blockIdx.x / blocks;
  const int64_t first = (blockIdx.x - which * blocks) * kChannelsABlock;
  const int64_t channel = first + threadIdx.x % kChannelsABlock;
  A sum[1] = {A(0)};
  if (channel < all.channels) {
#pragma unroll 4
    for (int64_t p = threadIdx.x / kChannelsABlock; p < all.count; p += kThreads / kChannelsABlock)
      sum[0] += all.parts[(which * all.count + p) * all.channels + channel];
  }
  sum[0] = fold_slices<1>(sum, kChannelsABlock, kThreads / kChannelsABlock, space);
  if (threadIdx.x < kChannelsABlock && channel < all.channels) all.sums[which][channel] = sum[0];
}

// Where the scratch memory of a call holds what, counted in the accumulation dtype: moments, parts, channel parts.
struct NormScratch {
  int64_t parts, channel_parts, end;
};

template <class Pass>
NormScratch scratch_of(const NormPlan& plan, int64_t channels) {
  constexpr int64_t kMoments = sizeof(typename Pass::Moments) / sizeof(typename Pass::A);
  NormScratch scratch{};
  scratch.parts = plan.in_samples ? plan.groups * kMoments : 0;
  scratch.channel_parts = scratch.parts + (plan.pieces > 1 ? plan.groups * plan.pieces * Pass::kSums : 0);
  const int64_t channel_parts = plan.parts_a_channel > 1 ? plan.parts_a_channel * channels : 0;
  scratch.end = scratch.channel_parts + channel_parts * Pass::kChannelSums;
  return scratch;
}

template <class Pass>
void launch_pass(const NormCall& call, const NormPlan& plan, double* memory, cudaStream_t stream) {
  using T = typename Pass::T;
  using A = typename Pass::A;
  const NormScratch scratch = scratch_of<Pass>(plan, call.channels);
  A* const items = reinterpret_cast<A*>(memory);
  Pass pass{};
  pass.tangent = static_cast<const T*>(call.tangent);
  pass.grad_out = static_cast<const T*>(call.grad_out);
  pass.x = static_cast<const T*>(call.x);
  pass.z = call.z != nullptr ? static_cast<const T*>(call.z) : pass.x;
  pass.mean = static_cast<const A*>(call.mean);
  pass.rstd = static_cast<const A*>(call.rstd);
  pass.weight = static_cast<const A*>(call.weight);
  pass.out_tangent = static_cast<T*>(call.out_tangent);
  pass.out_x = static_cast<T*>(call.out_x);
  for (int k = 0; k < Pass::kChannelSums; ++k) pass.channel_sums[k] = static_cast<A*>(call.channel_sums[k]);
  pass.moments = reinterpret_cast<typename Pass::Moments*>(items);
  pass.parts = items + scratch.parts;
  pass.channel_parts = items + scratch.channel_parts;
  pass.channels = call.channels;
  pass.parts_a_channel = plan.parts_a_channel;
  pass.slope = call.z != nullptr ? A(call.slope) : A(1);
  pass.inverse_size = A(1.0 / static_cast<double>(plan.group_size));
  pass.batch = call.groups == 0;

  const auto launch_stage = [&](Stage stage) {
    if (plan.in_bands)
      launch(norm_bands<Pass>, plan.bands.blocks(), stream, pass, plan.bands, stage);
    else
      launch(norm_runs<Pass>, plan.runs.blocks(), stream, pass, plan.runs, stage);
  };
  if (plan.in_samples || plan.pieces > 1)
    launch_stage(Stage::sums);
  else
    launch_stage(Stage::both);
  if (plan.in_samples) {
    if (plan.pieces > 1)
      launch(finish_moments<Pass>, ceil_div(plan.groups, kThreads / kWarp), stream, pass, plan.groups, plan.pieces);
    launch(norm_samples<Pass>, plan.samples.blocks(), stream, pass, plan.samples);
  } else if (plan.pieces > 1) {
    launch_stage(Stage::map);
  }
  if (plan.parts_a_channel > 1)
    launch(finish_channels<A>, Pass::kChannelSums * ceil_div(call.channels, kChannelsABlock), stream,
           ChannelParts<A>{
               pass.channel_parts, {pass.channel_sums[0], pass.channel_sums[1]}, plan.parts_a_channel, call.channels});
}

// Calls f with the type of the pass and its plan.
template <class F>
void dispatch_pass(ScalarType dtype, const NormCall& call, F&& f) {
  dispatch_floating("norm_act", dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool aligned =
        all_aligned(call.tangent, call.grad_out, call.x, call.z, call.weight, call.out_tangent, call.out_x);
    const NormPlan plan = plan_norm<T>(call, aligned);
    if (call.tangent != nullptr)
      f(NormPass<T, true>(), plan);
    else
      f(NormPass<T, false>(), plan);
  });
}

}  // namespace

int64_t norm_scratch(ScalarType dtype, const NormCall& call) {
  int64_t doubles = 0;
  dispatch_pass(dtype, call, [&](auto pass, const NormPlan& plan) {
    using Pass = decltype(pass);
    const int64_t bytes = scratch_of<Pass>(plan, call.channels).end * sizeof(typename Pass::A);
    doubles = ceil_div(bytes, sizeof(double));
  });
  return doubles;
}

void launch_norm(ScalarType dtype, const NormCall& call, double* scratch, cudaStream_t stream) {
  dispatch_pass(dtype, call,
                [&](auto pass, const NormPlan& plan) { launch_pass<decltype(pass)>(call, plan, scratch, stream); });
}

}  // namespace gpkernels::cuda
