// The kernels in this instruction set; CMakeLists.txt gives this file its flags.
#include "lanes_avx512.hpp"
#include "lanes_portable.hpp"
#include "blocks.hpp"
#include "count.hpp"
#include "dot_fast.hpp"
#include "dot_lanes_avx512.hpp"
#include "round.hpp"
#include "step.hpp"
#include "widen.hpp"
#include "fixed.hpp"
#include "units.hpp"

namespace halfstep {

const Kernels avx512_kernels = {
    "avx512",
    round_arrays<Avx512Lanes, Avx512Lanes64>,
    count_nonfinite,
    widen,
    quantize_blocks<Avx512Lanes>,
    dequantize_blocks<Avx512Lanes>,
    top_magnitude<Avx512Lanes>,
    dot_fast<Avx512Dot>,
    adam<Avx512Lanes>,
    sgd<Avx512Lanes>,
    touch<Avx512Lanes>,
};

const UnitKernel avx512_unit = {"avx512", unit_task<Vectors64>, fixed_tasks};

}  // namespace halfstep
