// Launches as the CUDA runtime sees them: a bad grid is an error kept for cudaGetLastError.
#include "cuda_runtime.h"

namespace {
cudaError_t last_error = cudaSuccess;
int64_t launch_count = 0;
}  // namespace

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

void launch_on_host(int64_t blocks, unsigned threads, const std::function<void()>& kernel) {
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > 1024 || threads % 32 != 0) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  ++launch_count;
  shim::run(static_cast<unsigned>(blocks), threads, kernel);
}

int64_t shim::launches() {
  return launch_count;
}
