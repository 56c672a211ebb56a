"The notebooks, the package and the README say the same thing, and the layers point one way."
import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from fastcore.docments import docments
from helpers import ROOT, Fresh
from nbdev.config import get_config

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if p.name[0].isdigit()]
MODULES = [p.stem.partition("_")[2] for p in CHAPTERS]  # in reading order

spec = importlib.util.spec_from_file_location("_book", ROOT / "nbs" / "_book.py")
book = importlib.util.module_from_spec(spec)
spec.loader.exec_module(book)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the project, for commands that write into it."
    path = tmp_path_factory.mktemp("copy") / "convnext_nb"
    left_out = ".venv .git runs data build *.egg-info __pycache__ _proc _site".split()
    shutil.copytree(ROOT, path, ignore=shutil.ignore_patterns(*left_out))
    return path


def nbdev(command, cwd, **env):
    "An nbdev command, and what it writes."
    command = [Path(sys.executable).with_name(command)]
    p = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    return p.stdout + p.stderr


def test_export_and_clean_leave_no_diff(copy):
    for command in ("nbdev_export", "nbdev_clean"): nbdev(command, copy)
    for path in [*sorted((ROOT / "convnext_nb").glob("*.py")), *NOTEBOOKS]:
        rel = path.relative_to(ROOT)
        assert (copy / rel).read_text() == path.read_text(), f"{rel} differs: run `make export`"
    modules = [{p.name for p in (root / "convnext_nb").glob("*.py")} for root in (copy, ROOT)]
    assert modules[0] == modules[1]


def process_notebooks(folder):
    "In a process of its own: what `nbdev_docs` does before it calls Quarto."
    from nbdev.quarto import proc_nbs
    os.chdir(folder)
    proc_nbs(n_workers=0)


def test_nbdev_can_make_its_docs(copy):
    "It runs the cells with imports and those that are exported, and no others."
    p = Fresh(process_notebooks, copy)
    said = "\n".join(p.communicate())
    assert p.returncode == 0 and "imports and other code" not in said, said
    assert len(list((copy / "_proc").glob("*.ipynb"))) == len(NOTEBOOKS)


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text() == book.readme(), "run `make readme`"


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def printed(cell):
    "What a cell shows as text; tables, which show as HTML, left out."
    for o in cell.outputs:
        if "text" in o: yield o.text
        elif "text/html" not in o.get("data", {}): yield o.get("data", {}).get("text/plain", "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_outputs(path):
    assert path.stat().st_size < 1_000_000
    code = code_cells(path)
    assert any(c.outputs for c in code), "committed without outputs"
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    local = re.compile(r"(?<![\w.:/])/(home|root|tmp|usr|opt|work|content|Users)/")
    for text in (t for c in code for t in printed(c)):
        assert not local.search(text), "an output shows a path of the machine that ran it"
        assert max(map(len, text.splitlines()), default=0) <= 88, "an output is wider than the page"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.name)
def test_chapter(path):
    nb = nbformat.read(path, as_version=4)
    right = book.chapter(path, get_config(path=ROOT))
    assert nb == right, "badge, install cell or kernel differ: run `make export`"
    text = [c.source for c in nb.cells if c.cell_type == "markdown"]
    assert text[0].startswith("# ") and "\n> " in text[0] and text[1].startswith(book.BADGE)
    opening = [t for t in text[2:6] if t.startswith("**You need**")]
    assert len(opening) == 1 and "**You will have**" in opening[0]
    assert nb.cells[3].source.startswith(book.COLAB)  # before anything of ours is imported
    code = [c.source for c in nb.cells if c.cell_type == "code"]
    assert f"#| default_exp {path.stem.partition('_')[2]}" in code
    for source in code:  # "Run All" anywhere: they ask first, and say what they left out
        if re.search(r"^#\| (cuda|slow)", source, re.M):
            assert re.search(r"^(if|else)\b", source, re.M) and "left out" in source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_nothing_is_said_twice(path):
    cells = nbformat.read(path, as_version=4).cells
    said = Counter(p for c in cells if c.cell_type == "markdown" for p in c.source.split("\n\n"))
    assert not [p for p, n in said.items() if n > 1 and len(p) > 60]


def test_usage_installs_itself_on_colab():
    path = ROOT / "nbs" / "usage.ipynb"
    nb = nbformat.read(path, as_version=4)
    assert nb == book.chapter(path, get_config(path=ROOT)), "run `make export`"
    assert nb.cells[1].source.startswith(book.BADGE) and nb.cells[2].source.startswith(book.COLAB)


