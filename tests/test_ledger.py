"""The ledger of several guides, what it checks, and what its errors promise."""

import copy
import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from ppvae import ledger, pairs
from ppvae.evidence import mixture_evidence
from ppvae.families import DiagonalNormal, FullRankNormal, Gamma, LogNormal, TruncatedNormal
from ppvae.guides import Amortized, PerDatapoint, per_datapoint
from ppvae.models import ExponentialGaussian, FactorAnalysis
from ppvae.nn import MLP

GAPS = ("approximation_gap", "amortization_gap", "inference_gap")


class Linear:
    """Factor analysis with random loadings, and guides that are off by known amounts."""

    def __init__(self, z_dim=3, rows=40):
        torch.manual_seed(3)
        loadings = torch.randn(6, z_dim)
        self.model = FactorAnalysis(6, z_dim, loadings=loadings, noise=0.6 * torch.ones(6)).double()
        self.x = 1.5 * torch.randn(rows, 6).double()
        self.posterior = self.model.posterior(self.x)
        self.precision = self.posterior.precision_matrix[0]
        self.sd = self.precision.diagonal().rsqrt()
        #: KL of the best diagonal normal to the posterior.
        self.approximation = 0.5 * float(
            self.precision.diagonal().log().sum() - torch.logdet(self.precision)
        )

    def diagonal(self, shift=0.0):
        def guide(x):
            with pyro.plate("data", len(x), dim=-1):
                loc = self.model.posterior(x).mean + shift * self.sd
                pyro.sample("z", dist.Normal(loc, self.sd).to_event(1))

        return guide

    def full(self, shift=0.0):
        def guide(x):
            with pyro.plate("data", len(x), dim=-1):
                posterior = self.model.posterior(x)
                loc = posterior.mean + shift * self.sd
                tril = posterior.scale_tril.expand(len(x), -1, -1)
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

        return guide

    def cost(self, shift):
        """Nats that a shift of the mean costs: ½ sᵀ Λ s."""
        s = shift * self.sd
        return 0.5 * float(s @ self.precision @ s)


def test_several_guides_share_one_ledger_whose_gaps_are_the_closed_forms():
    linear = Linear()
    guides = {
        "good": linear.diagonal(),
        "shifted": linear.diagonal(0.4),
        "full": linear.full(0.2),
    }
    comparison = ppvae.compare(linear.model, guides, linear.x, num_samples=2000)
    ds = comparison.dataset
    assert ds["guide"].values.tolist() == [
        *guides,
        "per_datapoint DiagonalNormal(3)",
        "per_datapoint FullRankNormal(3)",
    ]
    assert ds["source"].values.tolist() == ["amortized"] * 3 + ["per_datapoint"] * 2
    exact = {
        "good": (linear.approximation, 0.0),
        "shifted": (linear.approximation, linear.cost(0.4)),
        "full": (0.0, linear.cost(0.2)),
        "per_datapoint DiagonalNormal(3)": (linear.approximation, 0.0),
        "per_datapoint FullRankNormal(3)": (0.0, 0.0),
    }
    for name, values in exact.items():
        for gap, value in zip(GAPS, (*values, sum(values)), strict=True):
            mean, stderr = comparison.mean(gap, name)
            assert abs(mean - value) < 4 * stderr + 1e-6, (name, gap)
    # One evidence for all, and each guide's parts add up.
    assert ds["log_evidence"].dims == ("data",)
    parts = ds["approximation_gap"] + ds["amortization_gap"]
    np.testing.assert_allclose(ds["inference_gap"], parts, atol=1e-9)
    text = str(comparison)
    for name in exact:
        assert any(line.startswith(f"  {name} ") for line in text.splitlines())


def test_a_guide_has_the_same_figures_alone_and_among_others():
    linear = Linear()
    alone = ppvae.compare(linear.model, linear.diagonal(0.4), linear.x, num_samples=500)
    among = ppvae.compare(
        linear.model,
        {"one": linear.diagonal(0.4), "two": linear.full()},
        linear.x,
        num_samples=500,
    )
    for gap in GAPS:
        mean, stderr = alone.mean(gap)
        other, other_stderr = among.mean(gap, "one")
        assert abs(mean - other) < 4 * math.hypot(stderr, other_stderr) + 1e-6


