"""Registers the library's values as JAX pytrees, so that `jax.jit`, `jax.vmap` and `jax.lax.scan` take and return them.

Users import it once: ``import favorsharp.jax``. Arrays are leaves; names, sizes and the fingerprint of a state are
static.
"""

from dataclasses import fields

import jax

from favorsharp.landmarks.settings import Landmarks
from favorsharp.storage import VALUES

_STATIC = frozenset(
    {"dtype", "method", "kernel", "scale", "num_features", "window", "fingerprint", "num_seen", "settings"}
)

for _kind in VALUES:
    if _kind is Landmarks:  # only settings
        jax.tree_util.register_static(Landmarks)
        continue
    _names = [field.name for field in fields(_kind)]
    jax.tree_util.register_dataclass(
        _kind,
        data_fields=[name for name in _names if name not in _STATIC],
        meta_fields=[name for name in _names if name in _STATIC],
    )
