#include "rt_ops.h"

extern "C" int kernels_in_c();

int main() { return !(kernels_in_c() > 0 && rt_kernel_at(0) && int(rt_kernel_count()) == kernels_in_c()); }
