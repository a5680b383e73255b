#include "rt_ops.h"

int kernels_in_c(void);
int kernels_in_c(void) { return (int)rt_kernel_count(); }
