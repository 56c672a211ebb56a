"Sphinx's settings for the web edition; book/build.py writes the pages that it reads."
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from nbdev.config import get_config

sys.path.insert(0, str(Path(__file__).parent))
cfg = get_config(path=Path(__file__).parents[1])

project, author, copyright = "ConvNeXt, a book that runs", cfg.author, cfg.copyright
html_title = project
release = cfg.version
extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"  # outputs as they were committed
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "attrs_block", "attrs_inline"]
myst_heading_anchors = 4
# Jupyter's anchors, so that one link serves a notebook, its page on GitHub and the web edition
myst_heading_slug_func = "build.anchor"
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "sphinx_book_theme"
html_favicon = str(Path(__file__).parent / "static" / "icon.svg")
html_context = dict(default_mode="auto")
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["style.css"]
html_copy_source = html_show_sourcelink = False
html_theme_options = dict(
    repository_url=cfg.git_url.removesuffix(".git"), repository_branch=cfg.branch,
    use_repository_button=True, use_issues_button=True, use_download_button=False,
    launch_buttons=dict(colab_url="https://colab.research.google.com"),
    show_toc_level=2)


def setup(app):
    "Formulas as MathML, by docutils: browsers draw it, and no script comes from elsewhere."
    def visit(block):
        def html(self, node):
            self.body.append(tex2mathml(node.astext(), as_block=block))
            raise SkipNode
        return html, None
    app.add_html_math_renderer("mathml", visit(False), visit(True))


html_math_renderer = "mathml"
