"""Results in ArviZ's form: draws of the guide, densities of the pair, and the same in a file."""

import tracemalloc

import arviz_base
import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

import ppvae
from ppvae import files, inference_data, pairs
from ppvae.families import DiagonalNormal
from ppvae.guides import PerDatapoint
from ppvae.inference_data import GROUPS
from ppvae.models import FactorAnalysis

ROWS, DRAWS = 12, 4000
SUFFIXES = [
    ".nc",
    pytest.param(".zarr", marks=pytest.mark.skipif(not files.find_spec("zarr"), reason="no zarr")),
]


class Exact:
    """The posterior of a factor analysis model as its guide, with its spread times a factor."""

    def __init__(self, model, factor=1.0):
        self.model, self.factor = model, factor

    def __call__(self, x):
        posterior = self.model.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z",
                dist.MultivariateNormal(
                    posterior.mean, covariance_matrix=self.factor**2 * posterior.covariance_matrix
                ),
            )


@pytest.fixture
def linear():
    """A factor analysis model in float64, its exact posterior as guide, and rows."""
    model = FactorAnalysis(x_dim=5, z_dim=2).double()
    x = ppvae.simulate(model, torch.zeros(ROWS, 5, dtype=torch.float64)).x
    return model, Exact(model), x


def five_errors(draws, mean):
    """Whether means over draws lie within five of their standard errors."""
    draws = np.asarray(draws)
    error = draws.std(axis=0) / np.sqrt(len(draws))
    return bool((np.abs(draws.mean(axis=0) - mean) < 5 * error).all())


def test_with_the_exact_posterior_all_weights_are_the_evidence(linear):
    model, guide, x = linear
    tree = ppvae.to_datatree(model, guide, x, num_samples=50)
    stats = tree["sample_stats"]
    evidence = model.log_evidence(x).detach().numpy()
    np.testing.assert_allclose(
        stats["log_weight"].values, np.broadcast_to(evidence, (50, ROWS)), atol=1e-10
    )
    assert (stats["pareto_k"].values == -np.inf).all()


def test_densities_are_those_of_the_draws_beside_them():
    model, guide = pairs.exponential_gaussian()
    guide = guide.double()
    x = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    tree = ppvae.to_datatree(model, guide, x, num_samples=40)
    z = torch.as_tensor(tree["posterior"]["z"].values)
    stats = tree["sample_stats"]
    expected = ppvae.log_joint(model, x, z).numpy()
    np.testing.assert_allclose(stats["log_joint"].values, expected, rtol=1e-5, atol=1e-5)
    likelihood = dist.Normal(z, 1.0).log_prob(x).numpy()
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values, likelihood, atol=1e-5)
    np.testing.assert_allclose(
        stats["log_joint"].values - tree["log_likelihood"]["x"].values, -z.numpy(), atol=1e-5
    )
    np.testing.assert_allclose(
        stats["log_weight"].values,
        stats["log_joint"].values - stats["log_guide"].values,
        atol=1e-5,
    )


def test_draws_have_the_moments_of_what_they_are_drawn_from(linear):
    model, guide, x = linear
    tree = ppvae.to_datatree(model, guide, x, num_samples=DRAWS)
    posterior = model.posterior(x)
    mean, covariance = posterior.mean.detach(), posterior.covariance_matrix.detach()
    z = tree["posterior"]["z"].values
    assert five_errors(z, mean.numpy())
    assert five_errors((z - mean.numpy()) ** 2, covariance.diagonal(dim1=-2, dim2=-1).numpy())
    prior = tree["prior"]["z"].values
    assert five_errors(prior, 0.0)
    assert five_errors(prior**2, 1.0)
    # x given z is a linear map of z, and noise.
    loadings, offset = model.loadings.detach().numpy(), model.loc.detach().numpy()
    noise = model.noise.detach().numpy() ** 2
    means = mean.numpy() @ loadings.T + offset
    again = tree["posterior_predictive"]["x"].values
    assert five_errors(again, means)
    spread = np.einsum("di,nij,dj->nd", loadings, covariance.numpy(), loadings) + noise
    assert five_errors((again - means) ** 2, spread)
    fresh = tree["prior_predictive"]["x"].values
    assert five_errors(fresh, offset)
    assert five_errors((fresh - offset) ** 2, (loadings**2).sum(axis=1) + noise)
    # What is observed goes with its own draws: both groups' x - W z is noise alone.
    for z, rows in (("posterior", again), ("prior", fresh)):
        left = rows - (tree[z]["z"].values @ loadings.T + offset)
        assert five_errors(left**2, noise)


