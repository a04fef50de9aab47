"""The command line: what it prints and writes, and one clear line for every bad file or option."""

import json
import subprocess
import sys

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp.cli import main

FAST = ["--methods", "posrf,optimal", "--features", "8,64", "--seeds", "1"]


def run(capsys, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["favorsharp", *words])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.fixture
def arrays():
    return dict(zip("qkv", (x.astype(np.float32) for x in attention_problem(0, (3,), n=40, e=6)), strict=True))


@pytest.mark.parametrize("kind", ["npz", "folder", "triple", "safetensors", "bfloat16"])
def test_compare_reads_every_kind_of_file(tmp_path, capsys, monkeypatch, arrays, kind):
    if kind == "npz":
        path = tmp_path / "heads.npz"
        np.savez(path, scale=0.5, **arrays)
    elif kind in ("folder", "triple"):
        for name, x in arrays.items():
            np.save(tmp_path / f"{name}.npy", x)
        path = tmp_path if kind == "folder" else tmp_path / "k.npy"
    else:
        path = tmp_path / "heads.safetensors"
        if kind == "safetensors":
            from safetensors.numpy import save_file

            save_file(arrays, path)
        else:
            import torch
            from safetensors.torch import save_file

            save_file({name: torch.asarray(x).bfloat16() for name, x in arrays.items()}, path)
    picture, numbers = tmp_path / "out.png", tmp_path / "out.json"
    code, out, err = run(
        capsys,
        monkeypatch,
        "compare",
        str(path),
        *FAST,
        "--window",
        "0,8",
        "--output",
        str(picture),
        "--json",
        str(numbers),
    )
    assert code == 0, err
    rows = json.loads(numbers.read_text())
    assert [row["method"] for row in rows] == ["window alone", *["posrf"] * 4, *["optimal"] * 4]
    assert all(0 < row["measured"] < 2 for row in rows)
    assert f"{rows[-1]['measured']:.3f}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_compare_options(tmp_path, capsys, monkeypatch, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    output = ["--output", str(tmp_path / "a.svg")]
    for words in (
        ["--array", "torch", "--dtype", "float16"],
        ["--causal"],
        ["--heads", "0,2"],
        ["--draws", "iid,sobol"],
        ["--methods", "landmarks,optimal,prototypes", "--window", "0,8"],
        ["--backend", "reference"],
    ):
        code, out, err = run(capsys, monkeypatch, "compare", str(tmp_path / "a.npz"), *FAST, *output, *words)
        assert code == 0, err
        assert "Exact attention takes" in out
        assert ("landmarks*" in out) == ("--methods" in words)
        assert "*: biased" in out  # the window alone, at least
    _, out, _ = run(capsys, monkeypatch, "compare", str(tmp_path / "a.npz"), *FAST, *output, "--target", "5")
    assert "For an error of 5: " in out
    _, out, _ = run(capsys, monkeypatch, "compare", str(tmp_path / "a.npz"), *FAST, *output, "--target", "1e-9")
    assert "No setting reaches an error of 1e-09" in out


