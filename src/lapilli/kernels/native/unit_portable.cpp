// The kernels for one instruction set; compiled with its flags (CMakeLists.txt).
#include "isa_portable.h"

#include "attention.h"
#include "linear.h"

namespace lapilli {

const Table kPortable = {Portable::kName, linear<Portable>, attention<Portable>};

}  // namespace lapilli
