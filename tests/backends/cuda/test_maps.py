"""The packed form of a map gives its log features, is computed on the map's device, and is cached while it is valid."""

import gc
import weakref
from dataclasses import replace

import ml_dtypes  # noqa: F401  np.dtype("bfloat16")
import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp._values import map_arrays
from favorsharp.backend import arrays_of
from favorsharp.methods import DENSE_EXPONENTIAL

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from favorsharp.torch_operators import TensorMap  # noqa: E402
from favorsharp_cuda.host import maps  # noqa: E402
from favorsharp_cuda.torch import operators  # noqa: E402

pytestmark = pytest.mark.own_backend
D, M = 5, 70


def drawn(method="optimal", kernel="softmax", batch=(), **options):
    q, k, _ = attention_problem(0, batch, n=40, d=D)
    return fs.feature_map(fs.fit(q, k + 0.3, method=method, kernel=kernel, **options), M, rng=0)


def with_matrix(**sides):
    p = drawn("posrf").parameters
    g = np.eye(D) + 0.1 * np.arange(D * D).reshape(D, D)
    return fs.feature_map(
        replace(p, **{side: g if value == "dense" else value * g for side, value in sides.items()}), M, rng=0
    )


def plain_terms(feature_map):
    """The constants that plain kernels read of each side, by the names of `FoldedSide`."""
    packed = maps.plain_map(feature_map, "float64")
    sizes = {"scalars": 8, "center": D, "linear": D, "near_center": D, "column": M, "rows": D * M, "dense": D * D}
    for side in (packed.query, packed.key):
        assert side.shape[1] == packed.size == sum(sizes.values())
        cut = np.split(np.asarray(side), np.cumsum(list(sizes.values()))[:-1], axis=1)
        terms = dict(zip(sizes, cut, strict=True))
        terms["rows"] = terms["rows"].reshape(-1, D, M).swapaxes(-1, -2)
        yield terms | {"dense": terms["dense"].reshape(-1, D, D)}


def untiled(tiles, size):
    """Tiles (count, tiles, 2, 64, size + 8) of numbers in two planes, as one matrix of rows for each map."""
    count, tile_count, planes, rows, width = tiles.shape
    assert (planes, rows, width) == (2, 64, size + 8)
    assert not tiles[..., size:].any()
    return tiles.astype(np.float64).sum(axis=2).reshape(count, tile_count * rows, width)[..., :size]


def tile_terms(feature_map):
    """The constants that tensor-core kernels read of each side, as natural logarithms."""
    packed = maps.tile_map(feature_map)
    padded = packed.padded_d
    for header, planes in (
        (packed.query_header, packed.query_planes), (packed.key_header, packed.key_planes)
    ):  # fmt: skip
        header, planes = np.asarray(header, np.float64), untiled(np.asarray(planes), padded)
        assert planes.shape[1] == packed.plane_rows
        assert header.shape[1] == packed.header_size
        vectors = (header[:, 8 + i * padded :][:, :D] for i in range(3))
        terms = dict(zip(("center", "linear", "near_center"), vectors, strict=True))
        terms["scalars"], column = header[:, :8].copy(), header[:, 8 + 3 * padded :][:, : packed.padded_m]
        assert np.all(column[:, M:] == -np.inf)
        rows, dense = planes[:, : packed.padded_m] * header[:, 3, None, None], planes[:, packed.padded_m :]
        assert not rows[:, M:].any()
        assert not dense[:, D:].any()
        terms["scalars"][:, 1:3] /= maps.LOG2E
        terms["linear"] = terms["linear"] / maps.LOG2E
        terms["column"], terms["rows"] = column[:, :M] / maps.LOG2E, rows[:, :M, :D] / maps.LOG2E
        dense = dense[:, :D, :D] * header[:, 4, None, None]
        yield terms | {"dense": dense.swapaxes(-1, -2) / np.sqrt(maps.LOG2E)}


def log_features(terms, x):
    """Log features of points (count, n, d), as the kernels compute them."""
    root, offset, beta = (terms["scalars"][:, i, None] for i in range(3))
    z = root[..., None] * x - terms["center"][:, None]
    factor = offset + (z @ terms["linear"][..., None])[..., 0] - beta * np.sum(z * z, axis=-1)
    factor = factor - np.sum((z @ terms["dense"]) ** 2, axis=-1)
    points = root[..., None] * x if terms.get("as_they_are") else z
    return points @ terms["rows"].swapaxes(-1, -2) + factor[..., None] + terms["column"][:, None]