def test_further_families_stand_beside_the_guide():
    linear = Linear()
    comparison = ppvae.compare(
        linear.model, linear.diagonal(0.3), linear.x, families=[FullRankNormal(3)]
    )
    names = comparison.dataset["guide"].values.tolist()
    assert names[0] == "amortized"
    assert set(comparison.local_fits) == {"DiagonalNormal(3)", "FullRankNormal(3)"}
    gain = comparison.difference(names[2], names[1])
    assert abs(gain.mean - linear.approximation) < 4 * gain.mean_stderr


def test_a_difference_has_the_error_of_the_difference():
    """The shift's cost is known; its error is below those of the two ELBOs together."""
    linear = Linear()
    comparison = ppvae.compare(
        linear.model, {"a": linear.diagonal(), "b": linear.diagonal(0.05)}, linear.x
    )
    difference = comparison.difference("a", "b")
    assert abs(difference.mean - linear.cost(0.05)) < 4 * difference.mean_stderr
    unpaired = math.hypot(*(comparison.mean("elbo", name)[1] for name in ("a", "b")))
    assert difference.mean_stderr < 0.5 * unpaired
    with pytest.raises(ValueError, match="guide: expected one of.*'c'"):
        comparison.difference("a", "c")
    with pytest.raises(ValueError, match="guide: expected one of.*None"):
        comparison.mean("amortization_gap")


def test_two_guides_of_one_family_share_its_optimum():
    model = ExponentialGaussian()
    x = torch.linspace(0, 3, 7)
    guides = {
        name: pairs.exponential_gaussian(family)[1]
        for name, family in (("a", LogNormal()), ("b", LogNormal()), ("c", TruncatedNormal()))
    }
    comparison = ppvae.compare(model, guides, x)
    assert set(comparison.local_fits) == {"LogNormal()", "TruncatedNormal()"}
    ds = comparison.dataset
    assert bool(
        (ds["approximation_gap"].sel(guide="a") == ds["approximation_gap"].sel(guide="b")).all()
    )
    assert comparison.mean("approximation_gap", "c")[0] < 1e-4


def test_flows_with_networks_of_their_own_are_families_of_their_own():
    torch.manual_seed(0)
    flows = [dist.transforms.Planar(3) for _ in range(2)]
    linear = Linear()
    model, x = copy.deepcopy(linear.model).float(), linear.x[:6].float()

    def through(flow):
        def guide(x):
            with pyro.plate("data", len(x), dim=-1):
                base = dist.Normal(x[:, :3], torch.ones(3)).to_event(1)
                pyro.sample("z", dist.TransformedDistribution(base, [flow]))

        return guide

    comparison = ppvae.compare(
        model, {"a": through(flows[0]), "b": through(flows[1])}, x, num_samples=200
    )
    assert len(comparison.local_fits) == 2


# --- Bounds ------------------------------------------------------------------------------------


def test_a_row_that_has_not_converged_is_a_bound_and_the_bound_holds():
    """The toy's optimum is known: a fit that is cut short gives amortization gaps below it."""
    model = ExponentialGaussian()
    torch.manual_seed(1)
    guide = Amortized(Gamma(), MLP(1, [8], 2))
    x = torch.tensor([0.0, 5.0, 20.0, 40.0])
    short = ppvae.compare(model, guide, x, max_steps=2).dataset
    whole = ppvae.compare(model, guide, x).dataset
    cut = ~short["converged"].values
    assert cut.any()
    assert whole["converged"].values.all()
    assert (short["amortization_gap_bound"].values == np.where(cut, "lower", "estimate")).all()
    assert (short["approximation_gap_bound"].values == np.where(cut, "upper", "estimate")).all()
    assert (short["inference_gap_bound"].values == "estimate").all()
    error = 4 * np.hypot(short["amortization_gap_stderr"], whole["amortization_gap_stderr"])
    assert (short["amortization_gap"] <= whole["amortization_gap"] + error).values.all()
    text = str(ppvae.compare(model, guide, x, max_steps=2))
    assert re.search(r"gap, amortization +≥ ", text)
    assert re.search(r"gap, approximation +≤ ", text)


def test_under_a_lower_bound_on_the_evidence_the_gap_is_one():
    model, guide = pairs.vae(6, 3, [5])
    x = (torch.rand(7, 6) > 0.5).float()
    ds = ppvae.compare(model, guide, x, evidence_samples=50, num_samples=50).dataset
    assert ds.attrs["evidence_kind"] == "iwae"
    assert set(ds["approximation_gap_bound"].values[ds["converged"].values]) == {"lower"}
    assert set(ds["inference_gap_bound"].values) == {"lower"}


