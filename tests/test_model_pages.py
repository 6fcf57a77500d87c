"""The pages of the models say what the code does."""

import re
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer.inspect import get_model_relations

from ppvae import families, likelihoods, pairs
from ppvae.configurations import MOST_CONFIGURATIONS, num_configurations
from ppvae.density import judging, read_model
from ppvae.isolation import forked_rng, private_store

PAGES = Path(__file__).resolve().parent.parent / "docs" / "models"
every_pair = pytest.mark.parametrize("name", pairs.__all__)


def rows_of_table():
    text = (PAGES / "index.md").read_text(encoding="utf-8")
    rows = [
        line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| [`")
    ]
    return {re.search(r"`(\w+)`", cells[0]).group(1): cells for cells in rows}


TABLE = rows_of_table()


def drawn(name):
    model, guide = getattr(pairs, name)()
    with private_store(), forked_rng(0), torch.no_grad():
        return model, guide, model(size=3)


def named(cell):
    return re.findall(r"`(\w+)`", cell)


def test_the_table_has_every_pair():
    assert sorted(TABLE) == sorted(pairs.__all__)


@every_pair
def test_every_pair_has_a_page_with_formula_graph_and_source(name):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert f"pairs.{name}" in text
    assert "$$" in text
    assert f"](_graphs/{name}.svg)" in text
    assert re.search(r"(19|20)\d\d", text), "no source with its year"
    assert "```python" in text


@every_pair
def test_pyros_renderer_reads_the_model(name):
    model, _, x = drawn(name)
    with private_store(), forked_rng(0):
        relations = get_model_relations(model, model_args=(x,))
    assert "x" in relations["observed"]
    latents = set(relations["sample_sample"]) - set(relations["observed"])
    assert latents, "a model without latent variables"


@every_pair
def test_the_families_of_the_table_fit(name):
    model, _, x = drawn(name)
    if name == "bayesian_neural_network":
        pytest.skip("its weights are shared by all rows; test_bayesian_neural_network has the rest")
    with judging(0, x, model):
        sites = read_model(model, x).latents.values()

    def build(kind, site):
        size = site.event_shape[0] if site.event_shape else None
        if kind is families.Categorical:
            return kind(site.support.upper_bound + 1) if size is None else None
        if kind is families.BlockNormal:
            return kind(size, [[i] for i in range(size)])
        if kind is families.Given:
            return kind("y", 10, families.DiagonalNormal(size)) if size else None
        if kind is families.ConditionalFlow:
            return kind(size, 2)
        return kind(size)

    for kind in named(TABLE[name][3]):
        fitting = 0
        for site in sites:
            family = build(getattr(families, kind), site)
            if family is None:
                continue
            try:
                family.check_site(site)
            except ValueError:
                continue
            fitting += 1
        assert fitting, f"{kind} fits no latent site of {name}"


def test_the_likelihoods_of_the_table_exist():
    for cells in TABLE.values():
        for name in named(cells[2]):
            assert name == "vae" or issubclass(getattr(likelihoods, name), likelihoods.Likelihood)


@every_pair
def test_the_exact_answer_of_the_table_is_there(name):
    model, _, x = drawn(name)
    exact = TABLE[name][4]
    assert hasattr(model, "log_evidence") == exact.startswith("closed form")
    if exact.startswith("enumeration"):
        with judging(0, x, model):
            assert num_configurations(read_model(model, x)) <= MOST_CONFIGURATIONS


def test_the_store_of_pyro_was_left_alone():
    assert not pyro.get_param_store().keys()
