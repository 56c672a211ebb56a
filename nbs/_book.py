"""What code keeps true in the notebooks and the README: `make export` runs it, and so does a test.

    python nbs/_book.py              badges, kernels and README
    python nbs/_book.py run NAME...  execute these notebooks in place first, as "Run All" does

- Every chapter has the badge, the Colab install cell and the kernel that it should have.
- README.md is nbs/index.ipynb, converted by nbconvert, with links from the project's root.
"""
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbdev.config import get_config

NBS = Path(__file__).parent
# `eval: false`: nbdev leaves the cell alone, Jupyter and Colab run it
BADGE, COLAB = "[![Open In Colab]", "#| hide\n#| eval: false\n# Colab"


def badge(cfg, name):
    "Markdown of the badge of the notebook `name`."
    colab = "https://colab.research.google.com"
    url = f"{colab}/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/nbs/{name}"
    return f"{BADGE}({colab}/assets/colab-badge.svg)]({url})"


def install(cfg):
    "A code cell that installs the package on Colab, beside the figures that chapters read."
    return (f"{COLAB} has torch and not this package\n"
            "import importlib.util\n\n"
            'shell, there = get_ipython(), importlib.util.find_spec("convnext_nb")\n'
            'if "google.colab" in str(shell) and not there:\n'
            f'    shell.system("git clone -q --depth 1 {cfg.git_url}")\n'
            f'    shell.system("pip install -q ./{cfg.repo}")\n'
            f'    shell.run_line_magic("cd", "-q {cfg.repo}/nbs")')


def chapter(path, cfg):
    """The notebook at `path` as settings.ini wants it, and with a kernel, so that Jupyter need not
    ask for one. A new notebook marks the two cells with BADGE and COLAB."""
    nb = nbformat.read(path, as_version=4)
    nb.metadata = {"kernelspec": dict(display_name="python3", language="python", name="python3")}
    for cell in nb.cells:
        if cell.source.startswith((BADGE, "BADGE")): cell.source = badge(cfg, path.name)
        if cell.source.startswith((COLAB, "#| hide\nCOLAB")): cell.source = install(cfg)
    return nb


def readme():
    "The text of README.md."
    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    nb.metadata.language_info = {"name": "python"}
    for cell in nb.cells:
        hidden = cell.source.startswith("#| echo: false")
        if hidden: cell.metadata.transient = {"remove_source": True}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.sub(r"\]\((\w+\.(ipynb|md)\b)", r"](nbs/\1", text)  # 00_blocks.ipynb -> nbs/...
    text = re.sub(r"\]\(\.\./", "](", text)                          # ../LICENSE -> LICENSE
    return "<!-- Made from nbs/index.ipynb by `make readme`. -->\n\n" + text.strip() + "\n"


def run(path):
    "Execute a notebook and keep its outputs; what needs a GPU or a network asks for it first."
    # warnings print paths of the machine, progress bars go by
    os.environ |= {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=1800, resources={"metadata": {"path": str(NBS)}}).execute()
    for cell in nb.cells: cell.metadata = {}
    nbformat.write(nb, path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        for name in sys.argv[2:]: run(NBS / f"{Path(name).stem}.ipynb")
    for path in sorted(NBS.glob("*.ipynb")):
        nb = chapter(path, get_config())
        if nb != nbformat.read(path, as_version=4): nbformat.write(nb, path)
    (NBS.parent / "README.md").write_text(readme(), encoding="utf-8")
