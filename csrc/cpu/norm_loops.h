// The inner loops of norm_act: sums over runs and columns of memory, the coefficients that follow from the sums of a
// group, and the maps with these. Notation as in gpkernels/ops/norm_act/reference.py; d = x - mean, so that xh = r d.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace gpkernels::cpu {

template <class T>
struct NormInputs {
  using A = acc_t<T>;
  const T* tangent;  // null in the backward
  const T* grad_out;
  const T* x;
  const T* z;
  A slope;

  [[gnu::always_inline]] A act(int64_t i) const {
    return A(z[i]) > 0 ? A(1) : slope;
  }
};

// What a map writes: in the backward the gradient in x, in the double backward those in x and grad_out.
template <class T>
struct NormOutputs {
  T* in_x;
  T* in_grad_out;
};

// Each channel's share in the gradients of weight and bias; the double backward has none in the bias.
template <class A>
struct AffineSums {
  A* weight;
  A* bias;
};

// The sums over a group, or over its elements of one channel: of a, a d and, in the double backward, b, b d, a b.
template <bool kSecond>
constexpr int kNormSums = kSecond ? 5 : 2;

// The mean and the coefficients of the maps:
//   backward         in x: c1 a + cx d + c0
//   double backward  in grad_out: act' gamma (t1 b + tx d + t0),   in x: qa a + qb b + qx d + q0
enum NormCoef { kMean, kC1, kCx, kC0, kT1 = kC1, kTx, kT0, kQa, kQb, kQx, kQ0 };

template <bool kSecond>
constexpr int kNormCoefs = kSecond ? 8 : 4;

template <bool kSecond, class T>
[[gnu::always_inline]] inline void norm_terms(const NormInputs<T>& in, int64_t i, acc_t<T> mean, acc_t<T> weight,
                                              acc_t<T>* terms) {
  using A = acc_t<T>;
  const A a = weight * (in.act(i) * A(in.grad_out[i])), d = A(in.x[i]) - mean;
  terms[0] = a;
  terms[1] = a * d;
  if constexpr (kSecond) {
    const A b = A(in.tangent[i]);
    terms[2] = b;
    terms[3] = b * d;
    terms[4] = a * b;
  }
}

constexpr int kLanes = 16;

// The sums over a run of memory that has one mean, in lanes; lane j of sum k at out[k * pitch + j]. `weight` has an
// element for each of the run, or is null.
template <bool kSecond, bool kWeighted, class T>
[[gnu::always_inline]] inline void sum_run(const NormInputs<T>& in, int64_t begin, int64_t length, acc_t<T> mean,
                                           const acc_t<T>* weight, acc_t<T>* out, int64_t pitch) {
  using A = acc_t<T>;
  constexpr int kSums = kNormSums<kSecond>;
  A lane[kSums][kLanes] = {}, terms[kSums];
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      norm_terms<kSecond>(in, begin + i + j, mean, kWeighted ? weight[i + j] : A(1), terms);
      for (int k = 0; k < kSums; ++k) lane[k][j] += terms[k];
    }
  for (int k = 0; k < kSums; ++k)
    for (int j = 0; j < kLanes; ++j) out[k * pitch + j] = lane[k][j];
#pragma GCC ivdep
  for (int64_t j = 0; j < length - i; ++j) {
    norm_terms<kSecond>(in, begin + i + j, mean, kWeighted ? weight[i + j] : A(1), terms);
    for (int k = 0; k < kSums; ++k) out[k * pitch + j] += terms[k];
  }
}

// Adds up the lanes of `count` values, in place, to x[0] ... x[count - 1].
template <class A>
[[gnu::always_inline]] inline void add_lanes(A* x, int64_t count) {
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
#pragma GCC ivdep
    for (int64_t i = 0; i < count * lanes; ++i) x[i] = x[2 * i] + x[2 * i + 1];
}

// Runs of `length` elements that are `stride` apart, each cut into parts of `part_length`. Run r has the mean and the
// coefficients at r * step.
struct RunParts {
  int64_t begin, stride, length, part_length, step;

  int64_t parts() const {  // of a run
    return (length + part_length - 1) / part_length;
  }

  // Runs f(part, slot, first element, elements) over the parts [first, last).
  template <class F>
  [[gnu::always_inline]] void for_each(int64_t first, int64_t last, const F& f) const {
    const int64_t count = parts();
    int64_t run = first / count, offset = first % count * part_length;
    for (int64_t part = first; part < last; ++part) {
      f(part, run * step, begin + run * stride + offset, std::min(part_length, length - offset));
      offset += part_length;
      if (offset >= length) offset = 0, ++run;
    }
  }
};

