"""From a call to a kernel: addresses of arrays, prepared problems, workspaces, and the threads that share the work."""
