// A stand-in for CUDA's <cuda_runtime.h> that lets g++ compile the kernels of csrc/cuda and the host execute them.
//
// Every thread of a block is a thread of control of its own, so barriers and shuffles mean what they mean on a GPU.
// fibers.cpp switches between them on one thread, in an order that alternates at every turn; threads.cpp gives each
// a std::thread, for ThreadSanitizer. Blocks run one after another, hence static memory serves as shared memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
cudaError_t cudaGetLastError();

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace shim {

struct Index {
  unsigned x;
};

struct Position {
  Index thread, block, block_size, grid_size;
};

// Of the calling thread of the kernel.
const Position& position();
void block_barrier();
// The `bits` that the thread `lane ^ offset` of the calling warp brings.
uint64_t exchange(uint64_t bits, int offset);

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

// Kernels launched so far in this process.
int64_t launches();

}  // namespace shim

#define threadIdx (shim::position().thread)
#define blockIdx (shim::position().block)
#define blockDim (shim::position().block_size)
#define gridDim (shim::position().grid_size)

template <class V>
void __stwb(V* p, V value) {
  *p = value;
}

inline void __syncthreads() {
  shim::block_barrier();
}

template <class V>
V __shfl_xor_sync(unsigned, V value, int offset) {
  static_assert(sizeof(V) <= sizeof(uint64_t), "wanted a value of at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = shim::exchange(bits, offset);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

void launch_on_host(int64_t blocks, unsigned threads, const std::function<void()>& kernel);
