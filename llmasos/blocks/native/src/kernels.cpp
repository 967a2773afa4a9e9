// Compiled once per instruction set, with its flags and with VARIANT as the name of the table.
#include "attention.h"
#include "linear.h"
#include "rows.h"

#define LLMASOS_NAME(variant) LLMASOS_JOIN(kernels_, variant)
#define LLMASOS_JOIN(a, b) a##b
#define LLMASOS_TEXT(variant) LLMASOS_QUOTE(variant)
#define LLMASOS_QUOTE(text) #text

namespace llmasos {

extern const Kernels LLMASOS_NAME(VARIANT);
const Kernels LLMASOS_NAME(VARIANT) = {LLMASOS_TEXT(VARIANT), linear, rms_norm, head_norm, rotate, gate, attend};

}  // namespace llmasos
