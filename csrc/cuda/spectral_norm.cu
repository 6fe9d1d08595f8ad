// spectral_norm: power iterations of many layers, their weights over sigma, and the gradient of these.
#include "kernels.h"
#include "spectral_product.cuh"

namespace gpkernels::cuda {
namespace {

// The units and the single items of a block's share, begin to end, of contiguous memory: f(i, width).
template <class T, class F>
__device__ __forceinline__ void for_units(int64_t begin, int64_t end, bool wide, const F& f) {
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x * kUnit<T>; i < end; i += kThreads * kUnit<T>) {
    if (wide && i + kUnit<T> <= end) {
      f(i, std::integral_constant<int, kUnit<T>>());
      continue;
    }
#pragma unroll 1
    for (int64_t j = i; j < end && j < i + kUnit<T>; ++j) f(j, std::integral_constant<int, 1>());
  }
}

template <class... Pointers>
__device__ __forceinline__ bool aligned_on_device(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class T>
__global__ void __launch_bounds__(kThreads) spectral_scale(const __grid_constant__ ScaleTable<T> table) {
  using A = acc_t<T>;
  const int layer = layer_of(table.first_block, table.layers, blockIdx.x);
  const T* const weight = table.weight[layer];
  T* const out = table.out[layer];
  const A sigma = table.sigma[layer], target = A(table.target[layer]);
  const A factor = sigma <= table.eps ? target : target / sigma;
  const int64_t begin = (int64_t(blockIdx.x) - table.first_block[layer]) * kTile<T>;
  const int64_t end = at_most(begin + kTile<T>, table.numel[layer]);
  for_units<T>(begin, end, aligned_on_device(weight, out), [&](int64_t i, auto width) {
    constexpr int kCount = decltype(width)::value;
    const auto unit = load<T, kCount>(weight + i);
    Unit<T, kCount> result;
#pragma unroll
    for (int j = 0; j < kCount; ++j) result.item[j] = T(factor * A(unit.item[j]));
    store(out + i, result);
  });
}

// The parts of <G, W>.
template <class T>
__global__ void __launch_bounds__(kThreads) spectral_dot(const __grid_constant__ DotTable<T> table) {
  using A = acc_t<T>;
  const int layer = layer_of(table.first_block, table.layers, blockIdx.x);
  const T* const grad = table.grad[layer];
  const T* const weight = table.weight[layer];
  const int64_t span = span_of<T>(table.numel[layer]);
  const int64_t begin = (int64_t(blockIdx.x) - table.first_block[layer]) * span;
  A sum = A(0);
  for_units<T>(begin, at_most(begin + span, table.numel[layer]), aligned_on_device(grad, weight),
               [&](int64_t i, auto width) {
                 constexpr int kCount = decltype(width)::value;
                 const auto g = load<T, kCount>(grad + i), w = load<T, kCount>(weight + i);
                 A unit = A(0);
#pragma unroll
                 for (int j = 0; j < kCount; ++j) unit += A(g.item[j]) * A(w.item[j]);
                 sum += unit;
               });
  sum = fold_lanes<SumFold<A>>(sum, kThreads);
  if (threadIdx.x == 0) table.parts[blockIdx.x] = sum;
}

// Row and column of element i.
struct Place {
  int64_t row, column;
};

template <class I>
__device__ __forceinline__ Place place_of(int64_t element, int rows, int inner) {
  const I i = static_cast<I>(element), length = static_cast<I>(inner), slab = i / length;
  const I outer = slab / static_cast<I>(rows);
  return {static_cast<int64_t>(slab - outer * static_cast<I>(rows)),
          static_cast<int64_t>(outer * length + (i - slab * length))};
}

// target (G - <G, W> / sigma u v^T) / sigma
template <class T>
__global__ void __launch_bounds__(kThreads) spectral_grad(const __grid_constant__ GradTable<T> table) {
  using A = acc_t<T>;
  const int layer = layer_of(table.first_block, table.layers, blockIdx.x);
  const int first = table.first_block[layer], parts = table.first_block[layer + 1] - first;
  A dot = A(0);
  for (int p = threadIdx.x; p < parts; p += kThreads) dot += table.parts[first + p];
  dot = fold_lanes<SumFold<A>>(dot, kThreads);
  const A sigma = table.sigma[layer], target = A(table.target[layer]);
  const bool dead = sigma <= table.eps;
  const A factor = dead ? target : target / sigma, along = dead ? A(0) : dot / sigma;
  const T* const grad = table.grad[layer];
  T* const out = table.out[layer];
  const A* const u = table.u[layer];
  const A* const v = table.v[layer];
  const int rows = table.rows[layer], inner = table.inner[layer];
  const int64_t numel = int64_t(rows) * table.columns[layer], span = span_of<T>(numel);
  const int64_t begin = int64_t(static_cast<int>(blockIdx.x) - first) * span;
  const bool is_small = numel <= 0x7FFFFFFF;
  for_units<T>(begin, at_most(begin + span, numel), table.wide[layer], [&](int64_t i, auto width) {
    constexpr int kCount = decltype(width)::value;
    const Place at = is_small ? place_of<unsigned>(i, rows, inner) : place_of<int64_t>(i, rows, inner);
    const auto g = load<T, kCount>(grad + i);
    const auto right = load<A, kCount>(v + at.column);
    const A left = along * u[at.row];
    Unit<T, kCount> result;
#pragma unroll
    for (int j = 0; j < kCount; ++j) result.item[j] = T(factor * (A(g.item[j]) - left * right.item[j]));
    store(out + i, result);
  });
}

// Calls f with the layers of a launch each, first and past the last.
template <class F>
void for_chunks(const std::vector<SpectralLayer>& layers, const F& f) {
  const int64_t count = static_cast<int64_t>(layers.size());
  for (int64_t first = 0; first < count; first += kLayers) f(first, std::min(count, first + kLayers));
}

int64_t numel_of(const SpectralLayer& layer) {
  return layer.outer * layer.rows * layer.inner;
}

template <class T>
void iterate(const std::vector<SpectralLayer>& layers, int64_t iterations, double eps, void* sigma, void* copies,
             double* scratch, cudaStream_t stream) {
  using A = acc_t<T>;
  for_chunks(layers, [&](int64_t first, int64_t end) {
    IterateTable<A> table{};
    int finish_first[kLayers];
    table.memory = reinterpret_cast<A*>(scratch);
    table.copies = static_cast<A*>(copies);
    table.eps = A(eps);
    table.layers = static_cast<int>(end - first);
    int64_t memory = 0, blocks = 0, finish_blocks = 0;
    for (int i = 0; i < table.layers; ++i) {
      const SpectralLayer& layer = layers[first + i];
      const Walk walk = plan_walk<T>(layer);
      table.weight[i] = layer.weight;
      table.u[i] = static_cast<A*>(layer.u), table.v[i] = static_cast<A*>(layer.v);
      table.scratch[i] = memory, table.place[i] = layer.place;
      table.rows[i] = walk.rows, table.columns[i] = walk.columns, table.inner[i] = walk.inner;
      table.row_tile[i] = static_cast<short>(walk.row_tile);
      table.column_tile[i] = static_cast<short>(walk.column_tile);
      table.swapped[i] = walk.swapped, table.wide[i] = walk.wide;
      table.first_block[i] = static_cast<int>(blocks), finish_first[i] = static_cast<int>(finish_blocks);
      memory += walk.scratch();
      blocks += walk.blocks();
      finish_blocks += 1 + (iterations > 0 || copies != nullptr ? ceil_div(walk.length(true), kVTile) : 0);
    }
    IterateTable<A> finish = table;
    std::copy(finish_first, finish_first + table.layers, finish.first_block);
    A* const result = static_cast<A*>(sigma) + first;
    if (iterations == 0) {
      launch(spectral_product<T, Factor::v>, blocks, stream, table);
      launch(spectral_finish<A>, finish_blocks, stream, finish, false, result);
    }
    for (int64_t k = 0; k < iterations; ++k) {
      launch(spectral_product<T, Factor::u>, blocks, stream, table);
      launch(spectral_product<T, Factor::t_and_v>, blocks, stream, table);
      launch(spectral_finish<A>, finish_blocks, stream, finish, true, result);
    }
  });
}

template <class T>
void scale(const std::vector<SpectralLayer>& layers, double eps, const void* sigma, cudaStream_t stream) {
  using A = acc_t<T>;
  for_chunks(layers, [&](int64_t first, int64_t end) {
    ScaleTable<T> table{};
    table.sigma = static_cast<const A*>(sigma) + first;
    table.eps = A(eps);
    table.layers = static_cast<int>(end - first);
    int64_t blocks = 0;
    for (int i = 0; i < table.layers; ++i) {
      const SpectralLayer& layer = layers[first + i];
      table.weight[i] = static_cast<const T*>(layer.weight), table.out[i] = static_cast<T*>(layer.out);
      table.target[i] = layer.target;
      table.numel[i] = numel_of(layer);
      table.first_block[i] = static_cast<int>(blocks);
      blocks += ceil_div(table.numel[i], kTile<T>);
    }
    launch(spectral_scale<T>, blocks, stream, table);
  });
}

template <class T>
void scale_backward(const std::vector<SpectralLayer>& layers, double eps, const void* sigma, double* scratch,
                    cudaStream_t stream) {
  using A = acc_t<T>;
  for_chunks(layers, [&](int64_t first, int64_t end) {
    DotTable<T> dot{};
    GradTable<T> table{};
    table.parts = dot.parts = reinterpret_cast<A*>(scratch);
    table.sigma = static_cast<const A*>(sigma) + first;
    table.eps = A(eps);
    table.layers = dot.layers = static_cast<int>(end - first);
    int64_t blocks = 0;
    for (int i = 0; i < table.layers; ++i) {
      const SpectralLayer& layer = layers[first + i];
      const Walk walk = plan_walk<T>(layer);
      const void* const left = walk.swapped ? layer.v : layer.u;
      const void* const right = walk.swapped ? layer.u : layer.v;
      dot.grad[i] = table.grad[i] = static_cast<const T*>(layer.grad);
      dot.weight[i] = static_cast<const T*>(layer.weight), table.out[i] = static_cast<T*>(layer.out);
      table.u[i] = static_cast<const A*>(left), table.v[i] = static_cast<const A*>(right);
      table.target[i] = layer.target;
      table.rows[i] = walk.rows, table.columns[i] = walk.columns, table.inner[i] = walk.inner;
      table.wide[i] = walk.inner % kUnit<T> == 0 && all_aligned(layer.grad, layer.out, right);
      dot.numel[i] = numel_of(layer);
      dot.first_block[i] = table.first_block[i] = static_cast<int>(blocks);
      blocks += ceil_div(dot.numel[i], span_of<T>(dot.numel[i]));
    }
    table.first_block[table.layers] = static_cast<int>(blocks);
    launch(spectral_dot<T>, blocks, stream, dot);
    launch(spectral_grad<T>, blocks, stream, table);
  });
}

// Doubles for the largest chunk, of as many items of the accumulation dtype as `of` says for each layer.
template <class A, class F>
int64_t scratch_doubles(const std::vector<SpectralLayer>& layers, const F& of) {
  int64_t most = 0;
  for_chunks(layers, [&](int64_t first, int64_t end) {
    int64_t items = 0;
    for (int64_t i = first; i < end; ++i) items += of(layers[i]);
    most = std::max(most, items);
  });
  return ceil_div(most * static_cast<int64_t>(sizeof(A)), sizeof(double));
}

}  // namespace

int64_t spectral_iterate_scratch(ScalarType dtype, const std::vector<SpectralLayer>& layers) {
  int64_t doubles = 0;
  dispatch_floating("spectral_norm_iterate", dtype, [&](auto tag) {
    using T = decltype(tag);
    doubles = scratch_doubles<acc_t<T>>(layers, [](const SpectralLayer& l) { return plan_walk<T>(l).scratch(); });
  });
  return doubles;
}

int64_t spectral_backward_scratch(ScalarType dtype, const std::vector<SpectralLayer>& layers) {
  int64_t doubles = 0;
  dispatch_floating("spectral_norm_scale_backward", dtype, [&](auto tag) {
    using T = decltype(tag);
    doubles = scratch_doubles<acc_t<T>>(
        layers, [](const SpectralLayer& l) { return ceil_div(numel_of(l), span_of<T>(numel_of(l))); });
  });
  return doubles;
}

void launch_spectral_iterate(ScalarType dtype, const std::vector<SpectralLayer>& layers, int64_t iterations, double eps,
                             void* sigma, void* copies, double* scratch, cudaStream_t stream) {
  dispatch_floating("spectral_norm_iterate", dtype,
                    [&](auto tag) { iterate<decltype(tag)>(layers, iterations, eps, sigma, copies, scratch, stream); });
}

void launch_spectral_scale(ScalarType dtype, const std::vector<SpectralLayer>& layers, double eps, const void* sigma,
                           cudaStream_t stream) {
  dispatch_floating("spectral_norm_scale", dtype, [&](auto tag) { scale<decltype(tag)>(layers, eps, sigma, stream); });
}

void launch_spectral_scale_backward(ScalarType dtype, const std::vector<SpectralLayer>& layers, double eps,
                                    const void* sigma, double* scratch, cudaStream_t stream) {
  dispatch_floating("spectral_norm_scale_backward", dtype,
                    [&](auto tag) { scale_backward<decltype(tag)>(layers, eps, sigma, scratch, stream); });
}

}  // namespace gpkernels::cuda
