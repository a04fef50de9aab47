"""Kernels with threads, forks, Numba's threading layers, limits, caches and processors; each test starts a process."""

import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.own_backend
pytest.importorskip("numba")

ROOT = Path(__file__).parents[3]
SETUP = """
import numpy as np
import favorsharp as fs
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((4, 1000, 16)).astype(DTYPE) for _ in range(3))
fm = fs.feature_map(fs.fit(q, k, method="posrf"), 64, rng=0)
def run(**options):
    with fs.use("numba"):
        return fs.linear_attention(q, k, v, fm, **options)
"""


def python(code, *, package=None, dtype="float64", **environment):
    """Run code after SETUP in a fresh interpreter; return what it prints.

    float64 is the dtype for which the tests of laws compile the kernels.
    """
    paths = [str(ROOT), str(package or ROOT / "backends")]
    result = subprocess.run(
        [sys.executable, "-c", f"DTYPE = {dtype!r}" + SETUP + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@pytest.mark.parametrize("layer", [pytest.param("omp", marks=pytest.mark.slow), "workqueue"])
def test_calls_from_several_threads_at_once(layer):
    """On the workqueue layer Numba itself would end the process."""
    code = """
    from concurrent.futures import ThreadPoolExecutor
    want = run(is_causal=True), run()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: (run(is_causal=True), run()), range(24)))
    assert all((a == want[0]).all() and np.allclose(b, want[1], atol=1e-5) for a, b in found)
    print("same")
    """
    assert python(code, NUMBA_THREADING_LAYER=layer) == "same"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_as_its_parent():
    code = """
    import os
    want = run(is_causal=True)
    child = os.fork()
    if child == 0:
        os._exit(0 if (run(is_causal=True) == want).all() else 1)
    print(os.waitpid(child, 0)[1])
    """
    assert python(code) == "0"


def test_beside_the_threads_of_torch():
    pytest.importorskip("torch")
    code = """
    import torch
    want = run()
    for _ in range(20):
        a = torch.randn(300, 300) @ torch.randn(300, 300)
        assert np.allclose(run(), want, atol=1e-5)
    torch.set_num_threads(1)
    from favorsharp_numba.host.threads import num_threads
    print(num_threads())
    """
    assert python(code) == "1"


def test_limits_on_threads_are_kept():
    code = """
    import numba
    from favorsharp_numba.host.threads import num_threads
    print(num_threads())
    """
    assert python(code, NUMBA_NUM_THREADS="1") == "1"
    pytest.importorskip("threadpoolctl")
    code = """
    import threadpoolctl
    from favorsharp_numba.host.threads import num_threads
    before = num_threads()
    with threadpoolctl.threadpool_limits(1):
        inside = num_threads()
    print(inside, num_threads() == before)
    """
    assert python(code) == "1 True"


SHARED = """
    import _thread, threading, time
    from favorsharp_numba.vectors.compiling import TAGS
    from favorsharp_numba.host.threads import share
    caller, ended = threading.get_ident(), []
    def share_two(of_helper, of_caller=lambda: None):
        begun = threading.Event()
        def kernel(one, low, high, scratch):
            if threading.get_ident() == caller:
                begun.wait(20)  # or, on a busy machine, the caller would have done all before a helper came
                of_caller()
            else:
                begun.set()
                of_helper()
        share(kernel, 2, 1e9, 16, TAGS["float32"], of_torch="torch" in sys.modules)
"""
POOLS = pytest.mark.parametrize("of_torch", [False, True], ids=["own threads", "threads of torch"])


def shared(code, *, of_torch):
    """Run SHARED and then code with two threads, our own or those of torch; return what it prints."""
    if of_torch:
        pytest.importorskip("torch")
    start = "import sys\n" + of_torch * "import torch\ntorch.set_num_threads(2)\n"
    code = start + textwrap.dedent(SHARED) + textwrap.dedent(code)
    return python(code, NUMBA_NUM_THREADS="2")


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="threads cannot be told where to run, or there is one place",
)
def test_helpers_run_where_their_caller_may_but_not_on_its_processor():
    code = """
    import ctypes, os
    from favorsharp_numba.host import threads
    processor, allowed = ctypes.CDLL(None).sched_getcpu, os.sched_getaffinity(0)
    for own in sorted(allowed):
        os.sched_setaffinity(0, {own})
        share_two(lambda: None)
        assert os.sched_getaffinity(threads._workers[0]) == {own}  # there is no other
        os.sched_setaffinity(0, allowed)
        before = processor()
        share_two(lambda: None)
        if processor() == before:
            assert os.sched_getaffinity(threads._workers[0]) == allowed - {before}
    threads._workers.append(threading.get_native_id())  # as where threads are greenlets
    threads._places = set()
    share_two(lambda: None)
    assert os.sched_getaffinity(0) == allowed
    """
    refused = """
    def refuse(*_):
        raise PermissionError
    os.sched_setaffinity, threads._places = refuse, set()
    share_two(lambda: ended.append("helped"))
    os.sched_getaffinity = refuse
    share_two(lambda: ended.append("helped"))
    print(*ended)
    """
    assert shared(textwrap.dedent(code) + textwrap.dedent(refused), of_torch=False) == "helped helped"


@POOLS
@pytest.mark.parametrize("sleep", [0, 0.2], ids=["while it waits", "while it works"])
def test_an_interrupt_is_raised_when_no_helper_writes_any_more(sleep, of_torch):
    code = f"""
    import signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it with none
    def interrupt():
        time.sleep(0.1)
        _thread.interrupt_main()
        time.sleep(0.3)
        ended.append("helper")
    try:
        share_two(interrupt, lambda: time.sleep({sleep}))
    except KeyboardInterrupt:
        print(*set(ended))
    """
    assert shared(code, of_torch=of_torch) == "helper"


@POOLS
def test_what_goes_wrong_on_a_helper_is_raised_by_the_call(of_torch):
    code = """
    def fail():
        raise ArithmeticError("of a helper")
    try:
        share_two(fail)
    except ArithmeticError as fault:
        print(fault)
    share_two(lambda: ended.append("next"))
    print(*set(ended))  # it may have done both tasks
    """
    assert shared(code, of_torch=of_torch).split("\n") == ["of a helper", "next"]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's entry points of OpenMP")
def test_threads_of_torch_work_for_its_arrays():
    """Results have the same bits as with our own threads, which work for other arrays, for a second caller, and in a
    forked child."""
    code = """
    import os
    from favorsharp_numba.host import threads, torch_team
    torch.set_num_threads(3)  # more than Numba's limit: one of them finds no place
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    of_tensors = fs.feature_map(fs.fit(*tensors[:2], method="posrf"), 64, rng=0)
    def attend(causal):
        with fs.use("numba"):
            return fs.linear_attention(*tensors, of_tensors, is_causal=causal).numpy()
    found = [attend(causal) for causal in (False, True)]
    share_two(lambda: ended.append(threading.get_ident()))
    assert not threads._workers and ended[0] != caller
    assert all((run(is_causal=bool(causal)) == x).all() for causal, x in enumerate(found))
    assert threads._workers
    with torch_team._free:  # another caller
        assert not torch_team.run(None) and (attend(True) == found[1]).all()
    child = os.fork()
    if child == 0:
        os._exit(0 if not torch_team.run(None) and (attend(True) == found[1]).all() else 1)
    print(os.waitpid(child, 0)[1])
    """
    assert shared(code, of_torch=True) == "0"


def test_results_do_not_depend_on_the_number_of_threads(tmp_path):
    code = """
    found = [run(**options) for options in ({}, {"is_causal": True}, {"window": 16}, {"is_causal": True, "window": 16})]
    np.save(PATH, np.stack(found))
    """
    results = []
    for threads in ("1", "2", "7"):
        path = tmp_path / f"{threads}.npy"
        python(f"PATH = {str(path)!r}\n" + textwrap.dedent(code), NUMBA_NUM_THREADS=threads)
        results.append(np.load(path))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("width", ["16", "32", "64"])
def test_every_vector_width_gives_the_same_results(width, tmp_path):
    code = """
    with fs.use("reference"):
        wide = [x.astype("float64") for x in (q, k, v)]
        want = [fs.linear_attention(*(x[:, :131] for x in wide), fm, **o) for o in OPTIONS]
        column = fs.kernel_matvec(*(x[:, :131, :1 if i == 2 else None] for i, x in enumerate(wide)), fm)
    q, k, v = (x[:, :131] for x in (q, k, v))
    for options, reference in zip(OPTIONS, want):
        assert np.abs(run(**options) - reference).max() < 1e-5
    np.testing.assert_allclose(fs.kernel_matvec(q, k, v[..., :1], fm), column, rtol=1e-4, atol=1e-4)
    _, state = fs.linear_attention(q[:, :130], k[:, :130], v[:, :130], fm, is_causal=True, return_state=True)
    out, _ = fs.decode_step(q[:, 130:], k[:, 130:], v[:, 130:], state, fm)
    assert np.abs(out - want[1][:, 130:]).max() < 1e-5
    out, pullback = fs.vjp(fs.linear_attention, q, k, v, fm, is_causal=True)
    print([float(np.abs(x).sum().round(1)) for x in pullback(out)])
    """
    options = "OPTIONS = [{}, {'is_causal': True}, {'window': 16}, {'is_causal': True, 'window': 5}]\n"
    width_of_host = python(options + textwrap.dedent(code), dtype="float32")
    other = {"FAVORSHARP_NUMBA_VECTORS": width, "NUMBA_CACHE_DIR": str(tmp_path)}  # its own cache
    assert python(options + textwrap.dedent(code), dtype="float32", **other) == width_of_host


@pytest.mark.parametrize("width", ["0", "48"])
def test_an_unknown_vector_width_is_refused(width):
    with pytest.raises(AssertionError, match="FAVORSHARP_NUMBA_VECTORS must be 16, 32 or 64"):
        python("import favorsharp_numba.vectors.compiling as c; c.vector_bytes()", FAVORSHARP_NUMBA_VECTORS=width)


PROCESSORS = {
    "haswell": ("+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+movbe", "32", ("zmm",)),
    "x86-64": ("+sse2", "16", ("zmm", "ymm", "vfmadd")),
}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="processors of the x86 family")
@pytest.mark.parametrize("name", PROCESSORS)
def test_code_for_a_lesser_processor_has_none_of_the_instructions_it_lacks(name, tmp_path):
    features, width, lacking = PROCESSORS[name]
    code = """
    from favorsharp_numba.kernels.attention import gather_keys, read_queries
    from favorsharp_numba.kernels.causal_attention import causal
    from favorsharp_numba.vectors.compiling import vector_bytes
    with fs.use("reference"):
        wide = [x.astype("float64") for x in (q, k, v)]
        want = [fs.linear_attention(*wide, fm, is_causal=c) for c in (False, True)]
    error = max(float(np.abs(run(is_causal=c) - x).max()) for c, x in zip((False, True), want))
    text = "".join(x for kernel in (causal, gather_keys, read_queries) for x in kernel.inspect_asm().values())
    print(vector_bytes(), error < 1e-5, "mulps" in text, any(word in text for word in LACKING))
    """
    code = f"LACKING = {lacking!r}\n" + textwrap.dedent(code)
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    cache |= {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    assert python(code, dtype="float32", **cache) == f"{width} True True False"


@pytest.mark.slow
def test_runs_where_nothing_can_be_cached(tmp_path):
    """If neither the package nor the home can be written to by any user, every process compiles."""
    package = tmp_path / "backends"
    shutil.copytree(ROOT / "backends", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "favorsharp_numba" / "kernels" / "__pycache__").touch()
    code = """
    from favorsharp_numba.kernels.attention import read_queries
    print(type(read_queries._cache).__name__, float(np.abs(run()).sum()) > 0)
    """
    nowhere = {"HOME": os.devnull, "XDG_CACHE_HOME": os.devnull, "NUMBA_CACHE_DIR": ""}
    assert python(code, package=package, PYTHONDONTWRITEBYTECODE="1", **nowhere) == "NullCache True"


def test_parts_of_kernels_have_no_machine_code_of_their_own():
    """Also when they come from the cache."""
    from numba import float64, int64

    from favorsharp_numba.vectors.rows import fill

    types = float64, int64, int64, float64
    fill.compile(types)
    assert not list(fill.overloads[types].library.get_defined_functions())


@pytest.mark.slow
def test_a_home_takes_the_cache_of_a_package_that_cannot_be_written_to(tmp_path):
    package = tmp_path / "backends"
    shutil.copytree(ROOT / "backends", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "favorsharp_numba" / "kernels" / "__pycache__").touch()
    code = """
    from favorsharp_numba.kernels.attention import read_queries
    run()
    print(sum(read_queries.stats.cache_hits.values()))
    """
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "NUMBA_CACHE_DIR": ""}
    results = [python(code, package=package, PYTHONDONTWRITEBYTECODE="1", **home) for _ in range(2)]
    assert results == ["0", "1"]


