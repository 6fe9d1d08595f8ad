// How norm_act's groups lie in memory, and the work on them cut up for threads: contiguous runs (Runs) or the columns
// of rows (Columns).
#pragma once

#include <algorithm>
#include <vector>

#include "../norm_shapes.h"
#include "norm_loops.h"

namespace gpkernels::cpu {

// Elements that one thread sums and then maps while its cache holds them; larger groups are shared among threads.
constexpr int64_t kCached = 65536;
// At most kPart / 16 values, or kUnitRows rows, are added up in the accumulation dtype; beyond that, in float64.
constexpr int64_t kPart = 2048;
constexpr int64_t kUnitRows = 128;
// Columns in a tile.
constexpr int64_t kColumns = 512;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Runs f(task) over [0, tasks), each of about `elements` elements.
template <class F>
void for_each_task(int64_t tasks, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 2 * kChunk / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) f(task);
  });
}

// out[i] += the sum of the `span` neighbours from x[i * span].
template <class A>
void add_groups_of(int64_t span, const A* x, int64_t count, double* out) {
  if (span == 1)
    add_rows(x, 1, count, count, out);
  else
    add_neighbours(x, count, span, out);
}

// out[i] = x[i / span], for `count` values x.
template <class A>
void repeat_each(const A* x, int64_t count, int64_t span, A* out) {
  if (span == 1)
    std::copy_n(x, count, out);
  else
    for (int64_t i = 0; i < count; ++i) std::fill_n(out + i * span, span, x[i]);
}

template <class T, bool kSecond>
struct NormProblem {
  using A = acc_t<T>;
  static constexpr int kSums = kNormSums<kSecond>, kCoefs = kNormCoefs<kSecond>;
  NormShape shape;
  NormInputs<T> in;
  NormOutputs<T> out;
  const A* mean;
  const A* rstd;
  const A* weight;       // null for ones
  AffineSums<A> affine;  // results, of shape (C,); null where not wanted
  AffineSums<A> shares;  // what each group adds to them, of shape (statistics, channels of a group); or null

  // Channels of a group.
  int64_t share() const {
    return shape.groups == 0 ? 1 : shape.channels / shape.groups;
  }

  // Writes the mean of each channel of groups [first, first + groups).
  void write_means(int64_t first, int64_t groups, A* means) const {
    repeat_each(mean + first, groups, share(), means);
  }

  // From sums[k * channels + c] of the channels of these groups to their coefficients and shares.
  void fold(int64_t first, int64_t groups, const std::vector<double>& sums, A* coefs, int64_t pitch) const {
    const int64_t size = share(), count = groups * size;
    std::vector<A> r(count), w(count, A(1)), unused;
    repeat_each(rstd + first, groups, size, r.data());
    if (weight != nullptr)
      for (int64_t c = 0; c < count;) {
        const int64_t channel = (first * size + c) % shape.channels, n = std::min(count - c, shape.channels - channel);
        std::copy_n(weight + channel, n, w.data() + c);
        c += n;
      }
    std::vector<double> totals(kSums * count);
    for (int k = 0; k < kSums; ++k) {
      const double* s = sums.data() + k * count;
      double* total = totals.data() + k * count;
      const bool weighted = k != 2 && k != 3;
      for (int64_t c = 0; c < count; ++c) total[c] = weighted ? s[c] * static_cast<double>(w[c]) : s[c];
      if (size == 1) continue;
      for (int64_t g = 0; g < groups; ++g) {
        double sum = 0;
        for (int64_t c = g * size; c < (g + 1) * size; ++c) sum += total[c];
        std::fill_n(total + g * size, size, sum);
      }
    }
    AffineSums<A> to = shares;
    if (shares.weight == nullptr) {
      unused.resize(2 * count);
      to = {unused.data(), unused.data() + count};
    } else {
      to.weight += first * size;
      if (!kSecond) to.bias += first * size;
    }
    fold_channels<kSecond>(sums.data(), totals.data(), r.data(), w.data(), static_cast<double>(shape.group_size()),
                           count, coefs, pitch, to);
  }
};

