// SPDX-License-Identifier: Apache-2.0
#include "cuda/runtime/device_info.h"

#include <cuda_runtime.h>

namespace grcsf::cuda {

Info info() {
  Info found;
  found.compiler = GRCSF_CUDA_COMPILER;
  found.architectures = GRCSF_CUDA_ARCHITECTURES;
  cudaRuntimeGetVersion(&found.runtime);
  cudaDriverGetVersion(&found.driver);
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    found.problem = cudaGetErrorString(status);
    cudaGetLastError();  // a machine without a GPU is no error of a later call
    return found;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    found.devices.push_back({properties.name, properties.major, properties.minor});
  }
  if (found.devices.empty()) found.problem = "no CUDA device";
  return found;
}

}  // namespace grcsf::cuda