def test_k_hat_is_arvizs_of_the_weights_of_each_row(linear):
    model, _, x = linear
    tree = ppvae.to_datatree(model, Exact(model, 0.6), x, num_samples=400, groups=["sample_stats"])
    stats = tree["sample_stats"]
    _, theirs = (-stats["log_weight"]).azstats.psislw(dim="sample")
    np.testing.assert_allclose(stats["pareto_k"].values, theirs.values, atol=1e-6)
    assert stats["pareto_k"].attrs["threshold"] == ppvae.diagnostics.pareto_k_threshold(400)


@pytest.fixture
def vague():
    """A model of wide noise: the posterior is near the prior, as leaving a row out needs it."""
    model = FactorAnalysis(
        5, 2, loadings=0.4 * torch.randn(5, 2), noise=torch.full((5,), 1.5)
    ).double()
    return model, ppvae.simulate(model, torch.zeros(ROWS, 5, dtype=torch.float64)).x


def test_loo_of_a_fixed_model_is_the_evidence(vague):
    # Without x_n its latent goes back to the prior, so that p(x_n | the others) is p(x_n).
    model, x = vague
    tree = ppvae.to_datatree(
        model, Exact(model), x, num_samples=DRAWS, sample_dims=("chain", "draw")
    )
    found = arviz_stats.loo(tree, pointwise=True, reff=1.0)
    assert not found.warning
    weights = np.exp(-tree["log_likelihood"]["x"].values[0])
    relative = weights.std(axis=0) / weights.mean(axis=0) / np.sqrt(DRAWS)
    evidence = model.log_evidence(x).detach().numpy()
    assert (np.abs(found.elpd_i.values - evidence) < 5 * relative).all()


def test_loo_takes_the_weights_of_a_guide_that_is_wrong(vague):
    model, x = vague
    tree = ppvae.to_datatree(
        model, Exact(model, 1.3), x, num_samples=DRAWS, sample_dims=("chain", "draw")
    )
    stats, likelihood = tree["sample_stats"], tree["log_likelihood"]["x"]
    # From the guide to the prior: log p(z) - log q(z | x).
    weights, k = (likelihood - stats["log_weight"]).azstats.psislw(dim=["chain", "draw"])
    found = arviz_stats.loo(tree, pointwise=True, reff=1.0, log_weights=weights, pareto_k=k)
    assert not found.warning
    evidence = model.log_evidence(x).detach().numpy()
    # The same estimate from its own terms, and its error as that of a ratio of two means.
    ratio = np.exp((stats["log_weight"] - likelihood).values[0])
    both = np.exp(stats["log_weight"].values[0])
    error = np.sqrt((both / both.mean(axis=0) - ratio / ratio.mean(axis=0)).var(axis=0) / DRAWS)
    assert (np.abs(found.elpd_i.values - evidence) < 5 * error).all()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dims", [("sample",), ("chain", "draw")])
