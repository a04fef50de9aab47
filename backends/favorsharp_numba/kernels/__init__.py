"""The compiled kernels, each in a file named like its op, and what they are made of."""
