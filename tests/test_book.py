"The notebooks, the package and the README say the same thing, and the layers point one way."
import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
BELOW = {"blocks": set(), "model": {"blocks"}, "data": set(), "pretrained": {"blocks", "model", "data"}, "train": {"blocks", "model", "data", "pretrained"},
         "modernize": {"blocks", "model"}, "kernels": {"blocks"}}

spec = importlib.util.spec_from_file_location("_book", ROOT / "nbs" / "_book.py")
book = importlib.util.module_from_spec(spec)
spec.loader.exec_module(book)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the project after nbdev_export and nbdev_clean."
    copy = tmp_path_factory.mktemp("copy") / "convnext_nb"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "data", "*.egg-info", "__pycache__"))
    for command in ("nbdev_export", "nbdev_clean"): subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True, capture_output=True)
    return copy


def test_export_and_clean_leave_no_diff(exported):
    for path in [*sorted((ROOT / "convnext_nb").glob("*.py")), *NOTEBOOKS]:
        rel = path.relative_to(ROOT)
        assert (exported / rel).read_text() == path.read_text(), f"{rel} differs: run `make export`"
    assert {p.name for p in (exported / "convnext_nb").glob("*.py")} == {p.name for p in (ROOT / "convnext_nb").glob("*.py")}


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text() == book.readme(), "run `make readme`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook(path):
    nb = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 1_000_000
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert any(c.outputs for c in code), "committed without outputs"
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    local = re.compile(r"(?<![\w.:/])/(home|root|tmp|usr|opt|work|content|Users)/")
    text = [o.get("text") or o.get("data", {}).get("text/plain", "") for c in code for o in c.outputs]
    assert not any(local.search(t) for t in text), "an output shows a path of the machine that ran it"
    if path.name == "index.ipynb": return
    assert nb == book.chapter(path, get_config(path=ROOT)), "badge or install cell differ from settings.ini: run `make export`"
    text = [c.source for c in nb.cells if c.cell_type == "markdown"]
    assert text[0].startswith("# ") and "\n> " in text[0] and text[1].startswith(book.BADGE)
    assert any(c.source.startswith(book.COLAB) for c in code)
    assert any(c.source.startswith("#| default_exp") for c in code)


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "convnext_nb").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_layers(path):
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
    ours = {n.module.split(".")[0] for n in nodes if n.level == 1} | {n.module.split(".")[1] for n in nodes if n.module.startswith("convnext_nb.")}
    assert ours <= BELOW[path.stem]
    if path.stem == "train": assert ours == {"data", "model", "pretrained"}  # it does see them


@pytest.mark.parametrize("module, absent", [("model", "timm torchvision sklearn matplotlib PIL fastcore"), ("train", "timm torchvision sklearn matplotlib fastcore")])
def test_import_is_light(module, absent):
    code = f"import sys, convnext_nb.{module}; print([m for m in {absent.split()} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_make_help_lists_every_target():
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {t} " in out for t in "train test export readme gpu clean".split())


def test_results_say_where_they_come_from():
    found = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert found
    for path in found:
        result = json.loads(path.read_text())
        assert {"command", "commit", "device", "torch", "python"} <= result.keys(), path
        assert {"summary", "runs"} <= result.keys() or {"config", "settings"} <= result.keys(), path
