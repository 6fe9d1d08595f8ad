// spectral_norm: power iterations of many weights, the weights over their singular values, and the gradient of these.
//
// A weight that fits a thread's cache is one task, which reads it from memory once. Larger ones are cut into blocks of
// slabs, whose sums are kept and added in order: no result depends on the number of threads.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cmath>
#include <memory>
#include <vector>

#include "data.h"
#include "empty.h"
#include "kernels.h"
#include "spectral_loops.h"
#include "spectral_tasks.h"
#include "stream.h"

namespace gpkernels::cpu {
namespace {

template <class T>
class Iteration {
  using A = acc_t<T>;

 public:
  Iteration(const T* w, const SpectralShape& shape, A* u, A* v, double eps) : s_(shape), w_(w), eps_(eps) {
    u_ = s_.rows ? Side{u, s_.slabs, false} : Side{u, s_.length / s_.inner, true};
    v_ = s_.rows ? Side{v, s_.length, true} : Side{v, s_.slabs * s_.inner, false};
    const int64_t parts = s_.blocks() * s_.length, expanded = s_.inner == 1 ? 0 : s_.length;
    scratch_.reset(new A[parts + std::max(u_.size, v_.size) + expanded]);
    image_ = scratch_.get() + parts;
    expanded_ = image_ + std::max(u_.size, v_.size);
  }

  const Slabs& slabs() const {
    return s_;
  }

  // W^T u or W v, a block at a time; `finish` makes it the new v or u.
  void prepare(bool to_u) {
    const Side& from = to_u ? v_ : u_;
    if (from.along && s_.inner > 1)
      for (int64_t r = 0; r < from.size; ++r) std::fill_n(expanded_ + r * s_.inner, s_.inner, from.x[r]);
  }
  void product(bool to_u, int64_t block) {
    const Side& from = to_u ? v_ : u_;
    const int64_t first = s_.begin(block), count = s_.count(block), inner = s_.inner;
    const T* w = w_ + first * s_.length;
    A* parts = scratch_.get() + block * s_.length;
    if (inner == 1) {
      if (from.along)
        dot_each_row(w, count, s_.length, s_.length, from.x, image_ + first);
      else
        sum_scaled_rows(w, count, s_.length, s_.length, from.x + first, parts);
      return;
    }
    std::vector<A> tile(s_.span());
    if (from.along)
      dot_each_class(w, count, s_.length, expanded_, inner, s_.span(), tile.data(), image_ + first * inner);
    else
      sum_patterned_rows(w, count, s_.length, from.x + first * inner, inner, s_.span(), tile.data(), parts);
  }
  // Returns the norm of the image; moves the vector to its direction if `keep` is false.
  void finish(bool to_u, bool keep) {
    const Side& to = to_u ? u_ : v_;
    double squares;
    if (to.along) {
      A* sums = s_.inner == 1 ? image_ : scratch_.get();
      squares = add_parts(scratch_.get(), s_.blocks(), s_.length, s_.length, sums);
      if (s_.inner > 1) {
        for (int64_t r = 0; r < to.size; ++r) {
          double sum = 0;
          for (int64_t b = 0; b < s_.inner; ++b) sum += static_cast<double>(sums[r * s_.inner + b]);
          image_[r] = static_cast<A>(sum);
        }
        squares = dot(image_, image_, to.size);
      }
    } else {
      squares = dot(image_, image_, to.size);
    }
    const double norm = std::sqrt(squares);
    if (!keep && norm > eps_) multiply(image_, static_cast<A>(1 / norm), to.size, to.x);
  }
  A sigma() const {
    return static_cast<A>(dot(u_.x, image_, u_.size));
  }
  void copy_vectors(A* u, A* v) const {
    std::copy_n(u_.x, u_.size, u);
    std::copy_n(v_.x, v_.size, v);
  }
  void run_alone(int64_t iterations) {
    for (int64_t i = 0; i < std::max<int64_t>(iterations, 1); ++i)
      for (const bool to_u : {false, true}) {
        if (iterations == 0 && !to_u) continue;
        prepare(to_u);
        for (int64_t block = 0; block < s_.blocks(); ++block) product(to_u, block);
        finish(to_u, iterations == 0);
      }
  }

