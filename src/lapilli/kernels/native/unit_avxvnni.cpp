// The kernels for one instruction set; compiled with its flags (CMakeLists.txt).
#define LAPILLI_AVXVNNI
#include "isa_avx2.h"

#include "levels.h"
#include "layer.h"
#include "prefill.h"
#include "tower.h"

namespace lapilli {

const Table kAvxVnni = {
    Avx2::kName,
    linear<Avx2>,
    dense<Avx2>,
    attention<Avx2>,
    prefill<Avx2>,
    rms_norm<Avx2>,
    silu_mul<Avx2>,
    gelu_mul<Avx2>,
    rotate<Avx2>,
    layer<Avx2>,
    step<Avx2>,
    round_levels<Avx2>,
    tower<Avx2>,
};

}  // namespace lapilli
