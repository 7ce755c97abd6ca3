// What keeps these kernels from a device.
#pragma once
#include <string>

#include "../ops.h"

namespace SA_NAMESPACE {

// empty when nothing, else a clause: "the driver says ..."
std::string missing_of_device(int device);

}  // namespace SA_NAMESPACE
