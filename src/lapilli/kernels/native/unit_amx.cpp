// The kernels for one instruction set; compiled with its flags (CMakeLists.txt).
#include "isa_amx.h"

#include "levels.h"
#include "layer.h"
#include "prefill.h"
#include "tower.h"

namespace lapilli {

const Table kAmx = {
    Amx::kName,
    linear<Amx>,
    dense<Amx>,
    attention<Amx>,
    prefill<Amx>,
    rms_norm<Amx>,
    silu_mul<Amx>,
    gelu_mul<Amx>,
    rotate<Amx>,
    layer<Amx>,
    step<Amx>,
    round_levels<Amx>,
    tower<Amx>,
};

}  // namespace lapilli
