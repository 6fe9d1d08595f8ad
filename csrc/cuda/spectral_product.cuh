// The power iteration of spectral_norm: W^T u and W v of many layers in parts, and what follows from their sums.
#pragma once

#include <cmath>

#include "reduce.cuh"
#include "spectral_plan.h"

namespace gpkernels::cuda {

constexpr int kWarps = kThreads / kWarp;

// What a launch multiplies with: u or v as they are; or both t = W^T u, from its parts, and v as it was, which stays
// where ||t|| is too small to tell.
enum class Factor { u, v, t_and_v };

// A tile of a layer, and where it lies.
struct Tile {
  int row, rows, column, columns;  // the first of each, and how many
  int row_index, column_index;     // among the tiles
};

// Where a tile leaves its sums: those with the second vector `parts` * `length` behind.
template <class A>
struct Parts {
  A* first;
  int parts, length;

  __device__ __forceinline__ A* of(int vector) const {
    return first + int64_t(vector) * parts * length;
  }
};

// What a thread reads of a tile: the units k * kWarp + lane of every kWarps-th row.
template <class T, int kWidth>
struct Reader {
  static constexpr int kUnits = kRowUnits<T, kWidth>;
  const T* row;
  int inner;
  int offset[kUnits];  // from `row`; negative: beyond the tile

  __device__ __forceinline__ Reader(const T* weight, const Walk& walk, const Tile& tile) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int outer = tile.column / walk.inner, inner = tile.column - outer * walk.inner;
    row = weight + (int64_t(outer) * walk.rows + tile.row + warp) * walk.inner;
    this->inner = walk.inner;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const int in_tile = (k * kWarp + lane) * kWidth, slabs = (inner + in_tile) / walk.inner;
      offset[k] = in_tile < tile.columns ? slabs * (walk.rows - 1) * walk.inner + inner + in_tile : -1;
    }
  }
  __device__ __forceinline__ Unit<T, kWidth> read(int k) const {
    return offset[k] >= 0 ? load<T, kWidth>(row + offset[k]) : Unit<T, kWidth>{};
  }
  __device__ __forceinline__ void advance() {
    row += int64_t(kWarps) * inner;
  }
};

// out.of(j)[c] = the sum over the tile's rows of W[r][c] * factors[j][r]. `space` holds a value for each warp and
// column.
template <class T, int kWidth, int kVectors>
__device__ __forceinline__ void add_rows(const T* weight, const Walk& walk, const Tile& tile,
                                         const acc_t<T> (*factors)[kRowTile], acc_t<T>* space,
                                         const Parts<acc_t<T>>& out) {
  using A = acc_t<T>;
  constexpr int kUnits = kRowUnits<T, kWidth>, kColumns = kColumnTile<T, kWidth>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Reader<T, kWidth> reader(weight, walk, tile);
  A sums[kVectors][kUnits][kWidth] = {};
#pragma unroll 1
  for (int r = warp; r < tile.rows; r += kWarps) {
    Unit<T, kWidth> units[kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) units[k] = reader.read(k);
    reader.advance();
    A own[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) own[v] = factors[v][r];
#pragma unroll
    for (int k = 0; k < kUnits; ++k)
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
#pragma unroll
        for (int v = 0; v < kVectors; ++v) sums[v][k][j] += A(units[k].item[j]) * own[v];
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kUnits; ++k)
#pragma unroll
      for (int j = 0; j < kWidth; ++j) space[warp * kColumns + (k * kWarp + lane) * kWidth + j] = sums[v][k][j];
    __syncthreads();
    for (int c = threadIdx.x; c < tile.columns; c += kThreads) {
      A sum = space[c];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += space[w * kColumns + c];
      out.of(v)[c] = sum;
    }
  }
}

// out.of(j)[r] = the sum over the tile's columns of W[r][c] * factors[j][c].
template <class T, int kWidth, int kVectors>
__device__ __forceinline__ void add_columns(const T* weight, const Walk& walk, const Tile& tile,
                                            const acc_t<T> (*factors)[kRowTile], const Parts<acc_t<T>>& out) {
  using A = acc_t<T>;
  constexpr int kUnits = kRowUnits<T, kWidth>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Reader<T, kWidth> reader(weight, walk, tile);
  A own[kVectors][kUnits][kWidth];
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int k = 0; k < kUnits; ++k)
#pragma unroll
      for (int j = 0; j < kWidth; ++j) own[v][k][j] = factors[v][(k * kWarp + lane) * kWidth + j];
#pragma unroll 1
  for (int r = warp; r < tile.rows; r += kWarps) {
    Unit<T, kWidth> units[kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) units[k] = reader.read(k);
    reader.advance();
    A sums[kVectors] = {};
#pragma unroll
    for (int k = 0; k < kUnits; ++k)
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
#pragma unroll
        for (int v = 0; v < kVectors; ++v) sums[v] += A(units[k].item[j]) * own[v][k][j];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const A sum = fold_lanes<SumFold<A>>(sums[v], kWarp);
      if (lane == 0) out.of(v)[r] = sum;
    }
  }
}

