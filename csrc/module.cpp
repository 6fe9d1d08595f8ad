// The module gpkernels._C: loading it registers the ops; build_info() says what was built.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/simd.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// The level the loader's resolvers pick on this machine; "baseline" where loops are not multiversioned.
std::string simd_level() {
#if GPK_HAS_MULTIVERSION
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "baseline";
}

py::dict build_info() {
  py::dict info;
  info["version"] = GPKERNELS_VERSION;
  info["compiler"] = compiler();
  info["flags"] = GPKERNELS_FLAGS;
  info["simd"] = simd_level();
  info["parallel"] = "torch intra-op threads";
  info["built_with_torch"] = GPKERNELS_TORCH;
  info["cuda_archs"] = GPKERNELS_BUILT_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of gpkernels; importing this module registers them with torch.";
  m.def("build_info", &build_info);
}
