"""From a call to a launch: arrays, packed maps, the structures that kernels take, compilation, and the launchers."""
