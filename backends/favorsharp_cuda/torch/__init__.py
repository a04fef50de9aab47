"""The kernels as operators of torch."""
