// SPDX-License-Identifier: Apache-2.0
// What the CUDA part of the build sees of this machine.
#pragma once

#include <string>
#include <vector>

namespace grcsf::cuda {

struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0;  // compute capability
};

struct Info {
  int runtime = 0;            // as CUDA counts: 13000 is 13.0
  int driver = 0;             // 0 without a driver
  std::string compiler;       // the version of nvcc: 13.0.88
  std::string architectures;  // what the kernels were compiled for
  std::string problem;        // why no device can be used, or empty
  std::vector<DeviceInfo> devices;
};

Info info();

}  // namespace grcsf::cuda
