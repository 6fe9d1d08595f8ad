// Runs every kernel on buffers of the exact size, for the sanitizers: no torch, whose threads they would watch too.
//
//   driver          all kernels; fails where a result is not written
//   driver race     a kernel that lacks a barrier: ThreadSanitizer must report it
//   driver overrun  a kernel given a size larger than its memory: AddressSanitizer must report it
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "launch.h"

using namespace gpkernels;
using namespace gpkernels::cuda;

namespace {

int64_t item_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

ScalarType accumulation(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// `shift` items into a 16-byte aligned allocation that ends with the last item. Bytes 0xFF are a NaN in every dtype.
class Buffer {
 public:
  Buffer(ScalarType dtype, int64_t items, int64_t shift = 0)
      : size_(item_size(dtype)), items_(items), shift_(shift), data_(std::malloc(size_ * (items + shift) + 1)) {
    std::memset(data_, 0xFF, size_ * (items + shift));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    std::free(data_);
  }
  void* get() const {
    return static_cast<char*>(data_) + size_ * shift_;
  }
  const Buffer& fill() const {
    for (int64_t i = 0; i < items_; ++i) {
      const double value = static_cast<double>(i * 37 % 101) / 101 - 0.45;
      char* item = static_cast<char*>(get()) + i * size_;
      if (size_ == 8) std::memcpy(item, &value, 8);
      const float single = static_cast<float>(value);
      if (size_ == 4) std::memcpy(item, &single, 4);
      const uint16_t half = static_cast<uint16_t>(0x3000 + i % 61);  // a small number in fp16 and bf16
      if (size_ == 2) std::memcpy(item, &half, 2);
    }
    return *this;
  }
  void check(const char* what) const {
    static const unsigned char nan[8] = {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};
    for (int64_t i = 0; i < items_; ++i)
      if (std::memcmp(static_cast<char*>(get()) + i * size_, nan, size_) == 0) {
        std::fprintf(stderr, "%s: item %ld of %ld is not written\n", what, static_cast<long>(i),
                     static_cast<long>(items_));
        std::exit(1);
      }
  }

 private:
  int64_t size_, items_, shift_;
  void* data_;
};

const int64_t seed[2] = {3, 4};

void run_sampling(ScalarType dtype, int64_t batch, int64_t elements, int64_t shift) {
  const int64_t numel = batch * elements;
  Buffer real(dtype, numel, shift), fake(dtype, numel, shift), out(dtype, numel, shift), other(dtype, numel, shift);
  Buffer eps(accumulation(dtype), batch), sigma(accumulation(dtype), 1), sum(accumulation(dtype), 1);
  real.fill(), fake.fill(), eps.fill(), sigma.fill();
  for (const EpsSource source :
       {EpsSource{eps.get(), nullptr, false}, EpsSource{nullptr, seed, false}, EpsSource{nullptr, seed, true}}) {
    launch_interpolate(dtype, real.get(), fake.get(), out.get(), source, batch, elements, nullptr);
    launch_interpolate_backward(dtype, real.get(), other.get(), out.get(), source, batch, elements, nullptr);
    out.check("interpolate");
    other.check("interpolate_backward");
  }
  Buffer noisy(dtype, numel, shift), scratch(ScalarType::Double, perturb_backward_scratch(dtype, numel));
  launch_perturb(dtype, real.get(), sigma.get(), 0.5, Noise::normal, seed, noisy.get(), numel, nullptr);
  noisy.check("perturb");
  launch_perturb_backward(dtype, real.get(), 0.5, Noise::uniform, seed, sum.get(), static_cast<double*>(scratch.get()),
                          numel, nullptr);
  sum.check("perturb_backward");
}

void run_penalty(ScalarType dtype, Norm norm, Reduction reduction, Groups groups, int64_t shift) {
  const int64_t numel = groups.count() * groups.reduce, values = reduction == Reduction::none ? groups.count() : 1;
  const PenaltyOptions options{Form::two_sided, norm, reduction, 1.0, 1.0, groups};
  const ScalarType sums = accumulation(dtype);
  Buffer grad(dtype, numel, shift), tangent(dtype, numel, shift), first(dtype, numel, shift);
  Buffer second(dtype, numel, shift), value(sums, values), saved(sums, (norm == Norm::linf ? 2 : 1) * groups.count());
  Buffer upstream(sums, values), in_upstream(sums, values), dots(sums, groups.count());
  Buffer scratch(ScalarType::Double, penalty_scratch(dtype, options));
  grad.fill(), tangent.fill(), upstream.fill();
  double* doubles = static_cast<double*>(scratch.get());
  launch_penalty(dtype, options, grad.get(), value.get(), saved.get(), doubles, nullptr);
  launch_penalty_backward(dtype, options, upstream.get(), grad.get(), saved.get(), first.get(), nullptr);
  launch_penalty_double_backward(dtype, options, tangent.get(), upstream.get(), grad.get(), saved.get(), second.get(),
                                 in_upstream.get(), dots.get(), doubles, nullptr);
  value.check("value"), saved.check("saved"), first.check("backward");
  second.check("double backward"), in_upstream.check("double backward in grad_out");
}

void run_pairs(ScalarType dtype, int64_t batch, int64_t elements, int64_t shift) {
  const ScalarType sums = accumulation(dtype);
  Buffer real(dtype, batch * elements, shift), fake(dtype, batch * elements, shift);
  Buffer loss_real(sums, batch), loss_fake(sums, batch), cost(sums, batch), delta(sums, batch), slope_at(sums, batch);
  Buffer grad_real(sums, batch), grad_fake(sums, batch);
  Buffer scratch(ScalarType::Double, pairwise_cost_scratch(dtype, batch, elements));
  for (const Buffer* given : {&real, &fake, &loss_real, &loss_fake}) given->fill();
  const PairCall call{batch,           elements,        0.01,       -0.5,        real.get(),    fake.get(),
                      loss_real.get(), loss_fake.get(), cost.get(), delta.get(), slope_at.get()};
  launch_pairwise_cost(dtype, call, static_cast<double*>(scratch.get()), nullptr);
  cost.check("cost"), delta.check("delta"), slope_at.check("slope_at");
  launch_pairwise_cost_backward(sums, cost.get(), slope_at.get(), grad_real.get(), grad_fake.get(), batch, nullptr);
  grad_real.check("pairwise_cost_backward"), grad_fake.check("pairwise_cost_backward in loss_fake");
}

struct NormCase {
  int64_t batch, channels, pixels, groups;
  bool channels_innermost;
};

void run_norm(ScalarType dtype, NormCase of, int64_t shift) {
  const int64_t numel = of.batch * of.channels * of.pixels;
  const int64_t groups = of.groups == 0 ? of.channels : of.batch * of.groups;
  const ScalarType sums = accumulation(dtype);
  Buffer tangent(dtype, numel, shift), grad_out(dtype, numel, shift), x(dtype, numel, shift), z(dtype, numel, shift);
  Buffer mean(sums, groups), rstd(sums, groups), weight(sums, of.channels);
  for (const Buffer* given : {&tangent, &grad_out, &x, &z, &mean, &rstd, &weight}) given->fill();
  Buffer first(dtype, numel, shift), second(dtype, numel, shift), third(dtype, numel, shift);
  Buffer grad_weight(sums, of.channels), grad_bias(sums, of.channels), in_weight(sums, of.channels);
  const auto launch_with_scratch = [&](const NormCall& call) {
    Buffer scratch(ScalarType::Double, norm_scratch(dtype, call));
    launch_norm(dtype, call, static_cast<double*>(scratch.get()), nullptr);
  };
  NormCall call{of.batch, of.channels, of.pixels, of.groups, of.channels_innermost, 0.2};
  call.grad_out = grad_out.get(), call.x = x.get(), call.z = z.get();
  call.mean = mean.get(), call.rstd = rstd.get(), call.weight = weight.get();
  call.out_x = first.get();
  launch_with_scratch(call);
  first.check("norm backward without affine");
  call.channel_sums[0] = grad_weight.get(), call.channel_sums[1] = grad_bias.get();
  launch_with_scratch(call);
  grad_weight.check("norm grad_weight"), grad_bias.check("norm grad_bias");
  call.tangent = tangent.get(), call.out_tangent = second.get(), call.out_x = third.get();
  call.channel_sums[0] = in_weight.get(), call.channel_sums[1] = nullptr;
  launch_with_scratch(call);
  second.check("norm double backward"), third.check("norm double backward in x"), in_weight.check("norm in_weight");
}

void run_spectral(ScalarType dtype, const std::vector<SpectralLayer>& shapes, int64_t shift) {
  const ScalarType sums = accumulation(dtype);
  std::vector<SpectralLayer> layers = shapes;
  std::vector<std::unique_ptr<Buffer>> given, made;
  const auto buffer = [&](auto& where, ScalarType type, int64_t items) {
    where.push_back(std::make_unique<Buffer>(type, items, shift));
    return where.back()->get();
  };
  for (SpectralLayer& layer : layers) {
    const int64_t numel = layer.outer * layer.rows * layer.inner;
    layer.weight = buffer(given, dtype, numel), layer.grad = buffer(given, dtype, numel);
    layer.u = buffer(given, sums, layer.rows), layer.v = buffer(given, sums, layer.outer * layer.inner);
    layer.out = buffer(made, dtype, numel);
    layer.target = 1.5;
  }
  for (const auto& one : given) one->fill();
  const Buffer sigma(sums, static_cast<int64_t>(layers.size()));
  for (const int64_t iterations : {0, 2}) {
    Buffer scratch(ScalarType::Double, spectral_iterate_scratch(dtype, layers));
    launch_spectral_iterate(dtype, layers, iterations, 1e-12, sigma.get(), nullptr, static_cast<double*>(scratch.get()),
                            nullptr);
    for (const auto& one : given) one->check("spectral norm u, v");
    sigma.check("spectral norm sigma");
  }
  launch_spectral_scale(dtype, layers, 1e-12, sigma.get(), nullptr);
  for (const auto& one : made) one->check("spectral norm scale");
  Buffer scratch(ScalarType::Double, spectral_backward_scratch(dtype, layers));
  for (SpectralLayer& layer : layers) layer.out = buffer(made, dtype, layer.outer * layer.rows * layer.inner);
  launch_spectral_scale_backward(dtype, layers, 1e-12, sigma.get(), static_cast<double*>(scratch.get()), nullptr);
  for (const auto& one : made) one->check("spectral norm backward");
}

__global__ void racy(float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  if (what == "race") {
    Buffer out(ScalarType::Float, kThreads);
    launch(racy, 1, nullptr, static_cast<float*>(out.get()));
    return 0;
  }
  if (what == "overrun") {
    Buffer short_one(ScalarType::Float, 100), out(ScalarType::Float, 128);
    launch_perturb(ScalarType::Float, short_one.fill().get(), nullptr, 0.5, Noise::normal, seed, out.get(), 128,
                   nullptr);
    return 0;
  }
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Double}) {
    run_sampling(dtype, 3, 1000, 0);
    run_sampling(dtype, 5, 1777, 1);
    for (const Norm norm : {Norm::l2, Norm::l1, Norm::linf}) {
      run_penalty(dtype, norm, Reduction::mean, {2, 16400, 1}, 0);  // rows split over blocks
      run_penalty(dtype, norm, Reduction::mean, {3, 2000, 1}, 0);   // a row a block
      run_penalty(dtype, norm, Reduction::none, {19, 37, 1}, 1);    // several rows a block, unaligned
      run_penalty(dtype, norm, Reduction::sum, {2, 40, 72}, 0);     // columns shared by threads
      run_penalty(dtype, norm, Reduction::mean, {2, 3, 301}, 1);    // columns, unaligned
    }
    run_pairs(dtype, 2, 16400, 0);                       // rows split over blocks
    run_pairs(dtype, 3, 2000, 1);                        // a row a block, unaligned
    run_pairs(dtype, 300, 37, 0);                        // several rows a block
    const int64_t split = 33'000 / item_size(dtype);     // elements of a group that two blocks share
    run_norm(dtype, {1, 2, split / 2, 1, false}, 0);     // runs
    run_norm(dtype, {3, 6, 35, 3, false}, 1);            // several groups of runs a block, unaligned
    run_norm(dtype, {40, 2, 64, 0, false}, 0);           // runs of a batch
    run_norm(dtype, {1, split, 1, 1, true}, 0);          // a sample over several blocks
    run_norm(dtype, {70, 36, 1, 2, true}, 1);            // several samples a block, channels in parts
    run_norm(dtype, {1, 8, split / 8 + 1, 4, true}, 0);  // bands of several groups
    run_norm(dtype, {1, 300, 5, 1, true}, 1);            // bands of a part of a group
    run_norm(dtype, {split / 4 + 1, 4, 1, 0, true}, 0);  // bands of a batch
    // Rows by parts; columns by parts; several panels; the transpose of both.
    const std::vector<SpectralLayer> layers{{1, 70, 72}, {1, 9, 1100}, {5, 40, 16}, {3, 7, 5}, {80, 530, 1}};
    run_spectral(dtype, layers, 0);
    run_spectral(dtype, layers, 1);
  }
  std::puts("all kernels ran");
}
