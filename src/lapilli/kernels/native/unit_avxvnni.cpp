// The kernels for one instruction set; compiled with its flags (CMakeLists.txt).
#define LAPILLI_AVXVNNI
#include "isa_avx2.h"

#include "attention.h"
#include "linear.h"

namespace lapilli {

const Table kAvxVnni = {Avx2::kName, linear<Avx2>, attention<Avx2>};

}  // namespace lapilli