// The parts of W^T u, or of W v: a tile a block. Of t_and_v the first tiles also leave t and the parts of ||t||^2.
template <class T, Factor kFactor>
__global__ void __launch_bounds__(kThreads, kFactor == Factor::t_and_v ? 2 : 3)
    spectral_product(const __grid_constant__ IterateTable<acc_t<T>> table) {
  using A = acc_t<T>;
  constexpr int kVectors = kFactor == Factor::t_and_v ? 2 : 1, kWidth = kUnit<T>;
  constexpr bool kTransposed = kFactor == Factor::u;
  __shared__ A factors[kVectors][kRowTile];
  __shared__ A space[kWarps * kColumnTile<T, kWidth>];
  static_assert(kColumnTile<T, kWidth> <= kRowTile && kColumnTile<T, 1> <= kColumnTile<T, kWidth>, "space is short");

  const int layer = layer_of(table.first_block, table.layers, blockIdx.x);
  const Walk walk = table.walk(layer);
  const bool adds_rows = walk.adds_rows(kTransposed);
  const int index = static_cast<int>(blockIdx.x) - table.first_block[layer], column_tiles = walk.column_tiles();
  Tile tile{};
  tile.row_index = index / column_tiles, tile.column_index = index % column_tiles;
  tile.row = tile.row_index * walk.row_tile, tile.column = tile.column_index * walk.column_tile;
  tile.rows = static_cast<int>(at_most(walk.row_tile, walk.rows - tile.row));
  tile.columns = static_cast<int>(at_most(walk.column_tile, walk.columns - tile.column));
  A* const memory = table.memory + table.scratch[layer];

  const int first = adds_rows ? tile.row : tile.column, count = adds_rows ? tile.rows : tile.columns;
  A squares = A(0);
#pragma unroll 1
  for (int i = threadIdx.x; i < kRowTile; i += kThreads) {
    const bool exists = i < count;
    if constexpr (kFactor == Factor::t_and_v) {
      const int parts = walk.parts(true), length = walk.length(true);
      A t = A(0);
      if (exists) {
#pragma unroll 4
        for (int p = 0; p < parts; ++p) t += memory[int64_t(p) * length + first + i];
        if ((adds_rows ? tile.column_index : tile.row_index) == 0) memory[walk.t() + first + i] = t;
      }
      squares += t * t;
      factors[0][i] = t;
      factors[kVectors - 1][i] = exists ? table.v[layer][first + i] : A(0);
    } else {
      const A* const vector = kTransposed ? table.u[layer] : table.v[layer];
      factors[0][i] = exists ? vector[first + i] : A(0);
    }
  }
  __syncthreads();
  if constexpr (kFactor == Factor::t_and_v) {
    if ((adds_rows ? tile.column_index : tile.row_index) == 0) {
      squares = fold_lanes<SumFold<A>>(squares, kThreads);
      if (threadIdx.x == 0) memory[walk.squares() + (adds_rows ? tile.row_index : tile.column_index)] = squares;
    }
  }

  const T* const weight = static_cast<const T*>(table.weight[layer]);
  const int part = adds_rows ? tile.row_index : tile.column_index, begin = adds_rows ? tile.column : tile.row;
  const int length = walk.length(kTransposed);
  const Parts<A> out{memory + (kTransposed ? 0 : walk.images()) + int64_t(part) * length + begin,
                     walk.parts(kTransposed), length};
  if (adds_rows && walk.wide)
    add_rows<T, kWidth, kVectors>(weight, walk, tile, factors, space, out);
  else if (adds_rows)
    add_rows<T, 1, kVectors>(weight, walk, tile, factors, space, out);
  else if (walk.wide)
    add_columns<T, kWidth, kVectors>(weight, walk, tile, factors, out);
  else
    add_columns<T, 1, kVectors>(weight, walk, tile, factors, out);
}

// After W v: a block a layer for u and sigma and, of an `iteration`, further ones for v.
template <class A>
__global__ void __launch_bounds__(kThreads)
    spectral_finish(const __grid_constant__ IterateTable<A> table, bool iteration, A* sigma) {
  const int layer = layer_of(table.first_block, table.layers, blockIdx.x);
  const Walk walk = table.walk(layer);
  const int index = static_cast<int>(blockIdx.x) - table.first_block[layer], parts = walk.parts(false);
  A* const memory = table.memory + table.scratch[layer];
  A norm = A(0);
  if (iteration) {
    for (int p = threadIdx.x; p < parts; p += kThreads) norm += memory[walk.squares() + p];
    norm = std::sqrt(fold_lanes<SumFold<A>>(norm, kThreads));
  }
  const bool moved = norm > table.eps, copied = table.copies != nullptr;
  A* const copy = copied ? table.copies + table.place[layer] : nullptr;
  const int length = walk.length(false);
  if (index > 0) {
    const int64_t first = int64_t(index - 1) * kVTile, end = at_most(first + kVTile, walk.length(true));
    if (moved || copied)
      for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
        const A value = moved ? memory[walk.t() + i] / norm : table.v[layer][i];
        if (moved) table.v[layer][i] = value;
        if (copied) copy[padded_vector(length) + i] = value;
      }
    return;
  }
  A* const image = memory + walk.images() + (iteration && !moved ? int64_t(parts) * length : 0);
  A* const u = table.u[layer];
  A squares = A(0), dot = A(0);
  for (int i = threadIdx.x; i < length; i += kThreads) {
    A sum = image[i];
#pragma unroll 8
    for (int p = 1; p < parts; ++p) sum += image[int64_t(p) * length + i];
    if (moved) sum /= norm;
    image[i] = sum;
    squares += sum * sum;
    dot += sum * u[i];
  }
  const A size = std::sqrt(fold_lanes<SumFold<A>>(squares, kThreads));
  dot = fold_lanes<SumFold<A>>(dot, kThreads);
  const bool turned = iteration && size > table.eps;
  if (turned || copied)
    for (int i = threadIdx.x; i < length; i += kThreads) {
      const A value = turned ? image[i] / size : u[i];
      if (turned) u[i] = value;
      if (copied) copy[i] = value;
    }
  if (threadIdx.x == 0) sigma[layer] = turned ? size : dot;
}

}  // namespace gpkernels::cuda
