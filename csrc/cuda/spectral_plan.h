// How spectral_norm's launches share out the layers of a group. The tables go to a kernel by value: nothing is copied
// to the device, and a captured CUDA graph keeps them with its nodes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../spectral_vectors.h"
#include "kernels.h"
#include "launch.h"
#include "unit.cuh"

namespace gpkernels::cuda {

constexpr int kLayers = 64;      // of a launch, so that a table stays below the 4 KB of parameters of every driver
constexpr int kRowTile = 512;    // rows of a tile, at most
constexpr int kMostParts = 512;  // of the dot product of a layer
constexpr int kVTile = 1024;     // elements of v that a block normalises

// Units that a thread has of a row.
template <class T, int kWidth>
constexpr int kRowUnits = kWidth == 1 ? 4 : (sizeof(T) == 8 ? 8 : 16) / kWidth;

// Columns of a tile.
template <class T, int kWidth>
constexpr int kColumnTile = kRowUnits<T, kWidth> * kWarp * kWidth;

// A weight as rows of contiguous memory: element (r, c) lies at (c / inner * rows + r) * inner + c % inner. It is W, or
// where the rows of W lie innermost its transpose (`swapped`).
struct Walk {
  int rows, columns, inner, row_tile, column_tile;
  bool swapped, wide;

  GPK_HD int row_tiles() const {
    return static_cast<int>(ceil_div(rows, row_tile));
  }
  GPK_HD int column_tiles() const {
    return static_cast<int>(ceil_div(columns, column_tile));
  }
  GPK_HD int blocks() const {
    return row_tiles() * column_tiles();
  }
  // Of W^T u (transposed) or W v: whether it adds up rows, into how many parts, and of what length each.
  GPK_HD bool adds_rows(bool transposed) const {
    return transposed != swapped;
  }
  GPK_HD int parts(bool transposed) const {
    return adds_rows(transposed) ? row_tiles() : column_tiles();
  }
  GPK_HD int length(bool transposed) const {
    return adds_rows(transposed) ? columns : rows;
  }

  // Where the scratch memory of a layer holds what: the parts of t = W^T u, t, the parts of ||t||^2, those of W t and
  // those of W v.
  GPK_HD int64_t t() const {
    return int64_t(parts(true)) * length(true);
  }
  GPK_HD int64_t squares() const {
    return t() + length(true);
  }
  GPK_HD int64_t images() const {
    return squares() + parts(false);
  }
  GPK_HD int64_t scratch() const {
    return images() + 2 * int64_t(parts(false)) * length(false);
  }
};

template <class T>
Walk plan_walk(const SpectralLayer& layer) {
  Walk walk{};
  walk.swapped = layer.inner == 1;
  walk.rows = static_cast<int>(walk.swapped ? layer.outer : layer.rows);
  walk.inner = static_cast<int>(walk.swapped ? layer.rows : layer.inner);
  walk.columns = static_cast<int>(walk.swapped ? layer.rows : layer.outer * layer.inner);
  walk.wide = walk.inner % kUnit<T> == 0 && all_aligned(layer.weight);
  walk.column_tile = walk.wide ? kColumnTile<T, kUnit<T>> : kColumnTile<T, 1>;
  // Every tile of W t adds up what the tiles of W^T u left: a fourth, at most, of what it reads of W.
  const int root = static_cast<int>(std::ceil(2 * std::sqrt(static_cast<double>(walk.rows))));
  walk.row_tile = std::min(kRowTile, std::max(32, static_cast<int>(ceil_div(root, 8)) * 8));
  return walk;
}

// The layer of a block, of `layers` whose blocks begin at first_block.
GPK_HD int layer_of(const int* first_block, int layers, int block) {
  int low = 0, high = layers;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_block[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

template <class A>
struct IterateTable {
  const void* weight[kLayers];
  A* u[kLayers];
  A* v[kLayers];
  int64_t scratch[kLayers], place[kLayers];
  int rows[kLayers], columns[kLayers], inner[kLayers], first_block[kLayers];
  short row_tile[kLayers], column_tile[kLayers];
  bool swapped[kLayers], wide[kLayers];
  A* memory;
  A* sigma;
  A* copies;
  A eps;
  int layers;

  GPK_HD Walk walk(int i) const {
    return {rows[i], columns[i], inner[i], row_tile[i], column_tile[i], swapped[i], wide[i]};
  }
};

template <class T>
struct ScaleTable {
  using A = acc_t<T>;
  const T* weight[kLayers];
  T* out[kLayers];
  double target[kLayers];
  int64_t numel[kLayers];
  int first_block[kLayers];
  const A* sigma;
  A eps;
  int layers;
};

// The elements of a layer that one block of the dot product handles, and of the map after it.
template <class T>
GPK_HD int64_t span_of(int64_t numel) {
  return kTile<T> * ceil_div(numel, kTile<T> * kMostParts);
}

template <class T>
struct DotTable {
  const T* grad[kLayers];
  const T* weight[kLayers];
  int64_t numel[kLayers];
  int first_block[kLayers];
  acc_t<T>* parts;  // one a block
  int layers;
};

// u and v are those of the walk's matrix.
template <class T>
struct GradTable {
  using A = acc_t<T>;
  const T* grad[kLayers];
  T* out[kLayers];
  const A* u[kLayers];
  const A* v[kLayers];
  double target[kLayers];
  int rows[kLayers], columns[kLayers], inner[kLayers], first_block[kLayers + 1];
  bool wide[kLayers];
  const A* parts;
  const A* sigma;
  A eps;
  int layers;
};

static_assert(sizeof(IterateTable<double>) <= 4096 && sizeof(ScaleTable<double>) <= 4096 &&
                  sizeof(DotTable<double>) <= 4096 && sizeof(GradTable<double>) <= 4096,
              "a table is larger than a kernel's parameters may be");

}  // namespace gpkernels::cuda
