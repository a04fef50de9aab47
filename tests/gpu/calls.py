"""Calls for the sanitizers and the profiler: small calls of every kernel, or a few large ones.

Results are not checked.
"""

import sys
from functools import partial

from records import DRY, context_is_lost, record, short, with_tests

with_tests()

SHAPES = {
    "first": ("float32-d64-e64-m144-optimal-softmax-sm_90", "float64-d12-e9-m24-optimal-softmax-sm_90"),
    "wide": ("float32-d128-e128-m130-optimal-softmax-sm_90", "float32-d130-e140-m40-optimal-softmax-sm_90"),
    "narrow": ("bfloat16-d64-e64-m144-optimal-softmax-sm_90", "float16-d32-e32-m16-optimal-softmax-sm_90"),
}


def small(which: str) -> int:
    """Make every call at some shapes and uneven lengths; return how many failed."""
    from shape_classes import CALLS, LENGTHS, VJPS, has_gradients
    from shape_classes import SHAPES as KNOWN
    from smoke import on_device
    from test_gpu import calls_for

    library = "numpy" if DRY else "torch" if which == "narrow" else "cupy"
    todo = []
    for shape in [x for x in KNOWN if str(x) in SHAPES[which]]:
        names = [*CALLS, *(x for x in VJPS if has_gradients(shape) and x in calls_for(library))]
        for lengths in LENGTHS[8:] if DRY else (LENGTHS[6], LENGTHS[5]):
            todo += [(name, shape, lengths, library) for name in (names[:1] if DRY else names)]
    failed = 0
    for given in todo:
        try:
            on_device(*given)
        except Exception as error:
            failed += 1
            fields = dict(zip(("call", "shape", "lengths", "library"), map(str, given), strict=True))
            record("call", **fields, ok=False, said=short(error))
            if context_is_lost(short(error)):
                break  # the sanitizer has reported the place, and every later call would fail too
    record("calls", which=which, calls=len(todo), failed=failed)
    return failed


def large() -> None:
    """Make one call of each case of the benchmark, for the profiler's counters."""
    import torch
    from times import runner

    from benchmarks.gpu import QUICK, Case, Token

    attention = partial(Case, 4, 16, 16_384, 64, 64)
    for case in QUICK[:1] if DRY else (attention(True), attention(False), Token(64, 8, 64, 64), attention(True, True)):
        with torch.set_grad_enabled(case.backward):
            runner(case)()
        if not DRY:
            torch.cuda.synchronize()
        record("calls", which=str(case), calls=1, failed=0)


if __name__ == "__main__":
    sys.exit(large() if sys.argv[1] == "large" else min(small(sys.argv[1]), 1))
