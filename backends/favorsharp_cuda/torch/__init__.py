"""The kernels for torch: custom operators, and the autograd Functions of eager and of traced calls."""
