"""The compiled kernels, in files named like their ops, and the parts that they share."""
