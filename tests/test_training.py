"""Training: what it reaches, what it records, what it leaves alone."""

import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ppvae
from ppvae import pairs
from ppvae.families import Categorical, DiagonalNormal, FullRankNormal, LogNormal
from ppvae.guides import PerDatapoint
from ppvae.models import FactorAnalysis
from ppvae.training import RowAdam


def test_ppca_reaches_the_maximum_of_the_likelihood():
    """The closed form of Tipping & Bishop (1999): W W^T + s^2 from the sample covariance."""
    torch.manual_seed(0)
    W = torch.randn(6, 2)
    x = torch.randn(2000, 2) @ W.mT + 0.5 * torch.randn(2000, 6)
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.mT @ x / len(x))
    variance = values[:-2].mean()
    top = vectors[:, -2:] @ torch.diag((values[-2:] - variance).sqrt())
    best = dist.MultivariateNormal(torch.zeros(6), top @ top.mT + variance * torch.eye(6))
    model, guide = pairs.ppca(6, 2, FullRankNormal(2))
    fit = ppvae.fit(model, guide, x, steps=2500, batch_size=500, lr=1e-2, progress=False)
    assert fit.completed
    reached = float(model.log_evidence(x).mean().detach())
    maximum = float(best.log_prob(x).mean())
    assert maximum - 0.02 < reached <= maximum + 1e-4


def test_rows_drawn_from_the_model_are_data():
    model, guide = pairs.factor_analysis()
    with ppvae.isolation.private_store():
        x = model(size=40)
    assert x.requires_grad
    fit = ppvae.fit(model, guide, x, steps=3, progress=False)
    assert fit.completed
    assert ppvae.compare(model, guide, x, num_samples=50).dataset.sizes["data"] == 40


class Rows(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], index % 10


def sources(x):
    return {
        "tensor": x,
        "dataset": Rows(x),
        "tensor dataset": TensorDataset(x),
        "loader": DataLoader(Rows(x), batch_size=20, shuffle=True),
        "loader of bare rows": DataLoader(x, batch_size=20),
    }


@pytest.mark.parametrize("kind", sources(torch.zeros(1)))
def test_tensors_data_sets_and_loaders_train_alike(kind):
    model, guide = pairs.factor_analysis()
    x = torch.randn(60, 6)
    before = ppvae.elbo(model, guide, x)
    fit = ppvae.fit(
        model, guide, sources(x)[kind], steps=60, batch_size=20, lr=1e-2, progress=False
    )
    assert fit.batch_size == 20
    assert fit.losses.shape == (60,)
    assert ppvae.elbo(model, guide, x).mean > before.mean + 0.1


def test_the_recorded_loss_is_minus_an_elbo_estimate_per_datum():
    model, guide = pairs.exponential_gaussian()
    x = torch.rand(50)
    fit = ppvae.fit(model, guide, x, steps=400, lr=1e-12, batch_size=50, progress=False)
    ours = ppvae.elbo(model, guide, x, 4000)
    error = math.hypot(float(fit.losses.std()) / 20, ours.mean_stderr)
    assert abs(-float(fit.losses.mean()) - ours.mean) < 4 * error


def test_the_same_seed_gives_the_same_run():
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model, guide = pairs.exponential_gaussian()
        fit = ppvae.fit(model, guide, torch.rand(50), steps=5, seed=seed, progress=False)
        runs.append(fit.losses)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_minibatches_of_a_table_touch_only_their_rows():
    """Torch's Adam moves absent rows through its moments: pyro issue 2386."""
    weight = torch.nn.Parameter(torch.zeros(6, 2))
    ours = RowAdam(weight, lr=0.05)
    reference = torch.nn.Parameter(torch.zeros(2, 2))
    theirs = torch.optim.Adam([reference], lr=0.05)
    rows, others = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    for step in range(50):
        gradient = torch.randn(2, 2)
        for parameter, value in ((reference, gradient),):
            parameter.grad = value.clone()
        theirs.step()
        weight.grad = torch.zeros(6, 2)
        weight.grad[rows] = gradient
        ours.step(rows)
        if step % 2:  # Other minibatches come between.
            before = weight.detach()[rows].clone()
            weight.grad = torch.zeros(6, 2)
            weight.grad[others] = 1.0
            ours.step(others)
            assert torch.equal(weight.detach()[rows], before)
    torch.testing.assert_close(weight.detach()[rows], reference.detach(), rtol=1e-5, atol=1e-6)