@pytest.mark.slow
def test_a_cache_that_names_classes_of_other_sources_is_of_no_account(tmp_path):
    """After an update, the index of compiled functions may name classes of arguments that no longer exist."""
    package = tmp_path / "backends"
    shutil.copytree(ROOT / "backends", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Points", "Dots"):
        for path in (package / "favorsharp_numba").rglob("*.py"):
            path.write_text(re.sub(r"\bPoints\b", name, path.read_text()))
        code = f"""
        import numba
        from favorsharp_numba.kernels.arguments import Mask, {name}
        from favorsharp_numba.kernels.tiles import load_points
        offsets, x = np.zeros(1, "int64"), np.ones(64, "float32")
        points, place = {name}(2, x.ctypes.data, offsets.ctypes.data, 4, 4, 4), x.ctypes.data // 4
        mask = Mask(0, 0, 0)
        numba.njit(lambda *given: load_points(*given))(
            np.float32(1), points, mask, 0, 0, 1, 1, 1, place, place + 1, place + 2
        )
        print(x[2], *set(signature[1].instance_class.__name__ for signature in load_points.signatures))
        """
        assert python(code, package=package, NUMBA_CACHE_DIR=str(tmp_path / "cache")) == f"0.0 {name}"


@pytest.mark.slow
def test_a_kernel_is_compiled_anew_when_a_file_it_uses_has_changed(tmp_path):
    """Numba's own stamp is that of the kernel's file; the test halves exp2, which is in another file."""
    package = tmp_path / "backends"
    shutil.copytree(ROOT / "backends", package, ignore=shutil.ignore_patterns("__pycache__"))
    code = """
    from favorsharp_numba.exponential_features import exponential_features
    import favorsharp_numba
    zero = np.zeros((4, 4), "float32")
    print(favorsharp_numba.__file__.startswith(ROOT), exponential_features(zero, zero, zero[:, :1], zero[:1])[0, 0])
    """
    code = f"ROOT = {str(tmp_path)!r}\n" + textwrap.dedent(code)
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert python(code, package=package, **environment) == "True 1.0"
    emitter = package / "favorsharp_numba" / "vectors" / "emitter.py"
    stamp = os.stat(package / "favorsharp_numba" / "kernels" / "exponential_features.py").st_mtime
    text = emitter.read_text()
    assert text.count("return [1.0, *fitted") == 1
    emitter.write_text(text.replace("return [1.0, *fitted", "return [0.5, *fitted"))
    assert os.stat(package / "favorsharp_numba" / "kernels" / "exponential_features.py").st_mtime == stamp
    assert python(code, package=package, **environment) == "True 0.5"


@pytest.mark.slow
def test_the_second_process_does_not_compile(tmp_path):
    code = """
    from favorsharp_numba.kernels.attention import read_queries
    run()
    print(sum(read_queries.stats.cache_hits.values()), sum(read_queries.stats.cache_misses.values()))
    """
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert python(code, **environment) == "0 1"
    assert python(code, **environment) == "1 0"


@pytest.mark.kernels
def test_layouts_and_lengths_share_one_compilation():
    code = """
    from favorsharp_numba.kernels.attention import read_queries
    from favorsharp_numba.kernels.causal_attention import causal
    run(); run(is_causal=True)
    q = q[:, ::-1, ::-1]; k = np.asfortranarray(k); v.flags.writeable = False
    run(); run(is_causal=True); run(key_mask=np.ones(k.shape[:-1], bool))
    q, k, v = (x[:, :3].astype("float16") for x in (q, k, v))
    run(); run(is_causal=True)
    print(len(read_queries.signatures), len(causal.signatures))
    """
    assert python(code, dtype="float32") == "1 1"


def test_importing_the_backend_imports_nothing():
    code = "import sys, favorsharp_numba; print(any(x in sys.modules for x in ('numba', 'torch')))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "False"


@pytest.mark.kernels
@pytest.mark.parametrize("threads", ["1", "2", "7"])
def test_packed_sequences_are_their_pieces_at_any_number_of_threads(threads):
    """This holds for values with a window, and for the gradients of points and map.

    Threads share heads and sequences.
    """
    pytest.importorskip("torch")
    code = """
    from dataclasses import replace
    from itertools import pairwise
    import torch
    bounds = [0, 7, 300, 333, 334, 700, 1000]
    points = [torch.from_numpy(x).double() for x in (q, k, v)]
    fm = fs.feature_map(fs.fit(*points[:2]), 64, rng=0)
    own = [getattr(fm.parameters, name).clone().requires_grad_() for name in ("g1", "g2", "center_x", "center_y")]
    g1, g2, center_x, center_y = own
    parameters = replace(fm.parameters, g1=g1, g2=g2, center_x=center_x, center_y=center_y)
    fm = replace(fm, parameters=parameters)
    def gradients(options, pieces):
        leaves = [x.clone().requires_grad_() for x in points]
        with fs.use("numba"):
            if pieces:
                out = torch.cat(
                    [
                        fs.linear_attention(*(x[:, a:b] for x in leaves), fm, **options)
                        for a, b in pairwise(bounds)
                    ],
                    dim=1,
                )
            else:
                out = fs.linear_attention(*leaves, fm, cu_seqlens=bounds, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        return [out, *torch.autograd.grad((out * weights).sum(), [*leaves, *own])]
    for options in ({}, {"is_causal": True}, {"window": 16}, {"is_causal": True, "window": 16}):
        want = gradients(options, True)
        for _ in range(3):
            for got, right in zip(gradients(options, False), want, strict=True):
                assert float((got - right).abs().max()) < 1e-9 * float(right.abs().max()), options
    print("same")
    """
    assert python(code, NUMBA_NUM_THREADS=threads) == "same"
