"""The web edition: `make book` writes it to _site/. Nothing is executed.

    python book/build.py [SITE]

1. Pages, in build/book: the chapters as committed, without directives and hidden cells; a page for
   each module, from its docments; a page for each measured result.
2. Sphinx makes the site of them. A warning is an error.
"""
import ast
import dataclasses
import importlib
import inspect
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import nbformat
from fastcore.docments import DocmentTbl, docments
from nbdev.process import extract_directives
from nbformat.v4 import new_markdown_cell
from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "book"
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def anchor(title):
    "Jupyter's anchor of a heading; Sphinx asks for it too (myst_heading_slug_func)."
    return title.replace(" ", "-")


def module_of(path):
    "00_blocks.ipynb -> blocks."
    return path.stem.partition("_")[2]


NAMES = [module_of(path) for path in CHAPTERS]  # in reading order
MODULES = {name: importlib.import_module(f"convnext_nb.{name}") for name in NAMES}


def label(page, module, name):
    "The target of a public name. Targets ignore case, names do not: a class says that it is one."
    return f"{page}.{module}.{name}" + ("-class" if name[0].isupper() else "")


# Chapters

def defined(source, module):
    "The public names that a cell defines."
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign): found += [t.id for t in node.targets if hasattr(t, "id")]
        elif hasattr(node, "name"): found.append(node.name)
    return [name for name in found if name in MODULES[module].__all__]


def into_api(text, module):
    "The text of a cell, its first mention of each name of this or an earlier chapter linked."
    known = NAMES[:NAMES.index(module) + 1] if module else NAMES
    home = {public: name for name in known for public in MODULES[name].__all__}

    def link(match):
        name = home.pop(match[1], None)
        return f"[{match[0]}](#{label('api', name, match[1])})" if name else match[0]

    # code, links and headings stay as they are
    kept = r"(```.*?```|\[[^\]]*\]\([^)]*\)|^#.*?$)"
    parts = re.split(kept, text, flags=re.S | re.M)
    parts[::2] = [re.sub(r"`(\w+)(?:\(\))?`", link, part) for part in parts[::2]]
    return "".join(parts)


def code_cells(cell, module):
    "A code cell as the web edition shows it: none, itself, or a line with its anchors before it."
    directives = extract_directives(cell, remove=True)
    if directives.keys() & {"hide", "default_exp"} or not cell.source.strip(): return []
    tags = cell.metadata.setdefault("tags", [])
    if directives.get("echo:") == ["false"]: tags.append("remove-input")
    if "code-fold:" in directives:
        tags.append("hide-input")
        show = " ".join(directives["code-summary:"]).strip('"')
        cell.metadata["mystnb"] = dict(code_prompt_show=show, code_prompt_hide=show)
    if "export" not in directives: return [cell]
    names = defined(cell.source, module)
    targets = "".join(f"({label('cell', module, name)})=\n" for name in names)
    links = [f"[{name}](#{label('api', module, name)})" for name in names]
    text = f"{targets}{{.exported}}\n{' · '.join([f'convnext_nb.{module}', *links])}"
    tags.append("exported")
    return [new_markdown_cell(text), cell]


def chapter(path):
    "The notebook of a chapter for the web."
    nb, module = nbformat.read(path, as_version=4), module_of(path)
    nb.metadata["language_info"] = dict(name="python", pygments_lexer="ipython3")
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "code": cells += code_cells(cell, module)
        elif not cell.source.startswith("[![Open In Colab]"):  # the theme has a button
            cell.source = into_api(cell.source, module)
            cells.append(cell)
    nb.cells = cells
    return nb


# API

class Parameters(DocmentTbl):
    "nbdev's table of parameters: code as code, and a configuration with its bases' fields."
    def __init__(self, f):
        super().__init__(f)
        self.dm |= docments(f, full=True, args_kwargs=True)  # what **kwargs are, too
        for base in getattr(f, "__mro__", ()):
            if not dataclasses.is_dataclass(base): continue
            self.dm |= {k: v for k, v in docments(base, full=True).items() if v["docment"]}

    def _row(self, name, props):
        cells = {k: props[k] for k in self._columns}
        for k, value in cells.items():
            if value is inspect.Parameter.empty: cells[k] = ""
            elif k == "anno": cells[k] = f"`{getattr(value, '__name__', value)}`"
            elif k == "default": cells[k] = f"`{value!r}`"
        texts = [str(c).replace("|", r"\|").replace("\n", " ") for c in cells.values()]
        return [f"`{name}`", *texts]


