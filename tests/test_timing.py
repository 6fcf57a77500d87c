"""ELBO against time: each point is a fit that anybody can make, and nothing is left changed."""

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import ppvae
from ppvae import pairs, timing
from ppvae.comparison import paired_weights
from ppvae.families import DiagonalNormal
from ppvae.guides import Amortized, PerDatapoint
from ppvae.isolation import evaluation_mode, forked_rng
from ppvae.likelihoods import Bernoulli
from ppvae.models import VAE
from ppvae.nn import MLP
from ppvae.priors import VampPrior

STEPS = 20


@pytest.fixture(scope="module")
def case() -> SimpleNamespace:
    with forked_rng(0):
        model, guide = pairs.factor_analysis(x_dim=4, z_dim=2)
        model, guide = model.float(), guide.float()
        x = model(size=230).detach().float()
    before = copy.deepcopy([*model.state_dict().values(), *guide.state_dict().values()])
    found = ppvae.elbo_against_time(
        model, guide, x[:200], x[200:], steps=STEPS, lr=0.01, num_samples=400, seed=5
    )
    return SimpleNamespace(
        model=model, guide=guide, train=x[:200], x=x[200:], found=found, before=before
    )


def of(found: ppvae.ElboAgainstTime, mode: str) -> Any:
    return found.dataset.isel(point=found.dataset["mode"].values == mode)


def test_each_point_of_the_training_is_a_fit_of_that_many_steps(case: SimpleNamespace) -> None:
    points = of(case.found, "amortized")
    assert points["effort"].values.tolist() == [0, 1, 2, 4, 8, 16, STEPS]
    for at, steps in ((0, 0), (3, 4), (-1, STEPS)):
        guide = copy.deepcopy(case.guide)
        if steps:
            with evaluation_mode(case.model):  # The model is held fixed.
                ppvae.fit(
                    case.model, guide, case.train, steps=steps, lr=0.01, seed=5, progress=False
                )
        own = paired_weights(case.model, {"": guide}, case.x, 400, 7)[""]
        assert float(points["elbo"][at]) == pytest.approx(float(own.mean()), abs=1e-4)
        stderr = float(own.std(dim=0).square().sum().sqrt()) / 20 / len(case.x)
        assert float(points["elbo_stderr"][at]) == pytest.approx(stderr, rel=1e-3)


@pytest.mark.parametrize("mode", ["per datapoint", "from the encoder"])
def test_fits_end_at_the_per_datapoint_optimum(case: SimpleNamespace, mode: str) -> None:
    best = ppvae.fit_per_datapoint(case.model, DiagonalNormal(2), case.x, num_samples=4000)
    last = of(case.found, mode).isel(point=-1)
    error = math.hypot(
        float(last["elbo_stderr"]), float(best.elbo_stderr.square().sum().sqrt()) / len(case.x)
    )
    # Either end may have a thousandth of a nat to gain.
    assert float(last["elbo"]) == pytest.approx(float(best.elbo.mean()), abs=5 * error + 2e-3)
    assert (np.diff(of(case.found, mode)["effort"].values) >= 0).all()


def test_no_elbo_is_above_the_evidence(case: SimpleNamespace) -> None:
    ds = case.found.dataset
    assert ds.attrs["evidence_bound"] == "exact"
    exact = case.model.log_evidence(case.x).mean().detach()
    assert ds.attrs["evidence"] == pytest.approx(float(exact), rel=1e-6)
    assert (ds["elbo"] <= ds.attrs["evidence"] + 5 * ds["elbo_stderr"]).all()
    assert f"log p(x)          {ds.attrs['evidence']:10.4f}" in repr(case.found)


def test_the_pair_is_left_as_it_was(case: SimpleNamespace) -> None:
    after = [*case.model.state_dict().values(), *case.guide.state_dict().values()]
    assert all(map(torch.equal, case.before, after))
    modules = (case.model, case.guide)
    assert all(p.requires_grad and p.grad is None for m in modules for p in m.parameters())
    assert all(part.training for m in modules for part in m.modules())