# --- Fairness ----------------------------------------------------------------------------------


def image_model(decoder, look=lambda x: x):
    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            out = decoder(z.reshape(-1, 2)).reshape(*z.shape[:-1], -1)
            pyro.sample("x", dist.Bernoulli(logits=out).to_event(1), obs=look(x))

    return model


def image_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x[:, :2] - 0.5, 1.0).to_event(1))


class AlwaysDropout(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            image_model(nn.Sequential(nn.Linear(2, 8), AlwaysDropout(), nn.Linear(8, 4))),
            "density of the same x and z is another one at each call",
        ),
        (
            image_model(nn.Linear(2, 4), lambda x: torch.bernoulli(0.5 * x + 0.25)),
            "binarise x once",
        ),
        (
            image_model(
                nn.Sequential(
                    nn.Linear(2, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 4)
                )
            ),
            "changes with the other rows.*Batch norm without running statistics",
        ),
    ],
)
def test_a_model_that_is_another_one_at_each_call_or_in_other_company_is_refused(model, words):
    x = (torch.rand(8, 4) > 0.5).float()
    with pytest.raises(ValueError, match=f"model: .*{words}"):
        ppvae.compare(model, image_guide, x, num_samples=20, evidence_samples=20)


def test_dropout_and_batch_norm_that_heed_eval_mode_are_fair():
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    x = (torch.rand(8, 4) > 0.5).float()
    model = image_model(decoder)
    statistics = copy.deepcopy(decoder.state_dict())
    text = str(ppvae.compare(model, image_guide, x, num_samples=20, evidence_samples=20))
    assert "model frozen in eval mode" in text
    assert decoder.training
    assert all(torch.equal(v, statistics[k]) for k, v in decoder.state_dict().items())


