"""Calibration: exact posteriors pass at the nominal rate, and what is off is seen and said."""

import dataclasses
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppvae
from ppvae import calibrate, density, simulate
from ppvae.calibration import LEVELS, GuideCalibration
from ppvae.distributions import TruncatedNormal as TruncatedNormalDistribution
from ppvae.families import LogNormal, TruncatedNormal
from ppvae.guides import Amortized, PerDatapoint
from ppvae.models import ExponentialGaussian, FactorAnalysis, GaussianMixture
from ppvae.nn import MLP
from ppvae.plots.calibration import coverage, rank_ecdf, z_scores

PHI = dist.Normal(0.0, 1.0)


def guide_of(posterior):
    """The guide that draws z from ``posterior(x)``."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    return guide


def toy():
    """The toy: its exact guide, and the one of half its scale."""
    model = ExponentialGaussian()

    def narrow(x):
        scale = torch.full_like(x, 0.5)
        return TruncatedNormalDistribution(x - 1, scale)

    return model, guide_of(model.posterior), guide_of(narrow), ()


def factor_analysis(device):
    """Factor analysis with two latents: its exact guide, and the one of half its scale."""
    loadings = torch.tensor([[1.0, 0.0], [0.5, -1.0], [-1.0, 0.6], [0.2, 0.4]])
    model = FactorAnalysis(4, 2, loadings=loadings).to(device)
    return model, guide_of(model.posterior), guide_of(scaled(model, 0.5)), (4,)


def scaled(model, factor, shift=0.0):
    def posterior(x):
        exact = model.posterior(x)
        return dist.MultivariateNormal(exact.loc + shift, scale_tril=factor * exact.scale_tril)

    return posterior


def repetitions(found, count):
    """The calibration of many rows, as ``count`` independent ones of as many rows each."""
    rows = len(found.pit) // count
    for at in range(count):
        part = slice(at * rows, (at + 1) * rows)
        columns = ("ranks", "pit", "z_scores", "contraction")
        yield dataclasses.replace(found, **{c: getattr(found, c)[part] for c in columns})


@pytest.mark.parametrize("name", ["toy", "factor analysis"])
def test_exact_posteriors_pass_at_the_nominal_rate_and_narrow_ones_never(device, name):
    """200 repetitions of 150 rows; rows are independent, so that one call makes them all."""
    model, exact, narrow, event = toy() if name == "toy" else factor_analysis(device)
    x = torch.zeros(200 * 150, *event, device=device)
    found = calibrate(model, {"exact": exact, "narrow": narrow}, x, num_samples=39)
    rejected = {
        guide: sum(not part.passes(0.05) for part in repetitions(found[guide], 200))
        for guide in ("exact", "narrow")
    }
    assert 0.02 <= rejected["exact"] / 200 <= 0.08
    assert rejected["narrow"] / 200 > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "factor analysis"])
def test_the_rates_over_calls_with_seeds_of_their_own(device, name):
    """The streams of data, draws and ties of one call and of the next are independent."""
    model, exact, narrow, event = toy() if name == "toy" else factor_analysis(device)
    x = torch.zeros(200, *event, device=device)
    runs = [calibrate(model, {"exact": exact, "narrow": narrow}, x, seed=s) for s in range(200)]
    assert 0.02 <= np.mean([not run["exact"].passes() for run in runs]) <= 0.08
    assert np.mean([not run["narrow"].passes() for run in runs]) > 0.95
    assert not any(run.passes() for run in runs)


@pytest.mark.parametrize("elements", [density._ELEMENTS, 64 * 5000 * 7])
def test_every_rank_is_as_probable(device, monkeypatch, elements):
    """Counts of each rank are binomial, also where the draws come a few at a time."""
    monkeypatch.setattr(density, "_ELEMENTS", elements)
    model, exact, _, _ = toy()
    draws, rows = 19, 5000
    found = calibrate(model, exact, torch.zeros(rows, device=device), num_samples=draws)
    ranks = found["amortized"].ranks
    assert (int(ranks.min()), int(ranks.max())) == (0, draws)
    counts = torch.bincount(ranks[:, 0], minlength=draws + 1).double()
    expected = rows / (draws + 1)
    assert float((counts - expected).abs().max()) < 4.5 * math.sqrt(expected)
    assert torch.equal((found["amortized"].pit * (draws + 1)).floor().long(), ranks)


def test_ties_of_discrete_latents_are_broken_at_random(device):
    """Three classes, and 99 draws: all but ties, and the ranks are uniform none the less."""
    loc = torch.tensor([[-1.0], [0.0], [1.5]])
    model = GaussianMixture(1, 3, loc=loc).to(device)
    found = calibrate(model, guide_of(model.posterior), torch.zeros(20_000, 1, device=device))[
        "amortized"
    ]
    counts = torch.bincount(found.ranks[:, 0], minlength=100).double()
    assert float((counts - 200).abs().max()) < 4.5 * math.sqrt(200)
    assert float(found.p_values) > 1e-4
    for level in LEVELS:
        share, error = found.coverage(level)
        assert abs(float(share) - level) < 5 * float(error)
    # A sure guide has no spread: its score is 0 where it is right, and infinite where it is not.
    sure = found.z_scores[found.contraction == 1]
    assert bool(((sure == 0) | sure.isinf()).all())


def test_coverage_of_a_normal_of_half_the_scale(device):
    """A central interval of N(m, σ²/4) has half the width: it holds 2 Φ(Φ⁻¹((1 + c)/2)/2) − 1."""
    model, exact, narrow, event = factor_analysis(device)
    x = torch.zeros(4000, *event, device=device)
    found = calibrate(model, {"exact": exact, "narrow": narrow}, x, num_samples=999)
    for level in LEVELS:
        share, error = found["exact"].coverage(level)
        assert bool(((share - level).abs() < 5 * error).all())
        truth = 2 * float(PHI.cdf(PHI.icdf(torch.tensor((1 + level) / 2)) / 2)) - 1
        share, error = found["narrow"].coverage(level)
        assert bool(((share - truth).abs() < 5 * error).all())
        smooth = (share * 4000 + 1) / 4002
        torch.testing.assert_close(error, (smooth * (1 - smooth) / 4000).sqrt())


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_z_scores_and_contraction_in_closed_form(device, factor):
    """The score of S draws is √(1/f² + 1/S) times a t variable; the variance is f² times Σ."""
    model, _, _, event = factor_analysis(device)
    rows, draws = 8000, 99
    x = torch.zeros(rows, *event, device=device)
    found = calibrate(model, guide_of(scaled(model, factor)), x, num_samples=draws)["amortized"]
    squares = found.z_scores.square()
    variance = (1 / factor**2 + 1 / draws) * (draws - 1) / (draws - 3)
    error = squares.std(dim=0) / math.sqrt(rows)
    assert bool(((squares.mean(dim=0) - variance).abs() < 5 * error).all())
    with torch.no_grad():
        posterior = model.posterior(x[:1]).covariance_matrix[0].diagonal().double()
    left = 1 - found.contraction
    error = torch.hypot(left.std(dim=0) / math.sqrt(rows), left.mean(dim=0) * math.sqrt(2 / 20_000))
    assert bool(((left.mean(dim=0) - factor**2 * posterior).abs() < 5 * error).all())


def test_the_prior_passes_though_it_learns_nothing(device):
    """Its ranks are uniform as well: what tells it from the posterior is the contraction."""
    model, _, _, event = factor_analysis(device)
    guide = guide_of(lambda x: dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
    found = calibrate(model, guide, torch.zeros(1000, *event, device=device))
    assert found.passes()
    mean = found["amortized"].contraction.mean(dim=0)
    assert float(mean.abs().max()) < 5 * math.sqrt(2 / (98 * 1000) + 2 / 20_000)
    assert "contraction -0.0" in repr(found) or "contraction 0.0" in repr(found)


def test_sbc_tests_uniformity_and_vsbc_symmetry(device):
    """Too narrow is not uniform but symmetric; too high is neither. Each is said in words."""
    model, exact, narrow, event = factor_analysis(device)
    guides = {
        "narrow": narrow,
        "wide": guide_of(scaled(model, 2.0)),
        "high": guide_of(scaled(model, 1.0, shift=0.4)),
        "low": guide_of(scaled(model, 1.0, shift=-0.4)),
        "exact": exact,
    }
    found = calibrate(model, guides, torch.zeros(1500, *event, device=device))
    for name, part in found.guides.items():
        biased, off = name in ("high", "low"), name != "exact"
        assert bool((part.p_values < 1e-6).all()) == off, name
        assert bool((part.symmetry_p_values < 1e-6).all()) == biased, name
        assert bool((part.symmetry_p_values > 1e-3).all()) == (not biased), name
        assert part.rejected() == (("z[0]", "z[1]") if off else ()), name
    for name, part in found.guides.items():
        words = {"narrow", "wide", "high", "low"} - {name}
        if name != "exact":
            assert f"z[0] too {name}: " in repr(part)
        assert not any(f"too {word}" in repr(part) for word in words)
    share, error = found["narrow"].coverage()
    held = f"95 % intervals hold {100 * share[0]:.0f} ± {100 * error[0]:.0f} %"
    assert held in repr(found["narrow"])
    assert "ranks are uniform in 2 elements" in repr(found["exact"])
    assert not found.passes()


def test_another_shape_is_said_to_be_one(device):
    """Quarters of the ranks with too many and too few in turn: place and width are right."""
    levels = (torch.arange(400, dtype=torch.float64, device=device) + 0.5) / 400
    # Of each half three fourths of the rows lie in its first quarter.
    half = (levels >= 0.5).double() / 2
    place = 2 * (levels - half)
    pit = half + torch.where(place < 0.75, place / 3, 0.25 + (place - 0.75)).clamp(0, 0.5)
    column = pit[:, None]
    found = GuideCalibration(("z",), column.long(), column, column, column, 99)
    assert not found.passes()
    assert "z off in shape, or in other ways from row to row (" in repr(found)


def untrained(device, family):
    return Amortized(family, MLP(1, [4], family.num_params)).to(device)


def test_per_datapoint_guides_are_judged_on_the_same_rows(device):
    """An untrained encoder fails where the best members of its family, exact ones, pass."""
    model = ExponentialGaussian()
    guide = untrained(device, TruncatedNormal())
    found = calibrate(model, guide, torch.zeros(300, device=device), per_datapoint=True)
    assert list(found.guides) == ["amortized", "per_datapoint"]
    assert not found["amortized"].passes()
    assert found["per_datapoint"].passes()
    # q* is the posterior itself, and so has its ranks: random numbers are shared.
    exact = calibrate(model, guide_of(model.posterior), torch.zeros(300, device=device))
    assert torch.equal(exact.x, found.x)
    apart = (exact["amortized"].ranks - found["per_datapoint"].ranks).abs()
    assert float(apart.double().mean()) < 1.5
    # What is off with q* too is the family.
    other = calibrate(model, {"ln": untrained(device, LogNormal())}, found.x[:], per_datapoint=True)
    assert list(other.guides) == ["ln", "per_datapoint"]


def test_guides_share_rows_and_random_numbers(device):
    model, exact, _, event = factor_analysis(device)
    found = calibrate(model, {"one": exact, "two": exact}, torch.zeros(50, *event, device=device))
    assert torch.equal(found["one"].pit, found["two"].pit)


def test_rows_and_latents_from_elsewhere(device):
    """Also of a seed that the call itself could have come to: its streams lie elsewhere."""
    model, exact, _, _ = toy()
    smallest = []
    for seed in range(6):
        drawn = simulate(model, torch.zeros(400, device=device), seed=seed)
        found = calibrate(model, exact, drawn.x, drawn.latents, seed=3)
        assert torch.equal(found.x, drawn.x)
        smallest.append(float(found["amortized"].p_values.min()))
    assert min(smallest) > 0.001
    fitted = ppvae.fit_per_datapoint(model, TruncatedNormal(), drawn.x).guide
    assert calibrate(model, fitted, drawn.x, drawn.latents).passes(level=0.001)


def test_bare_parameters_are_the_same_throughout(device):
    """A guide whose parameters nobody has made yet is freed and judged with one set of them."""
    model = ExponentialGaussian()

    def guide(x):
        loc = pyro.param("loc", lambda: torch.randn((), device=device))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(loc + 0 * x, 1.0))

    x = torch.zeros(200, device=device)
    before = torch.get_rng_state()
    one, same = calibrate(model, guide, x), calibrate(model, guide, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one["amortized"].ranks, same["amortized"].ranks)
    assert not list(pyro.get_param_store().keys())


def with_factor(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Exponential(torch.ones_like(x)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("prefers_small", -z)


def nan_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(torch.log(x - 100)))


def test_bad_input(device):
    model, exact, _, _ = toy()
    x = torch.ones(20, device=device)
    drawn = simulate(model, x)
    table = PerDatapoint(LogNormal(), 20).to(device)
    short = PerDatapoint(LogNormal(), 19).to(device)
    for message, call in {
        r"num_samples must be at least 19; got 18": lambda: calibrate(
            model, exact, x, num_samples=18
        ),
        r"x: .* at least 2 rows.*got 1\. .* x\[:1\]\.expand": lambda: calibrate(
            model, exact, x[:1]
        ),
        r"'amortized' is a table .* per_datapoint=True; or draw": lambda: calibrate(
            model, table, x
        ),
        r"'amortized': .* PerDatapoint: expected x with 19 rows": lambda: calibrate(
            model, short, drawn.x, drawn.latents
        ),
        r"latents: expected for site 'z' .*\(20,\); got None": lambda: calibrate(
            model, exact, x, {"w": x}
        ),
        r"latents: expected for site 'z' .*\(20,\); got \(20, 1\)": lambda: calibrate(
            model, exact, x, {"z": x[:, None]}
        ),
        r"latents: those of site 'z' are not all finite": lambda: calibrate(
            model, exact, x, {"z": x.log() / 0}
        ),
        r"'prefers_small': a model with a pyro.factor .* Write what": lambda: calibrate(
            with_factor, exact, x
        ),
        r"guides: expected a guide, or at least one by name": lambda: calibrate(model, {}, x),
        r"under 'a'; got int": lambda: calibrate(model, {"a": 3}, x),
        r"the name 'per_datapoint' is kept": lambda: calibrate(model, {"per_datapoint": exact}, x),
        r"level must be between 0 and 1; got 5": lambda: calibrate(model, exact, x).passes(5),
        r"level must be between 0 and 1; got 95": lambda: calibrate(model, exact, x)[
            "amortized"
        ].coverage(95),
        r"expected one of \['amortized'\]; got 'other'": lambda: calibrate(model, exact, x)[
            "other"
        ],
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_the_ecdf_leaves_its_band_where_the_guide_fails(device):
    model, exact, narrow, event = factor_analysis(device)
    for guide, passes in ((exact, True), (narrow, False)):
        found = calibrate(model, guide, torch.zeros(600, *event, device=device), seed=4)
        assert found.passes() == passes
        ax = rank_ecdf(found)
        band = ax.collections[0].get_paths()[0]
        curves = [line for line in ax.lines if line.get_label() in ("z[0]", "z[1]")]
        assert len(curves) == 2
        inside = [
            band.contains_points(np.asarray(line.get_xydata())[1:-1], radius=1e-9).all()
            or band.contains_points(np.asarray(line.get_xydata())[1:-1], radius=-1e-9).all()
            for line in curves
        ]
        assert all(inside) == passes


def test_pictures_hold_the_figures(device):
    model, exact, narrow, event = factor_analysis(device)
    guides = {"exact": exact, "narrow": narrow}
    found = calibrate(model, guides, torch.zeros(300, *event, device=device))
    ax = coverage(found)
    curves = [line for line in ax.lines if len(line.get_xdata()) == 101]
    assert len(curves) == 4
    for line, (guide, element) in zip(
        curves, [(g, e) for g in guides for e in (0, 1)], strict=True
    ):
        shown = dict(zip(np.round(line.get_xdata(), 2), line.get_ydata(), strict=True))
        for level in LEVELS:
            assert abs(shown[level] - float(found[guide].coverage(level)[0][element])) < 1e-12
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["exact", "narrow"]
    ax = z_scores(found)
    points = np.concatenate([part.get_offsets() for part in ax.collections])
    assert len(points) == 2 * 2 * 300
    expected = torch.cat([found[g].z_scores[:, e] for g in guides for e in (0, 1)]).cpu().numpy()
    assert np.allclose(points[:, 1], expected)


def test_infinite_scores_are_left_out_of_the_picture_and_counted(device):
    """A guide that is sure of the first class is right, at score 0, or infinitely wrong."""
    model = GaussianMixture(1, 2, loc=torch.tensor([[-1.0], [1.0]])).to(device)
    sure = guide_of(lambda x: dist.Categorical(logits=x * 0 + x.new_tensor([0.0, -torch.inf])))
    found = calibrate(model, sure, torch.zeros(100, 1, device=device))
    wrong = int((found.latents["z"] == 1).sum())
    ax = z_scores(found)
    assert ax.get_title() == f"left out, not finite: {wrong} of 100"
    assert sum(len(part.get_offsets()) for part in ax.collections) == 100 - wrong


@pytest.mark.fills_store
def test_an_autoguide_for_other_rows_is_refused():
    model = FactorAnalysis(x_dim=2, z_dim=1, loadings=torch.ones(2, 1))
    guide = pyro.infer.autoguide.AutoNormal(model)
    guide(torch.zeros(20, 2))
    with pytest.raises(ValueError, match="'amortized': it is a table with a row for each datum"):
        calibrate(model, guide, torch.zeros(20, 2))
    drawn = simulate(model, torch.zeros(20, 2))
    assert calibrate(model, guide, drawn.x, drawn.latents).guides["amortized"].num_samples == 99
