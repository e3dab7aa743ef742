// The kernels for one instruction set; compiled with its flags (CMakeLists.txt).
#include "isa_portable.h"

#include "linear.h"

namespace lapilli {

const Table kPortable = {Portable::kName, linear<Portable>};

}  // namespace lapilli