 private:
  struct Side {
    A* x;
    int64_t size;
    bool along;  // whether it has elements for those of a slab, not for slabs
  };
  Slabs s_;
  const T* w_;
  double eps_;
  Side u_, v_;
  std::unique_ptr<A[]> scratch_;  // sums of blocks, then image_ and expanded_
  A* image_;
  A* expanded_;
};

// Whole layers first, together; then each that is cut from its first pass to its last, which finds in the shared cache
// what the pass before it has read. `after` is called with every layer, or block of it, once its sigma is known.
template <class T, class F>
void iterate_all(std::vector<Iteration<T>>& layers, int64_t iterations, acc_t<T>* sigma, const F& after) {
  const int64_t count = static_cast<int64_t>(layers.size()), passes = std::max<int64_t>(iterations, 1);
  std::vector<Slabs> slabs;
  for (const Iteration<T>& layer : layers) slabs.push_back(layer.slabs());
  const std::vector<bool> whole = whole_layers(slabs);
  Tasks small;
  for (int64_t i = 0; i < count; ++i)
    if (whole[i]) small.add(i, -1, slabs[i].numel());
  small.run(false, [&](int64_t layer, int64_t) {
    layers[layer].run_alone(iterations);
    sigma[layer] = layers[layer].sigma();
    after(layer, 0, slabs[layer].numel());
  });
  for (int64_t i = 0; i < count; ++i) {
    if (whole[i]) continue;
    Iteration<T>& layer = layers[i];
    const Slabs& s = slabs[i];
    Tasks blocks;
    blocks.add_blocks(0, s);
    for (int64_t pass = 0; pass < passes; ++pass)
      for (const bool to_u : {false, true}) {
        if (iterations == 0 && !to_u) continue;
        layer.prepare(to_u);
        blocks.run(to_u, [&](int64_t, int64_t block) { layer.product(to_u, block); });
        layer.finish(to_u, iterations == 0);
      }
    sigma[i] = layer.sigma();
    blocks.run(false, [&](int64_t, int64_t block) { after(i, s.begin(block) * s.length, s.count(block) * s.length); });
  }
}

// Asks for large pages before memory that the allocator fetches anew at every call is touched: otherwise the faults of
// small pages take longer than the work.
void prefer_large_pages(Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uint64_t kLarge = uint64_t(1) << 22, kPage = uint64_t(1) << 21;
  const uint64_t bytes = static_cast<uint64_t>(x.numel() * x.element_size());
  if (bytes < kLarge) return;
  const uint64_t address = reinterpret_cast<uint64_t>(x.mutable_data_ptr());
  const uint64_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

std::vector<Tensor> results_like(const std::vector<Tensor>& weights) {
  std::vector<Tensor> results;
  results.reserve(weights.size());
  for (const Tensor& w : weights) {
    results.push_back(new_result_like(w));
    prefer_large_pages(results.back());
  }
  return results;
}

// What a layer's weight or gradient is multiplied by.
template <class A>
A factor(A sigma, double target, double eps) {
  return sigma <= eps ? static_cast<A>(target) : static_cast<A>(target / static_cast<double>(sigma));
}

// Normalised weights, from `begin` on `count` elements at a time.
template <class T>
class Scaling {
  using A = acc_t<T>;

 public:
  Scaling(const std::vector<Tensor>& weights, std::vector<Tensor>& results, const A* sigma,
          const std::vector<double>& targets, double eps)
      : writer_(results), sigma_(sigma), targets_(targets), eps_(eps) {
    for (const Tensor& w : weights) from_.push_back(data<T>(w));
    for (Tensor& x : results) to_.push_back(mutable_data<T>(x));
  }
  void run(int64_t layer, int64_t begin, int64_t count) const {
    const A by = factor(sigma_[layer], targets_[layer], eps_);
    const T* w = from_[layer] + begin;
    writer_.write(to_[layer] + begin, count, kPiece,
                  [&](int64_t i, int64_t width, T* out) { scale_weight(w + i, by, width, out); });
  }

 private:
  const Writer<T> writer_;
  const A* sigma_;
  const std::vector<double>& targets_;
  double eps_;
  std::vector<const T*> from_;
  std::vector<T*> to_;
};

template <class T>
std::vector<Iteration<T>> iterations_of(const std::vector<Tensor>& weights, const std::vector<SpectralShape>& shapes,
                                        std::vector<Tensor>& u, std::vector<Tensor>& v, double eps) {
  using A = acc_t<T>;
  std::vector<Iteration<T>> layers;
  layers.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i)
    layers.emplace_back(data<T>(weights[i]), shapes[i], mutable_data<A>(u[i]), mutable_data<A>(v[i]), eps);
  return layers;
}

// Weights for elementwise work: blocks of kBlock elements.
int64_t pieces(int64_t elements) {
  return (elements + kBlock - 1) / kBlock;
}

}  // namespace

Tensor spectral_norm_iterate(const std::vector<Tensor>& weights, std::vector<Tensor> u, std::vector<Tensor> v,
                             const std::vector<int64_t>& dims, int64_t iterations, double eps) {
  const std::vector<SpectralShape> shapes = checked_spectral_shapes(weights, u, v, dims);
  STD_TORCH_CHECK(iterations >= 0, "iterations: wanted 0 or more, got ", iterations);
  Tensor sigma = new_result({static_cast<int64_t>(weights.size())}, spectral_dtype(weights));
  dispatch_floating("spectral_norm_iterate", weights[0].scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    auto layers = iterations_of<T>(weights, shapes, u, v, eps);
    iterate_all(layers, iterations, mutable_data<acc_t<T>>(sigma), [](int64_t, int64_t, int64_t) {});
  });
  return sigma;
}

