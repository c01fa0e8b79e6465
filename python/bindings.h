// SPDX-License-Identifier: Apache-2.0
// One function an operator adds its kernels to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace grcsf::python {

void bind_residual_map(pybind11::module_& module);

}  // namespace grcsf::python
