// In a file of its own: ATen/Version.h takes two seconds to compile.
#include "common/capability.h"

#include <ATen/Version.h>

namespace drive {

std::string cpu_capability() { return at::get_cpu_capability(); }

}  // namespace drive
