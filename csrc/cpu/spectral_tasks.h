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
    const int64_t wanted = std::max(kBlock / std::max<int64_t>(1, length), slabs / kBlocks);
    height = std::clamp<int64_t>((wanted + 7) / 8 * 8, 8, kBlockSlabs);
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
  std::vector<int64_t> ends;

  void add(int64_t layer, int64_t block, int64_t elements) {
    list.push_back({layer, block});
    ends.push_back((ends.empty() ? 0 : ends.back()) + elements + 1024);
  }
  void add_blocks(int64_t layer, const Slabs& s) {
    for (int64_t b = 0; b < s.blocks(); ++b) add(layer, b, s.count(b) * s.length);
  }
  // Runs f(layer, block) over all tasks, shared among threads by their elements; each thread's share backwards where
  // its end was touched last.
  template <class F>
  void run(bool backwards, const F& f) const {
    if (list.empty()) return;
    torch::stable::parallel_for(0, ends.back(), 2 * kChunk, [&](int64_t first, int64_t last) {
      auto after = [&](int64_t limit) { return std::upper_bound(ends.begin(), ends.end(), limit) - ends.begin(); };
      // A task belongs to the thread in whose range it ends.
      const int64_t begin = after(first), end = after(last);
      for (int64_t i = begin; i < end; ++i) {
        const Task& task = list[backwards ? begin + end - 1 - i : i];
        f(task.layer, task.block);
      }
    });
  }
};

}  // namespace gpkernels::cpu
