"""From a call to a kernel: arguments, prepared problems, and the threads that share the work."""
