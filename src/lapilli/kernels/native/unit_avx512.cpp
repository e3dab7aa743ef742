// The kernels for one instruction set; compiled with its flags (CMakeLists.txt).
#include "isa_avx512.h"

#include "levels.h"
#include "layer.h"
#include "prefill.h"
#include "tower.h"

namespace lapilli {

const Table kAvx512 = {
    Avx512::kName,
    linear<Avx512>,
    dense<Avx512>,
    attention<Avx512>,
    prefill<Avx512>,
    rms_norm<Avx512>,
    silu_mul<Avx512>,
    gelu_mul<Avx512>,
    rotate<Avx512>,
    layer<Avx512>,
    step<Avx512>,
    round_levels<Avx512>,
    tower<Avx512>,
};

}  // namespace lapilli
