"""The layer between a call and its kernel: addresses of arrays, prepared problems, workspaces, and the thread pool."""
