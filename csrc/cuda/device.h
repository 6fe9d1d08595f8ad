// The device a call runs on: the current one while a guard lives, with torch's current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "ops.h"

namespace gpkernels::cuda {

constexpr DeviceType kDevice = DeviceType::GPK_DEVICE;

// Constructed after the checks of `tensor`, which names the device.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const {
    return stream_;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Kernels follow pointers on one device.
inline void check_same_device(const char* name, const Tensor& x, const char* other_name, const Tensor& other) {
  STD_TORCH_CHECK(x.get_device_index() == other.get_device_index(), name, ": wanted the device of ", other_name, ", ",
                  other.get_device_index(), ", got ", x.get_device_index());
}

inline double* doubles(const Tensor& scratch) {
  return static_cast<double*>(scratch.mutable_data_ptr());
}

}  // namespace gpkernels::cuda
