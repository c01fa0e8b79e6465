// SPDX-License-Identifier: Apache-2.0
// Bindings of gcu.

#include "cpu/gcu/gcu.h"
#include "bindings.h"
#include "call.h"
#include "cuda/gcu/gcu.h"
#include "dlpack.h"

namespace py = pybind11;

namespace grcsf::python {
namespace {

GcuArguments arguments_of(const py::object& skip, const py::object& deep,
                          const py::object& skip_gate, const py::object& deep_gate, bool similarity,
                          double eps, const Call& call) {
  GcuArguments arguments;
  arguments.skip = view_of(skip, "skip");
  arguments.deep = view_of(deep, "deep");
  arguments.skip_gate = view_of(skip_gate, "skip_gate");
  arguments.deep_gate = view_of(deep_gate, "deep_gate");
  arguments.similarity = similarity;
  arguments.eps = eps;
  arguments.threads = call.threads;
  arguments.cuda = call.cuda;
  return arguments;
}

}  // namespace

void bind_gcu(py::module_& module) {
  module.def("gcu_forward", [](const py::object& skip, const py::object& deep,
                               const py::object& skip_gate, const py::object& deep_gate,
                               bool similarity, double eps, const py::tuple& resources,
                               const py::object& compensated, const py::object& dissimilarity) {
    const Call call(resources);
    auto arguments = arguments_of(skip, deep, skip_gate, deep_gate, similarity, eps, call);
    arguments.compensated = view_of(compensated, "compensated");
    arguments.dissimilarity = view_of(dissimilarity, "dissimilarity");
    const py::gil_scoped_release release;
    GRCSF_KERNEL(gcu_forward, arguments.skip)(arguments);
  });
  module.def(
      "gcu_backward",
      [](const py::object& skip, const py::object& deep, const py::object& skip_gate,
         const py::object& deep_gate, bool similarity, double eps, const py::tuple& resources,
         const py::object& grad_compensated, const py::object& grad_dissimilarity,
         const py::object& grad_skip, const py::object& grad_deep, const py::object& grad_skip_gate,
         const py::object& grad_deep_gate) {
        const Call call(resources);
        auto arguments = arguments_of(skip, deep, skip_gate, deep_gate, similarity, eps, call);
        arguments.grad_compensated = view_of(grad_compensated, "grad_compensated");
        arguments.grad_dissimilarity = view_of(grad_dissimilarity, "grad_dissimilarity");
        arguments.grad_skip = view_of(grad_skip, "grad_skip");
        arguments.grad_deep = view_of(grad_deep, "grad_deep");
        arguments.grad_skip_gate = view_of(grad_skip_gate, "grad_skip_gate");
        arguments.grad_deep_gate = view_of(grad_deep_gate, "grad_deep_gate");
        const py::gil_scoped_release release;
        GRCSF_KERNEL(gcu_backward, arguments.skip)(arguments);
      });
}

}  // namespace grcsf::python
