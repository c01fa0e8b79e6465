// SPDX-License-Identifier: Apache-2.0
// Binding of the vectors' exponential, for the tests.
#include "cpu/simd/exponential.h"

#include "bindings.h"
#include "dlpack.h"

namespace py = pybind11;

namespace grcsf::python {

void bind_exponential(py::module_& module) {
  module.def(
      "exponential",
      [](const py::object& values, const py::object& out) {
        exponential({view_of(values, "values"), view_of(out, "out")});
      },
      py::arg("values"), py::arg("out"),
      "The kernels' own exponential, for tests: 1-D contiguous float32 or float64, of one length.");
}

}  // namespace grcsf::python
