// Which C++ function implements which op of gpkernels/ops/_library.py, on CUDA devices.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(GPK_LIBRARY, GPK_DEVICE, m) {
  m.impl("interpolate", TORCH_BOX(&gpkernels::cuda::interpolate));
  m.impl("interpolate_backward", TORCH_BOX(&gpkernels::cuda::interpolate_backward));
  m.impl("perturb", TORCH_BOX(&gpkernels::cuda::perturb));
  m.impl("perturb_backward", TORCH_BOX(&gpkernels::cuda::perturb_backward));
  m.impl("grad_norm_penalty", TORCH_BOX(&gpkernels::cuda::grad_norm_penalty));
  m.impl("grad_norm_penalty_backward", TORCH_BOX(&gpkernels::cuda::grad_norm_penalty_backward));
  m.impl("grad_norm_penalty_double_backward", TORCH_BOX(&gpkernels::cuda::grad_norm_penalty_double_backward));
  m.impl("pairwise_cost", TORCH_BOX(&gpkernels::cuda::pairwise_cost));
  m.impl("pairwise_cost_backward", TORCH_BOX(&gpkernels::cuda::pairwise_cost_backward));
  m.impl("norm_act_backward", TORCH_BOX(&gpkernels::cuda::norm_act_backward));
  m.impl("norm_act_double_backward", TORCH_BOX(&gpkernels::cuda::norm_act_double_backward));
  m.impl("spectral_norm_iterate", TORCH_BOX(&gpkernels::cuda::spectral_norm_iterate));
  m.impl("spectral_norm_update", TORCH_BOX(&gpkernels::cuda::spectral_norm_update));
  m.impl("spectral_norm_scale", TORCH_BOX(&gpkernels::cuda::spectral_norm_scale));
  m.impl("spectral_norm_scale_backward", TORCH_BOX(&gpkernels::cuda::spectral_norm_scale_backward));
}
