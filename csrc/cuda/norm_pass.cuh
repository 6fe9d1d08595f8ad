// One element of norm_act's derivatives, as gpkernels/ops/norm_act/reference.py defines them: what it adds to the sums
// of its group, and what it becomes once the moments of the group, which follow from the sums, are known.
#pragma once

#include <cstdint>

#include "reduce.cuh"
#include "unit.cuh"

namespace gpkernels::cuda {

// Of a group, xc being x - mean. The backward has the first two.
enum Sum { sum_a, sum_a_xc, sum_b, sum_b_xc, sum_a_b };

// What the results of an element depend on beside itself. The backward has the first four.
enum Moment { mean_x, rstd_x, m_a, k_a, m_b, k_b, q_ab };

template <class A, bool kSecond>
struct alignas(16) Moments {
  static constexpr int kCount = kSecond ? 7 : 4;
  A at[kCount];
};

template <class T_, bool kSecond_>
struct NormPass {
  using T = T_;
  using A = acc_t<T>;
  static constexpr bool kSecond = kSecond_;
  static constexpr int kSums = kSecond ? 5 : 2;
  static constexpr int kChannelSums = kSecond ? 1 : 2;  // in_weight; or grad_weight and grad_bias
  using Moments = cuda::Moments<A, kSecond>;

  const T* tangent;
  const T* grad_out;
  const T* x;
  const T* z;  // without an activation anything of x's size, with a slope of 1
  const A* mean;
  const A* rstd;
  const A* weight;  // null: ones
  T* out_tangent;
  T* out_x;
  A* channel_sums[2];  // null: not wanted
  Moments* moments;    // scratch memory: one a group
  A* parts;            // [groups][pieces][kSums]
  A* channel_parts;    // [kChannelSums][parts_a_channel][channels]
  int64_t channels, parts_a_channel;
  A slope, inverse_size;  // of a group
  bool batch;             // a group is a channel, and its sums are free of gamma

  template <int kCount>
  struct Items {
    Unit<T, kCount> x, grad_out, z, tangent;
  };
  template <int kCount>
  __device__ __forceinline__ Items<kCount> read(int64_t i) const {
    Unit<T, kCount> b{};
    if constexpr (kSecond) b = load<T, kCount>(tangent + i);
    return {load<T, kCount>(x + i), load<T, kCount>(grad_out + i), load<T, kCount>(z + i), b};
  }
  template <int kCount>
  __device__ __forceinline__ A act_of(const Items<kCount>& items, int j) const {
    return A(items.z.item[j]) > A(0) ? A(1) : slope;
  }
  __device__ __forceinline__ A gamma(int64_t channel) const {
    return weight != nullptr ? weight[channel] : A(1);
  }

  template <int kCount>
  __device__ __forceinline__ void add(A (&sums)[kSums], const Items<kCount>& items, int j, A mean, A gamma) const {
    const A xc = A(items.x.item[j]) - mean;
    const A a = gamma * (act_of(items, j) * A(items.grad_out.item[j]));
    sums[sum_a] += a;
    sums[sum_a_xc] += a * xc;
    if constexpr (kSecond) {
      const A b = A(items.tangent.item[j]);
      sums[sum_b] += b;
      sums[sum_b_xc] += b * xc;
      sums[sum_a_b] += a * b;
    }
  }
  __device__ __forceinline__ void add_part(A (&sums)[kSums], int64_t part) const {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] += parts[part * kSums + k];
  }
  __device__ __forceinline__ Moments moments_of(const A (&sums)[kSums], int64_t group) const {
    const A r = rstd[group], factor = (batch ? gamma(group) : A(1)) * inverse_size;
    Moments m;
    m.at[mean_x] = mean[group];
    m.at[rstd_x] = r;
    m.at[m_a] = factor * sums[sum_a];
    m.at[k_a] = factor * (r * sums[sum_a_xc]);
    if constexpr (kSecond) {
      m.at[m_b] = inverse_size * sums[sum_b];
      m.at[k_b] = inverse_size * (r * sums[sum_b_xc]);
      m.at[q_ab] = factor * sums[sum_a_b] - m.at[m_a] * m.at[m_b] - m.at[k_a] * m.at[k_b];
    }
    return m;
  }
  // For the next launch: the sums of a piece, or what follows from a whole group's.
  __device__ __forceinline__ void keep_sums(const A (&sums)[kSums], int64_t group, int64_t piece,
                                            int64_t pieces) const {
    if (pieces == 1) {
      moments[group] = moments_of(sums, group);
      return;
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) parts[(group * pieces + piece) * kSums + k] = sums[k];
  }

  // Writes the results of kCount elements from i on and adds to `sums` what they add to their channels' sums: `step`
  // is 1 where each has sums of its own, 0 where they share them. `moments_at(j)` and `gamma_at(j)` are element j's.
  template <int kCount, class MomentsAt, class GammaAt>
  __device__ __forceinline__ void map(int64_t i, const Items<kCount>& items, const MomentsAt& moments_at,
                                      const GammaAt& gamma_at, A (*sums)[kChannelSums], int step) const {
    Unit<T, kCount> in_x, in_grad_out;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const Moments m = moments_at(j);
      A(&sum)[kChannelSums] = sums[step * j];
      const A r = m.at[rstd_x], act = act_of(items, j), a0 = act * A(items.grad_out.item[j]);
      const A xh = (A(items.x.item[j]) - m.at[mean_x]) * r;
      const A gamma = gamma_at(j), a_centred = gamma * a0 - m.at[m_a] - xh * m.at[k_a];
      if constexpr (kSecond) {
        const A b_centred = A(items.tangent.item[j]) - m.at[m_b] - xh * m.at[k_b];
        in_x.item[j] = T(-(r * r) * (m.at[q_ab] * xh + m.at[k_a] * b_centred + m.at[k_b] * a_centred));
        in_grad_out.item[j] = T(act * gamma * r * b_centred);
        sum[0] += r * a0 * b_centred;
      } else {
        in_x.item[j] = T(r * a_centred);
        sum[0] += a0 * xh;
        sum[1] += a0;
      }
    }
    store(out_x + i, in_x);
    if constexpr (kSecond) store(out_tangent + i, in_grad_out);
  }

  // Whether the map adds up the channels. Those of a batch are the groups.
  GPK_HD bool maps_channels() const {
    return !batch && channel_sums[0] != nullptr;
  }
  __device__ __forceinline__ void write_channel(int which, int64_t part, int64_t channel, A sum) const {
    if (parts_a_channel == 1)
      channel_sums[which][channel] = sum;
    else
      channel_parts[(which * parts_a_channel + part) * channels + channel] = sum;
  }
  __device__ __forceinline__ void write_channel_of_batch(const A (&sums)[kSums], int64_t channel) const {
    if (!batch || channel_sums[0] == nullptr) return;
    const A r = rstd[channel];
    if constexpr (kSecond) {
      const A centred = sums[sum_a_b] - sums[sum_a] * (inverse_size * sums[sum_b]);
      channel_sums[0][channel] = r * (centred - r * sums[sum_a_xc] * (inverse_size * (r * sums[sum_b_xc])));
    } else {
      channel_sums[0][channel] = r * sums[sum_a_xc];
      channel_sums[1][channel] = sums[sum_a];
    }
  }
};

}  // namespace gpkernels::cuda
