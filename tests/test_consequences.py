"""What a gap does to a reader's figures, against those of normal guides with known moments."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import sigmas
from torch import nn

import ppvae
from ppvae import density, pairs
from ppvae.consequences import consequences
from ppvae.families import DiagonalNormal, FullRankNormal
from ppvae.guides import Amortized

PRIOR_SD, NOISE = 2.0, 0.8


def model(x):
    """A plane of latents with prior sd 2, of which x shows each with noise."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), PRIOR_SD).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)


class Rough(nn.Module):
    """An encoder that shrinks too much, and says the same spread of all rows."""

    def forward(self, x):
        return torch.cat([0.5 * x, torch.full_like(x, math.log(0.6))], dim=-1)


FUNCTIONS = {
    "square": lambda z: z[..., 0] ** 2,
    "sum": lambda z: z.sum(-1),
    "positive": lambda z: z[..., 1] > 0,
    "constant": lambda z: torch.ones_like(z[..., 0]),
}


def moments_of(comparison, x):
    """Mean and sd of the guide, and of q*."""
    params = comparison.local.guide.params(x)["z"].detach()
    return [(0.5 * x, torch.full_like(x, 0.6)), (params[:, :2], params[:, 2:].exp())]


@pytest.fixture(scope="module")
def case(request):
    device = torch.device(request.config.getoption("--device"))
    x = torch.linspace(-3, 3, 12, dtype=torch.float64, device=device)
    x = torch.stack([x, x.flip(0) / 2 + 0.3], dim=-1)
    guide = Amortized(DiagonalNormal(2), Rough())
    comparison = ppvae.compare(model, guide, x)
    return comparison, x, moments_of(comparison, x)


def both(found, name, **which):
    """A figure and its error, as tensors on the CPU."""
    ds = found.dataset.sel(**which)
    return tuple(torch.as_tensor(ds[v].values) for v in (name, f"{name}_stderr"))


def predictive(moments, x):
    mean, sd = (m.cpu() for m in moments)
    spread = (sd.square() + NOISE**2).sqrt()
    return dist.Normal(mean, spread).to_event(1).log_prob(x.cpu())


def expectations(moments):
    mean, sd = (m.cpu() for m in moments)
    return {
        "square": mean[:, 0].square() + sd[:, 0].square(),
        "sum": mean.sum(-1),
        "positive": dist.Normal(0.0, 1.0).cdf(mean[:, 1] / sd[:, 1]),
    }


def test_shifts_are_those_of_the_moments(case):
    comparison, _, moments = case
    found = consequences(comparison, num_samples=4000)
    (mean, sd), (best, its) = [(m.cpu(), s.cpu()) for m, s in moments]
    for name, truth in (("mean_shift", mean - best), ("sd_shift", sd - its)):
        value, stderr = both(found, name)
        assert found.dataset[name].dims == ("data", "element")
        assert sigmas(value, truth / PRIOR_SD, stderr) < 4.5
        # Common draws: the errors are a fraction of those of either figure.
        assert float(stderr.max()) < 0.02
    assert found.dataset["element"].values.tolist() == ["z[0]", "z[1]"]
    prior, stderr = both(found, "prior_sd")
    assert sigmas(prior, torch.full((2,), PRIOR_SD), stderr) < 4


def test_functions_have_the_expectations_of_both_guides(case):
    comparison, _, moments = case
    found = consequences(comparison, FUNCTIONS, num_samples=4000)
    own, best = expectations(moments[0]), expectations(moments[1])
    for name in own:
        for guide, truth in (("amortized", own[name]), ("per_datapoint", best[name])):
            value, stderr = both(found, "expectation", function=name, guide=guide)
            assert sigmas(value, truth, stderr) < 4.5
        value, stderr = both(found, "expectation_shift", function=name)
        assert sigmas(value, own[name] - best[name], stderr) < 4.5
    value, stderr = both(found, "expectation_shift", function="constant")
    assert float(value.abs().max()) == float(stderr.max()) == 0.0
    # What is linear in both guides' common noise has little left of it.
    _, paired = both(found, "expectation_shift", function="sum")
    _, alone = both(found, "expectation", function="sum", guide="amortized")
    assert bool((paired < 0.4 * alone).all())


