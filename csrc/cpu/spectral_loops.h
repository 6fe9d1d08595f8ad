// The inner loops of spectral_norm. A contiguous weight is `slabs` slabs of `length` elements. Where the matrix's rows
// are slabs (inner = 1), u has an element for each slab and v one for each element of a slab; where they are not, v has
// `inner` elements for each slab and u one for each `inner` elements of a slab.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace gpkernels::cpu {

constexpr int64_t kTileColumns = 4096;
constexpr int kDotLanes = 32;
// Elements added up in the accumulation dtype; beyond that, in float64.
constexpr int64_t kDotPart = 16384;

template <int kRows, class T>
[[gnu::always_inline]] inline void add_scaled_rows(const T* w, int64_t stride, int64_t width, const acc_t<T>* factors,
                                                   acc_t<T>* out) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < width; ++i) {
    A sum(0);
    for (int r = 0; r < kRows; ++r) sum += factors[r] * A(w[r * stride + i]);
    out[i] += sum;
  }
}

// out[i] = the sum of factors[r] w[r * stride + i] over the rows, for i < width.
template <class T>
GPK_MULTIVERSION void sum_scaled_rows(const T* w, int64_t rows, int64_t stride, int64_t width, const acc_t<T>* factors,
                                      acc_t<T>* out) {
  for (int64_t begin = 0; begin < width; begin += kTileColumns) {
    const int64_t count = std::min(kTileColumns, width - begin);
    acc_t<T> sums[kTileColumns] = {};
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_scaled_rows<4>(w + r * stride + begin, stride, count, factors + r, sums);
    for (; r < rows; ++r) add_scaled_rows<1>(w + r * stride + begin, stride, count, factors + r, sums);
    std::copy_n(sums, count, out + begin);
  }
}

// As sum_scaled_rows, with the factors of a row repeated along it: factors[r * inner + i % inner]. `tile` has room for
// `span` elements, a multiple of inner.
template <class T>
GPK_MULTIVERSION void sum_patterned_rows(const T* w, int64_t rows, int64_t width, const acc_t<T>* factors,
                                         int64_t inner, int64_t span, acc_t<T>* tile, acc_t<T>* out) {
  using A = acc_t<T>;
  std::fill_n(out, width, A(0));
  for (int64_t r = 0; r < rows; ++r, w += width, factors += inner) {
    for (int64_t i = 0; i < span; i += inner) std::copy_n(factors, inner, tile + i);
    for (int64_t begin = 0; begin < width; begin += span) {
      const int64_t count = std::min(span, width - begin);
      for (int64_t i = 0; i < count; ++i) out[begin + i] += tile[i] * A(w[begin + i]);
    }
  }
}

template <int kRows, class T>
[[gnu::always_inline]] inline void dot_rows(const T* w, int64_t stride, int64_t width, const acc_t<T>* x,
                                            acc_t<T>* out) {
  using A = acc_t<T>;
  double totals[kRows] = {};
  for (int64_t begin = 0; begin < width; begin += kDotPart) {
    const int64_t end = std::min(begin + kDotPart, width);
    A lane[kRows][kDotLanes] = {};
    int64_t i = begin;
    for (; i + kDotLanes <= end; i += kDotLanes)
      for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kDotLanes; ++j) lane[r][j] += x[i + j] * A(w[r * stride + i + j]);
    for (int r = 0; r < kRows; ++r) {
      for (int64_t j = 0; j < end - i; ++j) lane[r][j] += x[i + j] * A(w[r * stride + i + j]);
      for (int half = kDotLanes / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) lane[r][j] += lane[r][j + half];
      totals[r] += static_cast<double>(lane[r][0]);
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = static_cast<A>(totals[r]);
}

// out[r] = the sum of x[i] w[r * stride + i] over i < width.
template <class T>
GPK_MULTIVERSION void dot_each_row(const T* w, int64_t rows, int64_t stride, int64_t width, const acc_t<T>* x,
                                   acc_t<T>* out) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) dot_rows<4>(w + r * stride, stride, width, x, out + r);
  for (; r < rows; ++r) dot_rows<1>(w + r * stride, stride, width, x, out + r);
}

