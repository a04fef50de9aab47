"""The layer of vector instructions: how functions are compiled, and the inner loops of the kernels."""