def terms_of_points_as_they_are(feature_map):
    """The constants for points of bfloat16: their products with rows are not centred, but factors are."""
    packed = maps.tile_map(feature_map)
    sides = (packed.query_header, packed.query_rows), (packed.key_header, packed.key_rows)
    for terms, (header, rows) in zip(tile_terms(feature_map), sides, strict=True):
        rows = untiled(np.asarray(rows).view(np.dtype("bfloat16")), packed.padded_d)
        assert not rows[:, M:].any()
        column = np.asarray(header, np.float64)[:, 8 + 3 * packed.padded_d + packed.padded_m :]
        assert np.all(column[:, M:] == -np.inf)
        root = terms["scalars"][:, 0]
        shifted = {"rows": rows[:, :M, :D] / maps.LOG2E / root[:, None, None], "column": column[:, :M] / maps.LOG2E}
        yield terms | shifted | {"as_they_are": True}


EVERY_MAP = [
    *(pytest.param(drawn, {"method": method, "kernel": kernel}, id=f"{method}-{kernel}")
      for method in DENSE_EXPONENTIAL for kernel in ("softmax", "gaussian")),
    *(pytest.param(drawn, {"method": method, "batch": (2, 3)}, id=f"{method}-batch") for method in ("oprf", "optimal")),
    pytest.param(drawn, {"batch": (2, 3), "axis": (0, -2)}, id="broadcast"),
    pytest.param(with_matrix, {"g1": "dense"}, id="dense queries"),
    pytest.param(with_matrix, {"g2": "dense"}, id="dense keys"),
    pytest.param(with_matrix, {"g1": 0.0, "g2": "dense"}, id="zeros"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("terms", "tolerance"), [(plain_terms, 1e-12), (tile_terms, 2e-5), (terms_of_points_as_they_are, 2e-4)]
)
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(("make", "options"), EVERY_MAP)
def test_packed_numbers_give_the_features_of_the_map(make, options, library, terms, tolerance):
    feature_map = make(**options)
    batch = feature_map.batch_shape
    x = np.random.default_rng(1).standard_normal((*batch, 7, D))
    want = [np.asarray(f(x)).reshape(-1, 7, M) for f in (feature_map.log_query, feature_map.log_key)]
    if library == "torch":
        feature_map = map_arrays(feature_map, torch.asarray)
    for side, expected in zip(terms(feature_map), want, strict=True):
        np.testing.assert_allclose(log_features(side, x.reshape(-1, 7, D)), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("largest", [1.0, 2.0**-20, 3.0, np.nextafter(4.0, 0), 2.0**30, 0.0])
def test_planes_fill_the_range_of_float16(largest):
    planes, scale = maps._split(np.array([[[largest, -largest / 3]]]))
    assert np.log2(scale) == np.round(np.log2(scale))
    if largest:
        assert 2**12 <= scale[0] * largest <= 2**13
    np.testing.assert_allclose(planes.astype(float).sum(axis=1)[0] / scale, [[largest, -largest / 3]], rtol=2**-21)


@pytest.mark.parametrize("x", [0.0, -1.0, 1 / 3, -1e30, 3e-30, 1.00390625, 1.01171875, np.inf, np.nan])
def test_bits_of_bfloat16_are_rounded_to_nearest_and_even(x):
    with np.errstate(invalid="ignore"):
        planes = maps._bfloat16_planes(np.array([[[x, -x]]])).view(np.dtype("bfloat16"))
    want = np.array([x, -x], np.float32).astype("bfloat16")
    np.testing.assert_array_equal(planes[0, 0, 0].astype(float), want.astype(float))
    if np.isfinite(x):
        np.testing.assert_allclose(planes.astype(float).sum(axis=1)[0, 0], [x, -x], rtol=2**-16)


@pytest.mark.parametrize("largest", [np.inf, np.nan])
def test_planes_hold_what_is_not_finite(largest):
    with np.errstate(invalid="ignore"):
        planes, scale = maps._split(np.array([[[largest, 1.0]]]))
    assert np.isfinite(scale).all()
    assert planes[0, 0, 0, 0] == largest or np.isnan(largest)


class NothingIsRead(TorchDispatchMode):
    """Checks that all operations in the block are on `meta` tensors: no number is read, and none comes from the
    host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        seen = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert function is not torch.ops.aten._local_scalar_dense.default
        assert all(x.device.type == "meta" for x in seen), function
        return result


@pytest.mark.parametrize(("make", "options"), EVERY_MAP)
def test_kernels_leave_a_form_of_zeros_out(make, options):
    feature_map = make(**options)
    needed = any(terms["dense"].any() for terms in plain_terms(feature_map))
    assert maps.plain_map(feature_map, "float64").has_dense == maps.tile_map(feature_map).has_dense == needed
    trained = map_arrays(feature_map, lambda x: torch.asarray(x).requires_grad_())
    assert maps.plain_map(trained, "float64").has_dense
    assert maps.tile_map(trained).has_dense


@pytest.mark.parametrize(("make", "options"), EVERY_MAP)
def test_packing_a_trained_map_waits_for_nothing(make, options):
    """Tensors without numbers can be packed, so packing reads no number and copies none from the host."""
    feature_map = map_arrays(make(**options), lambda x: torch.asarray(x).to("meta").requires_grad_())
    with NothingIsRead():
        maps.plain_map(feature_map, "float32")
        packed = maps.tile_map(feature_map)
        maps.expanded_map(feature_map)
    assert packed.query_planes.dtype == torch.float16
    assert packed.query_rows.dtype == torch.int16


class Stream:
    """Stands for the caller's stream."""

    number, is_capturing = 0, False


@pytest.fixture
def stream(monkeypatch):
    now = Stream()
    for module in (maps, operators):
        monkeypatch.setattr(module, "stream_of", lambda like: (now.number, now.is_capturing))
    return now


def test_a_frozen_map_is_packed_once_for_each_stream(stream):
    feature_map = map_arrays(drawn(), torch.asarray)
    first = maps.tile_map(feature_map)
    assert maps.tile_map(feature_map) is first
    stream.number = 1
    second = maps.tile_map(feature_map)
    assert second is not first  # it may not be ready on this stream
    stream.number = 0
    assert maps.tile_map(feature_map) is first
    feature_map.rows.mul_(2)
    assert maps.tile_map(feature_map) is not first


def test_a_trained_map_is_packed_at_each_use(stream):
    """A replayed graph changes the numbers of such a map, but not its versions."""
    feature_map = map_arrays(drawn(), torch.asarray)
    feature_map.parameters.g1.requires_grad_()
    before = maps.plain_map(feature_map, "float64")
    feature_map.parameters.g1.data.mul_(2)
    assert not torch.equal(maps.plain_map(feature_map, "float64").query, before.query)


def test_a_capture_takes_what_is_kept_and_keeps_nothing_of_its_own(stream):
    feature_map = map_arrays(drawn(), torch.asarray)
    stream.number, stream.is_capturing = 7, True
    own = maps.tile_map(feature_map)
    assert own.has_dense  # nothing was read
    assert maps.tile_map(feature_map) is not own  # its numbers are there when the graph has run
    stream.number, stream.is_capturing = 0, False
    kept = maps.tile_map(feature_map)
    assert kept is not own
    stream.number, stream.is_capturing = 7, True
    assert maps.tile_map(feature_map) is kept


def test_what_a_graph_reads_outlives_the_map(stream):
    feature_map = map_arrays(drawn(), torch.asarray)
    read, unread = weakref.ref(maps.tile_map(feature_map)), weakref.ref(maps.plain_map(feature_map, "float64"))
    stream.is_capturing = True
    maps.tile_map(feature_map)
    del feature_map
    gc.collect()
    assert read() is not None
    assert unread() is None


def test_a_captured_operator_reads_its_tensors_anew(stream):
    feature_map = map_arrays(drawn(), torch.asarray)
    given = arrays_of(feature_map), 1.0, "softmax"
    kept = operators.kept(TensorMap(*given))
    assert operators.kept(TensorMap(*given)) is kept
    stream.is_capturing = True
    assert operators.kept(TensorMap(*given)) is not kept