// As dot_each_row, in classes: out[r * inner + b] sums over the i with i % inner = b. `tile` has room for `span`
// elements, a multiple of inner.
template <class T>
GPK_MULTIVERSION void dot_each_class(const T* w, int64_t rows, int64_t width, const acc_t<T>* x, int64_t inner,
                                     int64_t span, acc_t<T>* tile, acc_t<T>* out) {
  using A = acc_t<T>;
  for (int64_t r = 0; r < rows; ++r, w += width, out += inner) {
    std::fill_n(tile, span, A(0));
    for (int64_t begin = 0; begin < width; begin += span) {
      const int64_t count = std::min(span, width - begin);
      for (int64_t i = 0; i < count; ++i) tile[i] += x[begin + i] * A(w[begin + i]);
    }
    for (int64_t b = 0; b < inner; ++b) {
      A sum(0);
      for (int64_t i = b; i < span; i += inner) sum += tile[i];
      out[b] = sum;
    }
  }
}

// out[i] = the sum over k < parts of x[k * pitch + i], and returns the sum of squares of out.
template <class A>
GPK_MULTIVERSION double add_parts(const A* x, int64_t parts, int64_t pitch, int64_t count, A* out) {
  constexpr int64_t kTile = 256;
  double squares[8] = {};
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t width = std::min(kTile, count - begin);
    double sums[kTile] = {};
    for (int64_t k = 0; k < parts; ++k)
      for (int64_t i = 0; i < width; ++i) sums[i] += static_cast<double>(x[k * pitch + begin + i]);
    for (int64_t i = 0; i < width; ++i) {
      out[begin + i] = static_cast<A>(sums[i]);
      sums[i] *= sums[i];
    }
    for (int64_t i = width; i < (width + 7) / 8 * 8; ++i) sums[i] = 0;
    for (int64_t i = 0; i < width; i += 8)
      for (int64_t j = 0; j < 8; ++j) squares[j] += sums[i + j];
  }
  double total = 0;
  for (double square : squares) total += square;
  return total;
}

template <class A>
GPK_MULTIVERSION double dot(const A* x, const A* y, int64_t count) {
  double lane[8] = {}, total = 0;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int64_t j = 0; j < 8; ++j) lane[j] += static_cast<double>(x[i + j]) * static_cast<double>(y[i + j]);
  for (int64_t j = 0; i < count; ++i, ++j) lane[j] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  for (double sum : lane) total += sum;
  return total;
}

template <class A>
GPK_MULTIVERSION void multiply(const A* x, A factor, int64_t count, A* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = factor * x[i];
}

template <class T>
GPK_MULTIVERSION void scale_weight(const T* w, acc_t<T> factor, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = T(factor * acc_t<T>(w[i]));
}

// The sum of x y, in lanes of the accumulation dtype.
template <class T>
GPK_MULTIVERSION double dot_weights(const T* x, const T* y, int64_t count) {
  using A = acc_t<T>;
  constexpr int kLanes = 64;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kDotPart) {
    const int64_t end = std::min(begin + kDotPart, count);
    A lane[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lane[j] += A(x[i + j]) * A(y[i + j]);
    for (int j = 0; i < end; ++i, ++j) lane[j] += A(x[i]) * A(y[i]);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    total += static_cast<double>(lane[0]);
  }
  return total;
}

// out[i] = factor (g[i] - share along[i]).
template <class T>
GPK_MULTIVERSION void subtract_rank_one(const T* g, int64_t width, acc_t<T> factor, acc_t<T> share,
                                        const acc_t<T>* along, T* out) {
  using A = acc_t<T>;
  const A s = factor * share;
  for (int64_t i = 0; i < width; ++i) out[i] = T(factor * A(g[i]) - s * along[i]);
}

// As subtract_rank_one with a share across[i % inner] of `share`.
template <class T>
GPK_MULTIVERSION void subtract_patterned(const T* g, int64_t width, acc_t<T> factor, acc_t<T> share,
                                         const acc_t<T>* across, const acc_t<T>* along, int64_t inner, int64_t span,
                                         acc_t<T>* tile, T* out) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < span; ++i) tile[i] = factor * (share * across[i % inner]);
  for (int64_t begin = 0; begin < width; begin += span) {
    const int64_t count = std::min(span, width - begin);
    for (int64_t i = 0; i < count; ++i) out[begin + i] = T(factor * A(g[begin + i]) - tile[i] * along[begin + i]);
  }
}

}  // namespace gpkernels::cpu
