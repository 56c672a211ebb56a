"""The web edition: `make book` writes it to _site/. Nothing is executed.

    python book/build.py [SITE]

1. Pages: the chapters as committed, without directives and hidden cells; a page for each module,
   from its docments; a page for each measured result.
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
from pathlib import Path
from pprint import pformat
from tempfile import TemporaryDirectory

import nbformat
from fastcore.docments import DocmentTbl, docments
from nbdev.process import extract_directives
from nbformat.v4 import new_markdown_cell
from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def anchor(title):
    "Jupyter's anchor of a heading; Sphinx asks for it too (myst_heading_slug_func)."
    return title.replace(" ", "-")


def module_of(path):
    "00_blocks.ipynb -> blocks."
    return path.stem.partition("_")[2]


NAMES = [module_of(path) for path in CHAPTERS]  # in reading order
MODULES = {name: importlib.import_module(f"convnext_nb.{name}") for name in NAMES}


def public(module, name):
    "The object of that name; of a custom operation, the function that it was made from."
    f = getattr(MODULES[module], name)
    return getattr(f, "_init_fn", f)


def label(page, module, name):
    "The target of a public name. Targets ignore case, names do not: a class says that it is one."
    is_class = inspect.isclass(public(module, name))
    return f"{page}.{module}.{name}" + ("-class" if is_class else "")


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
    home = {name: m for m in known for name in MODULES[m].__all__}

    def link(match):
        m = home.pop(match[1], None)
        return f"[{match[0]}](#{label('api', m, match[1])})" if m else match[0]

    # code, links and headings stay as they are
    kept = r"(```.*?```|\[[^\]]*\]\([^)]*\)|^#.*?$)"
    parts = re.split(kept, text, flags=re.S | re.M)
    parts[::2] = [re.sub(r"`(\w+)(?:\(\))?`", link, part) for part in parts[::2]]
    return "".join(parts)


def code_cells(cell, module):
    "A code cell as the web edition shows it: none, itself, or a line with its anchors before it."
    directives = extract_directives(cell, remove=False)
    cell.source = re.sub(r"\A(?:#\|.*\n?)+\n*", "", cell.source)
    if directives.keys() & {"hide", "default_exp"} or not cell.source: return []
    tags = cell.metadata.setdefault("tags", [])
    if directives.get("echo:") == ["false"]: tags.append("remove-input")
    if "code-fold:" in directives:
        tags.append("hide-cell")
        prompt = " ".join(directives["code-summary:"]).strip('"')
        cell.metadata["mystnb"] = dict(code_prompt_show=prompt, code_prompt_hide=prompt)
    if not directives.keys() & {"export", "exporti"}: return [cell]
    tags.append("exported")
    names = defined(cell.source, module)
    targets = "".join(f"({label('cell', module, name)})=\n" for name in names)
    links = [f"[{name}](#{label('api', module, name)})" for name in names]
    text = f"{targets}{{.exported}}\n{' · '.join([f'convnext_nb.{module}', *links])}"
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

def short(annotation):
    "A type as one writes it: without the modules that its parts come from."
    if annotation is type(None): return "None"
    if type(annotation) is type: return annotation.__name__
    return re.sub(r"<class '(.*)'>", r"\1", re.sub(r"\b(\w+\.)+", "", str(annotation)))


class Parameters(DocmentTbl):
    "nbdev's table of parameters: code as code, `|` escaped, what **kwargs are among them."
    def __init__(self, f):
        own = docments(f, full=True, args_kwargs=True)
        super().__init__(f, returns=not inspect.isclass(f))
        self.dm |= own
        for props in self.dm.values():
            if not isinstance(props["docment"], str): props["docment"] = inspect.Parameter.empty
        if dataclasses.is_dataclass(f):  # its own fields; `entry` links the base's
            bases = [b for b in f.__mro__[1:] if dataclasses.is_dataclass(b)]
            theirs = {field.name for b in bases for field in dataclasses.fields(b)}
            self.params = [k for k in self.params if k not in theirs]

    @property
    def has_return(self):
        return self.returns and isinstance(self.dm.get("return", {}).get("docment"), str)

    def _row(self, name, props):
        cells = {k: props[k] for k in self._columns}
        for k, value in cells.items():
            if value is inspect.Parameter.empty: cells[k] = ""
            elif k == "anno": cells[k] = f"`{short(value)}`"
            elif k == "default": cells[k] = f"`{shown_default(value)}`"
        texts = [str(c).replace("|", r"\|").replace("\n", " ") for c in cells.values()]
        return [f"`{name}`", *texts]

    @property
    def return_str(self):
        row = self._row("returns", self.dm["return"])
        return f"| {' | '.join(['**returns**', *row[1:]])} |"


def shown_default(value):
    return value.__name__ if inspect.isclass(value) else repr(value)


def signature(name, f):
    "How it is called: names and defaults. Types and what they mean stand in the table."
    try: parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError): return name
    shown = []
    for p in parameters:
        text = str(p.replace(annotation=p.empty, default=p.empty))
        if p.default is not p.empty: text += f"={shown_default(p.default)}"
        if p.name != "self": shown.append(text)
    lines = [f"{name}("]
    for i, text in enumerate(shown):
        end = ")" if i + 1 == len(shown) else ", "
        if len(lines[-1]) + len(text) > 78: lines.append(" " * (len(name) + 1))
        lines[-1] += text + end
    return "\n".join(line.rstrip() for line in lines) if shown else f"{name}()"


def entry(name, f):
    "A function, a class or a method: signature, docstring, table."
    yield f"```python\n{signature(name, f)}\n```"
    yield inspect.getdoc(f) or ""
    yield Parameters(f)._repr_markdown_()
    for base in f.__mro__[1:] if dataclasses.is_dataclass(f) else ():
        module = base.__module__.rpartition(".")[2]
        if dataclasses.is_dataclass(base) and base.__name__ in MODULES[module].__all__:
            yield f"And the fields of [{base.__name__}](#{label('api', module, base.__name__)})."
            return


def methods(cls):
    "The methods that a class brings, beyond those of torch's classes that it redefines."
    theirs = [b for b in cls.__mro__ if not b.__module__.startswith("convnext_nb")]
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        ours = method.__module__.startswith("convnext_nb") and not name.startswith("_")
        if ours and not any(hasattr(b, name) for b in theirs): yield name, method


def comment(module, name):
    "The comment above a constant, or beside it."
    source = inspect.getsource(MODULES[module])
    found = re.search(rf"(?:^# (?!%%)(.*)\n)?^{name} = .*?(?:  # (.*))?$", source, re.M)
    return found and (found[1] or found[2]) or ""


def value(name, v, lines=20):
    "What a constant holds, or begins with."
    text = pformat(v, width=78, sort_dicts=False)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).splitlines()
    if len(text) > lines: text = [*text[:lines], "..."]
    equals = " = " if len(text) == 1 else " =\n"
    return f"```text\n{name}{equals}" + "\n".join(text) + "\n```"


def api(module):
    "The page of a module: every public name, with a link to the cell that defines it."
    stem = CHAPTERS[NAMES.index(module)].stem
    yield f"# convnext_nb.{module}"
    yield f"{inspect.getdoc(MODULES[module])}. [Chapter {stem[:2]}](../nbs/{stem}.ipynb) makes it."
    for name in MODULES[module].__all__:
        f = public(module, name)
        yield f"({label('api', module, name)})="
        yield f"## {name}"
        yield f"{{.defined}}\n[the cell that defines it](#{label('cell', module, name)})"
        if callable(f): yield from entry(name, f)
        else: yield from (comment(module, name), value(name, f))
        for key, method in methods(f) if inspect.isclass(f) else ():
            yield f"### {name}.{key}"
            yield from entry(key, method)


def api_index():
    "Every public name in a line."
    yield "# API"
    yield "Every name that a module exports. `forward` and what torch's classes bring are left out."
    for module in NAMES:
        yield f"## convnext_nb.{module}"
        rows = []
        for name in MODULES[module].__all__:
            f = public(module, name)
            doc = (inspect.getdoc(f) or "") if callable(f) else comment(module, name)
            rows.append({"name": f"[`{name}`](#{label('api', module, name)})",
                         "": doc.partition("\n\n")[0].replace("\n", " ")})
        yield table(rows)
    yield toctree([f"{module}.md" for module in NAMES])


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


def told(setting):
    "What was compared, in words: what is counted or measured there stands in the JSON file."
    for k, v in setting.items():
        if isinstance(v, str) and k != "fastest_peer": yield v
        elif isinstance(v, int) and k != "rounds": yield f"{k} {v}"


def tables(found):
    "The summary or the settings of a result: one table, or one for each comparison."
    if isinstance(found, dict):
        found = [{"": k, **(v if isinstance(v, dict) else {"value": v})} for k, v in found.items()]
    if not any(isinstance(v, dict) for v in found[0].values()):
        yield table(found)
        return
    for setting in found:
        peers = next(v for v in setting.values() if isinstance(v, dict))
        yield f"**{', '.join(told(setting))}**"
        yield table([{"": name, **values} for name, values in peers.items()])


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
    "The page of a result: pictures, tables, receipt, and how it was measured."
    result = json.loads(path.read_text())
    source, doc = script(result)
    yield f"# {path.stem}"
    yield from pictures(path)
    yield f"```sh\n{result['command']}\n```"
    yield doc
    for key in ("summary", "settings"):
        if not result.get(key): continue
        yield f"## {key.capitalize()}"
        yield from tables(result[key])
    receipt = {k: v for k, v in result.items() if not isinstance(v, (dict, list))}
    for part in ("config", "how", "peaks", "result"):
        receipt |= {f"{part}: {k}": v for k, v in result.get(part, {}).items()}
    yield "## Receipt\n\n" + table([{"": k, "value": f"`{shown(v)}`"} for k, v in receipt.items()])
    yield f"All of it: [{path.name}](../benchmarks/results/{path.name})"


def results_index():
    "Every result in a line."
    yield "# Results"
    yield ("What takes longer than a cell is measured by a script in `benchmarks/`, with the peers "
           "in the same run, and written down with machine, versions, seeds and command.")
    rows = []
    for path in RESULTS:
        result = json.loads(path.read_text())
        what = script(result)[1].partition("\n\n")[0].replace("\n", " ")
        command = result["command"].removeprefix("python benchmarks/")
        rows.append({"result": f"[{path.stem}]({path.stem}.md)", "what": what,
                     "command": f"`{command}`"})
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
        module, name = match[1].partition("_")[2], match[2]
        if name not in MODULES[module].__all__: return match[0]
        return f"(#{label('cell', module, name)})"
    yield re.sub(r"\((\w+)\.ipynb#(\w+)\)", link, (ROOT / "nbs" / "glossary.md").read_text())


def write_pages(folder):
    "All that Sphinx reads, laid out as in the repository, so that links between files hold."
    def write(name, blocks):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(block for block in blocks if block), encoding="utf-8")

    shutil.copytree(ROOT / "benchmarks" / "results", folder / "benchmarks" / "results")
    for name in ("LICENSE", "CONTRIBUTING.md", "CHANGELOG.md"): shutil.copy(ROOT / name, folder)
    write("index.md", index())
    write("nbs/glossary.md", glossary())
    for path in [*CHAPTERS, ROOT / "nbs" / "usage.ipynb"]:
        write(f"nbs/{path.name}", [nbformat.writes(chapter(path))])
    write("api/index.md", api_index())
    for module in NAMES: write(f"api/{module}.md", api(module))
    write("results/index.md", results_index())
    for path in RESULTS: write(f"results/{path.stem}.md", measured(path))


def main(site=ROOT / "_site"):
    "Write the site and return Sphinx's status."
    with TemporaryDirectory() as folder:  # myst-nb leaves a folder beside what it makes
        pages, made = Path(folder, "pages"), Path(folder, "made")
        pages.mkdir()
        write_pages(pages)
        options = ["-q", "-W", "--keep-going", "-c", str(ROOT / "book")]
        status = build_main([*options, "-d", f"{folder}/doctrees", str(pages), str(made)])
        shutil.rmtree(site, ignore_errors=True)
        if made.exists(): shutil.move(made, site)
        return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