// A plan cuts the memory into blocks of whole groups and a block into units. `start` writes the means, `reduce` adds
// the sums of a unit, `fold` turns those of a block into coefficients, `map` writes the results of a unit. Sums and
// coefficients are those of the block.
template <class A, class Plan>
void run(const Plan& plan) {
  if (plan.block_elements <= kCached) {
    const int64_t grain = std::max<int64_t>(1, 2 * kChunk / plan.block_elements);
    torch::stable::parallel_for(0, plan.blocks, grain, [&](int64_t first, int64_t last) {
      std::vector<A> sums(plan.block_sums), coefs(plan.block_coefs);
      for (int64_t block = first; block < last; ++block) {
        plan.start(block, coefs.data());
        for (int64_t unit = 0; unit < plan.units; ++unit) plan.reduce(block, unit, coefs.data(), sums.data());
        plan.fold(block, sums.data(), coefs.data());
        for (int64_t unit = 0; unit < plan.units; ++unit) plan.map(block, unit, coefs.data());
      }
    });
    return;
  }
  std::vector<A> sums(plan.blocks * plan.block_sums), coefs(plan.blocks * plan.block_coefs);
  auto sums_of = [&](int64_t block) { return sums.data() + block * plan.block_sums; };
  auto coefs_of = [&](int64_t block) { return coefs.data() + block * plan.block_coefs; };
  const int64_t unit_elements = plan.block_elements / plan.units;
  for_each_task(plan.blocks, plan.block_coefs, [&](int64_t block) { plan.start(block, coefs_of(block)); });
  for_each_task(plan.blocks * plan.units, unit_elements, [&](int64_t task) {
    plan.reduce(task / plan.units, task % plan.units, coefs_of(task / plan.units), sums_of(task / plan.units));
  });
  for_each_task(plan.blocks, plan.block_sums,
                [&](int64_t block) { plan.fold(block, sums_of(block), coefs_of(block)); });
  for_each_task(plan.blocks * plan.units, unit_elements,
                [&](int64_t task) { plan.map(task / plan.units, task % plan.units, coefs_of(task / plan.units)); });
}

// Contiguous memory as runs of a channel's pixels. A unit is a part of a run, or several whole runs.
template <class T, bool kSecond>
struct Runs {
  using A = acc_t<T>;
  static constexpr int kSums = kNormSums<kSecond>, kCoefs = kNormCoefs<kSecond>;
  const NormProblem<T, kSecond>& p;
  bool batch;                  // each block is one channel, its runs in different samples
  int64_t groups;              // of a block; the last may have fewer
  int64_t runs, parts, slots;  // of a block, of a run, and the channels of a block
  int64_t unit_parts, units, blocks, block_elements, block_sums, block_coefs;

  explicit Runs(const NormProblem<T, kSecond>& problem) : p(problem) {
    const NormShape& shape = p.shape;
    batch = shape.groups == 0;
    groups = batch ? 1 : std::clamp<int64_t>(kChunk / shape.group_size(), 1, shape.statistics());
    runs = batch ? shape.batch : groups * p.share();
    slots = batch ? 1 : runs;
    parts = ceil_div(shape.pixels, kPart);
    unit_parts = std::max<int64_t>(1, kPart / shape.pixels);
    units = ceil_div(runs * parts, unit_parts);
    blocks = ceil_div(shape.statistics(), groups);
    block_elements = runs * shape.pixels;
    block_sums = kSums * runs * parts;
    block_coefs = kCoefs * slots;
  }

  int64_t groups_in(int64_t block) const {
    return std::min(groups, p.shape.statistics() - block * groups);
  }

  // Runs f(memory, first part, last part) for a unit.
  template <class F>
  void with_parts(int64_t block, int64_t unit, const F& f) const {
    const int64_t pixels = p.shape.pixels, stride = batch ? p.shape.channels * pixels : pixels;
    const int64_t present = (batch ? runs : groups_in(block) * p.share()) * parts;
    f(RunParts{block * (batch ? pixels : block_elements), stride, pixels, kPart, batch ? 0 : 1}, unit * unit_parts,
      std::min(present, (unit + 1) * unit_parts));
  }

  void start(int64_t block, A* coefs) const {
    p.write_means(block * groups, groups_in(block), coefs + kMean * slots);
  }

  void reduce(int64_t block, int64_t unit, const A* coefs, A* sums) const {
    with_parts(block, unit, [&](const RunParts& memory, int64_t first, int64_t last) {
      sum_parts<kSecond>(p.in, memory, first, last, coefs + kMean * slots, sums, runs * parts);
    });
  }

  void fold(int64_t block, const A* sums, A* coefs) const {
    const int64_t channels = groups_in(block) * p.share(), of_channel = runs * parts / slots;
    std::vector<double> of_channels(kSums * channels);
    for (int k = 0; k < kSums; ++k)
      add_groups_of(of_channel, sums + k * runs * parts, channels, of_channels.data() + k * channels);
    p.fold(block * groups, groups_in(block), of_channels, coefs, slots);
  }

  void map(int64_t block, int64_t unit, const A* coefs) const {
    with_parts(block, unit, [&](const RunParts& memory, int64_t first, int64_t last) {
      map_parts<kSecond>(p.in, p.out, memory, first, last, coefs, slots);
    });
  }
};