def test_seconds_are_those_of_the_work_and_not_of_its_judgement(
    case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With clocks of our own every point has a time that is known beforehand."""
    clock = itertools.count(100)

    def train(*args: Any, steps: int, **settings: Any) -> Any:
        return SimpleNamespace(seconds=float(steps), completed=steps < 4, status="diverged")

    def refit(model: Any, family: Any, x: torch.Tensor, *, max_steps: int | None, **_: Any) -> Any:
        return SimpleNamespace(
            guide=PerDatapoint(DiagonalNormal(2), len(x)).to(x),
            seconds=float(next(clock)),
            steps=torch.full((len(x),), min(max_steps or 5, 5)),
            converged=torch.ones(len(x)),
            status="",
        )

    monkeypatch.setattr(timing, "fit", train)
    monkeypatch.setattr(timing, "fit_per_datapoint", refit)
    monkeypatch.setattr(timing, "seconds_to_encode", lambda guide, x: 0.25)
    found = ppvae.elbo_against_time(case.model, case.guide, case.train, case.x, steps=6)
    assert of(found, "amortized")["seconds"].values.tolist() == [0.25, 1.25, 2.25, 4.25, 6.25]
    # The first fit of each way says how far the budgets go, and is not drawn.
    cold, warm = of(found, "per datapoint"), of(found, "from the encoder")
    assert cold["effort"].values.tolist() == warm["effort"].values.tolist() == [1, 2, 4, 5]
    assert cold["seconds"].values.tolist() == [101, 102, 103, 104]
    assert warm["seconds"].values.tolist() == [112, 113, 114, 115]  # After a training of 6 s.
    assert found.dataset.attrs["seconds_encoding"] == 0.25
    said = found.dataset.attrs["status"]
    assert "training of 4 steps: diverged; training of 6 steps: diverged" in said
    assert "training of 2" not in said


def test_an_encoder_that_the_model_shares_is_trained_in_the_copy_alone() -> None:
    encoder = MLP(6, [8], DiagonalNormal(2).num_params)
    guide = Amortized(DiagonalNormal(2), encoder)
    x = torch.bernoulli(torch.full((40, 6), 0.5))
    prior = VampPrior(encoder, DiagonalNormal(2), x[:3])
    model = VAE(6, 2, MLP(2, [8], 6), Bernoulli(), prior)
    kept = encoder.state_dict()["layers.0.weight"].clone()
    found = ppvae.elbo_against_time(model, guide, x[:30], x[30:], steps=8, lr=0.01)
    elbo = of(found, "amortized")["elbo"].values
    assert len(set(elbo.tolist())) == len(elbo)  # Each step moved the copy.
    assert torch.equal(encoder.state_dict()["layers.0.weight"], kept)


class WithBareParameter(PyroModule):
    """A guide whose scale is at home in Pyro's store alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> None:
        """Draw z."""
        scale = pyro.param("scale", x.new_ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.layer(x), scale).to_event(1))


def test_what_cannot_be_measured_is_refused(case: SimpleNamespace) -> None:
    def run(guide: Any, **settings: Any) -> None:
        ppvae.elbo_against_time(case.model, guide, case.train, case.x, **settings)

    with pytest.raises(ValueError, match="guide: expected a module.*got method"):
        run(case.guide.forward)
    with pytest.raises(ValueError, match="guide: a PerDatapoint guide keeps"):
        run(PerDatapoint(DiagonalNormal(2), 30))
    with pytest.raises(ValueError, match=r"expected parameters in modules.*\['scale'\]"):
        run(WithBareParameter().to(case.x))
    with pytest.raises(ValueError, match=r"figure for each of the 30 rows of x; got shape \(2,\)"):
        run(case.guide, evidence=ppvae.Estimate(torch.zeros(2), torch.zeros(2), "exact", "exact"))
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        run(case.guide, steps=0)
    with pytest.raises(ValueError, match=r"x_train: expected rows of shape \(4,\)"):
        ppvae.elbo_against_time(case.model, case.guide, case.train[:, :3], case.x)
