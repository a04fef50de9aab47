"""The layer between a call and its launches: arrays, packed maps, structures of kernels, compilation, and launchers."""
