// SPDX-License-Identifier: Apache-2.0
// The module grcsf_kernels._C: kernels that take DLPack capsules, and what the build knows of
// itself.
#include "bindings.h"

#include <pybind11/stl.h>

#include "cpu/runtime/isa.h"
#include "cpu/runtime/parallel.h"
#ifdef GRCSF_HAVE_CUDA
#include "cuda/runtime/device_info.h"
#endif

namespace py = pybind11;

namespace {

// The operators with a kernel, by backend: what dispatch reads.
py::dict operators() {
  py::dict found;
  const auto operators = py::make_tuple("residual_map", "gcu", "rcu");
#ifdef GRCSF_EMULATED
  found["cpu"] = py::tuple();
  found["cuda"] = py::tuple();
  found["cuda-emulated"] = operators;
#else
  found["cpu"] = operators;
  found["cuda"] = operators;
#endif
  return found;
}

py::object cuda_info() {
#ifdef GRCSF_HAVE_CUDA
  const auto info = grcsf::cuda::info();
  py::list devices;
  for (const auto& device : info.devices) {
    devices.append(py::make_tuple(device.name, device.major, device.minor));
  }
  py::dict found;
  found["runtime"] = info.runtime;
  found["driver"] = info.driver;
  found["compiler"] = info.compiler;
  found["architectures"] = info.architectures;
  found["problem"] = info.problem;
  found["devices"] = devices;
  return found;
#else
  return py::none();
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of grcsf_kernels; tensors come as DLPack capsules.";
  module.def("operators", operators, "Names of the operators with a kernel, by backend.");
  module.def("share_openmp", grcsf::share_openmp, py::arg("library"),
             "Use the OpenMP runtime of a loaded library; whether it has one.");
  module.def("openmp_library", grcsf::openmp_library, "Path of the OpenMP runtime in use, or ''.");
  module.def("isa", [] { return grcsf::isa_name(grcsf::isa()); }, "Instruction set in use.");
  module.def(
      "widest_isa", [] { return grcsf::isa_name(grcsf::widest_isa()); },
      "Widest instruction set that this build has for this processor.");
  module.def("choose_isa", grcsf::choose_isa, py::arg("name"),
             "Use another instruction set from now on, for tests.");
  module.def("cuda_info", cuda_info,
             "What the CUDA build sees of this machine; None without CUDA.");
#ifdef GRCSF_EMULATED
  grcsf::python::bind_faults(module);
#else
  grcsf::python::bind_exponential(module);
#endif
  grcsf::python::bind_gcu(module);
  grcsf::python::bind_pool(module);
  grcsf::python::bind_rcu(module);
  grcsf::python::bind_residual_map(module);
}
