// The launchers of the CUDA kernels: raw device pointers, a dtype and a stream, no torch. Nothing here
// synchronises or allocates; where a result is combined from parts, the caller brings the scratch memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "../penalty_derivatives.h"
#include "../philox.h"

namespace gpkernels::cuda {

using torch::headeronly::ScalarType;

// Where eps comes from: given, one a sample (accumulation dtype); drawn, one a sample; or drawn, one an element.
struct EpsSource {
  const void* given;
  const int64_t* seed;  // null where eps is given
  bool per_element;
};

// `elements` of each of `batch` samples. A null gradient is not computed.
void launch_interpolate(ScalarType dtype, const void* real, const void* fake, void* out, EpsSource eps, int64_t batch,
                        int64_t elements, cudaStream_t stream);
void launch_interpolate_backward(ScalarType dtype, const void* grad_out, void* grad_real, void* grad_fake,
                                 EpsSource eps, int64_t batch, int64_t elements, cudaStream_t stream);

// `sigma` is null where it is 1.
void launch_perturb(ScalarType dtype, const void* real, const void* sigma, double scale, Noise noise,
                    const int64_t* seed, void* out, int64_t numel, cudaStream_t stream);
// Doubles of scratch memory.
int64_t perturb_backward_scratch(ScalarType dtype, int64_t numel);
void launch_perturb_backward(ScalarType dtype, const void* grad_out, double scale, Noise noise, const int64_t* seed,
                             void* grad_sigma, double* scratch, int64_t numel, cudaStream_t stream);

struct PenaltyOptions {
  Form form;
  Norm norm;
  Reduction reduction;
  double target;
  double weight;  // of one group in the reduced value
  Groups groups;
};

// Doubles of scratch memory of the forward and of the double backward.
int64_t penalty_scratch(ScalarType dtype, const PenaltyOptions& options);
void launch_penalty(ScalarType dtype, const PenaltyOptions& options, const void* grad, void* value, void* saved,
                    double* scratch, cudaStream_t stream);
void launch_penalty_backward(ScalarType dtype, const PenaltyOptions& options, const void* grad_out, const void* grad,
                             const void* saved, void* grad_grad, cudaStream_t stream);
// `dots` holds one value a group, in the accumulation dtype.
void launch_penalty_double_backward(ScalarType dtype, const PenaltyOptions& options, const void* grad_grad,
                                    const void* grad_out, const void* grad, const void* saved, void* out_grad,
                                    void* out_grad_out, void* dots, double* scratch, cudaStream_t stream);

// Pairs of samples, `elements` each; losses and results are one value a pair, in the accumulation dtype.
struct PairCall {
  int64_t batch, elements;
  double margin, slope;
  const void* real;
  const void* fake;
  const void* loss_real;
  const void* loss_fake;
  void* cost;
  void* delta;
  void* slope_at;
};

// Doubles of scratch memory.
int64_t pairwise_cost_scratch(ScalarType dtype, int64_t batch, int64_t elements);
void launch_pairwise_cost(ScalarType dtype, const PairCall& call, double* scratch, cudaStream_t stream);
// `dtype` is that of all four vectors.
void launch_pairwise_cost_backward(ScalarType dtype, const void* grad_cost, const void* slope_at, void* grad_real,
                                   void* grad_fake, int64_t batch, cudaStream_t stream);

// The first derivative of norm_act, or the second where there is a tangent, of tensors that are not empty. Statistics,
// weight and sums are in the accumulation dtype.
struct NormCall {
  int64_t batch, channels, pixels;
  int64_t groups;           // of a sample's channels, each with statistics; 0: each channel of the batch has
  bool channels_innermost;  // in memory: channels_last, or no pixels
  double slope;
  const void* tangent;  // null in the first derivative
  const void* grad_out;
  const void* x;
  const void* z;  // null: no activation
  const void* mean;
  const void* rstd;
  const void* weight;  // null: ones
  void* out_tangent;   // null in the first derivative
  void* out_x;
  void* channel_sums[2];  // grad_weight and grad_bias, null where not wanted; or in_weight
};

// Doubles of scratch memory.
int64_t norm_scratch(ScalarType dtype, const NormCall& call);
void launch_norm(ScalarType dtype, const NormCall& call, double* scratch, cudaStream_t stream);

// A layer of spectral_norm: contiguous memory (outer, rows, inner), of less than 2^31 rows and columns, with at least
// one element. u and v are in the accumulation dtype. A call uses the pointers that it needs.
struct SpectralLayer {
  int64_t outer, rows, inner;
  int64_t place;  // of u, then v, in copies of all vectors
  double target;
  const void* weight;
  const void* grad;
  void* u;
  void* v;
  void* out;
};

// Doubles of scratch memory.
int64_t spectral_iterate_scratch(ScalarType dtype, const std::vector<SpectralLayer>& layers);
int64_t spectral_backward_scratch(ScalarType dtype, const std::vector<SpectralLayer>& layers);
// `sigma` is one value a layer; `copies` is where u and v go, too, or null.
void launch_spectral_iterate(ScalarType dtype, const std::vector<SpectralLayer>& layers, int64_t iterations, double eps,
                             void* sigma, void* copies, double* scratch, cudaStream_t stream);
void launch_spectral_scale(ScalarType dtype, const std::vector<SpectralLayer>& layers, double eps, const void* sigma,
                           cudaStream_t stream);
void launch_spectral_scale_backward(ScalarType dtype, const std::vector<SpectralLayer>& layers, double eps,
                                    const void* sigma, double* scratch, cudaStream_t stream);

}  // namespace gpkernels::cuda
