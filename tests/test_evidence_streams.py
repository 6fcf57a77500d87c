"""Evidence from draws that come in portions: the same figures, in bounded memory, as a graph."""

import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppvae
from ppvae import density, graphs, pairs
from ppvae.density import ChunkedJoint, judging, weigh, weighed
from ppvae.evidence import _elbo, iwae_from
from ppvae.graphs import Repeated, repeating


@pytest.fixture
def portions(monkeypatch):
    """Portions so small that many are needed; gives the evaluators that were made."""
    made = []

    class Noted(ChunkedJoint):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(density, "ChunkedJoint", Noted)
    monkeypatch.setattr(density, "_CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 40_000))
    monkeypatch.setattr(density, "_ELEMENTS", 20_000)
    return made


def eagerly_captured(monkeypatch, compiles=False):
    monkeypatch.setattr(repeating, "capture_pays", lambda coming, each: True)
    monkeypatch.setattr(repeating, "_COMPILE_SECONDS", 0.0 if compiles else math.inf)


@pytest.fixture
def pair(device):
    torch.manual_seed(0)
    model, guide = (part.to(device).double() for part in pairs.vae(16, 3, [20]))
    return model, guide, (torch.rand(30, 16, device=device) < 0.4).double()


def test_streamed_figures_are_those_of_all_weights_at_once(pair, portions):
    model, guide, x = pair
    weights = ppvae.log_weights(model, guide, x, 333, seed=4)
    iwae, elbo = (f(model, guide, x, 333, seed=4) for f in (ppvae.iwae, ppvae.elbo))
    assert [len(made.rows) for made in portions] == [1] * 3
    assert portions[0].draws < 30
    torch.testing.assert_close(iwae.value, torch.logsumexp(weights, 0) - math.log(333))
    relative = weights.softmax(0) * 333
    torch.testing.assert_close(iwae.stderr, relative.std(0) / math.sqrt(333))
    torch.testing.assert_close(elbo.value, weights.mean(0))
    torch.testing.assert_close(elbo.stderr, weights.std(0) / math.sqrt(333))


def test_the_estimate_is_the_same_one_whatever_the_portions(pair, monkeypatch):
    model, guide, x = pair
    whole = ppvae.iwae(model, guide, x, 2000)
    monkeypatch.setattr(density, "_CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 40_000))
    parts = ppvae.iwae(model, guide, x, 2000, seed=1)
    error = math.hypot(whole.mean_stderr, parts.mean_stderr)
    assert 0 < abs(whole.mean - parts.mean) < 5 * error


@pytest.mark.parametrize("split", [[1, 49], [7, 3, 40], [50]])
def test_parts_merge_without_loss_of_digits(split, device):
    # In single precision E[w²] - E[w]² would have no digit of these errors.
    noise = 1e-5 * torch.randn(50, 4, dtype=torch.float64, device=device)
    weights = (noise - torch.tensor([0.0, 3.0, -40.0, 900.0], device=device)).double()
    for function, scale in ((_elbo, 1.0), (iwae_from, 1.0)):
        found = function(weights.split(split))
        expected = scale * weights.std(0) / math.sqrt(50)
        torch.testing.assert_close(found.stderr, expected, rtol=1e-3, atol=0.0)


def test_impossible_draws_weigh_nothing(device):
    inf = torch.inf
    weights = torch.tensor(
        [[-inf, -inf, 0.0], [-inf, -inf, -inf], [-900.0, -inf, -inf], [-900.0, -inf, 0.0]]
    ).to(device)
    for split in ([4], [2, 2], [1, 1, 1, 1], [3, 1]):
        found = iwae_from(weights.split(split))
        expected = torch.logsumexp(weights, 0) - math.log(4)
        torch.testing.assert_close(found.value, expected)
        # Two of four: relative weights 0, 0, 2, 2 have a variance of 4/3.
        torch.testing.assert_close(found.stderr[::2], expected.new_full((2,), math.sqrt(1 / 3)))
        assert torch.isneginf(_elbo(weights.split(split)).value).all()


def test_the_model_runs_once_for_a_portion_and_the_guide_for_many(pair, portions):
    model, guide, x = pair
    calls = {"model": 0, "guide": 0}
    hooks = [
        model.decoder.register_forward_hook(lambda *_: calls.update(model=calls["model"] + 1)),
        guide.encoder.register_forward_hook(lambda *_: calls.update(guide=calls["guide"] + 1)),
    ]
    ppvae.iwae(model, guide, x, 500)
    for hook in hooks:
        hook.remove()
    needed = math.ceil(500 / portions[0].draws)
    assert needed <= calls["model"] <= needed + 4
    assert calls["guide"] <= math.ceil(needed / (10 // portions[0].draws)) + 4


def uniform(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Uniform(-1.0 + 0 * x[:, 0], 1.0))
        k = pyro.sample("k", dist.Categorical(logits=x[:, :3]))
        pyro.sample("x", dist.Normal((z * k)[..., None] + 0 * x, 0.5).to_event(1), obs=x)


def wide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0 * x[:, 0], 1.0))
        pyro.sample("k", dist.Categorical(logits=0 * x[:, :4]))  # The model has three.


def test_a_graph_gives_the_weights_of_plain_calls(pair, portions, monkeypatch):
    plain = ppvae.log_weights(*pair, 400)
    eagerly_captured(monkeypatch)
    replayed = ppvae.log_weights(*pair, 400)
    assert portions[0]._evaluate.tiers.keys() == {"eager"}
    assert "replayed graph" in next(reversed(portions[1]._evaluate.tiers))
    assert torch.equal(plain, replayed)


def test_a_graph_knows_draws_outside_of_the_support(portions, monkeypatch, device):
    x = torch.randn(40, 8, device=device).double()
    plain = ppvae.log_weights(uniform, wide, x, 400)
    eagerly_captured(monkeypatch)
    replayed = ppvae.log_weights(uniform, wide, x, 400)
    assert "replayed graph" in next(reversed(portions[1]._evaluate.tiers))
    assert torch.equal(plain, replayed)
    # P(|z| > 1 or k = 3) under the guide.
    outside = 1 - math.erf(math.sqrt(0.5)) * 0.75
    share = float(torch.isneginf(plain).double().mean())
    assert abs(share - outside) < 5 * math.sqrt(outside * (1 - outside) / plain.numel())


def test_rows_are_portioned_where_the_model_allows_it(pair, monkeypatch):
    model, guide, x = pair
    monkeypatch.setattr(density, "_CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 2000))

    def mixing(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            logits = model.decoder(z - z.mean(-2, keepdim=True))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    for program, portioned in ((model, True), (mixing, False)):
        with judging(0, x, program, guide), torch.no_grad():
            weights, draws = weigh(program, guide, x, 5)
            chunked = ChunkedJoint(program, x, draws, 5)
            assert (len(chunked.rows) > 1) is portioned
            torch.testing.assert_close(chunked(draws), density.joint(program, x, draws))
        with judging(0, x, program, guide), torch.no_grad():
            parts = torch.cat(list(weighed(program, guide, x, 5)))
        assert parts.shape == weights.shape


def test_what_cannot_be_a_graph_is_called_plainly(monkeypatch):
    eagerly_captured(monkeypatch)
    repeated = Repeated(lambda x: [x if x.sum() > 0 else -x], calls=100)
    for _ in range(8):
        assert repeated(-torch.ones(2))[0].tolist() == [1.0, 1.0]
    assert repeated.tiers == {"eager": 8}
    assert "value of a tensor" in repeated.why[0]


def test_a_graph_that_gives_something_else_is_not_used(monkeypatch):
    eagerly_captured(monkeypatch)
    # What a function reads besides tensors may differ once it is captured.
    repeated = Repeated(lambda x: [x * (2 if graphs.capturing() else 3)], calls=100)
    for _ in range(8):
        assert repeated(torch.ones(2))[0].tolist() == [3.0, 3.0]
    assert "differ from the function's" in repeated.why[0]


def test_graphs_draw_what_plain_calls_draw(monkeypatch):
    def function(x):
        return [x + torch.randn_like(x)]

    torch.manual_seed(3)
    plain = [function(torch.zeros(n))[0] for n in (5, 7) * 10]
    eagerly_captured(monkeypatch)
    repeated = Repeated(function, calls=20)
    torch.manual_seed(3)
    found = [repeated(torch.zeros(n))[0] for n in (5, 7) * 10]
    assert all(map(torch.equal, plain, found))
    assert repeated.tiers == {"eager": 8, "replayed graph": 12}


@pytest.mark.slow
def test_a_compiled_portion_gives_the_weights_of_plain_calls(pair, portions, monkeypatch):
    plain = ppvae.log_weights(*pair, 400)
    eagerly_captured(monkeypatch, compiles=True)
    compiled = ppvae.log_weights(*pair, 400)
    assert "compiled" in next(reversed(portions[1]._evaluate.tiers))
    torch.testing.assert_close(plain, compiled, rtol=1e-10, atol=1e-10)


MEMORY = """
import math, sys, torch, ppvae
from ppvae import pairs
from ppvae.graphs import repeating
# What torch loads to make a graph is beside the point here.
repeating.capture_pays = lambda coming, each: False
repeating._COMPILE_SECONDS = math.inf
torch.manual_seed(0)
model, guide = pairs.vae(64, 4, [32])
x = (torch.rand(1000, 64) < 0.3).float()
ppvae.iwae(model, guide, x[:10], 10)

def peak():  # ru_maxrss would be that of the process which started this one.
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

before = peak()
ppvae.iwae(model, guide, x, int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_within_its_budget_and_does_not_grow_with_the_draws():
    few, many = (
        float(
            subprocess.run(
                [sys.executable, "-c", MEMORY, str(draws)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for draws in (500, 8_000)
    )
    # The largest tensor has 6.1 MiB. The weights of all draws would have 31.
    assert 6.1 < few < 10 * 6.1
    assert many < few + 3 * 6.1
