// How the `vectors` of spectral_norm hold u and v of a group's layers: one after the other.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace gpkernels {

// Elements that a vector takes there, so that the next begins where a GPU can read units.
GPK_HD int64_t padded_vector(int64_t length) {
  return (length + 3) / 4 * 4;
}

}  // namespace gpkernels
