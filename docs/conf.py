"""Sphinx settings of the site: ``make docs`` builds it into build/docs."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# The kernels of the notebooks import the checkout, with one thread each.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RL_WARNINGS"] = "False"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

_about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where files outside of docs/ are shown; without it, their names are no links.
_repository = _about.get("urls", {}).get("Repository")

project = "iwsft"
author = "The iwsft maintainers"
copyright = author
html_title = "iwsft"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["results/**"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_heading_anchors = 3
# A line may begin with "% interval".
myst_disable_syntax = ["myst_line_comment"]
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
# Progress bars and warnings of other libraries.
nb_output_stderr = "remove"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Yields", "params_style")]


def _follow_links(app: Any, page: str, source: list[str]) -> None:
    """Links to files outside of docs/, and to pages that are not Sphinx's, lead somewhere."""
    if "/" in page:  # From a folder of docs/, "../" is docs/ itself, and notebooks are JSON.
        return
    inside = r"\[([^\]]+)\]\(\.\./([^)]+)\)"
    link = rf"[\1]({_repository}/blob/main/\2)" if _repository else r"\1"
    text = re.sub(inside, link, source[0])
    source[0] = re.sub(
        r"\[([^\]]+)\]\((results/[\w.-]+(?:html|json))\)", r'<a href="\2">\1</a>', text
    )


def _add_results(app: Any, error: Exception | None) -> None:
    """Put the recorded results next to the pages, and the report that is made of them."""
    if error is None:
        from benchmarks.report.page import write_report

        out = Path(app.outdir) / "results"
        write_report(ROOT / "docs" / "results" / "runs.json", out)
        shutil.copytree(ROOT / "docs" / "results", out, dirs_exist_ok=True)


def _own_signature(app: Any, what: str, name: str, thing: Any, *rest: Any) -> Any:
    """Take the arguments of a class from its constructor where a metaclass hides them."""
    if what != "class" or rest[1] != "(*args, **kwargs)" or "__init__" not in vars(thing):
        return None
    whole = inspect.signature(thing.__init__)
    plain = [p.replace(annotation=p.empty) for p in list(whole.parameters.values())[1:]]
    return str(inspect.Signature(plain)), None


def setup(app: Any) -> None:
    """Register the functions above with Sphinx."""
    app.connect("autodoc-process-signature", _own_signature)
    app.connect("source-read", _follow_links)
    app.connect("build-finished", _add_results)
