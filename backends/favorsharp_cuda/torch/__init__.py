"""The layer that only torch needs: the kernels as operators of torch."""
