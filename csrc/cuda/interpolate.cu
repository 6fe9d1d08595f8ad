// interpolate: out = eps real + (1 - eps) fake  (Gulrajani et al. 2017, Algorithm 1, line 6), and its
// adjoint. eps is drawn where it is used.
#include "kernels.h"
#include "random.cuh"
#include "unit.cuh"

namespace gpkernels::cuda {
namespace {

// The eps of a row of `length` elements, looked up when the element asked for lies past the last one's row.
template <class A>
struct RowEps {
  const A* given;
  Seed seed;
  int64_t length;
  int64_t end = 0;
  A value = 0;

  __device__ __forceinline__ void seek(int64_t i) {
    if (i < end) return;
    const int64_t row = i / length;
    end = (row + 1) * length;
    value = given != nullptr ? given[row] : A(uniform_at(seed, row));
  }
  __device__ __forceinline__ A operator[](int) const {
    return value;
  }
};

template <class T>
struct Blend {
  using A = acc_t<T>;
  const T* real;
  const T* fake;
  T* out;

  static __device__ __forceinline__ T blend(A eps, T r, T f) {
    return T(eps * A(r) + (A(1) - eps) * A(f));
  }
  template <class Eps>
  __device__ __forceinline__ void unit(int64_t i, const Eps& eps) const {
    const Unit<T> r = load(real + i), f = load(fake + i);
    Unit<T> result;
#pragma unroll
    for (int j = 0; j < kUnit<T>; ++j) result.item[j] = blend(A(eps[j]), r.item[j], f.item[j]);
    store(out + i, result);
  }
  __device__ __forceinline__ void element(int64_t i, A eps) const {
    out[i] = blend(eps, real[i], fake[i]);
  }
};

template <class T>
struct Split {
  using A = acc_t<T>;
  const T* grad_out;
  T* grad_real;
  T* grad_fake;

  template <class Eps>
  __device__ __forceinline__ void unit(int64_t i, const Eps& eps) const {
    const Unit<T> g = load(grad_out + i);
    Unit<T> result;
    if (grad_real != nullptr) {
#pragma unroll
      for (int j = 0; j < kUnit<T>; ++j) result.item[j] = T(A(eps[j]) * A(g.item[j]));
      store(grad_real + i, result);
    }
    if (grad_fake != nullptr) {
#pragma unroll
      for (int j = 0; j < kUnit<T>; ++j) result.item[j] = T((A(1) - A(eps[j])) * A(g.item[j]));
      store(grad_fake + i, result);
    }
  }
  __device__ __forceinline__ void element(int64_t i, A eps) const {
    const A g = A(grad_out[i]);
    if (grad_real != nullptr) grad_real[i] = T(eps * g);
    if (grad_fake != nullptr) grad_fake[i] = T((A(1) - eps) * g);
  }
};

template <class T, class Map>
__global__ void __launch_bounds__(kThreads)
    map_by_row(Map map, EpsSource source, int64_t length, int64_t numel, bool aligned) {
  using A = acc_t<T>;
  const Seed seed = source.seed != nullptr ? read_seed(source.seed) : Seed{};
  RowEps<A> eps{static_cast<const A*>(source.given), seed, length};
#pragma unroll 1
  for (int u = 0; u < kUnitsPerThread; ++u) {
    const int64_t begin = unit_start<T>(blockIdx.x, u);
    if (begin >= numel) return;
    eps.seek(begin);
    if (aligned && begin + kUnit<T> <= eps.end) {
      map.unit(begin, eps);
      continue;
    }
    const int64_t end = begin + kUnit<T> < numel ? begin + kUnit<T> : numel;
#pragma unroll 1
    for (int64_t i = begin; i < end; ++i) {
      eps.seek(i);
      map.element(i, eps.value);
    }
  }
}

template <class T, class Map>
__global__ void __launch_bounds__(kThreads)
    map_by_element(Map map, const int64_t* __restrict__ seed_words, int64_t numel, bool aligned) {
  const Seed seed = read_seed(seed_words);
#pragma unroll 1
  for (int u = 0; u < kUnitsPerThread; ++u) {
    const int64_t begin = unit_start<T>(blockIdx.x, u);
    if (begin >= numel) return;
    float eps[kUnit<T>];
    draw_uniform(eps, seed, begin);
    if (aligned && begin + kUnit<T> <= numel) {
      map.unit(begin, eps);
      continue;
    }
#pragma unroll
    for (int j = 0; j < kUnit<T>; ++j)
      if (begin + j < numel) map.element(begin + j, acc_t<T>(eps[j]));
  }
}

template <class T, class Map>
void launch_map(const Map& map, EpsSource eps, int64_t batch, int64_t elements, bool aligned, cudaStream_t stream) {
  const int64_t numel = batch * elements;
  if (numel == 0) return;
  const int64_t blocks = ceil_div(numel, kTile<T>);
  if (eps.per_element)
    launch(map_by_element<T, Map>, blocks, stream, map, eps.seed, numel, aligned);
  else
    launch(map_by_row<T, Map>, blocks, stream, map, eps, elements, numel, aligned);
}

}  // namespace

void launch_interpolate(ScalarType dtype, const void* real, const void* fake, void* out, EpsSource eps, int64_t batch,
                        int64_t elements, cudaStream_t stream) {
  dispatch_floating("interpolate", dtype, [&](auto tag) {
    using T = decltype(tag);
    const Blend<T> map{static_cast<const T*>(real), static_cast<const T*>(fake), static_cast<T*>(out)};
    launch_map<T>(map, eps, batch, elements, all_aligned(real, fake, out), stream);
  });
}

void launch_interpolate_backward(ScalarType dtype, const void* grad_out, void* grad_real, void* grad_fake,
                                 EpsSource eps, int64_t batch, int64_t elements, cudaStream_t stream) {
  dispatch_floating("interpolate_backward", dtype, [&](auto tag) {
    using T = decltype(tag);
    const Split<T> map{static_cast<const T*>(grad_out), static_cast<T*>(grad_real), static_cast<T*>(grad_fake)};
    launch_map<T>(map, eps, batch, elements, all_aligned(grad_out, grad_real, grad_fake), stream);
  });
}

}  // namespace gpkernels::cuda
