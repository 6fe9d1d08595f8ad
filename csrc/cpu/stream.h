// Writing results that are larger than the caches past these: a cached store first reads the line that it overwrites.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "data.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace gpkernels::cpu {

// Elements of a piece of a result, where nothing else decides.
constexpr int64_t kPiece = 4096;

inline void stream(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(out) & 15);
  std::memcpy(out, in, head);
  out += head, in += head, bytes -= head;
  for (; bytes >= 64; bytes -= 64, out += 64, in += 64)
    for (int i = 0; i < 64; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
  std::memcpy(out, in, bytes);
#else
  std::memcpy(to, from, bytes);
#endif
}

// Before other threads read what was streamed.
inline void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Writes the results of an op, of which this is one: through the caches or, where all together are large, past them.
template <class T>
class Writer {
 public:
  explicit Writer(const std::vector<Tensor>& results) {
    int64_t bytes = 0;
    for (const Tensor& x : results) bytes += x.numel() * static_cast<int64_t>(sizeof(T));
    streams_ = bytes >= kLarge;
  }

  // Calls f(begin, count, to) for pieces of [0, elements), which f computes into `to`.
  template <class F>
  void write(T* out, int64_t elements, int64_t piece, const F& f) const {
    std::unique_ptr<T[]> buffer(streams_ ? new T[std::min(piece, elements)] : nullptr);
    for (int64_t begin = 0; begin < elements; begin += piece) {
      const int64_t count = std::min(piece, elements - begin);
      f(begin, count, streams_ ? buffer.get() : out + begin);
      if (streams_) stream(out + begin, buffer.get(), count * static_cast<int64_t>(sizeof(T)));
    }
    if (streams_) end_stream();
  }

 private:
  static constexpr int64_t kLarge = int64_t(1) << 25;
  bool streams_;
};

}  // namespace gpkernels::cpu