def test_compare_without_a_file_measures_real_heads_and_a_longer_sequence(tmp_path, capsys, monkeypatch):
    output = ["--output", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
    fast = ["--methods", "posrf,landmarks,optimal", "--features", "16", "--seeds", "1", "--window", "0,16"]
    code, out, err = run(capsys, monkeypatch, "compare", *fast, *output, "--lengths", "512,700")
    assert code == 0, err
    rows = [(row["keys"], row["method"], row["window"]) for row in json.loads((tmp_path / "a.json").read_text())]
    assert rows[:3] == [(512, "window alone", 16), (512, "posrf", 0), (512, "posrf", 16)]
    assert rows[7:] == [(700, "window alone", 16), (700, "landmarks", 0), (700, "optimal", 0)]
    exact, landmarks, optimal = out.splitlines()[-3:]
    assert exact.startswith("Exact attention over 700 tokens takes ")
    assert "landmarks" in landmarks
    assert "optimal" in optimal
    code, _, err = run(capsys, monkeypatch, "compare", *fast, *output, "--lengths", "0")
    assert (code, err.count("\n")) == (2, 1)
    assert "--lengths takes integers of 1 or more" in err


def bad_files(folder, arrays):
    """Bad files, and a part of the error line for each."""
    good = arrays["q"]

    def save(name, **changes):
        np.savez(folder / name, **{n: x for n, x in (arrays | changes).items() if x is not None})
        return folder / name

    text = folder / "text.npz"
    text.write_text("not an archive")
    one = folder / "one.npz"
    with one.open("wb") as file:
        np.save(file, good)
    torn = folder / "torn.npz"
    torn.write_bytes(save("whole.npz").read_bytes()[:300])
    tensors = folder / "text.safetensors"
    tensors.write_text("no tensors")
    pickled = folder / "pickled.npz"
    np.savez(pickled, q=np.array([{}], dtype=object), k=good, v=good)
    squeezed = folder / "squeezed.npz"
    np.savez_compressed(squeezed, **arrays)
    content = bytearray(squeezed.read_bytes())
    content[200:300] = bytes(100)
    squeezed.write_bytes(content)
    named = folder / "named.npz"
    named.mkdir()
    return {
        folder / "absent.npz": "no such file",
        folder / "notes.txt": "no such file",
        text: "cannot be read as .npz",
        one: "cannot be read as .npz",
        torn: "cannot be read as .npz",
        pickled: "cannot be read as .npz",
        tensors: "cannot be read as .safetensors",
        save("no_v.npz", v=None): "no array v",
        save("integers.npz", q=np.ones((3, 40, 8), int)): "q has dtype int64",
        save("flat.npz", k=np.ones(8)): "k has shape (8,)",
        save("empty.npz", v=np.ones((3, 0, 6))): "v has shape (3, 0, 6)",
        save("nan.npz", q=np.full((3, 40, 8), np.nan)): "q holds values that are not finite",
        save("sizes.npz", q=np.ones((3, 40, 7))): "shapes do not fit",
        save("scale.npz", scale=np.float32(-1)): "scale must be one positive number",
        save("word.npz", scale=np.array("half")): "scale must be one positive number",
        save("imaginary.npz", scale=np.complex64(1)): "scale must be one positive number",
        squeezed: "cannot be read as .npz",
        named: "no q.npy, k.npy, v.npy",
    }


def test_bad_files_get_one_clear_line(tmp_path, capsys, monkeypatch, arrays):
    for path, message in bad_files(tmp_path, arrays).items():
        code, out, err = run(capsys, monkeypatch, "compare", str(path))
        assert code == 2, path
        assert out == ""
        assert err.count("\n") == 1, err
        assert message in err
        assert str(path) in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "favor"], "--methods: 'favor' is unknown or signed; accepted: posrf, oprf"),
        (["--methods", "trig"], "--methods: 'trig' is unknown or signed"),
        (["--features", "0"], "--features takes integers of 1 or more"),
        (["--features", "many"], "--features takes integers"),
        (["--window", "-1"], "--window takes integers of 0 or more"),
        (["--draws", "halton"], "--draws: 'halton' is unknown; accepted: iid"),
        (["--heads", "9"], "--heads: the leading index has 6 entries"),
        (["--array", "mlx"], "--array: 'mlx' is unknown; accepted: numpy, torch, cupy"),
        (["--dtype", "int8"], "--dtype: 'int8' is unknown"),
        (["--dtype", "bfloat16"], "is not available here"),
        (["--backend", "triton"], "backend 'triton' is unknown"),
        (["--target", "-1"], "--target must be a positive number"),
        (["--output", "picture.docx"], "--output must end in .png"),
        (["--output", "no/such/folder/a.png"], "no such folder to write to"),
        (["--output", "{folder}"], "--output must end in .png"),
        (["--output", "{folder}/taken.png"], "taken.png: cannot be written: Is a directory"),
        (["--json", "{folder}"], "cannot be written: Is a directory"),
        (["--json", "no/such/folder/a.json"], "no such folder to write to"),
        (["--methods", ","], "--methods is empty, got ','; accepted: posrf"),
        (["--draws", " "], "--draws is empty, got ' '; accepted: iid"),
        (["--heads", ""], "--heads takes integers of 0 or more"),
        (["--target", "nan"], "--target must be a positive number"),
        (["--seeds", "-1"], "Invalid value for '--seeds'"),
        (["--features", "9" * 5000], "favorsharp compare: "),
        (["--speed", "9"], "No such option: --speed"),
        (["a", "b"], "unexpected extra argument"),
    ],
)
def test_bad_options_get_one_clear_line(tmp_path, capsys, monkeypatch, words, message):
    (tmp_path / "taken.png").mkdir()
    code, _, err = run(capsys, monkeypatch, "compare", *(word.format(folder=tmp_path) for word in words))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.own_backend
