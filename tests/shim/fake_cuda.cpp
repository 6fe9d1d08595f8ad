// A CUDA device without a GPU, for fake tensors, which have a dtype, a shape and a device and no memory: what autograd
// and autocast ask of a device is answered, and there is nothing to run. To be preloaded: torch asks once.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override {
    return kDevice;
  }
  c10::Device getDevice() const override {
    return kDevice;
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return kStream;
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return kStream;
  }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
  }
  void block(void*, const c10::Stream&) const override {
  }
  bool queryEvent(void*) const override {
    return true;
  }
};

const c10::impl::DeviceGuardImplRegistrar kGuard(c10::DeviceType::CUDA, new Guard());

// The name is that under which torch looks for it.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {
  }
  void init() const override {
  }
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  int getNumGPUs() const override {
    return 1;
  }
};

}  // namespace

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
