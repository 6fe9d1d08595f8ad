// Functions marked GPK_HD compile for the host and, under nvcc, for the device as well.
#pragma once

#if defined(__CUDACC__)
#define GPK_HD __host__ __device__ __forceinline__
#else
#define GPK_HD inline
#endif
