"""Makes every call once, at a few shapes, and records its error relative to float64.

There is a process for each shape and library, which makes one call after the other.
"""

import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import turns
from records import DRY, record, with_tests
from turns import Step

with_tests()

SHAPES = (
    *("float32-d64-e64-m144-optimal-softmax-sm_90", "bfloat16-d64-e64-m144-optimal-softmax-sm_90"),
    *("float16-d32-e32-m16-optimal-softmax-sm_90", "float32-d128-e128-m130-optimal-softmax-sm_90"),
    *("float64-d12-e9-m24-optimal-softmax-sm_90", "float32-d40-e100-m33-optimal-gaussian-sm_90"),
    "float32-d130-e140-m40-optimal-softmax-sm_90",
)


def on_device(name: str, shape: Any, lengths: Any, library: str) -> tuple[Any, str]:
    """The result of a call on the GPU, and the implementation that ran."""
    import test_gpu
    from on_host import installed
    from shape_classes import CALLS, Problem

    import favorsharp as fs
    from favorsharp.dispatch import OPS, watch

    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(installed()) if DRY else "cuda"
        stack.enter_context(fs.use(backend))
        seen = stack.enter_context(watch())
        if name in CALLS:
            op, args, options = CALLS[name](Problem(shape, lengths))
            args = [test_gpu.on_device(x, library) for x in args]
            options = {key: test_gpu.on_device(x, library) for key, x in options.items()}
            got = test_gpu.on_host(OPS[op](*args, **options))
        else:
            got = test_gpu.on_host(tuple(test_gpu.gradients_of(name, shape, lengths, library)))
        return got, f"{seen[0][0]} by {seen[0][1]}" if seen else ""


def check(name: str, shape: Any, lengths: Any, library: str, fields: dict[str, Any]) -> None:
    """Compare a call with float64, and record the error and its limit."""
    import numpy as np
    from shape_classes import CALLS, wanted
    from test_gpu import TOLERANCES

    from favorsharp.testing import relative_error

    begun = time.perf_counter()
    got, ran = on_device(name, shape, lengths, library)
    want = wanted(name, shape, lengths)
    if name not in CALLS:  # gradients that are 0 in exact arithmetic are compared with the size of the others
        want = tuple(np.asarray(x) for x in want)
        size = max(float(np.abs(x).max()) for x in want[1:] if x.size)
        got, want = (tuple(np.append(x, size / 30) for x in each) for each in (got, want))
    error, limit = float(relative_error(got, want)), TOLERANCES[shape.dtype]
    seconds, right = round(time.perf_counter() - begun, 2), error <= limit
    record("call", **fields, ok=right, error=error, limit=limit, ran=ran, seconds=seconds, quiet=right)


def steps(library: str, label: str) -> list[Step]:
    """The calls of one shape."""
    from shape_classes import CALLS, LENGTHS, SHAPES, VJPS, has_gradients
    from test_gpu import calls_for

    shape = next(x for x in SHAPES if str(x) == label)
    todo = [(name, LENGTHS[number]) for name in CALLS for number in (0, 5)]
    if has_gradients(shape):
        todo += [(name, LENGTHS[0]) for name in VJPS if name in calls_for(library)]
    found = []
    for name, lengths in todo[:1] if DRY else todo:
        fields = {"call": name, "shape": label, "lengths": str(lengths), "library": library}
        found.append(Step("call", fields, partial(check, name, shape, lengths, library, fields)))
    return found


def jobs() -> list[list[str]]:
    """The library and the shape of each process."""
    shapes, libraries = (SHAPES[4:5], ("numpy",)) if DRY else (SHAPES, ("torch", "cupy"))
    return [[x, label] for label in shapes for x in libraries if not (x == "cupy" and "bfloat16" in label)]


def main() -> int:
    """Start a process for each job, or do one job; return how many ended early."""
    options = turns.parser()
    options.add_argument("--job", nargs=2)
    options.add_argument("--jobs", type=int, default=6)
    given = options.parse_args()
    if given.job:
        return turns.main(lambda: steps(*given.job))
    with ThreadPoolExecutor(given.jobs) as pool:
        return sum(pool.map(lambda job: turns.shepherd([sys.executable, __file__, "--job", *job]), jobs()))


if __name__ == "__main__":
    sys.exit(main())