@pytest.mark.parametrize("held_out", [False, True])
def test_the_predictive_density_is_that_of_the_convolution(case, held_out):
    comparison, x, moments = case
    new = x.flip(0) / 3 if held_out else None
    found = consequences(comparison, x_new=new, num_samples=20_000)
    at = x if new is None else new
    own, best = predictive(moments[0], at), predictive(moments[1], at)
    for guide, truth in (("amortized", own), ("per_datapoint", best)):
        value, stderr = both(found, "predictive", guide=guide)
        assert sigmas(value, truth, stderr) < 4.5
    value, stderr = both(found, "predictive_shift")
    assert sigmas(value, own - best, stderr) < 4.5
    assert ("x_new" in repr(found)) is held_out


def test_the_standard_errors_are_those_of_repetitions(case):
    comparison, x, moments = case
    (mean, sd), (best, its) = [(m.cpu(), s.cpu()) for m, s in moments]
    own, other = expectations(moments[0])["square"], expectations(moments[1])["square"]
    near = predictive(moments[0], x) - predictive(moments[1], x)
    truths = {
        "mean_shift": (mean - best) / PRIOR_SD,
        "sd_shift": (sd - its) / PRIOR_SD,
        "expectation_shift": (own - other)[:, None],
        "predictive_shift": near,
    }
    # Rows whose likelihood is no matter of a few draws.
    rows = (x.cpu().abs() < 2).all(dim=-1)
    runs = [
        consequences(comparison, {"square": FUNCTIONS["square"]}, num_samples=400, seed=seed)
        for seed in range(40)
    ]
    for name, truth in truths.items():
        z = torch.stack([(value - truth) / error for value, error in (both(f, name) for f in runs)])
        z = z[:, rows]
        # The rows share their draws, so that 40 runs count as 40.
        assert float(z.mean(dim=0).abs().mean()) < 4 / math.sqrt(40)
        assert abs(float(z.square().mean().sqrt()) - 1) < 4 / math.sqrt(2 * 40)


def test_the_optimum_in_its_own_place_changes_nothing(case):
    """Shifts of q* against itself, of the same family and draws, are exactly 0."""
    comparison, x, _ = case
    itself = ppvae.compare(model, comparison.local.guide, x, num_samples=10)
    best = itself.local.guide
    for name, parameter in best.named_parameters():
        own = dict(comparison.local.guide.named_parameters())[name]
        parameter.data.copy_(own.data)
    found = consequences(itself, FUNCTIONS, num_samples=100)
    for name in ("mean_shift", "sd_shift", "expectation_shift", "predictive_shift"):
        assert float(both(found, name)[0].abs().max()) < 1e-12


def test_another_family_has_the_right_errors_too(case):
    _, x, _ = case
    guide = Amortized(DiagonalNormal(2), Rough())
    comparison = ppvae.compare(model, {"mine": guide}, x, families=[FullRankNormal(2)])
    found = consequences(comparison, num_samples=2000)
    assert found.dataset["guide"].values.tolist() == ["mine", "per_datapoint"]
    params = comparison.local_fits["DiagonalNormal(2)"].guide.params(x)["z"].detach()
    truth = (0.5 * x - params[:, :2]).cpu() / PRIOR_SD
    value, stderr = both(found, "mean_shift")
    assert sigmas(value, truth, stderr) < 4.5
    wide = ppvae.compare(model, guide, x, family=FullRankNormal(2))
    found = consequences(wide, num_samples=2000)
    mean = wide.local.guide.families["z"].distribution(wide.local.guide.params(x)["z"]).mean
    value, stderr = both(found, "mean_shift")
    assert sigmas(value, (0.5 * x - mean.detach()).cpu() / PRIOR_SD, stderr) < 4.5