// Memory as rows whose columns belong to channels: `span` neighbours to each, and again from the first channel where a
// row holds several pixels. A block is some columns of a sample, or of the batch; a unit is some of its rows.
template <class T, bool kSecond>
struct Columns {
  using A = acc_t<T>;
  static constexpr int kSums = kNormSums<kSecond>, kCoefs = kNormCoefs<kSecond>;
  const NormProblem<T, kSecond>& p;
  int64_t elements, rows, length, span, repeats = 1;  // of a sample or the batch
  int64_t width, tiles, channels;                     // of a block; the last tile may have fewer
  int64_t unit_rows, units, blocks, block_elements, block_sums, block_coefs;

  explicit Columns(const NormProblem<T, kSecond>& problem) : p(problem) {
    const NormShape& shape = p.shape;
    const int64_t outer = shape.groups == 0 ? 1 : shape.batch;
    elements = shape.numel() / outer;
    span = shape.channel_stride;
    length = shape.channels * span;
    if (span == 1 && length <= kColumns / 4) repeats = std::min(kColumns / length, elements / length);
    length *= repeats;
    rows = ceil_div(elements, length);
    const int64_t cached = kCached / rows, columns = cached < kColumns / 4 ? kColumns : std::min(cached, kColumns);
    const bool tiled = p.share() == 1 && repeats == 1;
    width = tiled ? std::min(length, std::max<int64_t>(1, columns / span) * span) : length;
    tiles = ceil_div(length, width);
    channels = width / span / repeats;
    blocks = outer * tiles;
    block_elements = rows * width;
    unit_rows = block_elements <= kCached ? kUnitRows : std::clamp<int64_t>(kChunk / width, 1, kUnitRows);
    units = ceil_div(rows, unit_rows);
    block_sums = units * kSums * width;
    block_coefs = kCoefs * width;
  }

  int64_t first_group(int64_t block) const {
    return (block / tiles * p.shape.channels + block % tiles * channels) / p.share();
  }

  int64_t groups_in(int64_t block) const {
    return std::min(channels, p.shape.channels - block % tiles * channels) / p.share();
  }

  // Runs f(first element, rows, columns) for a unit; a sample's last row may be shorter.
  template <class F>
  void with_rows(int64_t block, int64_t unit, const F& f) const {
    const int64_t column = block % tiles * width, first = unit * unit_rows, last = std::min(rows, first + unit_rows);
    const int64_t begin = block / tiles * elements + first * length + column;
    const int64_t rest = last == rows ? elements % length : 0;
    f(begin, last - first - (rest > 0), std::min(width, length - column));
    if (rest > 0) f(begin + (last - first - 1) * length, 1, rest);
  }

  // From a value for each of `count` channels to one for each column, in place.
  void expand(A* values, int64_t count) const {
    if (span > 1)
      for (int64_t c = count; c-- > 0;) {
        const A value = values[c];
        std::fill_n(values + c * span, span, value);
      }
    for (int64_t i = 1; i < repeats; ++i) std::copy_n(values, count, values + i * count);
  }

  void start(int64_t block, A* coefs) const {
    p.write_means(first_group(block), groups_in(block), coefs + kMean * width);
    expand(coefs + kMean * width, groups_in(block) * p.share());
  }

  void reduce(int64_t block, int64_t unit, const A* coefs, A* sums) const {
    A* of_unit = sums + unit * kSums * width;
    std::fill_n(of_unit, kSums * width, A(0));
    with_rows(block, unit, [&](int64_t begin, int64_t count, int64_t columns) {
      sum_columns<kSecond>(p.in, begin, count, length, columns, coefs + kMean * width, of_unit, width);
    });
  }

  void fold(int64_t block, const A* sums, A* coefs) const {
    const int64_t count = groups_in(block) * p.share();
    std::vector<double> of_channels(kSums * count);
    for (int64_t unit = 0; unit < units; ++unit)
      for (int k = 0; k < kSums; ++k) {
        const A* s = sums + (unit * kSums + k) * width;
        double* to = of_channels.data() + k * count;
        for (int64_t repeat = 0; repeat < repeats; ++repeat) add_groups_of(span, s + repeat * count, count, to);
      }
    p.fold(first_group(block), groups_in(block), of_channels, coefs, width);
    for (int k = kMean + 1; k < kCoefs; ++k) expand(coefs + k * width, count);
  }

  void map(int64_t block, int64_t unit, const A* coefs) const {
    with_rows(block, unit, [&](int64_t begin, int64_t count, int64_t columns) {
      map_columns<kSecond>(p.in, p.out, begin, count, length, columns, coefs, width);
    });
  }
};

}  // namespace gpkernels::cpu
