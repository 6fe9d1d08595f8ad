// Reductions and maps over groups of a tensor's elements: samples, pixels (over channels), or the whole
// batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../penalty_derivatives.h"
#include "simd.h"

namespace gpkernels::cpu {

// How a reduction combines. A term is called with an element's index and its group's index.
template <class A>
struct Sum {
  [[gnu::always_inline]] static A combine(A a, A b) {
    return a + b;
  }
};

template <class A>
struct Max {
  [[gnu::always_inline]] static A combine(A a, A b) {
    return b > a || b != b ? b : a;  // a NaN stays
  }
};

template <template <class> class Op, class A, class Term>
GPK_MULTIVERSION A reduce_row(const Term& term, int64_t begin, int64_t end, int64_t group) {
  constexpr int kLanes = 32;
  A lane[kLanes] = {};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] = Op<A>::combine(lane[j], term(i + j, group));
  for (int j = 0; i < end; ++i, ++j) lane[j] = Op<A>::combine(lane[j], term(i, group));
  A result = lane[0];
  for (int j = 1; j < kLanes; ++j) result = Op<A>::combine(result, lane[j]);
  return result;
}

constexpr int64_t kTile = 512;

template <template <class> class Op, class A, class Term>
GPK_MULTIVERSION void reduce_columns(const Term& term, Groups groups, int64_t outer, int64_t begin, int64_t end,
                                     A* out) {
  A acc[kTile] = {};
  const int64_t width = end - begin;
  for (int64_t r = 0; r < groups.reduce; ++r) {
    const int64_t offset = (outer * groups.reduce + r) * groups.inner + begin;
    const int64_t group = outer * groups.inner + begin;
    for (int64_t i = 0; i < width; ++i) acc[i] = Op<A>::combine(acc[i], term(offset + i, group + i));
  }
  std::memcpy(out + outer * groups.inner + begin, acc, width * sizeof(A));
}

// Runs f(outer, begin, end) over the columns of every outer block, a tile at a time.
template <class F>
void for_each_tile(Groups groups, const F& f) {
  const int64_t tiles = (groups.inner + kTile - 1) / kTile;
  const int64_t elements = std::max<int64_t>(1, groups.reduce * std::min(groups.inner, kTile));
  torch::stable::parallel_for(0, groups.outer * tiles, std::max<int64_t>(1, 2 * kChunk / elements),
                              [&](int64_t first, int64_t last) {
                                for (int64_t task = first; task < last; ++task) {
                                  const int64_t begin = task % tiles * kTile;
                                  f(task / tiles, begin, std::min(begin + kTile, groups.inner));
                                }
                              });
}

// out[group] = the combination of term over the group.
template <template <class> class Op, class A, class Term>
void reduce_groups(Groups groups, const Term& term, A* out) {
  if (groups.inner != 1) {
    for_each_tile(groups, [&](int64_t outer, int64_t begin, int64_t end) {
      reduce_columns<Op, A>(term, groups, outer, begin, end, out);
    });
    return;
  }
  const int64_t chunks = chunks_of(groups.reduce);
  if (chunks <= 1) {
    std::fill(out, out + groups.outer, A(0));
    for_each_chunk(groups.outer, groups.reduce, [&](int64_t row, int64_t, int64_t, int64_t end) {
      out[row] = reduce_row<Op, A>(term, row * groups.reduce, row * groups.reduce + end, row);
    });
    return;
  }
  std::vector<double> partial(groups.outer * chunks);
  for_each_chunk(groups.outer, groups.reduce, [&](int64_t row, int64_t chunk, int64_t begin, int64_t end) {
    const int64_t offset = row * groups.reduce;
    partial[row * chunks + chunk] = reduce_row<Op, A>(term, offset + begin, offset + end, row);
  });
  for (int64_t row = 0; row < groups.outer; ++row) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total = Op<double>::combine(total, partial[row * chunks + c]);
    out[row] = static_cast<A>(total);
  }
}

template <class T, class Element>
GPK_MULTIVERSION void map_row(const Element& element, T* out, int64_t begin, int64_t end, int64_t group) {
  for (int64_t i = begin; i < end; ++i) out[i] = element(i, group);
}

template <class T, class Element>
GPK_MULTIVERSION void map_columns(const Element& element, T* out, int64_t offset, int64_t group, int64_t width) {
  for (int64_t i = 0; i < width; ++i) out[offset + i] = element(offset + i, group + i);
}

template <class T, class Element>
void map_groups(Groups groups, const Element& element, T* out) {
  if (groups.inner == 1) {
    for_each_chunk(groups.outer, groups.reduce, [&](int64_t row, int64_t, int64_t begin, int64_t end) {
      map_row(element, out, row * groups.reduce + begin, row * groups.reduce + end, row);
    });
    return;
  }
  for_each_tile(groups, [&](int64_t outer, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < groups.reduce; ++r)
      map_columns(element, out, (outer * groups.reduce + r) * groups.inner + begin, outer * groups.inner + begin,
                  end - begin);
  });
}

}  // namespace gpkernels::cpu