def signature(name, f):
    "How it is called: names and defaults. Types and what they mean stand in the table."
    try: parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError): return name
    lines = [f"{name}("]
    for p in parameters:
        if p.name == "self": continue
        text = str(p.replace(annotation=p.empty, default=p.empty))
        if p.default is not p.empty: text += f"={getattr(p.default, '__name__', repr(p.default))}"
        if len(lines[-1]) + len(text) > 78: lines.append(" " * (len(name) + 1))
        lines[-1] += f"{text}, "
    return "\n".join(lines).removesuffix(", ") + ")"


def entry(name, f):
    "A function, a class or a method: signature, docstring, table."
    yield f"```python\n{signature(name, f)}\n```"
    yield inspect.getdoc(f) or ""
    yield Parameters(f)._repr_markdown_()


def methods(cls):
    "The methods that a class brings, beyond those of torch's classes that it redefines."
    theirs = [b for b in cls.__mro__ if not b.__module__.startswith("convnext_nb")]
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        ours = method.__module__.startswith("convnext_nb") and not name.startswith("_")
        if ours and not any(hasattr(b, name) for b in theirs): yield name, method


def value(name, v, source):
    "A constant: the comment above it, and what it holds."
    above = re.search(rf"((?:^#(?! %%).*\n)+){name}\b", source, re.M)
    if above: yield re.sub(r"^# ?", "", above[1], flags=re.M)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", repr(v))
    yield f"```python\n{name} = {textwrap.shorten(text, 500, placeholder=' ...')}\n```"


def api(name):
    "The page of a module: every public name, with a link to the cell that defines it."
    module, chapter = MODULES[name], CHAPTERS[NAMES.index(name)].stem
    yield f"# convnext_nb.{name}"
    yield f"{inspect.getdoc(module)}. [Chapter {chapter[:2]}](../nbs/{chapter}.ipynb) makes it."
    for public in module.__all__:
        f = getattr(module, public)
        f = getattr(f, "_init_fn", f)  # a custom operation
        yield f"({label('api', name, public)})="
        yield f"## {public}"
        yield f"{{.defined}}\n[the cell that defines it](#{label('cell', name, public)})"
        yield from entry(public, f) if callable(f) else value(public, f, inspect.getsource(module))
        for key, method in methods(f) if inspect.isclass(f) else ():
            yield f"### {public}.{key}"
            yield from entry(key, method)


def api_index():
    "Every public name in a line."
    yield "# API"
    yield "Every name that a module exports. `forward` and what torch's classes bring are left out."
    for name, module in MODULES.items():
        yield f"## convnext_nb.{name}"
        rows = []
        for public in module.__all__:
            f = getattr(module, public)
            doc = (inspect.getdoc(getattr(f, "_init_fn", f)) or "") if callable(f) else "a constant"
            rows.append({"name": f"[`{public}`](#{label('api', name, public)})",
                         "": doc.split("\n\n")[0].replace("\n", " ")})
        yield table(rows)
    yield toctree([f"{name}.md" for name in MODULES])


# Results

def shown(v):
    "A value in a cell."
    if v is None: return ""
    if isinstance(v, float): return f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.4g}"
    return str(v).replace("|", r"\|")