template <bool kSecond, class T>
GPK_MULTIVERSION void sum_parts(NormInputs<T> in, RunParts runs, int64_t first, int64_t last, const acc_t<T>* mean,
                                acc_t<T>* sums, int64_t pitch) {
  using A = acc_t<T>;
  constexpr int64_t kTogether = 32, kPitch = kTogether * kLanes;
  alignas(64) A lanes[kNormSums<kSecond> * kPitch];
  for (; first < last; first += kTogether) {
    const int64_t count = std::min(kTogether, last - first);
    runs.for_each(first, first + count,
                  [&](int64_t part, int64_t slot, int64_t begin, int64_t length) __attribute__((always_inline)) {
                    sum_run<kSecond, false>(in, begin, length, mean[slot], nullptr, lanes + (part - first) * kLanes,
                                            kPitch);
                  });
    for (int k = 0; k < kNormSums<kSecond>; ++k) {
      add_lanes(lanes + k * kPitch, count);
      std::copy_n(lanes + k * kPitch, count, sums + k * pitch + first);
    }
  }
}

template <bool kSecond, class T>
GPK_MULTIVERSION void sum_weighted(NormInputs<T> in, int64_t begin, int64_t length, acc_t<T> mean,
                                   const acc_t<T>* weight, acc_t<T>* sums) {
  constexpr int kSums = kNormSums<kSecond>;
  alignas(64) acc_t<T> lanes[kSums * kLanes];
  sum_run<kSecond, true>(in, begin, length, mean, weight, lanes, kLanes);
  add_lanes(lanes, kSums);
  std::copy_n(lanes, kSums, sums);
}

// out[k * pitch + i] += the sum k of column i over `rows` rows that are `stride` apart.
template <bool kSecond, class T>
GPK_MULTIVERSION void sum_columns(NormInputs<T> in, int64_t begin, int64_t rows, int64_t stride, int64_t width,
                                  const acc_t<T>* mean, acc_t<T>* out, int64_t pitch) {
  using A = acc_t<T>;
  constexpr int kRows = 4, kSums = kNormSums<kSecond>;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      A sums[kSums], terms[kSums];
      for (int k = 0; k < kSums; ++k) sums[k] = out[k * pitch + i];
#pragma GCC unroll 4
      for (int q = 0; q < kRows; ++q) {
        norm_terms<kSecond>(in, begin + (r + q) * stride + i, mean[i], A(1), terms);
        for (int k = 0; k < kSums; ++k) sums[k] += terms[k];
      }
      for (int k = 0; k < kSums; ++k) out[k * pitch + i] = sums[k];
    }
  for (; r < rows; ++r)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      A terms[kSums];
      norm_terms<kSecond>(in, begin + r * stride + i, mean[i], A(1), terms);
      for (int k = 0; k < kSums; ++k) out[k * pitch + i] += terms[k];
    }
}

// The coefficients but the mean, and the shares, of `count` channels. sums[k * count + c] are a channel's own,
// totals[k * count + c] those of its group, with a = gamma a0.
template <bool kSecond, class A>
GPK_MULTIVERSION void fold_channels(const double* sums, const double* totals, const A* rstd, const A* weight,
                                    double group_size, int64_t count, A* coefs, int64_t pitch, AffineSums<A> shares) {
  const double scale = 1 / group_size;
#pragma GCC ivdep
  for (int64_t c = 0; c < count; ++c) {
    const double r = rstd[c], w = weight[c], m_a = scale * totals[c], k_a = scale * r * totals[count + c];
    if constexpr (kSecond) {
      const double m_b = scale * totals[2 * count + c], k_b = scale * r * totals[3 * count + c];
      const double q = scale * totals[4 * count + c] - m_a * m_b - k_a * k_b;
      coefs[kT1 * pitch + c] = A(w * r);
      coefs[kTx * pitch + c] = A(-w * r * r * k_b);
      coefs[kT0 * pitch + c] = A(-w * r * m_b);
      coefs[kQa * pitch + c] = A(-w * r * r * k_b);
      coefs[kQb * pitch + c] = A(-r * r * k_a);
      coefs[kQx * pitch + c] = A(-r * r * r * (q - 2 * k_a * k_b));
      coefs[kQ0 * pitch + c] = A(r * r * (k_a * m_b + k_b * m_a));
      shares.weight[c] = A(r * (sums[4 * count + c] - m_b * sums[c] - k_b * r * sums[count + c]));
    } else {
      coefs[kC1 * pitch + c] = A(w * r);
      coefs[kCx * pitch + c] = A(-r * r * k_a);
      coefs[kC0 * pitch + c] = A(-r * m_a);
      shares.weight[c] = A(r * sums[count + c]);
      shares.bias[c] = A(sums[c]);
    }
  }
}

// Coefficients of a run.
template <class A, bool kSecond>
struct UniformCoefs {
  A c[kNormCoefs<kSecond>];
  [[gnu::always_inline]] A operator()(int k, int64_t) const {
    return c[k];
  }
};

