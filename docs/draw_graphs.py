"""Draw the graph of each ready-made model with Pyro's renderer: `python docs/draw_graphs.py`.

Pyro writes the graph, Graphviz lays it out. The library comes with the `docs` extra; no program
has to be installed beside it.
"""

from __future__ import annotations

from pathlib import Path

import pygraphviz
import pyro
import torch

from ppvae import pairs
from ppvae.isolation import forked_rng, private_store

FOLDER = Path(__file__).resolve().parent / "models" / "_graphs"


def draw(name: str) -> Path:
    """Draw the model of a pair; gives the file."""
    path = FOLDER / f"{name}.svg"
    with private_store(), forked_rng(0):
        model, _ = getattr(pairs, name)()
        with torch.no_grad():
            x = model(size=2)
        graph = pyro.render_model(model, model_args=(x,), render_distributions=True)
    laid_out = pygraphviz.AGraph(string=graph.source)
    laid_out.graph_attr["bgcolor"] = "white"
    laid_out.layout("dot")
    path.parent.mkdir(parents=True, exist_ok=True)
    laid_out.draw(str(path))
    return path


def draw_all() -> None:
    """Draw the models of all pairs."""
    for name in pairs.__all__:
        draw(name)


if __name__ == "__main__":
    draw_all()