def test_a_file_holds_what_memory_would(linear, suffix, dims, tmp_path, monkeypatch):
    model, guide, x = linear
    told = {
        "dims": {"z": ["factor"]},
        "coords": {"data": [f"row {i}" for i in range(ROWS)], "factor": ["one", "two"]},
        "constant_data": {"age": np.arange(ROWS), "prices": np.ones(3)},
        "sample_dims": dims,
    }
    # A few draws for each evaluation, and some evaluations for each portion.
    monkeypatch.setattr(inference_data, "draw_chunks", lambda n, x: [3] * (n // 3) + [n % 3])
    memory = ppvae.to_datatree(model, guide, x, num_samples=20, **told)
    monkeypatch.setattr(inference_data, "_HELD", 1000)
    path = tmp_path / f"draws{suffix}"
    with ppvae.to_datatree(model, guide, x, num_samples=20, path=path, **told) as file:
        assert set(file.groups) == set(memory.groups)
        for group in memory.groups:
            here, there = memory[group].to_dataset(), file[group].to_dataset().load()
            for each in (here, there):
                each.attrs.pop("created_at", None)
            xarray.testing.assert_equal(here, there)
            assert {n: v.dtype.kind for n, v in here.items()} == {
                n: v.dtype.kind for n, v in there.items()
            }
        assert file.attrs == memory.attrs
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_grows_without_its_draws_in_memory(linear, suffix, tmp_path, monkeypatch):
    model, guide, x = linear
    monkeypatch.setattr(inference_data, "_HELD", 20_000)
    monkeypatch.setattr(inference_data, "draw_chunks", lambda n, x: [100] * (n // 100))
    groups = ["posterior", "posterior_predictive"]
    tracemalloc.start()
    try:
        path = tmp_path / f"draws{suffix}"
        ppvae.to_datatree(model, guide, x, num_samples=5_000, groups=groups, path=path).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000 * ROWS * (5 + 2) * 8 / 2


def test_draws_do_not_hang_on_what_else_is_made(linear):
    model, guide, x = linear
    whole = ppvae.to_datatree(model, guide, x, num_samples=10, seed=3)
    for group in GROUPS[:6]:
        alone = ppvae.to_datatree(model, guide, x, num_samples=10, seed=3, groups=[group])
        assert set(alone.groups) == {"/", f"/{group}"}
        xarray.testing.assert_equal(alone[group].to_dataset(), whole[group].to_dataset())
    other = ppvae.to_datatree(model, guide, x, num_samples=10, seed=4, groups=["posterior"])
    assert not other["posterior"].to_dataset().equals(whole["posterior"].to_dataset())


def test_a_comparison_has_a_tree_for_each_guide(linear):
    _, _, x = linear
    pair, guide = pairs.factor_analysis(x_dim=5, z_dim=2)
    rows = x.float()
    comparison = ppvae.compare(pair, guide, rows)
    tree = ppvae.to_datatree(comparison, num_samples=DRAWS)
    ledger = tree["comparison"].to_dataset()
    xarray.testing.assert_identical(ledger, comparison.dataset)
    for name in ("amortized", "per_datapoint"):
        own = tree[name]
        weights = own["sample_stats"]["log_weight"]
        elbo, error = (ledger[v].sel(guide=name).values for v in ("elbo", "elbo_stderr"))
        mine = weights.std("sample").values / np.sqrt(DRAWS)
        distance = np.abs(weights.mean("sample").values - elbo)
        assert (distance < 5 * np.hypot(mine, error)).all()
        # Each is a tree of its own for ArviZ.
        summary = arviz_stats.summary(own, sample_dims="sample", kind="stats")
        assert len(summary) == ROWS * 2
        assert arviz_base.extract(own, sample_dims="sample").sizes["sample"] == DRAWS
    assert set(tree["per_datapoint/sample_stats"].data_vars) > {"converged", "steps"}
    local = comparison.local
    np.testing.assert_array_equal(
        tree["per_datapoint/sample_stats"]["steps"].values, local.steps.numpy()
    )


def test_several_guides_and_families_keep_their_names(linear):
    model, guide, x = linear
    comparison = ppvae.compare(
        model, {"a/b": guide, "wide": Exact(model, 2.0)}, x[:3], families=[DiagonalNormal(2)]
    )
    tree = ppvae.to_datatree(comparison, num_samples=5, groups=["posterior", "sample_stats"])
    names = [str(name).replace("/", ".") for name in comparison.dataset["guide"].values]
    assert list(tree.children) == [*names, "comparison"]
    fits = [tree[name]["sample_stats"] for name in names if name.startswith("per_datapoint")]
    assert len(fits) == len(comparison.local_fits)
    for found, local in zip(fits, comparison.local_fits.values(), strict=True):
        np.testing.assert_array_equal(found["elbo"].values, local.elbo.numpy())
    with pytest.raises(ValueError, match="'comparison' is kept"):
        ppvae.to_datatree(ppvae.compare(model, {"comparison": guide}, x[:2]))


def test_a_fit_brings_its_convergence_and_its_losses():
    model, guide = pairs.exponential_gaussian()
    x = torch.tensor([0.5, 2.0])
    fit = ppvae.fit(model, guide, x, steps=5, progress=False)
    local = ppvae.fit_per_datapoint(model, None, x, init=guide)
    tree = ppvae.to_datatree(model, local, x, num_samples=10, fit=fit)
    np.testing.assert_array_equal(tree["training"]["loss"].values, fit.losses.numpy())
    assert tree["training"].attrs["status"] == fit.status
    np.testing.assert_array_equal(tree["sample_stats"]["converged"].values, local.converged.numpy())
    assert tree.attrs["guide"] == repr(local.guide)


def foreign(x):
    """Two latents and two observations under a plate with a name of its own; x has a covariate."""
    with pyro.plate("patients", len(x)):
        a = pyro.sample("part/a", dist.Normal(x.new_zeros(()), 1.0))
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5)))
        pyro.sample("y", dist.Normal(a + x[:, 1], 1.0), obs=x[:, 0])
        rate = (a + k).exp()[..., None].expand(*a.shape, 2)
        pyro.sample("n", dist.Poisson(rate).to_event(1), obs=x.new_ones(len(x), 2))


def foreign_guide(x):
    with pyro.plate("patients", len(x)):
        pyro.sample("part/a", dist.Normal(x[:, 0] / 2, 0.7))
        pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)))