def table(rows):
    "A Markdown table of dictionaries; what is no single value is left to the JSON file."
    rows = [{k: v for k, v in row.items() if not isinstance(v, (dict, list))} for row in rows]
    columns = list(dict.fromkeys(k for row in rows for k in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[shown(row.get(k)) for k in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(found):
    "The summary or the settings of a result: one table, or one for each comparison."
    if isinstance(found, dict):
        found = [{"": k, **(v if isinstance(v, dict) else {"value": v})} for k, v in found.items()]
    if not any(isinstance(v, dict) for v in found[0].values()):
        yield table(found)
        return
    for setting in found:
        peers = next(v for v in setting.values() if isinstance(v, dict))
        told = [f"{k} {shown(v)}" for k, v in setting.items() if not isinstance(v, dict)]
        yield f"### {', '.join(told)}"
        yield table([{"": name, **values} for name, values in peers.items()])


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def pictures(path):
    "The pictures of a result: its name begins theirs, and no longer name of a result does."
    for picture in sorted(path.parent.glob(f"{path.stem}*.png")):
        owner = max((p.stem for p in RESULTS if picture.stem.startswith(p.stem)), key=len)
        if owner == path.stem: yield f"![{picture.stem}](../benchmarks/results/{picture.name})"


def script(result):
    "The script that measured a result, and what it says of itself."
    path = next(w for w in result["command"].split() if w.endswith(".py"))
    return path, ast.get_docstring(ast.parse((ROOT / path).read_text()))


def measured(path):
    "The page of a result: pictures, table, receipt."
    result = json.loads(path.read_text())
    source, doc = script(result)
    yield f"# {path.stem}"
    yield from pictures(path)
    for key in ("summary", "settings"):
        if not result.get(key): continue
        yield f"## {key.capitalize()}"
        yield from tables(result[key])
    receipt = {k: v for k, v in result.items() if not isinstance(v, (dict, list))}
    for part in ("config", "how", "peaks"):
        receipt |= {f"{part}: {k}": v for k, v in result.get(part, {}).items()}
    yield "## Receipt\n\n" + table([{"": k, "value": f"`{shown(v)}`"} for k, v in receipt.items()])
    yield f"All of it: [{path.name}](../benchmarks/results/{path.name})"
    yield f"## {source}\n\n{doc}"


def results_index():
    "Every result in a line."
    yield "# Results"
    yield ("Each figure of the book comes from a script in `benchmarks/`, which measures the "
           "peers in the same run and writes machine, versions, seeds and command beside it.")
    rows = []
    for path in RESULTS:
        result = json.loads(path.read_text())
        what = script(result)[1].split("\n\n")[0].replace("\n", " ")
        rows.append({"result": f"[{path.stem}]({path.stem}.md)", "what": what,
                     "machine": result["device"], "threads": result["threads"]})
    yield table(rows)
    yield toctree([f"{path.stem}.md" for path in RESULTS])


# The site

def toctree(entries, caption=None):
    "Pages of the navigation, under a caption or under the page that this stands in."
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["```{toctree}", *options, *entries, "```"])


def index():
    "The README, and what there is to read."
    yield (ROOT / "README.md").read_text()
    titles = {p: nbformat.read(p, 4).cells[0].source.splitlines()[0].strip("# ") for p in CHAPTERS}
    chapters = [f"{p.stem[:2]} {title} <nbs/{p.stem}>" for p, title in titles.items()]
    yield toctree(["nbs/usage", *chapters], "Chapters")
    yield toctree(["nbs/glossary", "api/index", "results/index"], "Reference")
    yield toctree(["CONTRIBUTING", "CHANGELOG"], "Project")


def glossary():
    "Links to the chapter of a public name lead to the cell that defines it."
    def link(match):
        name, public = match[1].partition("_")[2], match[2]
        if public not in MODULES[name].__all__: return match[0]
        return f"(#{label('cell', name, public)})"
    yield re.sub(r"\((\w+)\.ipynb#(\w+)\)", link, (ROOT / "nbs" / "glossary.md").read_text())


def write(name, blocks):
    "A page of Markdown."
    path = PAGES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(block for block in blocks if block), encoding="utf-8")


def pages():
    "All that Sphinx reads, laid out as in the repository, so that links between files hold."
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "benchmarks" / "results", PAGES / "benchmarks" / "results")
    for name in ("LICENSE", "CONTRIBUTING.md", "CHANGELOG.md"): shutil.copy(ROOT / name, PAGES)
    write("index.md", index())
    write("nbs/glossary.md", glossary())
    write("api/index.md", api_index())
    write("results/index.md", results_index())
    for path in [*CHAPTERS, ROOT / "nbs" / "usage.ipynb"]:
        write(f"nbs/{path.name}", [nbformat.writes(chapter(path))])
    for name in NAMES: write(f"api/{name}.md", api(name))
    for path in RESULTS: write(f"results/{path.stem}.md", measured(path))


def main(site=ROOT / "_site"):
    "Write the site and return Sphinx's status."
    pages()
    shutil.rmtree(site, ignore_errors=True)
    conf = str(Path(__file__).parent)
    return build_main(["-q", "-W", "--keep-going", "-c", conf, str(PAGES), str(site)])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