def test_cells_hold_one_idea():
    lines = [[line for line in c.source.splitlines() if line.strip() and not line.startswith("#|")]
             for path in NOTEBOOKS for c in code_cells(path)]
    long = [cell[0] for cell in lines if len(cell) > 25]
    assert len(long) <= .02 * len(lines), long


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short(name):
    lines = (ROOT / "convnext_nb" / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 720  # a line for each parameter included


def documented(name, f):
    "The functions to describe in a public name: itself, or a class's constructor and methods."
    if not inspect.isclass(f) or dataclasses.is_dataclass(f): yield name, f
    if not inspect.isclass(f): return
    for key, method in inspect.getmembers(f, inspect.isfunction):
        public = not key.startswith("_") or key == "__init__" and not dataclasses.is_dataclass(f)
        ours = method.__module__.startswith("convnext_nb")
        if public and ours: yield f"{name}.{key}", method


def comments(f):
    "The comment beside each parameter; a configuration inherits those of its base."
    mro = reversed(f.__mro__) if inspect.isclass(f) else [f]
    found = {}
    for base in [b for b in mro if b is f or dataclasses.is_dataclass(b)]:
        known = docments(base, args_kwargs=True)
        found |= {k: v for k, v in known.items() if v or k not in found}
    return found


def raised(f):
    "The exceptions that the code of `f` names."
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(f)))):
        if isinstance(node, ast.Raise) and node.exc:
            yield ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    "A docstring, a comment beside each parameter, and the errors by name."
    module = importlib.import_module(f"convnext_nb.{name}")
    source, missing = inspect.getsource(module), []
    for public_name in module.__all__:
        public = getattr(module, public_name)
        public = getattr(public, "_init_fn", public)  # a custom operation
        if not callable(public):  # a comment above or beside it
            told = rf"^# (?!%%).*\n{public_name} = |^{public_name} = .*  # "
            if not re.search(told, source, re.M): missing.append(public_name)
            continue
        whole = inspect.getdoc(public) or ""
        for qualified, f in documented(public_name, public):
            doc = inspect.getdoc(f) or ""
            if not doc and not qualified.endswith("__init__"): missing.append(qualified)
            for parameter, comment in comments(f).items():
                if parameter not in ("self", "cls", "return") and not comment:
                    missing.append(f"{qualified}({parameter})")
            if inspect.isclass(f): continue
            missing += [f"{qualified}: {error}" for error in raised(f) if error not in whole + doc]
    assert not missing, "\n".join(missing)


def imported(source):
    "The modules of this package that some code imports."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found = [a.name for a in node.names]
        elif not isinstance(node, ast.ImportFrom): continue
        elif node.level == 1 or node.module == "convnext_nb":
            found = [f"convnext_nb.{node.module or a.name}" for a in node.names]
            if node.level == 0: found = [f"convnext_nb.{a.name}" for a in node.names]
        else: found = [node.module]
        yield from (m.split(".")[1] for m in found if m.startswith("convnext_nb."))


def test_imported():
    text = "import os, convnext_nb.data as d\nfrom .model import ConvNeXt\nfrom . import train\n"
    text += "from convnext_nb import runs\nfrom convnext_nb.kernels import Traffic\nimport torch"
    assert list(imported(text)) == ["data", "model", "train", "runs", "kernels"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.name)
def test_reading_order_is_layer_order(path):
    "A chapter, its module and its tests, imports only chapters with a smaller number, and itself."
    name = path.stem.partition("_")[2]
    below = MODULES[:MODULES.index(name)]
    module = set(imported((ROOT / "convnext_nb" / f"{name}.py").read_text()))
    assert module <= set(below), module
    for c in code_cells(path):
        source = re.sub(r"^\s*[%!].*", "", c.source, flags=re.M)
        assert set(imported(source)) <= {*below, name}, c.source


LIGHT = "timm torchvision sklearn matplotlib fastcore"


@pytest.mark.parametrize("module, absent", [("model", f"{LIGHT} PIL"), ("train", LIGHT)])
def test_import_is_light(module, absent):
    found = f"[m for m in {absent.split()} if m in sys.modules]"
    code = f"import sys, convnext_nb.{module}; print({found})"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "[]"


def test_make_help_lists_every_target():
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    targets = "train test lint lab export readme book gpu clean".split()
    assert all(f"make {t} " in out for t in targets)


def test_results_say_where_they_come_from():
    found = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert found
    for path in found:
        result = json.loads(path.read_text())
        assert {"command", "commit", "device", "torch", "python"} <= result.keys(), path
        assert {"summary", "runs"} <= result.keys() or {"config", "settings"} <= result.keys(), path
