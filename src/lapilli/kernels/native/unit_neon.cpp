// The kernels for one instruction set; compiled with its flags (CMakeLists.txt).
#include "isa_neon.h"

#include "levels.h"
#include "layer.h"
#include "prefill.h"
#include "tower.h"

namespace lapilli {

const Table kNeon = {
    Neon::kName,
    linear<Neon>,
    dense<Neon>,
    attention<Neon>,
    prefill<Neon>,
    rms_norm<Neon>,
    silu_mul<Neon>,
    gelu_mul<Neon>,
    rotate<Neon>,
    layer<Neon>,
    step<Neon>,
    round_levels<Neon>,
    tower<Neon>,
};

}  // namespace lapilli
