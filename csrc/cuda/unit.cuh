// A unit is what one thread handles at a time: a multiple of 16 bytes of memory and of 4 numbers of Philox.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../dtypes.h"
#include "launch.h"

namespace gpkernels::cuda {

template <class T>
constexpr int kUnit = sizeof(T) == 2 ? 8 : 4;

template <class T, int kCount = kUnit<T>>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Unit {
  T item[kCount];
};

// `p` is aligned as a unit is.
template <class T, int kCount = kUnit<T>>
__device__ __forceinline__ Unit<T, kCount> load(const T* p) {
  return *reinterpret_cast<const Unit<T, kCount>*>(p);
}

template <class T, int kCount>
__device__ __forceinline__ void store(T* p, const Unit<T, kCount>& unit) {
  if constexpr (kCount == 1) {
    *p = unit.item[0];
  } else {
    // An assignment could be taken apart into stores of single items; the intrinsic is one store.
    using Piece = std::conditional_t<sizeof(unit) % sizeof(uint4) == 0, uint4, uint2>;
    Piece pieces[sizeof(unit) / sizeof(Piece)];
    memcpy(pieces, &unit, sizeof(unit));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(unit) / sizeof(Piece)); ++i)
      __stwb(reinterpret_cast<Piece*>(p) + i, pieces[i]);
  }
}

template <class... Pointers>
bool all_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);  // true for a null pointer
}

// A thread handles kUnitsPerThread units of a tile, a tile's width apart; a block handles one tile.
constexpr int kUnitsPerThread = 4;

template <class T>
constexpr int64_t kTile = int64_t(kThreads) * kUnitsPerThread * kUnit<T>;

template <class T>
__device__ __forceinline__ int64_t unit_start(int64_t tile, int unit) {
  return tile * kTile<T> + (int64_t(unit) * kThreads + threadIdx.x) * kUnit<T>;
}

}  // namespace gpkernels::cuda
