"""The public functions `save` and `load` for feature maps, fits, moments and states.

A file is an .npz archive of arrays and one JSON header; it never contains a pickle.
"""

import hashlib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from favorsharp._arrays import dtype_name, from_host, is_array, nearest_dtype, to_host
from favorsharp._typing import Array
from favorsharp.features import MAPS, FeatureMap
from favorsharp.landmarks.settings import Landmarks
from favorsharp.landmarks.state import LandmarkState
from favorsharp.moments import Moments
from favorsharp.ops.state import State
from favorsharp.parameters import Parameters

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 1
"""The version of the format that `save` writes; `load` reads only this version."""

VALUES: tuple[Any, ...] = (Moments, Parameters, State, *MAPS, Landmarks, LandmarkState)
"""The library's values: what can be saved, and passed through JAX's transformations."""

_KINDS = {kind.__name__: kind for kind in VALUES}


def save(path: "str | Path", value: Moments | Parameters | FeatureMap | State | Landmarks | LandmarkState) -> None:
    """Write a value to a file, which `load` can read on any machine and into any array library.

    Parameters
    ----------
    path : str or Path
        The file; no extension is added to its name, and an existing file is replaced.
    value : Moments, Parameters, FeatureMap, State, Landmarks or LandmarkState

    Raises
    ------
    TypeError
        If the value is of another type, or its method is a callable, which cannot be saved as data.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 64, 4))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 32, rng=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fs.save(f"{folder}/map.npz", feature_map)
    ...     loaded = fs.load(f"{folder}/map.npz")
    >>> np.array_equal(loaded.query(q), feature_map.query(q))
    True
    """
    import json
    from pathlib import Path

    import numpy as np

    arrays: dict[str, Any] = {}
    header = {"favorsharp": FORMAT, "value": _taken_apart(value, "", arrays)}
    header["digest"] = _digest(header["value"], arrays)
    with Path(path).open("wb") as file:
        np.savez(file, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)


def load(path: "str | Path", *, like: Array | None = None) -> Any:
    """Read what `save` wrote.

    Parameters
    ----------
    path : str or Path
    like : array, optional
        The loaded arrays have the library and the device of this array; without it they are NumPy arrays. Their dtypes
        are those of the saved value. float16 and bfloat16 become float32 in a library that lacks them, and float64
        becomes float32 if it is not available (in JAX, unless 64 bits are enabled).

    Returns
    -------
    Moments, Parameters, FeatureMap, State, Landmarks or LandmarkState
        It has the same numbers as the saved value. So a state and the map that made it still belong together, even if
        one of them or both were saved and loaded.

    Raises
    ------
    ValueError
        If the file is not one that `save` wrote, was written in another version of the format, or is damaged.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 64, 4))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 32, rng=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fs.save(f"{folder}/map.npz", feature_map)
    ...     loaded = fs.load(f"{folder}/map.npz")
    >>> np.array_equal(loaded.query(q), feature_map.query(q))
    True
    """
    import json
    from pathlib import Path

    import numpy as np

    path = Path(path)
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            header = json.loads(arrays.pop("header").tobytes())
            version = header["favorsharp"]
        except Exception as error:  # any error; NumPy would advise to run code from the file
            raise ValueError(f"{path}: not a file that favorsharp.save wrote, or a damaged one") from error
    if version != FORMAT:
        raise ValueError(f"{path}: format {version!r} of favorsharp's files; accepted: {FORMAT}")
    if header.get("digest") != _digest(header.get("value"), arrays):
        raise ValueError(f"{path}: damaged or altered: its contents do not have the digest that it names")
    try:
        return _put_together(header["value"], arrays, np.zeros(0) if like is None else like)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its contents do not make a value of favorsharp: {error}") from None


def _taken_apart(value: Any, prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """The fields of a value as JSON; its arrays are put into `arrays`."""
    if type(value) not in VALUES:
        raise TypeError(f"value must be Moments, Parameters, a FeatureMap or a State, got {type(value).__name__}")
    entries: dict[str, Any] = {}
    for field in fields(value):
        entry, name = getattr(value, field.name), prefix + field.name
        if type(entry) in VALUES:
            entries[field.name] = _taken_apart(entry, f"{name}.", arrays)
        elif is_array(entry):
            arrays[name] = to_host(entry)  # bfloat16 becomes float32
            entries[field.name] = {"array": name, "dtype": dtype_name(entry).rstrip("_")}
        elif entry is None or isinstance(entry, str | int | float):
            entries[field.name] = entry
        else:
            raise TypeError(f"{field.name} is {entry!r}, which is code: save takes the named methods")
    return {"type": type(value).__name__, "fields": entries}


def _put_together(described: dict[str, Any], arrays: dict[str, Any], like: Array) -> Any:
    values = {}
    for name, entry in described["fields"].items():
        if isinstance(entry, dict) and "array" in entry:
            values[name] = from_host(arrays[entry["array"]], like, dtype=nearest_dtype(entry["dtype"], like))
        else:
            values[name] = _put_together(entry, arrays, like) if isinstance(entry, dict) else entry
    return _KINDS[described["type"]](**values)


def _digest(described: Any, arrays: dict[str, Any]) -> str:
    import json

    digest = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype.str}{arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