def test_a_table_is_trained_by_minibatches_to_its_optimum():
    torch.manual_seed(0)
    model = FactorAnalysis(4, 2, loadings=torch.randn(4, 2), noise=torch.ones(4))
    with torch.no_grad(), ppvae.isolation.private_store():
        x = model(size=60)
    guide = PerDatapoint(DiagonalNormal(2), 60)
    ppvae.fit(model, guide, x, steps=1500, batch_size=20, lr=2e-2, progress=False)
    best = ppvae.fit_per_datapoint(model, DiagonalNormal(2), x)
    ours, theirs = ppvae.elbo(model, guide, x, 4000), ppvae.elbo(model, best.guide, x, 4000)
    assert theirs.mean - ours.mean > -4 * ours.mean_stderr
    assert theirs.mean - ours.mean < 0.05


@pytest.mark.fills_store
def test_a_hand_written_pair_trains_and_keeps_its_bare_parameters():
    def model(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(slope * (x - 3), scale))

    torch.manual_seed(0)
    x = 3 + math.sqrt(2) * torch.randn(2000)
    ppvae.fit(model, guide, x, steps=1500, lr=1e-2, batch_size=200, progress=False)
    # The optimum is exact: posterior mean (x − shift) / 2, sd √½, shift = mean of x.
    store = {name: float(value.detach()) for name, value in pyro.get_param_store().items()}
    error = 4 * math.sqrt(2 / 2000)
    assert abs(store["shift"] - 3) < error + 0.05
    assert abs(store["slope"] - 0.5) < 0.05
    assert abs(store["scale"] - math.sqrt(0.5)) < 0.05
    exact = dist.Normal(store["shift"], math.sqrt(2)).log_prob(x)
    assert abs(float(exact.mean()) - ppvae.elbo(model, guide, x).mean) < 0.02


def test_other_elbo_classes_work():
    for loss in (Trace_ELBO(num_particles=2), TraceGraph_ELBO()):
        model, guide = pairs.exponential_gaussian()
        x = torch.rand(60) * 3
        before = ppvae.elbo(model, guide, x).mean
        ppvae.fit(model, guide, x, loss=loss, steps=60, lr=1e-2, progress=False)
        assert ppvae.elbo(model, guide, x).mean > before + 0.1


def test_a_run_that_diverges_says_so_and_keeps_the_last_good_state():
    model, guide = pairs.exponential_gaussian()
    x = torch.rand(50) * 3
    fit = ppvae.fit(model, guide, x, steps=500, lr=1e6, progress=False)
    assert not fit.completed
    assert fit.status.startswith("diverged at step")
    assert "lower lr" in fit.status
    assert fit.steps == len(fit.losses) < 500
    assert all(torch.isfinite(p).all() for p in guide.parameters())


