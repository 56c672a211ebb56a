"""Write the Open-in-Colab badge and the Colab install cell into every notebook, from settings.ini (`make export` runs this).

A notebook has a Markdown cell that starts with the badge (or with the word BADGE) and a code cell that starts with
`# Colab` (or with the word COLAB); both are rewritten when user, repo or branch change.
"""
from pathlib import Path

import nbformat
from nbdev.config import get_config

BADGE = ("BADGE", "[![Open In Colab]")
COLAB = ("COLAB", "#| hide\nCOLAB", "#| hide\n# Colab")


def badge(cfg, name):
    "Markdown of the badge of the notebook `name`."
    url = f"https://colab.research.google.com/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/nbs/{name}"
    return f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"


def install(cfg):
    "The cell that installs the package where it runs on Colab, and does nothing elsewhere."
    return ("#| hide\n# Colab has torch and not this package\nimport importlib.util, sys\n\n"
            'if "google.colab" in sys.modules and importlib.util.find_spec("convnext_nb") is None:\n'
            f'    get_ipython().system("pip install -q git+{cfg.git_url}")')


def write(path, cfg):
    "Put both into one notebook; returns whether it changed."
    nb = nbformat.read(path, as_version=4)
    before = nbformat.writes(nb)
    for cell in nb.cells:
        if cell.source.startswith(BADGE): cell.source = badge(cfg, path.name)
        if cell.source.startswith(COLAB): cell.source = install(cfg)
    if nbformat.writes(nb) == before: return False
    nbformat.write(nb, path)
    return True


if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        if write(path, get_config()): print(f"badge: {path.name}")
