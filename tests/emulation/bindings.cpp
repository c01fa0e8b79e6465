// SPDX-License-Identifier: Apache-2.0
// What only the emulated module has: kernels with faults, and the launches that were made.
#include "bindings.h"

#include <utility>

#include "dlpack.h"
#include "emulation.h"
#include "faults.h"

namespace py = pybind11;

namespace grcsf::python {

void bind_faults(py::module_& module) {
  using cuda::Fault;
  py::dict faults;
  constexpr std::pair<const char*, Fault> named[] = {
      {"none", Fault::none},
      {"no_barrier", Fault::no_barrier},
      {"no_second_barrier", Fault::no_second_barrier},
      {"half_barrier", Fault::half_barrier},
      {"two_barriers", Fault::two_barriers},
      {"unwritten", Fault::unwritten},
      {"outside", Fault::outside},
      {"too_little", Fault::too_little},
      {"too_much", Fault::too_much},
      {"none_of_shuffles", Fault::none_of_shuffles},
      {"inactive_lane", Fault::inactive_lane},
      {"diverged", Fault::diverged},
      {"none_of_warps", Fault::none_of_warps},
      {"no_warp_barrier", Fault::no_warp_barrier},
      {"other_warp", Fault::other_warp},
      {"none_of_copies", Fault::none_of_copies},
      {"not_waited", Fault::not_waited},
      {"forgotten", Fault::forgotten},
      {"misaligned", Fault::misaligned}};
  for (const auto& [name, fault] : named) faults[name] = static_cast<int>(fault);
  module.attr("faults") = faults;
  module.def("run_fault", [](int fault, const py::object& in, const py::object& out, int threads) {
    cuda::run_fault(static_cast<Fault>(fault), view_of(in, "in"), view_of(out, "out"), threads);
  });
  module.def("forget_launches", emulation::forget_launches, py::arg("only_note"));
  module.def("launches", [] {
    py::list found;
    for (const auto& launch : emulation::launches()) {
      found.append(py::make_tuple(launch.kernel, launch.blocks, launch.threads, launch.shared));
    }
    return found;
  });
}

}  // namespace grcsf::python
