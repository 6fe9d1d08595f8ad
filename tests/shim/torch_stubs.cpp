// What a torch with CUDA exports and a CPU torch lacks, or refuses without a device.
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cuda_runtime.h"

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  return TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = error == 0 ? nullptr : strdup("CUDA error: invalid configuration argument");
  return TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char* message) {
  std::free(message);
}

__attribute__((visibility("default"))) int64_t gpk_shim_launches() {
  return shim::launches();
}
}