std::tuple<Tensor, Tensor> spectral_norm_update(const std::vector<Tensor>& weights, std::vector<Tensor> u,
                                                std::vector<Tensor> v, std::vector<Tensor> results,
                                                const std::vector<int64_t>& dims, const std::vector<double>& targets,
                                                int64_t iterations, double eps) {
  const std::vector<SpectralShape> shapes = checked_spectral_shapes(weights, u, v, dims);
  check_layers("targets", targets.size(), weights.size());
  STD_TORCH_CHECK(iterations >= 0, "iterations: wanted 0 or more, got ", iterations);
  check_layers("results", results.size(), weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    check_like("results", results[i], "weights", weights[i]);
    prefer_large_pages(results[i]);
  }
  const SpectralVectors places(shapes);
  Tensor sigma = new_result({static_cast<int64_t>(weights.size())}, spectral_dtype(weights));
  Tensor vectors = new_result({places.size}, spectral_dtype(weights));
  dispatch_floating("spectral_norm_update", weights[0].scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    A* const sigmas = mutable_data<A>(sigma);
    A* const copies = mutable_data<A>(vectors);
    std::fill_n(copies, places.size, A(0));
    auto layers = iterations_of<T>(weights, shapes, u, v, eps);
    const Scaling<T> scaling(weights, results, sigmas, targets, eps);
    iterate_all(layers, iterations, sigmas, [&](int64_t layer, int64_t begin, int64_t count) {
      if (begin == 0) layers[layer].copy_vectors(copies + places.u[layer], copies + places.v[layer]);
      scaling.run(layer, begin, count);
    });
  });
  return {sigma, vectors};
}

std::vector<Tensor> spectral_norm_scale(const std::vector<Tensor>& weights, const Tensor& sigma,
                                        const std::vector<double>& targets, double eps) {
  check_layers("targets", targets.size(), weights.size());
  check_weights(weights);
  check_vector("sigma", sigma, static_cast<int64_t>(weights.size()), spectral_dtype(weights));
  std::vector<Tensor> results = results_like(weights);
  if (weights.empty()) return results;
  Tasks tasks;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t elements = weights[i].numel();
    for (int64_t b = 0; b < pieces(elements); ++b) tasks.add(i, b, std::min(kBlock, elements - b * kBlock));
  }
  dispatch_floating("spectral_norm_scale", weights[0].scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Scaling<T> scaling(weights, results, data<acc_t<T>>(sigma), targets, eps);
    tasks.run(false, [&](int64_t layer, int64_t block) {
      const int64_t begin = block * kBlock;
      scaling.run(layer, begin, std::min(kBlock, weights[layer].numel() - begin));
    });
  });
  return results;
}

