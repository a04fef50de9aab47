"""Reads queries, keys and values from files for the commands. Every fault of a file raises `ValueError` naming it."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

ACCEPTED = ".npz or .safetensors with arrays q, k, v; or one of q.npy, k.npy, v.npy, or the folder that holds all three"


def read_attention(path: Path) -> tuple[Any, Any, Any, float | None]:
    """Read queries (*b, n, d), keys (*b, s, d), values (*b, s, e) and the scale, which is None if the file has none."""
    if not path.exists():
        raise ValueError(f"{path}: no such file; accepted: {ACCEPTED}")
    if path.is_dir() or path.suffix == ".npy":
        arrays = _read_triple(path if path.is_dir() else path.parent)
    elif path.suffix == ".npz":
        arrays = _read_npz(path)
    elif path.suffix == ".safetensors":
        arrays = _read_safetensors(path)
    else:
        raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; accepted: {ACCEPTED}")
    missing = [name for name in "qkv" if name not in arrays]
    if missing:
        raise ValueError(f"{path}: no array {', '.join(missing)}; it has {', '.join(arrays) or 'none'}")
    q, k, v = (arrays[name] for name in "qkv")
    _check(path, q, k, v)
    return q, k, v, _scale(path, arrays.get("scale"))


def check_writable(*paths: Path | None) -> None:
    """Raise unless the files can be written.

    The commands call it before they start to work; existing files do not change.
    """
    for path in paths:
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: no such folder to write to")
        existed = path.exists()
        try:
            with path.open("ab"):
                pass
            if not existed:
                path.unlink()
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error.strerror}") from None


def _read_triple(folder: Path) -> dict[str, Any]:
    absent = [f"{name}.npy" for name in "qkv" if not (folder / f"{name}.npy").exists()]
    if absent:
        raise ValueError(f"{folder}: no {', '.join(absent)}; accepted: {ACCEPTED}")
    try:
        return {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in "qkv"}
    except Exception as error:  # a damaged file can raise any error
        raise ValueError(f"{folder}: cannot be read as .npy: {error}") from None


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:  # opened here, so that it is closed also if np.load fails
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array, not an archive")
            return {name: archive[name] for name in archive.files if name in ("q", "k", "v", "scale")}
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as .npz: {error}") from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401  importing it gives NumPy a bfloat16 dtype
    try:
        from safetensors import safe_open
    except ImportError:
        raise ValueError(f"{path}: reading it needs safetensors: pip install 'favorsharp[cli]'") from None
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            arrays = {name: file.get_tensor(name) for name in names if name in ("q", "k", "v", "scale")}
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as .safetensors: {error}") from None
    return {name: x.astype(np.float32) if x.dtype.name == "bfloat16" else x for name, x in arrays.items()}


def _check(path: Path, q: Any, k: Any, v: Any) -> None:
    shapes = ", ".join(f"{name} {x.shape}" for name, x in zip("qkv", (q, k, v), strict=True))
    for name, x in zip("qkv", (q, k, v), strict=True):
        if x.dtype.name not in ("float16", "float32", "float64"):
            raise ValueError(f"{path}: {name} has dtype {x.dtype.name}; accepted: float16, bfloat16, float32, float64")
        if x.ndim < 2 or 0 in x.shape:
            raise ValueError(f"{path}: {name} has shape {x.shape}; accepted: (heads..., points, size), none of them 0")
        if not np.isfinite(x).all():
            raise ValueError(f"{path}: {name} holds values that are not finite")
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2] or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        raise ValueError(f"{path}: shapes do not fit: {shapes}; accepted: q (*b, n, d), k (*b, s, d), v (*b, s, e)")


def _scale(path: Path, scale: Any) -> float | None:
    if scale is None:
        return None
    if scale.ndim != 0 or scale.dtype.kind not in "fiu" or not np.isfinite(scale) or not scale > 0:
        raise ValueError(f"{path}: scale must be one positive number, got {scale}")
    return float(scale)
