// The layer of a tower for CPUs that also have products of bfloat16; compiled with that flag.
#include "isa_avx512bf16.h"

#include "tower.h"

namespace lapilli {

void tower_avx512bf16(const TowerCall& call) { tower<Avx512Bf16>(call); }

}  // namespace lapilli
