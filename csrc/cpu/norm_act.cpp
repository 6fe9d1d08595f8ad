// norm_act_backward and norm_act_double_backward. Both sum over each group of elements that shares a mean, turn the
// sums into a few coefficients, and map every element with these.
#include <algorithm>
#include <memory>
#include <vector>

#include "../checks.h"
#include "../norm_shapes.h"
#include "data.h"
#include "empty.h"
#include "kernels.h"
#include "norm_groups.h"
#include "norm_loops.h"

namespace gpkernels::cpu {
namespace {

// Pixels of a channel from which the runs of a batch are summed one by one.
constexpr int64_t kRunPixels = 512;

// Adds up `rows` rows of shares, each of `width` channels.
template <bool kSecond, class A>
void sum_shares(AffineSums<A> shares, int64_t rows, int64_t width, AffineSums<A> out) {
  const int64_t tiles = ceil_div(width, kColumns);
  for_each_task(kSecond ? tiles : 2 * tiles, rows * std::min(width, kColumns), [&](int64_t task) {
    const int64_t begin = task % tiles * kColumns, count = std::min(kColumns, width - begin);
    const A* from = task < tiles ? shares.weight : shares.bias;
    A* to = task < tiles ? out.weight : out.bias;
    double sums[kColumns] = {};
    add_rows(from + begin, rows, width, count, sums);
    std::transform(sums, sums + count, to + begin, [](double sum) { return static_cast<A>(sum); });
  });
}

// One pixel a sample: a group is a run of memory with a weight for each element, and the affine gradients are sums of
// columns.
template <bool kAffine, class T, bool kSecond>
void run_rows(const NormProblem<T, kSecond>& p) {
  using A = acc_t<T>;
  constexpr int kSums = kNormSums<kSecond>;
  using Coefs = UniformCoefs<A, kSecond>;
  const int64_t batch = p.shape.batch, channels = p.shape.channels, groups = p.shape.groups;
  const int64_t length = channels / groups, parts = ceil_div(length, kPart);
  const std::vector<A> ones(p.weight == nullptr ? channels : 0, A(1));
  const A* weight = p.weight == nullptr ? ones.data() : p.weight;

  auto reduce = [&](int64_t row, int64_t part, A* sums) {
    const int64_t begin = part * kPart;
    sum_weighted<kSecond>(p.in, row * length + begin, std::min(kPart, length - begin), p.mean[row],
                          weight + row % groups * length + begin, sums);
  };
  auto fold = [&](int64_t row, const A* sums) {
    double totals[kSums] = {};
    for (int64_t i = 0; i < parts * kSums; ++i) totals[i % kSums] += static_cast<double>(sums[i]);
    Coefs coefs{{p.mean[row]}};
    const A one(1);
    A unused[2];
    fold_channels<kSecond>(totals, totals, p.rstd + row, &one, static_cast<double>(length), 1, coefs.c, 1,
                           AffineSums<A>{unused, unused + 1});
    return coefs;
  };
  // One group, of `count` samples from `sample` on: its columns [begin, begin + width).
  auto map = [&](int64_t group, int64_t sample, int64_t count, int64_t begin, int64_t width, const Coefs* coefs,
                 AffineSums<A> affine) {
    const int64_t column = group * length + begin;
    if constexpr (kAffine) {
      affine.weight += column;
      if (!kSecond) affine.bias += column;
    }
    constexpr int kRows = kSecond ? 2 : 4;
    int64_t i = 0;
    for (; i + kRows <= count; i += kRows)
      map_rows<kRows, kSecond, kAffine>(p.in, p.out, (sample + i) * channels + column, channels, width, coefs + i,
                                        weight + column, affine);
    for (; i < count; ++i)
      map_rows<1, kSecond, kAffine>(p.in, p.out, (sample + i) * channels + column, channels, width, coefs + i,
                                    weight + column, affine);
  };
  auto clear = [&](AffineSums<A> affine, int64_t begin, int64_t count) {
    if constexpr (kAffine) std::fill_n(affine.weight + begin, count, A(0));
    if constexpr (kAffine && !kSecond) std::fill_n(affine.bias + begin, count, A(0));
  };

  constexpr int64_t kBlocks = 16, kTogether = 4;
  if (length <= kCached && batch >= kBlocks) {
    const int64_t block_samples = std::min(kUnitRows, ceil_div(ceil_div(batch, kBlocks), kTogether) * kTogether);
    const int64_t blocks = ceil_div(batch, block_samples), values = kAffine ? blocks * channels : 0;
    const std::unique_ptr<A[]> of_weight(new A[values]), of_bias(new A[kSecond ? 0 : values]);
    for_each_task(blocks, block_samples * channels, [&](int64_t block) {
      const AffineSums<A> affine{of_weight.get() + block * channels, of_bias.get() + block * channels};
      clear(affine, 0, channels);
      std::vector<A> sums(parts * kSums);
      std::vector<Coefs> coefs(kTogether * groups);
      const int64_t end = std::min(batch, (block + 1) * block_samples);
      for (int64_t sample = block * block_samples; sample < end; sample += kTogether) {
        const int64_t count = std::min(kTogether, end - sample);
        for (int64_t i = 0; i < count * groups; ++i) {
          const int64_t row = sample * groups + i;
          for (int64_t part = 0; part < parts; ++part) reduce(row, part, sums.data() + part * kSums);
          coefs[i % groups * kTogether + i / groups] = fold(row, sums.data());
        }
        for (int64_t group = 0; group < groups; ++group)
          map(group, sample, count, 0, length, &coefs[group * kTogether], affine);
      }
    });
    if constexpr (kAffine) sum_shares<kSecond, A>({of_weight.get(), of_bias.get()}, blocks, channels, p.affine);
    return;
  }
  const int64_t rows = batch * groups, tiles = ceil_div(length, kColumns);
  std::vector<A> sums(rows * parts * kSums);
  std::vector<Coefs> coefs(rows);
  for_each_task(rows * parts, std::min(length, kPart),
                [&](int64_t task) { reduce(task / parts, task % parts, sums.data() + task * kSums); });
  for_each_task(rows, parts * kSums, [&](int64_t row) {
    coefs[row % groups * batch + row / groups] = fold(row, sums.data() + row * parts * kSums);
  });
  for_each_task(groups * tiles, batch * std::min(length, kColumns), [&](int64_t task) {
    const int64_t group = task / tiles, begin = task % tiles * kColumns, count = std::min(kColumns, length - begin);
    clear(p.affine, group * length + begin, count);
    map(group, 0, batch, begin, count, &coefs[group * batch], p.affine);
  });
}

template <class T, bool kSecond>
void solve(NormProblem<T, kSecond> p) {
  using A = acc_t<T>;
  const NormShape& shape = p.shape;
  const bool affine = p.affine.weight != nullptr;
  if (shape.numel() == 0) {
    if (affine) std::fill_n(p.affine.weight, shape.channels, A(0));
    if (affine && !kSecond) std::fill_n(p.affine.bias, shape.channels, A(0));
    return;
  }
  if (shape.groups > 0 && shape.pixels == 1) return affine ? run_rows<true>(p) : run_rows<false>(p);
  const bool summed = affine && shape.groups > 0 && shape.batch > 1;
  const int64_t values = summed ? shape.batch * shape.channels : 0;
  const std::unique_ptr<A[]> of_weight(new A[values]), of_bias(new A[kSecond ? 0 : values]);
  p.shares = summed ? AffineSums<A>{of_weight.get(), of_bias.get()} : p.affine;
  if (shape.channel_stride == 1 || (shape.groups == 0 && shape.pixels < kRunPixels))
    run<A>(Columns<T, kSecond>(p));
  else
    run<A>(Runs<T, kSecond>(p));
  if (summed) sum_shares<kSecond>(p.shares, shape.batch, shape.channels, p.affine);
}

template <class T, bool kSecond>
NormProblem<T, kSecond> problem(const NormShape& shape, const T* tangent, const Tensor& grad_out, const Tensor& x,
                                const std::optional<Tensor>& z, const Tensor& mean, const Tensor& rstd,
                                const std::optional<Tensor>& weight, double slope) {
  using A = acc_t<T>;
  // Without an activation any signs do, with a slope of 1.
  const T* signs = data<T>(z.has_value() ? *z : grad_out);
  NormProblem<T, kSecond> p{};
  p.shape = shape;
  p.in = {tangent, data<T>(grad_out), data<T>(x), signs, z.has_value() ? A(slope) : A(1)};
  p.mean = data<A>(mean);
  p.rstd = data<A>(rstd);
  p.weight = weight.has_value() ? data<A>(*weight) : nullptr;
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> norm_act_backward(const Tensor& grad_out, const Tensor& x,
                                                     const std::optional<Tensor>& z, const Tensor& mean,
                                                     const Tensor& rstd, const std::optional<Tensor>& weight,
                                                     int64_t groups, double slope, bool need_affine) {
  const NormShape shape = checked_norm_shape(grad_out, x, z, mean, rstd, weight, groups);
  const int64_t channels = need_affine ? shape.channels : 0;
  Tensor grad_x = new_result_like(x);
  Tensor grad_weight = new_result({channels}, accumulation_dtype(x));
  Tensor grad_bias = new_result({channels}, accumulation_dtype(x));
  dispatch_floating("norm_act_backward", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    NormProblem<T, false> p = problem<T, false>(shape, nullptr, grad_out, x, z, mean, rstd, weight, slope);
    p.out.in_x = mutable_data<T>(grad_x);
    if (need_affine) p.affine = {mutable_data<A>(grad_weight), mutable_data<A>(grad_bias)};
    solve(p);
  });
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_double_backward(const Tensor& tangent, const Tensor& grad_out,
                                                            const Tensor& x, const std::optional<Tensor>& z,
                                                            const Tensor& mean, const Tensor& rstd,
                                                            const std::optional<Tensor>& weight, int64_t groups,
                                                            double slope) {
  const NormShape shape = checked_norm_shape(grad_out, x, z, mean, rstd, weight, groups);
  check_like("tangent", tangent, "x", x);
  Tensor out_tangent = new_result_like(x);
  Tensor in_x = new_result_like(x);
  Tensor in_weight = new_result({shape.channels}, accumulation_dtype(x));
  dispatch_floating("norm_act_double_backward", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    NormProblem<T, true> p = problem<T, true>(shape, data<T>(tangent), grad_out, x, z, mean, rstd, weight, slope);
    p.out = {mutable_data<T>(in_x), mutable_data<T>(out_tangent)};
    p.affine.weight = mutable_data<acc_t<T>>(in_weight);
    solve(p);
  });
  return {out_tangent, in_x, in_weight};
}

}  // namespace gpkernels::cpu
