// SPDX-License-Identifier: Apache-2.0
// Bindings of rcu.

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "call.h"
#include "cpu/rcu/rcu.h"
#include "cuda/rcu/rcu.h"
#include "dlpack.h"

namespace py = pybind11;

namespace grcsf::python {
namespace {

using Capsules = std::array<py::object, 8>;

// In the order of the operator.
RcuWeights weights_of(const Capsules& capsules, const std::string& prefix) {
  RcuWeights weights;
  const std::pair<const char*, TensorView*> fields[] = {
      {"query_weight", &weights.query_weight},   {"query_bias", &weights.query_bias},
      {"value_weight", &weights.value_weight},   {"value_bias", &weights.value_bias},
      {"score_weight1", &weights.score_weight1}, {"score_bias1", &weights.score_bias1},
      {"score_weight2", &weights.score_weight2}, {"score_bias2", &weights.score_bias2}};
  for (std::size_t i = 0; i < capsules.size(); ++i) {
    *fields[i].second = view_of(capsules[i], (prefix + fields[i].first).c_str());
  }
  return weights;
}

RcuArguments arguments_of(const py::object& x, const py::object& residual, const Capsules& weights,
                          const std::array<std::int64_t, 3>& patch, const Call& call,
                          const py::object& scores) {
  RcuArguments arguments;
  arguments.x = view_of(x, "x");
  arguments.residual = view_of(residual, "residual");
  arguments.weights = weights_of(weights, "");
  for (int axis = 0; axis < 3; ++axis) arguments.patch[axis] = patch[axis];
  arguments.threads = call.threads;
  arguments.cuda = call.cuda;
  arguments.scores = view_of(scores, "scores");
  return arguments;
}

}  // namespace

void bind_rcu(py::module_& module) {
  module.def("rcu_forward",
             [](const py::object& x, const py::object& residual, const Capsules& weights,
                const std::array<std::int64_t, 3>& patch, const py::tuple& resources,
                const py::object& out, const py::object& scores) {
               const Call call(resources);
               auto arguments = arguments_of(x, residual, weights, patch, call, scores);
               arguments.out = view_of(out, "out");
               const py::gil_scoped_release release;
               GRCSF_KERNEL(rcu_forward, arguments.x)(arguments);
             });
  module.def(
      "rcu_backward",
      [](const py::object& grad_out, const py::object& grad_scores, const py::object& scores,
         const py::object& x, const py::object& residual, const Capsules& weights,
         const std::array<std::int64_t, 3>& patch, const py::tuple& resources,
         const py::object& grad_x, const py::object& grad_residual, const Capsules& grad_weights) {
        const Call call(resources);
        auto arguments = arguments_of(x, residual, weights, patch, call, scores);
        arguments.grad_out = view_of(grad_out, "grad_out");
        arguments.grad_scores = view_of(grad_scores, "grad_scores");
        arguments.grad_x = view_of(grad_x, "grad_x");
        arguments.grad_residual = view_of(grad_residual, "grad_residual");
        arguments.grad_weights = weights_of(grad_weights, "gradient of ");
        const py::gil_scoped_release release;
        GRCSF_KERNEL(rcu_backward, arguments.x)(arguments);
      });
}

}  // namespace grcsf::python
