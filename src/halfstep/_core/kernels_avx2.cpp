// The kernels in this instruction set; CMakeLists.txt gives this file its flags.
#include "lanes_avx2.hpp"
#include "lanes_portable.hpp"
#include "blocks.hpp"
#include "count.hpp"
#include "dot_fast.hpp"
#include "dot_lanes_avx2.hpp"
#include "round.hpp"
#include "step.hpp"
#include "widen.hpp"
#include "fixed.hpp"
#include "units.hpp"

namespace halfstep {

const Kernels avx2_kernels = {
    "avx2",
    round_arrays<Avx2Lanes, Avx2Lanes64>,
    count_nonfinite,
    widen,
    quantize_blocks<Avx2Lanes>,
    dequantize_blocks<Avx2Lanes>,
    top_magnitude<Avx2Lanes>,
    dot_fast<Avx2Dot>,
    adam<Avx2Lanes>,
    sgd<Avx2Lanes>,
    touch<Avx2Lanes>,
};

const UnitKernel avx2_unit = {"avx2", unit_task<Vectors32>, fixed_tasks};

}  // namespace halfstep
