// How norm_act's kernels are laid out on the grid: a function of shape, dtype and alignment only, never of the device,
// so that their sums are the same everywhere.
#pragma once

#include <cstdint>
#include <numeric>

#include "kernels.h"
#include "launch.h"

namespace gpkernels::cuda {

constexpr int64_t kNormBlocks = 1024;       // wanted where groups are split
constexpr int64_t kNormPieces = 128;        // of a group, at most: every block of the map adds up their sums
constexpr int64_t kPieceBytes = 16384;      // of a tensor, at least
constexpr int64_t kRowsAPart = 32;          // of a channel's sum, at least
constexpr int64_t kBandColumns = kThreads;  // at most

// Items a thread takes at a time where memory is aligned: 16 bytes along a run, but one of float64, whose sums need
// twice the registers; of neighbouring columns, which have sums each, no more than 4, and then of several rows.
template <class T>
constexpr int kRunItems = sizeof(T) == 8 ? 1 : 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kColumnItems = sizeof(T) == 8 ? 1 : 4;
template <class T>
constexpr int kColumnRows = sizeof(T) == 2 ? 2 : 1;

// The pieces into which to split the work of each of `blocks` blocks.
inline int64_t pieces_wanted(int64_t blocks, int64_t bytes, int64_t limit) {
  const int64_t pieces = at_most(at_most(ceil_div(kNormBlocks, blocks), bytes / kPieceBytes), limit);
  return pieces < 1 ? 1 : pieces;
}

// Along what the channel changes within a group.
enum class Along { nothing, run, element };

// Groups of `runs` runs of `length` contiguous elements: a sample's block of channels in contiguous memory, or a
// channel of the batch there. A piece of a group is what a block takes, runs or parts of runs.
struct RunPlan {
  int64_t groups, runs, length, group_stride, run_stride;
  int64_t groups_a_sample, channels_a_group;
  Along channels;
  bool wide;  // several items at a time
  int run_pieces, length_pieces;
  int64_t piece_runs, piece_length;
  int lanes, group_threads;  // threads that share a run, a piece: powers of two up to a warp, or the block

  GPK_HD int pieces() const {
    return run_pieces * length_pieces;
  }
  int64_t blocks() const {
    return ceil_div(groups * pieces(), kThreads / group_threads);
  }
};

// A power of two of threads, with a unit or two each up to the limit.
inline int threads_for(int64_t units, int limit) {
  int threads = 1;
  while (threads < limit && 2 * threads < units) threads *= 2;
  return threads;
}

inline void split_runs(RunPlan& plan, int64_t items, int64_t item_size) {
  const int64_t wanted = pieces_wanted(plan.groups, plan.runs * plan.length * item_size, kNormPieces);
  plan.piece_runs = ceil_div(plan.runs, at_most(plan.runs, wanted));
  plan.run_pieces = static_cast<int>(ceil_div(plan.runs, plan.piece_runs));
  plan.piece_length = plan.length;
  if (wanted > plan.run_pieces)
    plan.piece_length = ceil_div(ceil_div(plan.length, wanted / plan.run_pieces), items) * items;
  plan.length_pieces = static_cast<int>(ceil_div(plan.length, plan.piece_length));

  const int64_t units = ceil_div(plan.piece_length, plan.wide ? items : 1), all_units = plan.piece_runs * units;
  const bool few = plan.groups * kWarp < kNormBlocks * kThreads / 2;
  plan.group_threads = all_units > (few ? 2 : 8) * kWarp ? kThreads : threads_for(all_units, kWarp);
  plan.lanes = threads_for(units, plan.group_threads < kWarp ? plan.group_threads : kWarp);
  while (plan.group_threads / plan.lanes > plan.piece_runs) plan.lanes *= 2;
  if (plan.lanes > kWarp) plan.lanes = kThreads;
}

// `outer` matrices of `rows` times `columns` contiguous elements, with a group every `width` columns: a sample's
// blocks of channels in channels_last memory, or the channels of the batch there. A band is the columns of a block,
// whole groups or a part of one; a piece of a group is its rows and columns in one block.
struct BandPlan {
  int64_t outer, rows, columns, width;
  bool wide;
  int band_columns, bands, bands_a_group;  // bands_a_group is 1 for bands of several groups
  int row_pieces;
  int64_t piece_rows;

