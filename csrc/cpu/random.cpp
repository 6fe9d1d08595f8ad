#include "random.h"

#include "simd.h"

namespace gpkernels::cpu {

GPK_MULTIVERSION void fill_uniform(float* out, Seed seed, uint64_t first_block, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) {
    const Philox4 draw = philox4x32_10(seed, first_block + b);
    for (int w = 0; w < 4; ++w) out[4 * b + w] = uniform(draw.word[w]);
  }
}

GPK_MULTIVERSION void fill_uniform_symmetric(float* out, Seed seed, uint64_t first_block, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) {
    const Philox4 draw = philox4x32_10(seed, first_block + b);
    for (int w = 0; w < 4; ++w) out[4 * b + w] = uniform_symmetric(draw.word[w]);
  }
}

GPK_MULTIVERSION void fill_normal(float* out, Seed seed, uint64_t first_block, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) {
    const Philox4 draw = philox4x32_10(seed, first_block + b);
    normal_pair(draw.word[0], draw.word[1], out + 4 * b, out + 4 * b + 1);
    normal_pair(draw.word[2], draw.word[3], out + 4 * b + 2, out + 4 * b + 3);
  }
}

}  // namespace gpkernels::cpu
