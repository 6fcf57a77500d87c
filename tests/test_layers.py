"""Who may import whom.

A module of ppvae imports only from rows above its own, so the package has no import circles, and
each room can be read knowing only the ones before it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ppvae

ROOT = Path(ppvae.__file__).parent

ROWS = [
    "markup",
    "isolation",
    "progress",
    "graphs",
    "data",
    "distributions",
    "factorized",
    "flows",
    "nn",
    "likelihoods",
    "priors",
    "density",
    "simulation",
    "terms",
    "divergence",
    "configurations",
    "families",
    "freeing",
    "models",
    "baselines",
    "guides",
    "proposals",
    "generation",
    "classification",
    "shared",
    "pairs",
    "objectives",
    "compiled",
    "precision",
    "feeding",
    "training",
    "descent",
    "reconstruction",
    "adversarial",
    "classical",
    "natural",
    "fisher",
    "coordinate",
    "local",
    "alternating",
    "refinement",
    "evidence",
    "annealing",
    "diagnostics",
    "pooling",
    "uniformity",
    "calibration",
    "usage",
    "gradients",
    "ledger",
    "comparison",
    "consequences",
    "explanation",
    "repairs",
    "timing",
    "files",
    "inference_data",
    "plots",
    "pages",
    "preparing",
    "reporting",
    "summaries",
    "catalogue",
    "cli",
]
# A leaf serves the modules named here and no others.
LEAVES = {"data": {"plots", "preparing", "cli"}}
# A record may have a method that hands it to a later room: the import stands inside the method, or
# is for the type checker, so that no module needs a later one to be imported.
DOORS = {"ledger": {"pages"}}
# Libraries that are slow to import, or change torch's settings when they are.
LAZY = (
    "arviz",
    "arviz_base",
    "arviz_plots",
    "arviz_stats",
    "jinja2",
    "matplotlib",
    "sklearn",
    "torchvision",
    "zuko",
)


class Import(NamedTuple):
    """One imported name, in full: `from a import b` gives a.b."""

    name: str
    line: int
    is_lazy: bool


def in_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, package: str) -> list[Import]:
    """Everything that the file imports, wherever in the file it does."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = [*(above if node.level else []), *([node.module] if node.module else [])]
            for alias in node.names:
                yield Import(".".join([*parts, alias.name]), node.lineno, lazy)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if in_type_checking(node):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, lazy)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, lazy)

    return list(visit(ast.parse(path.read_text(encoding="utf-8")), False))


def room(path: Path) -> str:
    """The row of ROWS that a file belongs to: its module, or the package it lies in."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def package_of(path: Path) -> str:
    return ".".join(["ppvae", *path.relative_to(ROOT).parts[:-1]])


FILES = sorted(
    path for path in ROOT.rglob("*.py") if path not in {ROOT / "__init__.py", ROOT / "__main__.py"}
)
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


@each_file
def test_every_module_has_a_row(path: Path) -> None:
    assert room(path) in ROWS, f"give {room(path)} a row in ROWS"


@each_file
def test_a_module_imports_only_from_rows_above(path: Path) -> None:
    own = room(path)
    above = ROWS[: ROWS.index(own)]
    for name, line, is_lazy in imports(path, package_of(path)):
        parts = name.split(".")
        if parts[0] != "ppvae":
            continue
        assert len(parts) > 1, f"{path.name}:{line} imports the whole package"
        other = parts[1]
        if other == own and path.parent != ROOT:
            continue  # files of one room may share
        if is_lazy and other in DOORS.get(own, ()):
            continue
        assert other in above, (
            f"{path.name}:{line} imports {name}; a module in row {own!r} may import {above}"
        )
        allowed = LEAVES.get(other)
        assert allowed is None or own in allowed, (
            f"{path.name}:{line} imports {name}, which serves only {sorted(allowed or [])}"
        )


@each_file
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    for name, line, is_lazy in imports(path, package_of(path)):
        heavy = name.split(".")[0] in LAZY or name.startswith("pyro.contrib.zuko")
        assert is_lazy or not heavy, f"{path.name}:{line} imports {name} with the module"


@each_file
def test_only_flows_import_zuko(path: Path) -> None:
    names = [name for name, _, _ in imports(path, package_of(path))]
    zuko = [name for name in names if name.split(".")[0] == "zuko" or ".contrib.zuko" in name]
    assert not zuko or room(path) == "flows"


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "import a.b\n"
        "from c import d as e\n"
        "from . import f\n"
        "from .g import h\n"
        "from ..i import j\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    import k\n"
        "else:\n"
        "    import l\n"
        "def m():\n"
        "    from n import o\n"
        "class p:\n"
        "    import q\n",
        encoding="utf-8",
    )
    assert [(i.name, i.is_lazy) for i in imports(path, "ppvae.models")] == [
        ("a.b", False),
        ("c.d", False),
        ("ppvae.models.f", False),
        ("ppvae.models.g.h", False),
        ("ppvae.i.j", False),
        ("typing.TYPE_CHECKING", False),
        ("k", True),
        ("l", False),
        ("n.o", True),
        ("q", False),
    ]


def test_import_ppvae_is_light_and_leaves_validation_alone() -> None:
    code = (
        "import sys, torch, pyro\n"
        "from torch.distributions import Distribution\n"
        "rng, before = torch.get_rng_state(), (Distribution._validate_args, pyro.settings.get())\n"
        "import ppvae\n"
        "assert (Distribution._validate_args, pyro.settings.get()) == before\n"
        "assert torch.equal(torch.get_rng_state(), rng)\n"
        "assert not pyro.get_param_store().keys()\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert not set(run.stdout.split()) & set(LAZY)