@pytest.mark.parametrize("suffix", [None, *SUFFIXES])
def test_a_foreign_pair_keeps_its_names(suffix, tmp_path):
    x = torch.randn(4, 2)
    path = None if suffix is None else tmp_path / f"draws{suffix}"
    names = {"coords": {"patients": ["p1", "p2", "p3", "p4"]}, "dims": {"n": ["visit"]}}
    with ppvae.to_datatree(foreign, foreign_guide, x, num_samples=600, path=path, **names) as tree:
        assert tree["posterior"]["part.a"].dims == ("sample", "patients")
        assert tree["posterior_predictive"]["n"].dims == ("sample", "patients", "visit")
        assert tree["observed_data"]["y"].sel(patients="p2") == x[1, 0]
        np.testing.assert_array_equal(tree["constant_data"]["rows"].values, x.numpy())
        a, k = tree["posterior"]["part.a"].values, tree["posterior"]["k"].values
        assert five_errors(a, x[:, 0].numpy() / 2)
        assert five_errors(k, 0.3)
        rate = np.exp(a + k)
        likelihood = tree["log_likelihood"]
        np.testing.assert_allclose(
            likelihood["n"].values, 2 * (np.log(rate) - rate), rtol=1e-4, atol=1e-4
        )
        total = likelihood["y"].values + likelihood["n"].values
        prior = dist.Normal(0.0, 1.0).log_prob(torch.as_tensor(a)).numpy() + np.log(0.5)
        np.testing.assert_allclose(
            tree["sample_stats"]["log_joint"].values, total + prior, rtol=1e-4, atol=1e-4
        )


