"""Tests of the bundle for a machine without a network, and of the environment of stages there."""

import importlib.metadata
import json
import os
import zipfile
from types import SimpleNamespace

import bundle
import cubins
import environment
import pytest

pytestmark = pytest.mark.own_backend


@pytest.fixture
def pip(monkeypatch):
    """Stands for pip, which can download everything except execnet; returns the list of its commands."""
    commands = []

    def run(command, **options):
        commands.append(command)
        folder, name = command[command.index("-d") + 1], command[-1]
        if name == "execnet":
            return SimpleNamespace(returncode=1, stderr="looking\nERROR: no such version\n")
        with open(os.path.join(folder, f"{name.replace('-', '_')}-1-py3-none-any.whl"), "wb") as file:
            file.write(b"0" * 2048)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(bundle, "subprocess", SimpleNamespace(run=run))
    return commands


def test_a_bundle_has_a_wheel_of_everything_asked_for(pip, tmp_path, capsys):
    options = ["--out", str(tmp_path), "--wheel", "einops", "--without", "typer", "--python", "3.13"]
    assert bundle.main(options) == 1  # missing packages are reported, and the others are there
    said = capsys.readouterr()
    assert said.err == "execnet: ERROR: no such version\n"
    found = {file.name.partition("-")[0] for file in (tmp_path / "wheels").iterdir()}
    assert found == {name.replace("-", "_") for name in (*bundle.WHEELS, "einops") if name not in ("typer", "execnet")}
    assert "array_api_compat-1-py3-none-any.whl: 2 KB\n" in said.out
    for command in pip:
        assert "--no-deps" in command
        assert command[command.index("--python-version") + 1] == "3.13"


def wheel(folder, package):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{package}-1-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{package}/__init__.py", "here = True\n")


def test_stages_find_backends_and_the_wheels_of_what_is_not_installed(tmp_path):
    """Without an installation, they find backends by metadata with the entry points of pyproject.toml."""
    for package in ("numpy", "not_installed_anywhere"):
        wheel(tmp_path / "bundle" / "wheels", package)
    site = tmp_path / "work" / "site"
    for _ in range(2):  # a second run finds the files of the first
        environment.lay_out(site, tmp_path / "bundle")
    assert (site / "not_installed_anywhere" / "__init__.py").exists()
    assert not (site / "numpy").exists()
    (installed,) = importlib.metadata.distributions(path=[str(site)])
    found = {x.name: x.value for x in installed.entry_points if x.group == "favorsharp.backends"}
    assert installed.name == "favorsharp"
    assert found == {"numba": "favorsharp_numba:BACKEND", "cuda": "favorsharp_cuda:BACKEND"}
    own = environment.variables(tmp_path / "work", tmp_path, tmp_path / "records.jsonl", "facts", dry=False)
    assert str(site) in own["PYTHONPATH"].split(os.pathsep)
    assert (own["GPU_STAGE"], own["FAVORSHARP_GPU"]) == ("facts", "1")
    dry = environment.variables(tmp_path / "work", tmp_path, tmp_path / "records.jsonl", "facts", dry=True)
    assert (dry["GPU_DRY"], "FAVORSHARP_GPU" in dry) == ("1", False)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A bundle with two compiled kernels for 9.0, and a stand-in for CuPy's compiler that records its calls."""
    compiler = pytest.importorskip("cupy.cuda.compiler", exc_type=ImportError)
    pytest.importorskip("favorsharp_cuda")
    monkeypatch.setattr(
        cubins, "compile_for", lambda architecture, name: (f"_Z{name}", f"{architecture} {name}".encode())
    )
    made = cubins.make(tmp_path, "90", ("first", "second"))
    assert set(made["seconds"]) == {"first", "second"}
    for name in ("_compile_using_nvrtc_no_warning", "compile_using_nvrtc"):
        if hasattr(compiler, name):
            monkeypatch.setattr(compiler, name, lambda *given: "asked NVRTC")
    name = "_compile_using_nvrtc_no_warning"
    return tmp_path, lambda *given: getattr(compiler, name if hasattr(compiler, name) else "compile_using_nvrtc")(
        *given
    )


def test_cupy_gets_what_the_bundle_compiled_and_asks_for_the_rest(compiled):
    from favorsharp_cuda.host.source import source

    folder, ask = compiled
    assert cubins.hand_to_cupy(folder)
    assert ask(source(), (), "90", "a.cu", ("second",)) == (b"90 second", {"second": "_Zsecond"})
    for code, architecture, names in (
        *((source(), "80", ("second",)), (source(), "90", ("third",)), ("other code", "90", ("second",))),
        *((source(), "90", None), (source(), "90", ("first", "second"))),
    ):
        assert ask(code, (), architecture, "a.cu", names) == "asked NVRTC"


def test_kernels_compiled_from_another_source_are_not_used(compiled):
    folder, ask = compiled
    file = folder / "cubins" / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"source": "another"}))
    assert not cubins.hand_to_cupy(folder)
    assert ask("code", (), "90", "a.cu", ("second",)) == "asked NVRTC"
    assert cubins.read_index(folder / "nothing")["kernels"] == {}
