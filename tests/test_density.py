"""The seam: log weights per datum, for our own and for anybody's Pyro pair."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

import ppvae
from ppvae.density import check_pair, read_model
from ppvae.models import PPCA, ExponentialGaussian, FactorAnalysis


def exact_guide(model):
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", model.posterior(x))

    return guide


def tractable():
    torch.manual_seed(1)
    return [
        (
            ExponentialGaussian().double(),
            torch.tensor([-30.0, -2, -1, 0, 0.5, 1.5, 5, 40]).double(),
        ),
        *[
            (m.double(), 2 * torch.randn(20, 7).double())
            for m in (FactorAnalysis(7, 3), PPCA(7, 4))
        ],
    ]


@pytest.mark.parametrize("case", range(3))
def test_the_exact_posterior_has_constant_weights(case):
    model, x = tractable()[case]
    weights = ppvae.log_weights(model, exact_guide(model), x, num_samples=50)
    assert weights.shape == (50, len(x))
    assert (weights - model.log_evidence(x)).abs().max() < 1e-10


@pytest.mark.fills_store
@pytest.mark.parametrize("case", range(3))
def test_the_joint_is_pyros_own_trace_log_density(case):
    model, x = tractable()[case]
    trace = poutine.trace(exact_guide(model)).get_trace(x)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)
    z = trace.nodes["z"]["value"]
    ours = ppvae.log_joint(model, x, z)
    assert ours.shape == (len(x),)
    assert abs(float((ours.sum() - replayed.log_prob_sum()).detach())) < 1e-9
    many = ppvae.log_joint(model, x, z.expand(5, *z.shape))
    torch.testing.assert_close(many, ours.expand(5, -1))


def scaled_pair(rows, full_size=None):
    """A linear-Gaussian pair whose plate may claim more rows than it is given."""

    def plate(x):
        if full_size is None:
            return pyro.plate("data", len(x), dim=-1)
        return pyro.plate("data", full_size, subsample_size=len(x), dim=-1)

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("z", dist.Normal(0.3 * x, 0.9))

    return model, guide


def test_plate_scales_never_enter(device):
    x = torch.randn(10, device=device)
    evidence = dist.Normal(0.0, math.sqrt(2)).log_prob(x)
    for model in (scaled_pair(x)[0], scaled_pair(x, 100)[0], poutine.scale(scaled_pair(x)[0], 7.0)):
        weights = ppvae.log_weights(model, exact_scaled_guide, x, 20)
        torch.testing.assert_close(weights, evidence.expand(20, -1))


def exact_scaled_guide(x):
    with pyro.plate("data", 100, subsample_size=len(x), dim=-1):
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))


def test_pyros_renyi_bound_breaks_under_a_plate_scale_where_ours_holds():
    torch.manual_seed(0)
    x = torch.randn(10) * math.sqrt(2)
    evidence = float(dist.Normal(0.0, math.sqrt(2)).log_prob(x).sum())
    model, guide = scaled_pair(x, 100)
    renyi = RenyiELBO(alpha=0, num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    theirs = -renyi.loss(model, guide, x) / 10
    ours = ppvae.iwae(model, guide, x, 1000)
    error = float(ours.stderr.square().sum().sqrt())
    assert theirs > evidence + 1  # no lower bound on the evidence
    assert float(ours.value.sum()) < evidence + 4 * error
    assert abs(float(ours.value.sum()) - evidence) < 4 * error


def test_the_mean_weight_is_pyros_elbo():
    x = torch.randn(6)
    model, guide = scaled_pair(x)
    ours = ppvae.elbo(model, guide, x, 4000)
    torch.manual_seed(0)
    particles = [-Trace_ELBO().loss(model, guide, x) for _ in range(2000)]
    theirs = torch.tensor(particles)
    error = math.hypot(float(theirs.std()) / math.sqrt(2000), len(x) * ours.mean_stderr)
    assert abs(float(ours.value.sum()) - float(theirs.mean())) < 4 * error


def two_site_pair():
    def model(x):
        with pyro.plate("rows", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.deterministic("sum", a + b.sum(-1))
            pyro.sample("x", dist.Normal(a[..., None] + b, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("a", dist.Normal(0.2 * x.sum(-1), 0.6))
            pyro.sample("b", dist.Normal(0.3 * x, 0.7).to_event(1))

    return model, guide


def test_several_sites_event_dimensions_and_masks():
    model, _ = two_site_pair()
    x = torch.randn(5, 2)
    sites = read_model(model, x)
    assert sites.plate == "rows"
    assert {n: s.event_shape for n, s in sites.latents.items()} == {"a": (), "b": (2,)}
    assert sites.size == 3
    latents = {"a": torch.randn(4, 5), "b": torch.randn(4, 5, 2)}
    a, b = latents["a"], latents["b"]
    normal = dist.Normal(0.0, 1.0)
    by_hand = normal.log_prob(a) + normal.log_prob(b).sum(-1)
    by_hand = by_hand + dist.Normal(a[..., None] + b, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(ppvae.log_joint(model, x, latents), by_hand)
    nothing = poutine.mask(model, mask=torch.tensor([True, True, False, True, True]))
    masked = ppvae.log_joint(nothing, x, latents)
    torch.testing.assert_close(masked, by_hand * torch.tensor([1.0, 1, 0, 1, 1]))


def test_an_auxiliary_site_needs_no_partner_in_the_model():
    model, guide = two_site_pair()
    x = torch.randn(5, 2)
    assert list(check_pair(model, guide, x).latents) == ["a", "b"]


@pytest.mark.fills_store
def test_an_autonormal_weighs_as_the_normal_guide_that_it_is():
    x = torch.randn(7) + 1

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    auto = AutoNormal(model)
    auto(x)
    loc, scale = auto.locs.z.detach(), auto.scales.z.detach()

    def by_hand(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.LogNormal(loc, scale))

    one = ppvae.elbo(model, auto, x, 4000)
    other = ppvae.elbo(model, by_hand, x, 4000, seed=1)
    error = torch.hypot(one.stderr, other.stderr)
    assert ((one.value - other.value).abs() < 5 * error).all()


@pytest.mark.fills_store
def test_a_guide_with_one_draw_for_all_rows_is_refused():
    x = torch.randn(7)
    model, _ = scaled_pair(x)
    joint_guide = AutoDiagonalNormal(model)
    joint_guide(x)
    with pytest.raises(ValueError, match="_latent.*not defined per row"):
        ppvae.log_weights(model, joint_guide, x)


def test_draws_outside_of_the_support_weigh_nothing_and_spoil_no_other_row():
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.tensor([-50.0, 50.0]), 1.0))

    weights = ppvae.log_weights(ExponentialGaussian(), guide, torch.tensor([1.0, 50.0]), 100)
    assert (weights[:, 0] == -torch.inf).all()
    assert torch.isfinite(weights[:, 1]).all()


def test_the_same_seed_gives_the_same_draws_and_leaves_the_callers_alone():
    model, guide = ppvae.pairs.exponential_gaussian()
    x = torch.rand(4)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = ppvae.log_weights(model, guide, x, seed=5)
    second = ppvae.log_weights(model, guide, x, seed=5)
    other = ppvae.log_weights(model, guide, x, seed=6)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_judging_runs_in_eval_mode_and_restores_the_modes():
    model, _ = ppvae.pairs.vae(x_dim=8, z_dim=2, hidden=[5])
    encoder = torch.nn.Sequential(torch.nn.Dropout(0.9), ppvae.nn.MLP(8, [5], 4))
    guide = ppvae.Amortized(ppvae.families.DiagonalNormal(2), encoder)
    encoder[1].eval()
    x = torch.ones(3, 8)
    fixed = [guide.params(x) for _ in range(2)]
    assert not torch.equal(*fixed)
    assert torch.equal(ppvae.log_weights(model, guide, x), ppvae.log_weights(model, guide, x))
    assert encoder.training
    assert not encoder[1].training
    assert all(p.requires_grad for p in guide.parameters())


def test_validation_is_restored_setting_by_setting():
    model, guide = ppvae.pairs.exponential_gaussian()
    with pyro.settings.context(validate_distributions_torch=False):
        before = pyro.settings.get()
        ppvae.compare(model, guide, torch.rand(3), num_samples=30)
        assert pyro.settings.get() == before


class Broken:
    """Models and guides that cannot be judged, with what the refusal must name."""

    @staticmethod
    def no_plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    @staticmethod
    def global_latent(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @staticmethod
    def two_plates(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(3, -1))

    @staticmethod
    def no_observation(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    @staticmethod
    def other_size(x):
        with pyro.plate("data", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:3])

    @staticmethod
    def grey(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z), obs=x)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Broken.no_plate, ["'z'", "outside of any plate", "pyro.plate"]),
        (Broken.global_latent, ["'mu'", "latent outside of any plate"]),
        (Broken.two_plates, ["one plate", "inner"]),
        (Broken.no_observation, ["no site with obs=x", "['z']", "guide in the model's place"]),
        (Broken.other_size, ["'data'", "3 rows", "(5,)"]),
        (Broken.grey, ["'x'", "support of Bernoulli", "binarise"]),
    ],
)
def test_a_model_that_has_no_evidence_per_row_is_refused(model, words):
    _, guide = scaled_pair(None)
    x = torch.rand(5) * 0.5 + 0.2
    for call in (
        lambda: ppvae.log_weights(model, guide, x),
        lambda: ppvae.compare(model, guide, x),
        lambda: ppvae.quadrature(model, x),
        lambda: ppvae.fit_per_datapoint(model, ppvae.families.DiagonalNormal(), x),
    ):
        with pytest.raises(ValueError) as error:
            call()
        for word in words:
            assert word in str(error.value)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.tensor([0.0, math.nan, 1.0]), ["NaN or infinite", "1 of 3 rows", "row 1"]),
        (torch.tensor([0.0, math.inf]), ["NaN or infinite", "row 1"]),
        (torch.zeros(0), ["no rows", "(0,)"]),
        (torch.tensor(1.0), ["no rows", "()"]),
        (torch.tensor([1, 2]), ["torch.int64", ".float()"]),
        ([1.0, 2.0], ["torch.Tensor", "list"]),
        (torch.zeros(4, 2), ["ExponentialGaussian", "(batch,)", "(4, 2)"]),
        (torch.zeros(3, device="meta"), ["meta", "cpu"]),
    ],
)
def test_rows_that_are_no_data_are_refused_everywhere(x, words):
    model, guide = ppvae.pairs.exponential_gaussian()
    calls = [
        lambda: ppvae.log_weights(model, guide, x),
        lambda: ppvae.elbo(model, guide, x),
        lambda: ppvae.iwae(model, guide, x),
        lambda: ppvae.per_datapoint(guide, x, model=model),
        lambda: ppvae.fit_per_datapoint(model, None, x, init=guide),
        lambda: ppvae.compare(model, guide, x),
    ]
    if isinstance(x, torch.Tensor):  # A list of rows is a data set to fit.
        calls.append(lambda: ppvae.fit(model, guide, x, steps=1, progress=False))
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        for word in words:
            assert word in str(error.value)


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ([], ["['z']", "missing: ['z']"]),
        (["z", "extra"], ["extra: ['extra']", "is_auxiliary"]),
    ],
)
def test_a_guide_with_other_sites_is_refused(sites, words):
    model, _ = scaled_pair(None)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            for name in sites:
                pyro.sample(name, dist.Normal(0.0, 1.0))

    for call in (ppvae.log_weights, ppvae.compare, ppvae.elbo):
        with pytest.raises(ValueError) as error:
            call(model, guide, torch.zeros(3))
        for word in words:
            assert word in str(error.value)


def test_a_single_datum_without_its_batch_dimension_is_refused():
    """Broadcasting would make five data of its five elements."""
    model, _ = ppvae.pairs.vae(5, 2, [4])

    def foreign(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=model.decoder(z)).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"'x'.*\(5, 5\).*\(5,\).*x\[None\]"):
        ppvae.quadrature(foreign, torch.ones(5))


def test_programs_that_do_not_run_are_named_with_the_rows():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            flat = decoder(z.reshape(-1, 2))
            pyro.sample("x", dist.Normal(flat, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    decoder, encoder = torch.nn.Linear(2, 4), torch.nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"The guide does not run on x of shape \(6, 3\)"):
        ppvae.per_datapoint(guide, torch.randn(6, 3), model=guide_only)
    with pytest.raises(ValueError, match=r"model does not run.*torch\.float64.*dtype"):
        ppvae.quadrature(model_in_float32, torch.randn(6, 4).double())
    with pytest.raises(ValueError, match=r"leading\s+dimensions \(64, 6\).*reshape only the last"):
        ppvae.log_weights(model, guide, torch.randn(6, 4))


def guide_only(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = z.sum(-1, keepdim=True).expand(*z.shape[:-1], x.shape[-1])
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


_float32 = torch.nn.Linear(4, 4)


def model_in_float32(x):
    _float32(x)
    guide_only(x)


@pytest.mark.fills_store
def test_an_autoguide_for_other_rows_says_so():
    x = torch.randn(7)
    model, _ = scaled_pair(x)
    auto = AutoNormal(model)
    auto(x)
    with pytest.raises(ValueError, match="has 7 rows but x has 4.*only the rows that it was made"):
        ppvae.log_weights(model, auto, x[:4])


def test_a_guide_of_another_shape_is_refused():
    model, _ = two_site_pair()

    def guide(x):
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"'b'.*\(5, 2\).*\(5, 3\)"):
        ppvae.log_weights(model, guide, torch.zeros(5, 2))


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        ({"a": torch.zeros(5)}, ["['a', 'b']", "['a']"]),
        ({"a": torch.zeros(5), "b": torch.zeros(5, 3)}, ["'b'", "(5, 2)", "(5, 3)"]),
        ({"a": torch.zeros(2, 2, 5), "b": torch.zeros(5, 2)}, ["'a'", "(2, 2, 5)"]),
    ],
)
def test_latents_of_another_shape_are_refused(latents, words):
    model, _ = two_site_pair()
    with pytest.raises(ValueError) as error:
        ppvae.log_joint(model, torch.zeros(5, 2), latents)
    for word in words:
        assert word in str(error.value)
