// The kernels in this instruction set; CMakeLists.txt gives this file its flags.
#include "lanes_portable.hpp"
#include "count.hpp"
#include "dot_portable.hpp"
#include "round.hpp"
#include "widen.hpp"
#include "fixed.hpp"
#include "units.hpp"

namespace halfstep {

const Kernels portable_kernels = {
    "portable",
    round_arrays<Portable32>,
    count_nonfinite,
    widen,
    dot_portable,
};

const UnitKernel portable_unit = {"portable", unit_task<Vectors16>, fixed_tasks};

}  // namespace halfstep
