// The work of spectral_norm on the CPU cut into tasks: small weights whole, large ones in blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../spectral_shapes.h"
#include "simd.h"

namespace gpkernels::cpu {

// Elements of a weight that one thread does alone, from its cache; of a block of a larger one, at least.
constexpr int64_t kAlone = 196608, kBlock = 131072;
// Blocks of a large weight, at most: each has sums of its own, which one thread adds up.
constexpr int64_t kBlocks = 16;
// Slabs of a block, at most: they are added up in the accumulation dtype.
constexpr int64_t kBlockSlabs = 512;

// A weight as slabs; see spectral_loops.h. A single column is a single slab.
struct Slabs {
  int64_t slabs, length, inner;
  bool rows;       // whether the matrix's rows are slabs
  int64_t height;  // slabs of a block

  explicit Slabs(const SpectralShape& shape) : rows(shape.outer == 1 && shape.inner != 1) {
    slabs = rows ? shape.rows : shape.outer;
    inner = rows ? 1 : shape.inner;
    length = rows ? shape.inner : shape.rows * inner;
    const int64_t least = std::max<int64_t>({1, kBlock / std::max<int64_t>(1, length), slabs / kBlocks});
    const int64_t cuts = (slabs + least - 1) / least, even = (slabs + cuts - 1) / cuts;
    height = std::clamp<int64_t>((even + 7) / 8 * 8, 8, kBlockSlabs);
  }
  int64_t numel() const {
    return slabs * length;
  }
  bool small() const {
    return numel() <= kAlone;
  }
  int64_t blocks() const {
    return (slabs + height - 1) / height;
  }
  int64_t begin(int64_t block) const {
    return block * height;
  }
  int64_t count(int64_t block) const {
    return std::min(height, slabs - block * height);
  }
  // Elements of a pattern that repeats `inner` ones.
  int64_t span() const {
    return inner <= 32 ? 16 * inner : inner;
  }
};

// Work cut into tasks, each of one layer or one block of it.
struct Tasks {
  struct Task {
    int64_t layer, block;  // block -1: the layer
  };
  std::vector<Task> list;
  std::vector<int64_t> middles;  // of the tasks, in all work one after the other
  int64_t total = 0;

  void add(int64_t layer, int64_t block, int64_t elements) {
    const int64_t work = elements + 1024;
    list.push_back({layer, block});
    middles.push_back(total + work / 2);
    total += work;
  }
  void add_blocks(int64_t layer, const Slabs& s) {
    for (int64_t b = 0; b < s.blocks(); ++b) add(layer, b, s.count(b) * s.length);
  }
  // Runs f(layer, block) over all tasks, shared among threads by their elements; each thread's share backwards where
  // its end was touched last.
  template <class F>
  void run(bool backwards, const F& f) const {
    if (list.empty()) return;
    torch::stable::parallel_for(0, total, 2 * kChunk, [&](int64_t first, int64_t last) {
      auto before = [&](int64_t x) { return std::lower_bound(middles.begin(), middles.end(), x) - middles.begin(); };
      // A task belongs to the thread in whose range its middle lies.
      const int64_t begin = before(first), end = before(last);
      for (int64_t i = begin; i < end; ++i) {
        const Task& task = list[backwards ? begin + end - 1 - i : i];
        f(task.layer, task.block);
      }
    });
  }
};

// Which layers are one thread's each. Small ones, but for the largest of them while these keep some threads waiting for
// others: they are cut into blocks, too, which changes no result.
inline std::vector<bool> whole_layers(const std::vector<Slabs>& layers) {
  constexpr int64_t kCuttable = 32768;
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<bool> whole;
  for (const Slabs& s : layers) whole.push_back(s.small());
  while (threads > 1) {
    Tasks tasks;
    size_t largest = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
      if (!whole[i]) continue;
      tasks.add(static_cast<int64_t>(i), -1, layers[i].numel());
      if (!whole[largest] || layers[i].numel() > layers[largest].numel()) largest = i;
    }
    if (tasks.list.empty() || layers[largest].numel() < kCuttable) break;
    const int64_t share = (tasks.total + threads - 1) / threads;
    std::vector<int64_t> loads(threads);
    for (size_t t = 0; t < tasks.list.size(); ++t)
      loads[tasks.middles[t] / share] += layers[tasks.list[t].layer].numel();
    if (*std::max_element(loads.begin(), loads.end()) <= share + share / 8) break;
    whole[largest] = false;
  }
  return whole;
}

}  // namespace gpkernels::cpu