  GPK_HD int pieces() const {
    return row_pieces * bands_a_group;
  }
  int64_t blocks() const {
    return outer * row_pieces * bands;
  }
};

inline void split_rows(BandPlan& plan, int64_t wanted) {
  plan.piece_rows = ceil_div(plan.rows, wanted);
  plan.row_pieces = static_cast<int>(ceil_div(plan.rows, plan.piece_rows));
}

inline void set_bands(BandPlan& plan, int64_t band_columns) {
  plan.band_columns = static_cast<int>(at_most(band_columns, plan.columns));
  plan.bands = static_cast<int>(ceil_div(plan.columns, plan.band_columns));
  plan.bands_a_group = 1;
}

inline BandPlan plan_bands(int64_t outer, int64_t rows, int64_t columns, int64_t width, bool aligned, int64_t items,
                           int64_t item_size) {
  BandPlan plan{outer, rows, columns, width, aligned && columns % items == 0};
  int64_t step = std::lcm(width, items);
  if (width > kBandColumns) {
    plan.wide = plan.wide && width % items == 0;
    plan.band_columns = kBandColumns;
    plan.bands_a_group = static_cast<int>(ceil_div(width, kBandColumns));
    plan.bands = static_cast<int>(columns / width * plan.bands_a_group);
  } else {
    if (columns % items != 0 || step > kBandColumns) {
      plan.wide = false;
      step = width;
    }
    // Of 128 bytes; of 64 where that leaves few blocks, or more where there are too few rows for the threads.
    const bool few = outer * columns * item_size / 128 * kNormPieces < kNormBlocks;
    const int64_t least = (few ? 64 : 128) / item_size;
    const int64_t most = at_most(kThreads * items / rows, kBandColumns / step * step);
    set_bands(plan, ceil_div(most > least ? most : least, step) * step);
  }
  const int64_t limit = ceil_div(kNormPieces, plan.bands_a_group);
  split_rows(plan, pieces_wanted(outer * plan.bands, rows * plan.band_columns * item_size, limit));
  return plan;
}

// Samples as the rows, for a map whose moments are known: a band need not be of whole groups.
inline BandPlan plan_samples(int64_t samples, int64_t channels, int64_t width, bool aligned, int64_t items,
                             bool split) {
  BandPlan plan{1, samples, channels, width, aligned && width % items == 0};
  set_bands(plan, kWarp * items);
  const int64_t parts = at_most(ceil_div(kNormBlocks, plan.bands), samples / kRowsAPart);
  split_rows(plan, split && parts > 1 ? parts : 1);
  return plan;
}

// What a launch of the kernels by piece does: it leaves the sums of pieces, maps what such sums are of, or does both,
// where a group is one piece.
enum class Stage { sums, map, both };

// Which kernels a call takes.
struct NormPlan {
  bool in_bands;  // else in runs
  RunPlan runs;
  BandPlan bands;
  bool in_samples;  // the map is by `samples`
  BandPlan samples;
  int64_t groups, group_size, pieces;
  int64_t parts_a_channel;  // of the sums of channels, but for those of a batch
};

template <class T>
NormPlan plan_norm(const NormCall& call, bool aligned) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t n = call.batch, c = call.channels, s = call.pixels;
  const bool of_batch = call.groups == 0, adds_channels = !of_batch && call.channel_sums[0] != nullptr;
  const int64_t groups_a_sample = of_batch ? c : call.groups, width = c / groups_a_sample;
  NormPlan plan{};
  plan.groups = of_batch ? c : n * groups_a_sample;
  plan.group_size = n * c * s / plan.groups;
  plan.pieces = plan.parts_a_channel = 1;
  // Short runs of a batch are columns, like its channels in channels_last memory.
  plan.in_bands = of_batch ? call.channels_innermost || s * kSize < 64 : call.channels_innermost && s > 1;
  if (plan.in_bands) {
    const int64_t outer = of_batch ? 1 : n, columns = call.channels_innermost ? c : c * s;
    const int64_t rows = n * c * s / (outer * columns);
    plan.bands = plan_bands(outer, rows, columns, of_batch ? columns / c : width, aligned, kColumnItems<T>, kSize);
    plan.pieces = plan.bands.pieces();
    if (adds_channels) plan.parts_a_channel = n * plan.bands.row_pieces;
    return plan;
  }
  if (of_batch)
    plan.runs = {c, n, s, s, c * s, c, 1, Along::nothing};
  else if (s > 1)
    plan.runs = {plan.groups, width, s, width * s, s, groups_a_sample, width, Along::run};
  else
    plan.runs = {plan.groups, 1, width, width, width, groups_a_sample, width, Along::element};
  plan.runs.wide = aligned && plan.runs.length % kRunItems<T> == 0;
  split_runs(plan.runs, kRunItems<T>, kSize);
  plan.pieces = plan.runs.pieces();
  if (!adds_channels) return plan;
  plan.in_samples = s == 1;
  if (plan.in_samples) plan.samples = plan_samples(n, c, width, aligned, kColumnItems<T>, plan.pieces == 1);
  plan.parts_a_channel = plan.in_samples ? plan.samples.row_pieces : n * plan.runs.length_pieces;
  return plan;
}

}  // namespace gpkernels::cuda
