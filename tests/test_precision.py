"""Training in lower precision, and what of it stays in single."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from ppvae import fit, pairs
from ppvae.compiled import stepping
from ppvae.families import Flow
from ppvae.objectives import BetaELBO
from ppvae.precision import bfloat16_layers, layers_of, tensor_float32
from ppvae.priors import FlowPrior

CPU = torch.device("cpu")


def _pair(dtype=torch.float32):
    model, guide = pairs.vae(16, 2, [8])
    return model.to(dtype), guide.to(dtype)


def _rows():
    return (torch.rand(40, 16) < 0.5).float()


def _settings():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    names = [
        getattr(place, "fp32_precision", None)
        for place in (matmul, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None))
    ]
    return torch.get_float32_matmul_precision(), matmul.allow_tf32, cudnn.allow_tf32, names


def test_a_layer_multiplies_rounded_numbers_and_gives_back_float32():
    layer, x = nn.Linear(300, 7), torch.randn(5, 300)
    with bfloat16_layers(CPU, layer):
        low = layer(x)
    rounded = [t.detach().bfloat16().double() for t in (x, layer.weight, layer.bias)]
    exact = rounded[0] @ rounded[1].T + rounded[2]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.bfloat16().float(), low, rtol=0, atol=0)
    # The result is rounded to 8 bits; sums are longer than that.
    torch.testing.assert_close(low.double(), exact, rtol=2**-8, atol=2**-8 * float(exact.std()))
    assert not torch.equal(low, layer(x))
    assert "forward" not in vars(layer)


@pytest.mark.fills_store
def test_densities_and_latents_are_in_single_precision():
    """Of a foreign pair, whose distributions are whatever its networks put out."""
    encoder, decoder = nn.Linear(16, 4), nn.Linear(2, 32)
    seen = []

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc, log_scale = decoder(z).chunk(2, -1)
            seen.append(loc.dtype)
            pyro.sample("x", dist.Normal(loc, log_scale.exp()).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            seen.append(z.dtype)

    with bfloat16_layers(CPU, model, guide):
        trace = pyro.poutine.trace(guide).get_trace(_rows())
        joint = pyro.poutine.trace(pyro.poutine.replay(model, trace)).get_trace(_rows())
    for one in (trace, joint):
        one.compute_log_prob()
    parts = [trace.nodes["z"], joint.nodes["z"], joint.nodes["x"]]
    assert {part["log_prob"].dtype for part in parts} == {torch.float32}
    assert set(seen) == {torch.float32}


def test_the_layers_are_those_of_networks():
    model, guide = pairs.vae(16, 4, [8], family=Flow(4), prior=FlowPrior(4))
    found = layers_of(model, guide)
    expected = [m for net in (model.decoder, guide.encoder) for m in net.modules()]
    assert {id(m) for m in found} == {id(m) for m in expected if isinstance(m, nn.Linear)}

    class Masked(nn.Linear):
        def forward(self, x):
            return x

    bayesian = PyroModule[nn.Linear](2, 2)
    lowered = nn.Conv2d(1, 1, 3)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert layers_of(nn.ModuleList([Masked(2, 2), bayesian, lowered, normed])) == [lowered, normed]


@pytest.mark.parametrize(
    ("compile", "tier"),
    [
        (False, "eager"),
        ("auto", "replayed graph"),
        pytest.param(True, "compiled", marks=pytest.mark.slow),
    ],
)
def test_a_run_in_bfloat16_is_a_run_and_leaves_all_as_it_was(compile, tier, monkeypatch):
    monkeypatch.setattr(stepping, "_CAPTURE_SECONDS", 0.0)
    pair, other = _pair(), _pair()
    for one, two in zip(pair, other, strict=True):
        two.load_state_dict(one.state_dict())
    x = _rows()
    low = fit(*pair, x, steps=12, precision="bf16", batch_size=20, compile=compile, progress=False)
    full = fit(*other, x, steps=12, batch_size=20, compile=False, progress=False)
    assert low.completed
    # Half a unit in the last of 8 bits, for each logit and each moment.
    torch.testing.assert_close(low.losses, full.losses, rtol=2**-8, atol=0)
    assert not torch.equal(low.losses, full.losses)
    parts = [part for module in pair for part in module.modules()]
    assert not any("forward" in vars(part) for part in parts)
    assert {p.dtype for module in pair for p in module.parameters()} == {torch.float32}
    assert low.compile_report.signatures[0].tier == tier


@pytest.mark.fills_store
def test_the_elbo_of_one_model_hardly_moves():
    """The products' rounding is symmetric: over many logits it cancels to first order."""
    model, guide = _pair()
    x = _rows()

    def value():
        torch.manual_seed(1)
        return -BetaELBO(num_particles=100).loss(model, guide, x) / len(x)

    full = value()
    with bfloat16_layers(CPU, model, guide):
        low = value()
    # 16 logits below 1, whose relative rounding is at most 2^-9 in each of two layers.
    assert 0 < abs(low - full) < 16 * 2**-8


@pytest.mark.parametrize("fails", [False, True])
def test_tf32_is_as_before_afterwards(fails):
    before = _settings()
    try:
        with tensor_float32():
            assert torch.backends.cuda.matmul.allow_tf32
            assert torch.backends.cudnn.allow_tf32
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert _settings() == before


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one set of names"
)
def test_tf32_after_the_caller_used_the_other_names():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with tensor_float32():
            assert torch.get_float32_matmul_precision() == "high"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_layers_are_as_before_after_an_error():
    model, guide = _pair()

    def fails():
        with bfloat16_layers(CPU, model, guide):
            assert "forward" in vars(model.decoder.layers[0])
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "half"}, ['None, "tf32" or "bf16"', "'half'"]),
        ({"precision": "tf32", "device": "cpu"}, ["CUDA", "cpu"]),
        ({"precision": "bf16", "dtype": torch.float64}, ["float32", "float64"]),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    model, guide = _pair()
    with pytest.raises(ValueError) as error:
        fit(model, guide, _rows().to(options.get("dtype")), steps=1, progress=False, **options)
    assert all(word in str(error.value) for word in ["precision", *words])


def test_a_pair_without_networks_is_refused():
    model, _ = pairs.exponential_gaussian()
    with (
        pytest.raises(ValueError, match="linear layers and convolutions"),
        bfloat16_layers(CPU, model),
    ):
        pass