std::vector<Tensor> spectral_norm_scale_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                                                 const Tensor& vectors, const Tensor& sigma,
                                                 const std::vector<int64_t>& dims, const std::vector<double>& targets,
                                                 double eps) {
  const std::vector<SpectralShape> shapes = checked_spectral_shapes(weights, vectors, dims);
  const SpectralVectors places(shapes);
  const int64_t layers = static_cast<int64_t>(weights.size());
  check_layers("grads", grads.size(), weights.size());
  check_layers("targets", targets.size(), weights.size());
  check_vector("sigma", sigma, layers, spectral_dtype(weights));
  const std::vector<Slabs> slabs(shapes.begin(), shapes.end());
  const std::vector<bool> whole = whole_layers(slabs);
  Tasks small;
  std::vector<int64_t> starts(layers);  // of a layer's blocks among all
  int64_t blocks = 0;
  for (int64_t i = 0; i < layers; ++i) {
    check_like("grads", grads[i], "weights", weights[i]);
    starts[i] = blocks;
    blocks += slabs[i].blocks();
    if (whole[i]) small.add(i, -1, slabs[i].numel());
  }
  std::vector<Tensor> results = results_like(weights);
  std::vector<double> sums(blocks);
  dispatch_floating("spectral_norm_scale_backward", weights[0].scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const A* sigmas = data<A>(sigma);
    auto u = [&](int64_t layer) { return data<A>(vectors) + places.u[layer]; };
    auto v = [&](int64_t layer) { return data<A>(vectors) + places.v[layer]; };
    const Writer<T> writer(results);
    std::vector<std::vector<A>> expanded(layers);
    for (int64_t i = 0; i < layers; ++i) {
      if (slabs[i].inner == 1) continue;
      const A* rows = u(i);
      expanded[i].resize(slabs[i].length);
      for (int64_t j = 0; j < slabs[i].length; ++j) expanded[i][j] = rows[j / slabs[i].inner];
    }
    auto sum = [&](int64_t layer, int64_t block) {
      const Slabs& s = slabs[layer];
      const int64_t begin = s.begin(block) * s.length;
      sums[starts[layer] + block] =
          dot_weights(data<T>(grads[layer]) + begin, data<T>(weights[layer]) + begin, s.count(block) * s.length);
    };
    auto map = [&](int64_t layer, int64_t block) {
      const Slabs& s = slabs[layer];
      double total = 0;
      for (int64_t b = 0; b < s.blocks(); ++b) total += sums[starts[layer] + b];
      const bool dead = sigmas[layer] <= eps;
      const A by = factor(sigmas[layer], targets[layer], eps);
      const A share = dead ? A(0) : static_cast<A>(total / static_cast<double>(sigmas[layer]));
      const int64_t first_slab = s.begin(block), offset = first_slab * s.length;
      const T* g = data<T>(grads[layer]) + offset;
      T* out = mutable_data<T>(results[layer]) + offset;
      const A* across = (s.rows ? u(layer) : v(layer)) + first_slab * s.inner;
      std::vector<A> tile(s.inner == 1 ? 0 : s.span());
      const A* along = s.inner == 1 ? (s.rows ? v(layer) : u(layer)) : expanded[layer].data();
      writer.write(out, s.count(block) * s.length, s.length, [&](int64_t i, int64_t, T* to) {
        const A* factors = across + i / s.length * s.inner;
        if (s.inner == 1)
          subtract_rank_one(g + i, s.length, by, share * *factors, along, to);
        else
          subtract_patterned(g + i, s.length, by, share, factors, along, s.inner, s.span(), tile.data(), to);
      });
    };
    small.run(false, [&](int64_t layer, int64_t) {
      for (int64_t b = 0; b < slabs[layer].blocks(); ++b) sum(layer, b);
      for (int64_t b = 0; b < slabs[layer].blocks(); ++b) map(layer, b);
    });
    for (int64_t i = 0; i < layers; ++i) {
      if (whole[i]) continue;
      Tasks large;
      large.add_blocks(i, slabs[i]);
      large.run(false, sum);
      large.run(true, map);
    }
  });
  return results;
}

}  // namespace gpkernels::cpu