def test_a_backend_that_is_not_there_gets_one_clear_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAVORSHARP_BACKEND", "triton")
    code, _, err = run(capsys, monkeypatch, "compare", "--output", str(tmp_path / "a.png"), *FAST)
    assert (code, err.count("\n")) == (2, 1)
    assert "FAVORSHARP_BACKEND='triton': backend 'triton' is unknown" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ZeroDivisionError("by none"), OSError(28, "No space left"), RuntimeError()], ids=str)
def test_what_nobody_expected_is_one_line_or_a_traceback_on_demand(capsys, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr("favorsharp.cli.info._processor", fail)
    code, _, err = run(capsys, monkeypatch, "info")
    assert (code, err.count("\n")) == (2, 1)
    assert str(error) in err
    assert ("FAVORSHARP_TRACEBACK=1" in err) != isinstance(error, OSError)
    monkeypatch.setenv("FAVORSHARP_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main()


def test_interruption_is_one_line(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("favorsharp.cli.info._processor", interrupted)
    assert run(capsys, monkeypatch, "info") == (130, "", "favorsharp: interrupted\n")


@pytest.mark.parametrize("words", [["--version"], ["--version", "info"]], ids=str)
def test_version(capsys, monkeypatch, words):
    assert run(capsys, monkeypatch, *words) == (0, f"favorsharp {fs.__version__}\n", "")


def test_no_command_shows_the_help(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch)
    assert code == 0
    assert "compare" in out
    assert "--version" in out
    code, _, err = run(capsys, monkeypatch, "measure")
    assert (code, err) == (2, "favorsharp: No such command 'measure'; see favorsharp --help\n")


def test_the_package_runs_as_a_module_into_a_pipe_that_closes():
    got = subprocess.run([sys.executable, "-m", "favorsharp", "--version"], capture_output=True, text=True, check=False)
    assert (got.returncode, got.stdout, got.stderr) == (0, f"favorsharp {fs.__version__}\n", "")
    with subprocess.Popen(
        [sys.executable, "-m", "favorsharp", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""


def test_numbers_too_large_for_the_dtype(tmp_path, capsys, monkeypatch, arrays):
    np.savez(tmp_path / "large.npz", **(arrays | {"k": 1e30 * arrays["k"]}))
    code, _, err = run(capsys, monkeypatch, "compare", str(tmp_path / "large.npz"))
    assert code == 2
    assert "k holds numbers up to" in err
    assert err.count("\n") == 1


def test_unequal_lengths_are_measured_without_a_window(tmp_path, capsys, monkeypatch, arrays):
    np.savez(tmp_path / "cross.npz", **(arrays | {"q": arrays["q"][:, :9]}))
    output = ["--output", str(tmp_path / "a.png")]
    code, out, err = run(capsys, monkeypatch, "compare", str(tmp_path / "cross.npz"), *FAST, *output)
    assert code == 0, err
    assert "9 queries, 40 keys" in out
    code, _, err = run(capsys, monkeypatch, "compare", str(tmp_path / "cross.npz"), *FAST, *output, "--window", "4")
    assert code == 2
    assert "--window needs as many queries as keys, got 9 and 40" in err


def test_info(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "info")
    assert code == 0
    for word in (
        "numpy",
        np.__version__,
        "backend reference",
        "backend loopback",
        "logical processors",
        "CPU features",
    ):
        assert word in out


@pytest.mark.parametrize("absent", ["typer", "matplotlib"])
def test_without_the_extra_one_line_says_what_to_install(capsys, monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    line = f"favorsharp's command line needs {absent}: pip install 'favorsharp[cli]'\n"
    assert run(capsys, monkeypatch, "info") == (2, "", line)
    assert run(capsys, monkeypatch, "--version")[0] == 0


def test_without_safetensors_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "a.safetensors"
    path.touch()
    code, _, err = run(capsys, monkeypatch, "compare", str(path))
    assert (code, err.count("\n")) == (2, 1)
    assert "reading it needs safetensors: pip install 'favorsharp[cli]'" in err
