// Which GPUs the compiled kernels can run on.
#pragma once

#include <c10/core/Device.h>

namespace drive {

// Why the kernels cannot run on a GPU, in CUDA's words; nullptr: they can. CUDA is asked once a device.
const char* why_not_served(c10::DeviceIndex device);

}  // namespace drive
