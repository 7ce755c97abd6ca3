#include "device.h"

#include "simt.h"

namespace SA_NAMESPACE {
namespace {

// stands for all: they are compiled for the same architectures
SA_GLOBAL(32) void probe() {}

}  // namespace

#if defined(SA_CUDA_EMULATED)

std::string missing_of_device(int) { return {}; }

#else

std::string missing_of_device(int device) {
  int before = 0;
  if (const cudaError_t error = cudaGetDevice(&before); error != cudaSuccess)
    return std::string("the driver says: ") + cudaGetErrorString(error);
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe));
  cudaSetDevice(before);
  cudaGetLastError();  // forgotten, so that nobody else is blamed for it
  return error == cudaSuccess ? std::string() : std::string("the driver says: ") + cudaGetErrorString(error);
}

#endif

}  // namespace SA_NAMESPACE