// Coefficients of each column.
template <class A>
struct ColumnCoefs {
  const A* c;
  int64_t pitch;
  [[gnu::always_inline]] A operator()(int k, int64_t i) const {
    return c[k * pitch + i];
  }
};

// Maps a run of memory; the coefficients contain the weight.
template <bool kSecond, class Coefs, class T>
[[gnu::always_inline]] inline void map_run(NormInputs<T> in, NormOutputs<T> out, int64_t begin, int64_t length,
                                           Coefs coefs) {
  using A = acc_t<T>;
#pragma GCC ivdep
  for (int64_t i = 0; i < length; ++i) {
    const int64_t e = begin + i;
    const A act = in.act(e), d = A(in.x[e]) - coefs(kMean, i), a0 = act * A(in.grad_out[e]);
    if constexpr (kSecond) {
      const A b = A(in.tangent[e]);
      out.in_grad_out[e] = T(act * (coefs(kT1, i) * b + (coefs(kTx, i) * d + coefs(kT0, i))));
      out.in_x[e] = T(coefs(kQa, i) * a0 + coefs(kQb, i) * b + (coefs(kQx, i) * d + coefs(kQ0, i)));
    } else {
      out.in_x[e] = T(coefs(kC1, i) * a0 + (coefs(kCx, i) * d + coefs(kC0, i)));
    }
  }
}

template <bool kSecond, class T>
GPK_MULTIVERSION void map_parts(NormInputs<T> in, NormOutputs<T> out, RunParts runs, int64_t first, int64_t last,
                                const acc_t<T>* coefs, int64_t pitch) {
  runs.for_each(first, last, [&](int64_t, int64_t slot, int64_t begin, int64_t length) __attribute__((always_inline)) {
    UniformCoefs<acc_t<T>, kSecond> c;
    for (int k = 0; k < kNormCoefs<kSecond>; ++k) c.c[k] = coefs[k * pitch + slot];
    map_run<kSecond>(in, out, begin, length, c);
  });
}

template <bool kSecond, class T>
GPK_MULTIVERSION void map_columns(NormInputs<T> in, NormOutputs<T> out, int64_t begin, int64_t rows, int64_t stride,
                                  int64_t width, const acc_t<T>* coefs, int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r)
    map_run<kSecond>(in, out, begin + r * stride, width, ColumnCoefs<acc_t<T>>{coefs, pitch});
}

// Maps kRows rows that are `stride` apart, each with coefficients of its own and a weight for each column, and adds the
// columns' shares in the affine gradients.
template <int kRows, bool kSecond, bool kAffine, class T>
GPK_MULTIVERSION void map_rows(NormInputs<T> in, NormOutputs<T> out, int64_t begin, int64_t stride, int64_t length,
                               const UniformCoefs<acc_t<T>, kSecond>* rows, const acc_t<T>* weight,
                               AffineSums<acc_t<T>> affine) {
  using A = acc_t<T>;
  UniformCoefs<A, kSecond> coefs[kRows];
  std::copy_n(rows, kRows, coefs);
#pragma GCC ivdep
  for (int64_t i = 0; i < length; ++i) {
    const A w = weight[i];
    A in_weight = 0, in_bias = 0;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int64_t e = begin + r * stride + i;
      const A* c = coefs[r].c;
      const A act = in.act(e), d = A(in.x[e]) - c[kMean], a0 = act * A(in.grad_out[e]);
      if constexpr (kSecond) {
        const A b = A(in.tangent[e]), centred = c[kT1] * b + (c[kTx] * d + c[kT0]);
        out.in_grad_out[e] = T(act * w * centred);
        out.in_x[e] = T(c[kQa] * (w * a0) + c[kQb] * b + (c[kQx] * d + c[kQ0]));
        in_weight += a0 * centred;
      } else {
        out.in_x[e] = T(c[kC1] * (w * a0) + (c[kCx] * d + c[kC0]));
        in_weight += c[kC1] * (a0 * d);
        in_bias += a0;
      }
    }
    if constexpr (kAffine) affine.weight[i] += in_weight;
    if constexpr (kAffine && !kSecond) affine.bias[i] += in_bias;
  }
}

// out[i] += the sum over rows of x[row * stride + i].
template <class A>
GPK_MULTIVERSION void add_rows(const A* x, int64_t rows, int64_t stride, int64_t width, double* out) {
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) out[i] += static_cast<double>(x[r * stride + i]);
}

// out[i] += the sum of the `span` neighbours from x[i * span].
template <class A>
GPK_MULTIVERSION void add_neighbours(const A* x, int64_t count, int64_t span, double* out) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t s = 0; s < span; ++s) sum += static_cast<double>(x[i * span + s]);
    out[i] += sum;
  }
}

}  // namespace gpkernels::cpu
