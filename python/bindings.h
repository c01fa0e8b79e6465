// SPDX-License-Identifier: Apache-2.0
// One function an operator adds its kernels to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace grcsf::python {

void bind_exponential(pybind11::module_& module);
void bind_faults(pybind11::module_& module);  // of tests/emulation
void bind_gcu(pybind11::module_& module);
void bind_pool(pybind11::module_& module);
void bind_rcu(pybind11::module_& module);
void bind_residual_map(pybind11::module_& module);

}  // namespace grcsf::python
