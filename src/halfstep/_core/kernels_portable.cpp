// The kernels in this instruction set; CMakeLists.txt gives this file its flags.
#include "lanes_portable.hpp"
#include "blocks.hpp"
#include "count.hpp"
#include "dot_careful.hpp"
#include "round.hpp"
#include "step.hpp"
#include "widen.hpp"
#include "fixed.hpp"
#include "units.hpp"

namespace halfstep {

const Kernels portable_kernels = {
    "portable",
    round_arrays<Portable32, Portable64>,
    count_nonfinite,
    widen,
    quantize_blocks<Portable32>,
    dequantize_blocks<Portable32>,
    top_magnitude<Portable32>,
    dot_careful,
    adam<Portable32>,
    sgd<Portable32>,
    touch<Portable32>,
};

const UnitKernel portable_unit = {"portable", unit_task<Vectors16>, fixed_tasks};

}  // namespace halfstep