def test_an_encoder_that_is_random_in_eval_mode_is_refused():
    model, _ = pairs.vae(4, 2, [5])
    encoder = nn.Sequential(nn.Linear(4, 8), AlwaysDropout(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="'z'.*encoder's output.*eval mode"):
        ppvae.compare(model, Amortized(DiagonalNormal(2), encoder), torch.ones(3, 4))


def test_names_and_records_that_do_not_go_together_are_refused():
    model, guide = pairs.exponential_gaussian()
    x = torch.rand(20)
    fit = ppvae.fit(model, guide, x, steps=2, progress=False)
    for arguments, words in (
        ({"guide": {}}, "guide: expected a guide"),
        ({"guide": {"per_datapoint": guide}}, "'per_datapoint' is kept"),
        ({"guide": {"a": None}}, "guide: .*'a'.*NoneType"),
        ({"guide": {"a": guide}, "fit": fit}, "fit: .*repair_costs"),
    ):
        with pytest.raises(ValueError, match=words):
            ppvae.compare(model, x=x, **arguments)


# --- Evidence from a mixture -------------------------------------------------------------------


def toy_tables(x, locs):
    guides = []
    for loc in locs:
        guide = PerDatapoint(TruncatedNormal(), len(x))
        with torch.no_grad():
            guide.table("z").weight.copy_(torch.tensor([loc, 0.0]).expand(len(x), 2))
        guides.append(guide)
    return guides


def test_the_mixtures_mean_weight_is_unbiased_and_its_error_is_right():
    model, x = ExponentialGaussian(), torch.tensor([1.5])
    guides = toy_tables(x, (0.3, 3.0))
    estimates = [mixture_evidence(model, guides, x, 40, seed=seed) for seed in range(400)]
    values = torch.stack([e.value for e in estimates]).exp()
    exact = float(model.log_evidence(x).exp())
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 400**0.5
    claimed = torch.stack([e.stderr for e in estimates]).square().mean().sqrt()
    observed = torch.stack([e.value for e in estimates]).std()
    # A standard deviation from 400 repetitions has an error of 3.5 %.
    assert abs(float(claimed / observed) - 1) < 0.15


def test_a_guide_that_is_far_off_spoils_no_evidence():
    """The mixture costs at most log K and draws; the mean of each guide's weights would explode."""
    linear = Linear()
    good = per_datapoint(linear.full(), linear.x)
    far = per_datapoint(linear.full(12.0), linear.x)
    estimate = mixture_evidence(linear.model, [good, far], linear.x, 500)
    exact = linear.model.log_evidence(linear.x)
    assert ((estimate.value - exact).abs() < 5 * estimate.stderr + 1e-9).all()
    assert estimate.stderr.max() < 0.1


def test_supports_that_differ_mix():
    model, x = ExponentialGaussian(), torch.tensor([0.5, 2.0])
    free = PerDatapoint(DiagonalNormal(), 2)  # Half of its draws lie outside of the support.
    estimate = mixture_evidence(model, [free, *toy_tables(x, (1.0,))], x, 4000)
    assert ((estimate.value - model.log_evidence(x)).abs() < 4 * estimate.stderr).all()


# --- The errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("repetitions", [80, pytest.param(400, marks=pytest.mark.slow)])
def test_the_intervals_of_both_gaps_cover_the_exact_values(repetitions):
    """Repetitions with other data and draws; both gaps have closed forms."""
    linear = Linear(z_dim=2, rows=1)
    shift = linear.cost(0.3)
    covered = {"approximation_gap": 0, "amortization_gap": 0}
    for seed in range(repetitions):
        torch.manual_seed(1000 + seed)
        x = 1.5 * torch.randn(20, 6).double()
        comparison = ppvae.compare(
            linear.model, linear.diagonal(0.3), x, num_samples=200, seed=seed
        )
        for gap, exact in (
            ("approximation_gap", linear.approximation),
            ("amortization_gap", shift),
        ):
            value, stderr = comparison.mean(gap)
            covered[gap] += abs(value - exact) < 1.96 * stderr
    # At 95 %, within three binomial standard deviations.
    room = 3 * math.sqrt(0.95 * 0.05 * repetitions)
    assert all(abs(n - 0.95 * repetitions) < room for n in covered.values()), covered


def test_significant_rows_are_counted_on_both_sides():
    linear = Linear(rows=100)
    comparison = ppvae.compare(linear.model, linear.diagonal(0.5), linear.x, num_samples=200)
    ds = comparison.dataset
    beyond = np.maximum(2 * ds["amortization_gap_stderr"], 1e-4)
    above = int((ds["amortization_gap"] > beyond).sum())
    [line] = [t for t in str(comparison).splitlines() if t.startswith("  gap, amortization")]
    assert f"clearly above 0 in {above} of 100" in line


# --- What the fits say of themselves -----------------------------------------------------------


def test_a_restart_that_helps_is_recorded_with_its_gain():
    """A start in the wrong one of two modes loses a known amount to the right one."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            mean = torch.stack([z**2, 0.5 * z], dim=-1)
            pyro.sample("x", dist.Normal(mean, 0.2).to_event(1), obs=x)

    x = torch.tensor([[1.5, 0.5 * 1.5**0.5]]).double()
    wrong = PerDatapoint(DiagonalNormal(), 1).double()
    with torch.no_grad():
        wrong.table("z").weight.copy_(torch.tensor([[-(1.5**0.5), -2.0]]))
    fit = ppvae.fit_per_datapoint(model, None, x, init=wrong)
    assert float(fit.guide.table("z").weight.detach()[0, 0]) > 0.5
    assert float(fit.restart_gain) > 5
    # The gain is the difference between the two modes' ELBOs.
    there = PerDatapoint(DiagonalNormal(), 1).double()
    with torch.no_grad():
        flipped = fit.guide.table("z").weight.detach() * torch.tensor([[-1.0, 1.0]]).double()
        there.table("z").weight.copy_(flipped)
    weights = [ppvae.log_weights(model, g, x, 4000, seed=5) for g in (fit.guide, there)]
    loss = weights[0].mean() - weights[1].mean()
    error = math.hypot(*(float(w.std()) / 4000**0.5 for w in weights))
    assert abs(float(fit.restart_gain) - float(loss)) < 0.1 * float(loss) + 4 * error


def test_the_gradients_signal_is_noise_at_the_optimum_and_not_before():
    """At the optimum the ratio's square has a mean of one; far from it, it says so."""
    torch.manual_seed(0)
    model, guide = pairs.vae(64, 8, [32])
    x = ppvae.data.load("digits").test[:40]
    ppvae.fit(model, guide, x, steps=200, progress=False)
    done = ppvae.fit_per_datapoint(model, None, x, init=guide)
    assert done.converged.all()
    assert 0.5 < float(done.grad_snr.square().mean().sqrt()) < 2
    toy, far = ExponentialGaussian(), torch.tensor([20.0, 25.0])
    short = ppvae.fit_per_datapoint(toy, Gamma(), far, max_steps=2)
    assert not short.converged.any()
    assert (short.grad_snr > 10).all()


def test_rows_that_have_arrived_leave_the_batch():
    """A row that starts at its optimum takes fewer steps than one that starts far away."""
    model = ExponentialGaussian()
    x = torch.tensor([1.5, 1.5])
    best = ppvae.fit_per_datapoint(model, Gamma(), x[:1]).guide.table("z").weight.detach()[0]
    start = PerDatapoint(Gamma(), 2)
    with torch.no_grad():
        start.table("z").weight.copy_(torch.stack([best, torch.tensor([3.0, -3.0])]))
    fit = ppvae.fit_per_datapoint(model, None, x, init=start)
    assert fit.converged.all()
    assert int(fit.steps[0]) < int(fit.steps[1])


# --- The words ---------------------------------------------------------------------------------


def test_the_verdict_names_what_dominates():
    linear = Linear()
    cases = {
        "Amortization dominates": linear.diagonal(1.0),
        "The family dominates": linear.diagonal(0.01),
        "No gap beyond its error": linear.full(),
    }
    for words, guide in cases.items():
        comparison = ppvae.compare(linear.model, guide, linear.x)
        assert comparison.verdict().startswith(words)
        assert comparison.verdict() in " ".join(str(comparison).split())


def test_printed_sentences_are_broken_and_lose_nothing():
    linear = Linear()
    guides = {"narrow": linear.diagonal(0.01), "wide": linear.diagonal(1.0)}
    for pair in (linear.diagonal(1.0), guides):
        comparison = ppvae.compare(linear.model, pair, linear.x, max_steps=1)
        lines = str(comparison).splitlines()
        start = next(n for n, line in enumerate(lines) if line.startswith("Checked: "))
        # Above are the tables.
        assert max(map(len, lines[start:])) <= 84
        said = [*comparison.checks(), *comparison.warnings(), *comparison.costs()]
        words = " ".join([*said, comparison.verdict()]).split()
        printed = " ".join(lines[start:]).split()
        worst = printed.index("Worst")
        assert printed[:worst] + printed[-len(comparison.verdict().split()) :] == words
    note = ledger._broken(["  " + "word " * 40])
    assert len(note) > 1
    assert all(line.startswith("  word") for line in note)


def test_the_worst_rows_are_named():
    linear = Linear()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            loc = linear.model.posterior(x).mean
            loc = loc + torch.linspace(0, 2, len(x)).double()[:, None] * linear.sd
            pyro.sample("z", dist.Normal(loc, linear.sd).to_event(1))

    comparison = ppvae.compare(linear.model, guide, linear.x)
    assert comparison.worst(3).tolist() == [39, 38, 37]
    assert "Worst rows, by total gap: 39 (" in str(comparison)


def test_a_collapsed_latent_is_said_first():
    x = torch.randn(30)

    def ignores(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def uses(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def constant(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    collapsed = ppvae.compare(ignores, constant, x)
    assert float(collapsed.dataset["active_units"].max()) == 0
    assert str(collapsed).startswith(
        "COLLAPSED: no latent dimension of 1 is active, for q* neither"
    )
    idle = ppvae.compare(uses, constant, x)
    assert idle.dataset["active_units"].values.tolist() == [0, 1]
    assert str(idle).startswith("COLLAPSED: no latent dimension of 1 is active under your guide")


def test_a_gap_that_its_error_drowns_is_said_to_be_none():
    """Under an inverse-gamma guide with concentration below one E_q[z²] is infinite."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.InverseGamma(torch.full((len(x),), 0.3), 1.0))

    comparison = ppvae.compare(model, guide, torch.tensor([1.0, 2.0]), family=LogNormal())
    assert "hardly told from its error" in comparison.verdict()


def test_a_guide_without_a_density_is_refused_with_a_family_too():
    def point(x):
        where = pyro.param("where", torch.zeros(len(x)))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(where))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="'z'.*a point.*Delta"):
        ppvae.compare(model, point, torch.randn(3), family=DiagonalNormal())


def test_a_masked_guide_is_measured_against_a_named_family_only():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), pyro.poutine.mask(mask=x > 0):
            pyro.sample("z", dist.Normal(0.5 * x, 0.7))

    with pytest.raises(ValueError, match="'z'.*masked.*family="):
        ppvae.compare(model, guide, torch.randn(5))
