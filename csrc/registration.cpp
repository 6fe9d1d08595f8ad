// Which C++ function implements which op of gpkernels/ops/_library.py, on the CPU.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) {
  m.impl("interpolate", TORCH_BOX(&gpkernels::cpu::interpolate));
  m.impl("interpolate_backward", TORCH_BOX(&gpkernels::cpu::interpolate_backward));
  m.impl("perturb", TORCH_BOX(&gpkernels::cpu::perturb));
  m.impl("perturb_backward", TORCH_BOX(&gpkernels::cpu::perturb_backward));
  m.impl("grad_norm_penalty", TORCH_BOX(&gpkernels::cpu::grad_norm_penalty));
  m.impl("grad_norm_penalty_backward", TORCH_BOX(&gpkernels::cpu::grad_norm_penalty_backward));
  m.impl("grad_norm_penalty_double_backward", TORCH_BOX(&gpkernels::cpu::grad_norm_penalty_double_backward));
  m.impl("pairwise_cost", TORCH_BOX(&gpkernels::cpu::pairwise_cost));
  m.impl("pairwise_cost_backward", TORCH_BOX(&gpkernels::cpu::pairwise_cost_backward));
  m.impl("norm_act_backward", TORCH_BOX(&gpkernels::cpu::norm_act_backward));
  m.impl("norm_act_double_backward", TORCH_BOX(&gpkernels::cpu::norm_act_double_backward));
  m.impl("conv2d_input_gradient", TORCH_BOX(&gpkernels::cpu::conv2d_input_gradient));
  m.impl("spectral_norm_iterate", TORCH_BOX(&gpkernels::cpu::spectral_norm_iterate));
  m.impl("spectral_norm_update", TORCH_BOX(&gpkernels::cpu::spectral_norm_update));
  m.impl("spectral_norm_scale", TORCH_BOX(&gpkernels::cpu::spectral_norm_scale));
  m.impl("spectral_norm_scale_backward", TORCH_BOX(&gpkernels::cpu::spectral_norm_scale_backward));
}
