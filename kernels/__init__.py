"""GPU kernels, one file an op: formula and shapes, torch reference, Triton kernel, launch, SPEC."""
