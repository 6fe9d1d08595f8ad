// The elements of a CPU tensor.
#pragma once

#include "../checks.h"

namespace gpkernels::cpu {

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace gpkernels::cpu
