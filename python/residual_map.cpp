// SPDX-License-Identifier: Apache-2.0
// Bindings of residual_map.
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "call.h"
#include "cpu/residual_map/residual_map.h"
#include "cuda/residual_map/residual_map.h"
#include "dlpack.h"

namespace py = pybind11;

namespace grcsf::python {
namespace {

ResidualMapArguments arguments_of(const py::object& image, const py::object& prediction,
                                  const py::object& hidden,
                                  const std::array<std::int64_t, 3>& patch, bool normalized_target,
                                  bool average_reconstructions, double eps, const Call& call) {
  ResidualMapArguments arguments;
  arguments.image = view_of(image, "image");
  arguments.prediction = view_of(prediction, "prediction");
  arguments.hidden = view_of(hidden, "hidden");
  for (int axis = 0; axis < 3; ++axis) arguments.patch[axis] = patch[axis];
  arguments.normalized_target = normalized_target;
  arguments.average_reconstructions = average_reconstructions;
  arguments.eps = eps;
  arguments.threads = call.threads;
  arguments.cuda = call.cuda;
  return arguments;
}

}  // namespace

void bind_residual_map(py::module_& module) {
  module.def("residual_map_forward",
             [](const py::object& image, const py::object& prediction, const py::object& hidden,
                const std::array<std::int64_t, 3>& patch, bool normalized_target,
                bool average_reconstructions, double eps, const py::tuple& resources,
                const py::object& residual) {
               const Call call(resources);
               auto arguments = arguments_of(image, prediction, hidden, patch, normalized_target,
                                             average_reconstructions, eps, call);
               arguments.residual = view_of(residual, "residual");
               const py::gil_scoped_release release;
               GRCSF_KERNEL(residual_map_forward, arguments.image)(arguments);
             });
  module.def("residual_map_backward",
             [](const py::object& image, const py::object& prediction, const py::object& hidden,
                const std::array<std::int64_t, 3>& patch, bool normalized_target,
                bool average_reconstructions, double eps, const py::tuple& resources,
                const py::object& grad_residual, const py::object& grad_image,
                const py::object& grad_prediction) {
               const Call call(resources);
               auto arguments = arguments_of(image, prediction, hidden, patch, normalized_target,
                                             average_reconstructions, eps, call);
               arguments.grad_residual = view_of(grad_residual, "grad_residual");
               arguments.grad_image = view_of(grad_image, "grad_image");
               arguments.grad_prediction = view_of(grad_prediction, "grad_prediction");
               const py::gil_scoped_release release;
               GRCSF_KERNEL(residual_map_backward, arguments.image)(arguments);
             });
}

}  // namespace grcsf::python