def test_names_that_become_one_are_refused(linear):
    def model(x):
        with pyro.plate("data", len(x)):
            z = [pyro.sample(name, dist.Normal(x.new_zeros(()), 1.0)) for name in ("a/b", "a.b")]
            pyro.sample("x", dist.Normal(sum(z), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            for name in ("a/b", "a.b"):
                pyro.sample(name, dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match=r"Sites: 'a/b' and 'a\.b' are both written as 'a\.b'"):
        ppvae.to_datatree(model, guide, torch.randn(3))
    pair, exact, x = linear
    comparison = ppvae.compare(pair, {"a/b": exact, "a.b": exact}, x[:2])
    with pytest.raises(ValueError, match=r"guide: 'a/b' and 'a\.b' are both written as 'a\.b'"):
        ppvae.to_datatree(comparison)


def test_rows_and_true_latents_may_be_given_as_constants():
    x, truth = torch.randn(4, 2), torch.randn(4)
    given = {"rows": np.arange(4), "k": truth}
    tree = ppvae.to_datatree(foreign, foreign_guide, x, num_samples=3, constant_data=given)
    assert tree["constant_data"]["rows"].dims == ("patients",)
    np.testing.assert_array_equal(tree["constant_data"]["rows"].values, np.arange(4))
    np.testing.assert_array_equal(tree["constant_data"]["k"].values, truth.numpy())


def with_a_folder_as_plate(x):
    with pyro.plate("clinic/patients", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def its_folder_guide(x):
    with pyro.plate("clinic/patients", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def test_a_plate_with_a_slash_in_its_name_goes_to_a_file(tmp_path):
    pair, x = (with_a_folder_as_plate, its_folder_guide), torch.randn(3)
    told = {"num_samples": 4, "coords": {"clinic.patients": ["p", "q", "r"]}}
    memory = ppvae.to_datatree(*pair, x, **told)
    with ppvae.to_datatree(*pair, x, path=tmp_path / "draws.nc", **told) as file:
        for tree in (memory, file):
            assert tree["posterior"]["z"].dims == ("sample", "clinic.patients")
            assert tree["observed_data"]["x"].sel({"clinic.patients": "q"}) == x[1]


def test_one_draw_has_densities_and_no_k_hat(linear):
    model, guide, x = linear
    tree = ppvae.to_datatree(model, guide, x[:1], num_samples=1)
    evidence = model.log_evidence(x[:1]).detach().numpy()
    np.testing.assert_allclose(
        tree["sample_stats"]["log_weight"].values, evidence[None], atol=1e-10
    )
    assert np.isnan(tree["sample_stats"]["pareto_k"].values).all()


@pytest.mark.parametrize("suffix", [None, *SUFFIXES])
def test_counts_are_whole_numbers(suffix, tmp_path):
    x = torch.randn(4, 2)
    path = None if suffix is None else tmp_path / f"draws{suffix}"
    with ppvae.to_datatree(foreign, foreign_guide, x, num_samples=5, path=path) as tree:
        for group, name in (
            ("posterior", "k"),
            ("prior", "k"),
            ("posterior_predictive", "n"),
            ("prior_predictive", "n"),
            ("observed_data", "n"),
        ):
            assert tree[group][name].dtype.kind == "i", group
        assert tree["posterior"]["part.a"].dtype.kind == "f"
        assert tree["log_likelihood"]["n"].dtype.kind == "f"
        rate = np.exp(tree["posterior"]["part.a"].values + tree["posterior"]["k"].values)
        expected = 2 * (np.log(rate) - rate)
        np.testing.assert_allclose(tree["log_likelihood"]["n"].values, expected, atol=1e-4)


def with_a_factor(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("penalty", -z.abs())


def its_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def test_nothing_is_drawn_from_a_factor_but_its_density_counts():
    x = torch.tensor([0.3, 1.0])
    tree = ppvae.to_datatree(with_a_factor, its_guide, x, num_samples=6)
    assert not {"prior_predictive", "posterior_predictive"} & set(tree.children)
    z = tree["posterior"]["z"].values
    np.testing.assert_allclose(tree["log_likelihood"]["penalty"].values, -np.abs(z), rtol=1e-6)
    assert not np.allclose(tree["prior"]["z"].values, z)
    with pytest.raises(ValueError, match=r"'penalty'.*pyro.factor.*posterior_predictive"):
        ppvae.to_datatree(with_a_factor, its_guide, x, groups=["posterior_predictive"])


def with_a_deterministic_site(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        # Its event is all of the value, plate and draws included, where nothing else is said.
        twice = pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(twice, 0.1), obs=x)


def test_a_deterministic_site_is_kept_where_rows_are_drawn():
    x = torch.tensor([0.3, 1.0, -2.0])
    tree = ppvae.to_datatree(with_a_deterministic_site, its_guide, x, num_samples=500)
    for group in ("posterior", "prior"):
        assert set(tree[group].data_vars) == {"z"}
        left = tree[f"{group}_predictive"]["x"].values - 2 * tree[group]["z"].values
        assert five_errors(left, 0.0)
        assert five_errors(left**2, 0.01)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"groups": "posterior"}, r"groups: expected a list"),
        ({"groups": ["posteriors"]}, r"groups: expected a list of some of .*got \['posteriors'\]"),
        ({"groups": []}, r"groups: expected a list"),
        ({"num_samples": 0}, r"num_samples must be at least 1"),
        ({"dims": {"w": ["factor"]}}, r"dims: .*\['z', 'x'\].*'w'"),
        ({"dims": {"z": "factor"}}, r"dims: expected a list of names"),
        ({"dims": {"z": ["a", "b"]}}, r"dims: 'z' has event shape \(2,\).*takes 1 names"),
        ({"dims": {"z": ["data"]}}, r"dims: 'data' of 'z'.*is 12 long elsewhere"),
        ({"dims": {"z": ["sample"]}}, r"dims: 'sample' of 'z'.*for the draws"),
        ({"dims": {"z": ["d"], "x": ["d"]}}, r"dims: 'd' of 'x'.*is 2 long"),
        ({"coords": {"factor": ["a"]}}, r"coords: expected some of"),
        ({"coords": {"data": ["a"]}}, r"coords: expected 12 values along 'data'; got 1"),
        ({"sample_dims": ("data",)}, r"sample_dims: .*plate, 'data'"),
        ({"sample_dims": ("a", "b", "c")}, r"sample_dims: expected"),
        ({"sample_dims": ()}, r"sample_dims: expected"),
        ({"dims": {"z": ["z"]}}, r"'z' is the name of a dimension and of a variable"),
        ({"dims": {"x": ["z"]}}, r"'z' is the name of a dimension and of a variable"),
        ({"constant_data": {"data": np.arange(ROWS)}}, r"'data' is the name .* go to coords"),
        ({"sample_dims": ("z",)}, r"'z' is the name of a dimension and of a variable"),
        ({"constant_data": {"z": np.arange(ROWS)}}, r"constant_data: 'z' has event shape \(\)"),
        ({"constant_data": {"a/b": 1, "a.b": 2}}, r"constant_data: 'a/b' and 'a\.b' are both"),
        ({"path": "draws.csv"}, r"path: .*\.nc or \.zarr"),
        ({"path": "nowhere/draws.nc"}, r"path: there is no folder"),
    ],
    ids=str,
)
def test_a_mistake_is_named(linear, given, message, tmp_path, monkeypatch):
    model, guide, x = linear
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        ppvae.to_datatree(model, guide, x, **{"num_samples": 3, **given})
    assert not list(tmp_path.iterdir())


def test_what_belongs_together_is_asked_for(linear):
    model, guide, x = linear
    with pytest.raises(ValueError, match=r"guide: got none"):
        ppvae.to_datatree(model)
    with pytest.raises(ValueError, match=r"x: got none"):
        ppvae.to_datatree(model, guide)
    comparison = ppvae.compare(model, guide, x[:2])
    with pytest.raises(ValueError, match="pass it alone"):
        ppvae.to_datatree(comparison, guide, x)


def test_a_file_that_is_there_is_left_alone(linear, tmp_path):
    model, guide, x = linear
    path = tmp_path / "draws.nc"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"path: .* exists"):
        ppvae.to_datatree(model, guide, x, path=path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_another_has_written_in_part_is_left_alone(linear, suffix, tmp_path):
    model, guide, x = linear
    partial = tmp_path / f"draws{suffix}.part"
    partial.mkdir()
    (partial / "theirs").write_text("kept")
    with pytest.raises(ValueError, match=r"path: .*\.part' exists: it is written by another"):
        ppvae.to_datatree(model, guide, x, num_samples=3, path=tmp_path / f"draws{suffix}")
    assert (partial / "theirs").read_text() == "kept"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_interrupted_file_leaves_nothing_behind(linear, suffix, tmp_path, monkeypatch):
    model, guide, x = linear

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference_data, "pareto_k", stopped)
    with pytest.raises(KeyboardInterrupt):
        ppvae.to_datatree(model, guide, x, num_samples=5, path=tmp_path / f"draws{suffix}")
    assert not list(tmp_path.iterdir())


def test_zarr_that_is_not_installed_is_said(linear, tmp_path, monkeypatch):
    model, guide, x = linear
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs zarr.*ppvae\[zarr\]"):
        ppvae.to_datatree(model, guide, x, path=tmp_path / "draws.zarr")


def test_a_table_for_its_rows_and_the_generators_as_they_were():
    model, _ = pairs.exponential_gaussian()
    guide = PerDatapoint(ppvae.families.LogNormal(), 5)
    x = torch.rand(5)
    before = torch.get_rng_state()
    tree = ppvae.to_datatree(model, guide, x, num_samples=7, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert tree["posterior"]["z"].shape == (7, 5)
    assert tree.attrs["num_samples"] == 7
    assert tree.attrs["seed"] == 1
    assert tree.attrs["inference_library"] == "ppvae"