def test_an_interrupt_keeps_what_was_learned():
    model, guide = pairs.exponential_gaussian()

    class Interrupting(Trace_ELBO):
        calls = 0

        def loss_and_grads(self, *args, **kwargs):
            Interrupting.calls += 1
            if Interrupting.calls > 10:
                raise KeyboardInterrupt
            return super().loss_and_grads(*args, **kwargs)

    before = [p.detach().clone() for p in guide.parameters()]
    fit = ppvae.fit(model, guide, torch.rand(50), loss=Interrupting(), steps=100, progress=False)
    assert fit.status == "interrupted after 10 of 100 steps"
    assert fit.steps == 10
    assert any(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_dtype_and_device_move_pair_and_data(device):
    model, guide = pairs.factor_analysis()
    x = torch.randn(30, 6)
    ppvae.fit(model, guide, x, steps=3, dtype=torch.float64, device=device, progress=False)
    assert all(p.dtype == torch.float64 for p in guide.parameters())
    assert all(p.device.type == device.type for p in model.parameters())


def test_frozen_parameters_stay_and_gradients_are_needed_again_afterwards():
    model, guide = pairs.factor_analysis()
    model.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    ppvae.fit(model, guide, torch.randn(30, 6), steps=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in guide.parameters())
    guide.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing to train"):
        ppvae.fit(model, guide, torch.randn(30, 6), steps=3, progress=False)


def test_an_interrupted_run_keeps_its_last_good_parameters():
    """An update that no later loss has judged may have taken them to where they are no numbers."""
    model, guide = pairs.exponential_gaussian()

    class Interrupting(Trace_ELBO):
        calls = 0

        def loss_and_grads(self, *args, **kwargs):
            Interrupting.calls += 1
            if Interrupting.calls > 1:
                with torch.no_grad():
                    next(guide.parameters()).fill_(math.inf)
                raise KeyboardInterrupt
            return super().loss_and_grads(*args, **kwargs)

    before = [p.detach().clone() for p in guide.parameters()]
    fit = ppvae.fit(model, guide, torch.rand(50), loss=Interrupting(), steps=9, compile=False)
    assert fit.status.startswith("interrupted after 1 of 9 steps, and diverged")
    assert not fit.completed
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_progress_can_be_turned_off(capsys, monkeypatch):
    model, guide = pairs.exponential_gaussian()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ppvae.fit(model, guide, torch.rand(10), steps=2, progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    ppvae.fit(model, guide, torch.rand(10), steps=2, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fit" in captured.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, ["steps", "0"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"lr": -1.0}, ["lr", "positive"]),
        ({"compile": "always"}, ["compile", "auto", "always"]),
        ({"loss": Trace_ELBO}, ["loss", "Trace_ELBO is a class", "Trace_ELBO(...)"]),
        ({"loss": "iwae"}, ["loss", "ppvae.objectives", "'iwae'"]),
        ({"x": []}, ["without items"]),
        ({"x": DataLoader(torch.zeros(0, 1))}, ["without batches"]),
        ({"x": TensorDataset(torch.tensor([1, 2]))}, ["int64"]),
    ],
)
def test_bad_arguments_are_refused_by_name(change, words):
    model, guide = pairs.exponential_gaussian()
    arguments = {"x": torch.rand(5), "progress": False, "steps": 2} | change
    with pytest.raises(ValueError) as error:
        ppvae.fit(model, guide, **arguments)
    for word in words:
        assert word in str(error.value)


def test_misfits_of_guide_and_data_are_refused():
    model, _ = pairs.exponential_gaussian()
    with pytest.raises(ValueError, match="which rows a minibatch holds"):
        ppvae.fit(model, PerDatapoint(LogNormal(), 5), Rows(torch.rand(5)), progress=False)
    with pytest.raises(ValueError, match="DiagonalNormal.*'real'.*Exponential"):
        ppvae.fit(model, PerDatapoint(DiagonalNormal(), 5), torch.rand(5), progress=False)


def test_rows_reach_a_table_behind_a_handler():
    """`config_enumerate` wraps the guide; its rows are still those of the minibatch."""
    centres = torch.tensor([-3.0, 3.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(centres[z.long()], 1.0), obs=x)

    x = torch.where(torch.arange(40) % 3 == 0, 3.0, -3.0) + 0.3 * torch.randn(40)
    guide = PerDatapoint(Categorical(2), 40)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    wrapped = config_enumerate(guide)
    ppvae.fit(model, wrapped, x, loss=loss, steps=400, batch_size=8, lr=0.1, progress=False)
    exact = torch.stack([-0.5 * (x - c) ** 2 for c in centres], -1).log_softmax(-1)
    reached = Categorical(2).log_probs(guide.params(x)["z"].detach())[:, 0]
    assert float((reached.exp() - exact.exp()).abs().max()) < 0.05
    with pytest.raises(ValueError, match="pass x as one tensor"):
        ppvae.fit(model, wrapped, TensorDataset(x), loss=loss, steps=1, progress=False)


def test_a_guide_without_gradients_of_its_draws_takes_the_score_function():
    model, guide = pairs.sigmoid_belief_network(6, [3], [8])
    with torch.no_grad(), ppvae.isolation.private_store():
        x = model(size=50)
    run = ppvae.fit(model, guide, x, steps=3, seed=1, progress=False)
    again_model, again_guide = pairs.sigmoid_belief_network(6, [3], [8])
    assert run.completed
    assert len(run.losses) == 3
    again_model.load_state_dict(model.state_dict())
    again_guide.load_state_dict(guide.state_dict())
    # The same step as with the objective named.
    one = ppvae.fit(model, guide, x, steps=3, seed=2, progress=False)
    named = ppvae.fit(
        again_model, again_guide, x, loss=TraceGraph_ELBO(), steps=3, seed=2, progress=False
    )
    assert torch.equal(one.losses, named.losses)
