"""The operations that backends accelerate; each file holds their contracts and references in array API functions.

The public functions call these ops. Accelerated implementations are in `backends/`, and are compared with the
references.
"""
