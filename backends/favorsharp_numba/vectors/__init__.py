"""The inner loops of the kernels, written in vector instructions, and how functions are compiled."""
