// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and the two
// distributions drawn from it. The generator is counter based: number i of a stream depends on
// (seed, stream, i) alone, so every backend draws the same numbers whatever its order of work.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace gpkernels {

// The two words of the op's seed tensor: `key` selects the generator, `stream` the upper counter half.
struct Seed {
  uint64_t key;
  uint64_t stream;
};

// What perturb adds, as gpkernels/ops/perturb/reference.py numbers it.
enum class Noise : int64_t { normal, uniform, count };

struct Philox4 {
  uint32_t word[4];
};

GPK_HD Philox4 philox4x32_10(Seed seed, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(seed.stream), c3 = static_cast<uint32_t>(seed.stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed.key), k1 = static_cast<uint32_t>(seed.key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// U[0, 1) on a grid of 2^-24: exact in float, so no rounding can return 1.
GPK_HD float uniform(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
}

// U[-1, 1) on a grid of 2^-23.
GPK_HD float uniform_symmetric(uint32_t word) {
  return 2.0f * uniform(word) - 1.0f;
}

// ln(u) for u in (0, 1]: u = 2^e m with m in [1/sqrt 2, sqrt 2), ln m = 2 artanh((m-1)/(m+1)).
// The series is cut at s^9, a relative error below 1e-9. Branch free, so that the CPU loop vectorises.
GPK_HD float log_unit(float u) {
  int32_t bits;
  memcpy(&bits, &u, sizeof bits);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const int32_t mantissa_bits = bits - exponent * (1 << 23);
  float m;
  memcpy(&m, &mantissa_bits, sizeof m);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float s2 = s * s;
  const float series = 1.0f + s2 * (1.0f / 3 + s2 * (1.0f / 5 + s2 * (1.0f / 7 + s2 * (1.0f / 9))));
  return static_cast<float>(exponent) * 0.693147181f + 2.0f * s * series;
}

// (cos, sin) of 2 pi u for u in [0, 1): Taylor series on an eighth of a turn either side of a quarter.
GPK_HD void cos_sin_turn(float u, float* cosine, float* sine) {
  const int32_t quarter = static_cast<int32_t>(4.0f * u + 0.5f);
  const float t = 6.28318531f * (u - 0.25f * static_cast<float>(quarter));
  const float t2 = t * t;
  const float c =
      1.0f + t2 * (-1.0f / 2 + t2 * (1.0f / 24 + t2 * (-1.0f / 720 + t2 * (1.0f / 40320 - t2 * (1.0f / 3628800)))));
  const float s = t * (1.0f + t2 * (-1.0f / 6 + t2 * (1.0f / 120 + t2 * (-1.0f / 5040 + t2 * (1.0f / 362880)))));
  const bool swap = (quarter & 1) != 0;
  const float x = swap ? s : c, y = swap ? c : s;
  *cosine = ((quarter + 1) & 2) != 0 ? -x : x;
  *sine = (quarter & 2) != 0 ? -y : y;
}

// Box-Muller: two words give two independent N(0, 1). The first uniform is taken in (0, 1].
GPK_HD void normal_pair(uint32_t word0, uint32_t word1, float* first, float* second) {
  const float radius = sqrtf(-2.0f * log_unit(uniform(word0) + 0x1p-24f));
  float cosine, sine;
  cos_sin_turn(uniform(word1), &cosine, &sine);
  *first = radius * cosine;
  *second = radius * sine;
}

}  // namespace gpkernels
