"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build/html`."""

import os
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"

project = "ppvae"
author = "The ppvae developers"
copyright = author
try:
    release = metadata.version("ppvae")
except metadata.PackageNotFoundError:
    release = "unknown"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
# A name may stand in two modules (Bernoulli is a family and a likelihood): a reference in a
# docstring by that bare name then has two targets, and Sphinx's choice of the first will do.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = f"ppvae {release}"
html_static_path = ["_static"] if (HERE / "_static").is_dir() else []

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
}
autodoc_typehints = "signature"
# Docstrings that Pyro and torch wrote for the methods we override are theirs to publish.
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# A record's fields are documented once, by the Attributes section of its docstring.
napoleon_use_ivar = True


# --- Other projects' inventories -------------------------------------------------------------

INVENTORIES = {
    "arviz": "https://python.arviz.org/projects/base/en/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pyro": "https://docs.pyro.ai/en/stable/",
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}


def inventory(name: str) -> str | None:
    """Fetch a project's inventory into the build folder; None when that does not work.

    Sphinx would warn about an inventory it cannot reach, and a build in which warnings are
    errors would fail without a network. Links to projects that are out of reach become text.
    """
    path = HERE / "_build" / "inventories" / f"{name}.inv"
    if not path.exists():
        try:
            with urllib.request.urlopen(INVENTORIES[name] + "objects.inv", timeout=5) as response:
                content = response.read()
        except (OSError, ValueError):
            return None
        if not content.startswith(b"# Sphinx inventory version 2"):
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(path)


with ThreadPoolExecutor() as pool:
    _paths = dict(zip(INVENTORIES, pool.map(inventory, INVENTORIES), strict=True))
intersphinx_mapping = {
    name: (INVENTORIES[name], path) for name, path in _paths.items() if path is not None
}


# --- The gallery -----------------------------------------------------------------------------

_headers = ("GALLERY_HEADER.rst", "GALLERY_HEADER.md", "README.rst", "README.txt", "README.md")
if any(EXAMPLES.glob("plot_*.py")) and any((EXAMPLES / name).exists() for name in _headers):
    extensions.append("sphinx_gallery.gen_gallery")
    sphinx_gallery_conf = {
        "examples_dirs": ["../examples"],
        "gallery_dirs": ["auto_examples"],
        "filename_pattern": r"[/\\]plot_",
        "ignore_pattern": r"(^|[/\\])_[^/\\]*$",
        "abort_on_example_error": True,
        "download_all_examples": False,
        "min_reported_time": 1,
        "remove_config_comments": True,
        "show_memory": False,
        "matplotlib_animations": False,
    }
else:
    exclude_patterns.append("auto_examples")


# --- The graphs of the models ------------------------------------------------------------------


def setup(app: Any) -> None:
    """Draw the graph of each model before the pages that show them are read."""
    sys.path.insert(0, str(HERE))
    from draw_graphs import draw_all

    app.connect("builder-inited", lambda _: draw_all())