def test_portions_of_draws_give_the_same(case, monkeypatch):
    _, x, _ = case
    monkeypatch.setattr(density, "_ELEMENTS", 12 * 64 * 30)
    comparison = ppvae.compare(model, Amortized(DiagonalNormal(2), Rough()), x)
    moments = moments_of(comparison, x)
    found = consequences(comparison, FUNCTIONS, num_samples=1000)
    (mean, sd), (best, its) = [(m.cpu(), s.cpu()) for m, s in moments]
    for name, truth in (("mean_shift", mean - best), ("sd_shift", sd - its)):
        value, stderr = both(found, name)
        assert sigmas(value, truth / PRIOR_SD, stderr) < 4.5
    value, stderr = both(found, "expectation_shift", function="square")
    truth = expectations(moments[0])["square"] - expectations(moments[1])["square"]
    assert sigmas(value, truth, stderr) < 4.5


def test_several_sites_come_by_name(device):
    torch.manual_seed(0)
    model, guide = pairs.deep_latent_gaussian(4, z_dims=(3, 2), hidden=[8])
    model.to(device), guide.to(device)
    x = torch.rand(3, 4, device=device).round()
    comparison = ppvae.compare(model, guide, x, num_samples=50, evidence_samples=50, max_steps=20)
    found = consequences(comparison, {"both": lambda z: z["z_1"].sum(-1) * z["z_2"][..., 0]})
    assert found.dataset["element"].values.tolist() == [
        *(f"z_2[{j}]" for j in range(2)),
        *(f"z_1[{j}]" for j in range(3)),
    ]
    assert found.dataset["expectation"].shape == (2, 3, 1)
    with pytest.raises(ValueError, match=r"a dictionary with the draws by site, as in z\['z_2'\]"):
        consequences(comparison, {"as if one": lambda z: z.sum(-1)})


def test_words_name_the_worst_rows(case):
    comparison, _, moments = case
    found = consequences(comparison, FUNCTIONS, num_samples=2000)
    shift = ((moments[0][0] - moments[1][0]).abs() / PRIOR_SD).cpu()
    worst = shift.amax(dim=1).argsort(descending=True)
    # The two largest are the two ends, alike but for a hundredth.
    assert set(found.worst("mean_shift", 2).tolist()) == set(worst[:2].tolist())
    text = repr(found)
    assert text.startswith(
        "Consequences of 'amortized' in place of q* (DiagonalNormal(2)), 12 data"
    )
    head = next(line for line in text.splitlines() if "posterior mean, prior sd" in line)
    size = float(shift.square().mean().sqrt())
    assert float(head.split("prior sd")[1].split(",")[0]) == pytest.approx(size, rel=0.05)
    assert f"worst: {int(found.worst('mean_shift', 1))} z[0] (" in head
    value, stderr = both(found, "mean_shift")
    clear = int((value.abs() > 2 * stderr).sum())
    assert f"beyond two standard errors in {clear} of 24; " in head
    assert "E[constant]" in text
    assert "log E[p(the x that was read | z)], nats" in text
    with pytest.raises(ValueError, match="name: expected one of .*'square'.*; got 'cube'"):
        found.worst("cube")


def test_what_is_refused(case):
    comparison, x, _ = case
    with pytest.raises(ValueError, match="num_samples must be at least 2; got 1"):
        consequences(comparison, num_samples=1)
    with pytest.raises(ValueError, match=r"functions\['all'\]: expected a figure for each draw"):
        consequences(comparison, {"all": lambda z: z})
    with pytest.raises(ValueError, match=r"functions\['one'\]: .* got float"):
        consequences(comparison, {"one": lambda z: 1.0})
    with pytest.raises(ValueError, match=r"functions\['two'\] fails on its one argument"):
        consequences(comparison, {"two": lambda z, w: z})
    with pytest.raises(ValueError, match="functions: expected functions by name"):
        consequences(comparison, [abs])
    with pytest.raises(ValueError, match="names of other figures"):
        consequences(comparison, {"mean_shift": abs})
    with pytest.raises(ValueError, match="x_new: expected a row for each row"):
        consequences(comparison, x_new=x[:3])
    with pytest.raises(ValueError, match="guide: expected one of"):
        consequences(comparison, guide="theirs")
    guide = Amortized(DiagonalNormal(2), nn.Linear(2, 4).to(x))
    changed = ppvae.compare(model, guide, x, num_samples=10)
    guide.encoder.bias.data += 1.0
    with pytest.raises(ValueError, match="the model or the guide has changed"):
        consequences(changed)
