"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build/html`."""

import os
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from sphinx.util.nodes import make_refnode

os.environ.setdefault("MPLBACKEND", "Agg")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
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
exclude_patterns = ["_build", "skeletons"]

# A reference of ours that leads nowhere is an error. Names of other projects are left alone: their
# inventories may be out of reach, and torch and Pyro document classes under other names than those
# of the modules that hold them.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!ppvae\.)\w+\..*"),
    # What stands in single backticks is code, and a link where it names something.
    (r"py:obj", r".*"),
    # Imported for type checkers alone, so that a signature has the bare name.
    (r"py:.*", r"tuple\[int|ArrayLike|Axes|Floats|Tensor|Bound|Figure|DataTree|Path"),
    # Parts of ours that have no page: private bases, and what runs a compiled step.
    (r"py:.*", r"(ppvae\..*\.)?_\w+"),
    (r"py:.*", r"ppvae\.(compiled\.(stepping|captured)|families\.named\.DiagonalGaussian).*"),
]
default_role = "py:obj"
# A name may stand in two modules (Bernoulli is a family and a likelihood): a reference in a
# docstring by that bare name then has two targets, and Sphinx's choice of the first will do.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = f"ppvae {release}"
html_static_path = ["_static"]
html_css_files = ["ppvae.css"]

myst_enable_extensions = ["dollarmath", "deflist", "tasklist"]
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

QUICK = bool(os.environ.get("PPVAE_QUICK"))
# Of which kind the examples' pages are. Examples that have not changed are not run again, but for
# a build of the other kind, or after one that did not end.
_kind, _built = "quick" if QUICK else "full", HERE / "_build" / "examples-kind"
_stale = not _built.exists() or _built.read_text() != _kind
if _stale:
    _built.unlink(missing_ok=True)

extensions.append("sphinx_gallery.gen_gallery")
sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["auto_examples"],
    "filename_pattern": r"[/\\]plot_",
    "within_subsection_order": "gallery_order.FirstThingsFirst",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "min_reported_time": 1,
    "remove_config_comments": True,
    "run_stale_examples": _stale,
    "show_memory": False,
    "matplotlib_animations": False,
    # Results show themselves; what a plotting call happens to return is not shown.
    "capture_repr": ("_repr_html_",),
    # Examples that say how long something takes are alone on the machine; in a hurry none is.
    "parallel": os.cpu_count() if QUICK else False,
}
if QUICK:
    html_theme_options = {"announcement": "Quick build: examples are not trained out."}


# --- The citation ----------------------------------------------------------------------------


def bibtex() -> str:
    """CITATION.cff as BibTeX."""
    cff = yaml.safe_load((HERE.parent / "CITATION.cff").read_text(encoding="utf-8"))
    fields = {
        "title": f"{{{cff['title']}}}",
        "author": " and ".join(f"{{{author['name']}}}" for author in cff["authors"]),
        "version": cff["version"],
        "note": f"{cff['license']} licence",
    }
    lines = [f"  {key} = {{{value}}}," for key, value in fields.items()]
    return "\n".join(["@software{ppvae,", *lines, "}", ""])


# --- What a build makes before it reads the pages ----------------------------------------------


def make_sources(app: Any) -> None:
    """Draw the graph of each model, and write the citation."""
    from draw_graphs import draw_all

    draw_all()
    (HERE / "_build").mkdir(exist_ok=True)
    (HERE / "_build" / "citation.bib").write_text(bibtex(), encoding="utf-8")


def public_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """What `ppvae.compare` leads to: the page of the module that the name is defined in."""
    import ppvae

    name = node.get("reftarget", "").removeprefix("ppvae.")
    if node.get("refdomain") != "py" or name not in ppvae.__all__:
        return None
    module = getattr(getattr(ppvae, name), "__module__", None)
    found = env.domains["py"].objects.get(f"{module}.{name}")
    if found is None:
        return None
    return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, content)


def note_kind(app: Any, exception: Exception | None) -> None:
    """Write down of which kind the examples' pages are, once all were made."""
    if exception is None:
        _built.write_text(_kind)


def setup(app: Any) -> None:
    """Call the three."""
    app.connect("builder-inited", make_sources)
    app.connect("missing-reference", public_name)
    app.connect("build-finished", note_kind)
