// grad_norm_penalty on torch tensors: checks, results, and the launches on torch's current stream.
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../checks.h"
#include "../group_shapes.h"
#include "device.h"
#include "kernels.h"
#include "ops.h"

namespace gpkernels::cuda {
namespace {

// Decodes and checks what the three entry points have in common.
PenaltyOptions checked_options(const Tensor& grad, int64_t form, double target, int64_t norm, int64_t axes,
                               int64_t reduction) {
  PenaltyOptions options{checked_enum<Form>("form", form),
                         checked_enum<Norm>("norm", norm),
                         checked_enum<Reduction>("reduction", reduction),
                         target,
                         1.0,
                         {}};
  const Axes kind = checked_enum<Axes>("axes", axes);
  check_dense("grad", grad, kDevice);
  options.groups = groups_of(grad, kind);
  if (options.reduction == Reduction::mean) options.weight = 1.0 / static_cast<double>(options.groups.count());
  return options;
}

// Rows of the saved tensor: the norms and, for linf, how many elements attain them.
int64_t saved_rows(const PenaltyOptions& options) {
  return options.norm == Norm::linf ? 2 : 1;
}

void check_saved(const PenaltyOptions& options, const Tensor& grad, const Tensor& grad_out, const Tensor& saved) {
  const ScalarType dtype = accumulation_dtype(grad);
  const int64_t count = options.groups.count();
  check_vector("grad_out", grad_out, options.reduction == Reduction::none ? count : 1, dtype, kDevice);
  check_vector("saved", saved, saved_rows(options) * count, dtype, kDevice);
  check_same_device("grad_out", grad_out, "grad", grad);
  check_same_device("saved", saved, "grad", grad);
}

}  // namespace

std::tuple<Tensor, Tensor> grad_norm_penalty(const Tensor& grad, int64_t form, double target, int64_t norm,
                                             int64_t axes, int64_t reduction) {
  const PenaltyOptions options = checked_options(grad, form, target, norm, axes, reduction);
  const OnDevice device(grad);
  const ScalarType dtype = accumulation_dtype(grad);
  const std::vector<int64_t> shape = groups_shape(grad, static_cast<Axes>(axes));
  std::vector<int64_t> saved_shape{saved_rows(options)};
  saved_shape.insert(saved_shape.end(), shape.begin(), shape.end());
  Tensor saved = torch::stable::new_empty(grad, saved_shape, dtype);
  Tensor value =
      torch::stable::new_empty(grad, options.reduction == Reduction::none ? shape : std::vector<int64_t>{}, dtype);
  Tensor scratch = torch::stable::new_empty(grad, {penalty_scratch(grad.scalar_type(), options)}, ScalarType::Double);
  launch_penalty(grad.scalar_type(), options, grad.const_data_ptr(), value.mutable_data_ptr(), saved.mutable_data_ptr(),
                 doubles(scratch), device.stream());
  return {value, saved};
}

Tensor grad_norm_penalty_backward(const Tensor& grad_out, const Tensor& grad, const Tensor& saved, int64_t form,
                                  double target, int64_t norm, int64_t axes, int64_t reduction) {
  const PenaltyOptions options = checked_options(grad, form, target, norm, axes, reduction);
  check_saved(options, grad, grad_out, saved);
  const OnDevice device(grad);
  Tensor grad_grad = torch::stable::empty_like(grad);
  launch_penalty_backward(grad.scalar_type(), options, grad_out.const_data_ptr(), grad.const_data_ptr(),
                          saved.const_data_ptr(), grad_grad.mutable_data_ptr(), device.stream());
  return grad_grad;
}

std::tuple<Tensor, Tensor> grad_norm_penalty_double_backward(const Tensor& grad_grad, const Tensor& grad_out,
                                                             const Tensor& grad, const Tensor& saved, int64_t form,
                                                             double target, int64_t norm, int64_t axes,
                                                             int64_t reduction) {
  const PenaltyOptions options = checked_options(grad, form, target, norm, axes, reduction);
  check_saved(options, grad, grad_out, saved);
  check_like("grad_grad", grad_grad, "grad", grad, kDevice);
  check_same_device("grad_grad", grad_grad, "grad", grad);
  const OnDevice device(grad);
  Tensor out_grad = torch::stable::empty_like(grad);
  Tensor out_grad_out = torch::stable::empty_like(grad_out);
  Tensor dots = torch::stable::new_empty(grad, {options.groups.count()}, accumulation_dtype(grad));
  Tensor scratch = torch::stable::new_empty(grad, {penalty_scratch(grad.scalar_type(), options)}, ScalarType::Double);
  launch_penalty_double_backward(grad.scalar_type(), options, grad_grad.const_data_ptr(), grad_out.const_data_ptr(),
                                 grad.const_data_ptr(), saved.const_data_ptr(), out_grad.mutable_data_ptr(),
                                 out_grad_out.mutable_data_ptr(), dots.mutable_data_ptr(), doubles(scratch),
                                 device.stream());
  return {out_grad, out_grad_out};
}

}  // namespace gpkernels::cuda
