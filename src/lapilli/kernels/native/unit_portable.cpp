// The kernels for one instruction set; compiled with its flags (CMakeLists.txt).
#include "isa_portable.h"

#include "levels.h"
#include "layer.h"
#include "prefill.h"
#include "tower.h"

namespace lapilli {

const Table kPortable = {
    Portable::kName,
    linear<Portable>,
    dense<Portable>,
    attention<Portable>,
    prefill<Portable>,
    rms_norm<Portable>,
    silu_mul<Portable>,
    gelu_mul<Portable>,
    rotate<Portable>,
    layer<Portable>,
    step<Portable>,
    round_levels<Portable>,
    tower<Portable>,
};

}  // namespace lapilli
