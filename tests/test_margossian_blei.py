"""Two models of which it is known what amortization costs (Margossian & Blei 2023).

C. Margossian and D. Blei, *Amortized variational inference: when and why?*, arXiv 2307.11018. In
their linear model the optimum is a function of x_n, which a linear encoder can learn. In their
time series it is a function of x_n and of x_{n−1}, and an encoder of x_n alone falls short of it,
however wide.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from ppvae.families import DiagonalNormal
from ppvae.guides import Amortized
from ppvae.isolation import forked_rng
from ppvae.nn import MLP

# The saw time series.

A = 0.75
PRECISION = 1 + A**2


def series(length, seed):
    """Rows (x_{n−1}, x_n), by the rule and with the random numbers of the authors' notebook."""
    with forked_rng(seed):
        x = torch.zeros(length + 1)
        for n in range(length):
            torch.randn(1)  # There z_n is drawn here, on which x_{n+1} does not depend.
            x[n + 1] = torch.randn(()) + A * (3.4159 + x[n])
    return torch.stack([x[:-1], x[1:]], dim=-1)


def best_theta(rows):
    """θ at its optimum, the mean of x_n − a x_{n−1} over a."""
    return float((rows[:, 1] - A * rows[:, 0]).mean()) / A


def saw(theta):
    def model(rows):
        with pyro.plate("data", len(rows), dim=-1):
            z = pyro.sample("z", dist.Normal(rows[:, 0], 1.0))
            pyro.sample("x", dist.Normal(A * (z + theta), 1.0), obs=rows[:, 1])

    return model


class Columns(nn.Module):
    """An encoder that is given some columns of its rows."""

    def __init__(self, columns, net):
        super().__init__()
        self.columns, self.net = columns, net

    def forward(self, rows):
        return self.net(rows[:, self.columns])


def linear_guide(columns, weights, bias):
    """An encoder with these coefficients for the mean, and the exact posterior's scale."""
    net = MLP(len(columns), [], 2)
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.stack([weights, torch.zeros_like(weights)]))
        net.layers[0].bias.copy_(torch.tensor([float(bias), -0.5 * math.log(PRECISION)]))
    return Amortized(DiagonalNormal(), Columns(columns, net))


def authors_loss(mean_squares, count):
    """Their negative ELBO: without ½ log 2π, and with a normal q(θ), whose cost is the last term.

    Args:
        mean_squares: Sum over n of (E z − x_{n−1})² + (x_n − a E z − a θ)².
        count: Number of data.
    """
    return 0.5 * mean_squares + 0.5 * count * math.log(PRECISION) + 0.5 * math.log(count * A**2)


def best_linear_in_x(rows):
    """Least squares for (bias, slope, θ) of an encoder of x_n alone, and the sum of squares."""
    before, now = rows.double().unbind(-1)
    one, none = torch.ones_like(now), torch.zeros_like(now)
    design = torch.cat(
        [torch.stack([one, now, none], 1), torch.stack([A * one, A * now, A * one], 1)]
    )
    wanted = torch.cat([before, now])
    solution = torch.linalg.lstsq(design, wanted[:, None]).solution[:, 0]
    return solution, float((design @ solution - wanted).square().sum())


def test_the_authors_series_has_its_two_closed_form_losses():
    """Factorised VI at its optimum 553.01; the best encoder that is linear in x_n 892.63.

    The first is also what `quadrature` makes of the model, ½ log 2π and q(θ) accounted for.
    """
    rows = series(1000, seed=2012)
    residual = (rows[:, 1] - A * rows[:, 0]).double()
    squares = float((residual - residual.mean()).square().sum()) / PRECISION
    loss = authors_loss(squares, 1000)
    assert abs(loss - 553.01) < 0.05
    solution, squares = best_linear_in_x(rows)
    assert abs(authors_loss(squares, 1000) - 892.63) < 0.05
    assert abs(float(solution[2]) - best_theta(rows)) < 1e-4
    evidence = ppvae.quadrature(saw(best_theta(rows)), rows.double()).value
    by_integral = -float(evidence.sum()) - 500 * math.log(2 * math.pi)
    assert abs(by_integral + 0.5 * math.log(1000 * A**2) - loss) < 1e-3


def test_the_optimum_of_each_datum_is_the_posterior():
    """Normal((x_{n−1} + a (x_n − a θ)) / (1 + a²), 1 / (1 + a²))."""
    rows = series(100, seed=2012).double()
    theta = best_theta(rows)
    fit = ppvae.fit_per_datapoint(saw(theta), DiagonalNormal(), rows, tolerance=1e-7)
    loc, log_scale = fit.guide.table("z").weight.detach().unbind(-1)
    exact = (rows[:, 0] + A * (rows[:, 1] - A * theta)) / PRECISION
    torch.testing.assert_close(loc, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        log_scale, torch.full_like(loc, -0.5 * math.log(PRECISION)), rtol=0, atol=1e-4
    )


def test_the_gap_of_the_best_linear_encoder_is_its_closed_form():
    """(892.63 − 553.01) / 1000 nats a datum, all of it amortization."""
    rows = series(1000, seed=2012)
    theta = best_theta(rows)
    (bias, slope, _), squares = best_linear_in_x(rows)
    guide = linear_guide([1], slope[None], bias)
    residual = (rows[:, 1] - A * rows[:, 0]).double()
    optimal = float((residual - residual.mean()).square().sum()) / PRECISION
    exact = 0.5 * (squares - optimal) / 1000
    assert abs(exact - 0.33962) < 1e-4
    comparison = ppvae.compare(saw(theta), guide, rows)
    value, stderr = comparison.mean("amortization_gap")
    assert stderr < 0.002
    assert abs(value - exact) < 3 * stderr
    assert comparison.dataset.attrs["evidence_kind"] == "quadrature"
    approximation, error = comparison.mean("approximation_gap")
    assert abs(approximation) < 4 * error + 1e-4


def trained(columns, hidden, steps=500, lr=1e-2):
    """An encoder trained on another series, and its comparison on the authors'."""
    train, rows = series(3000, seed=1), series(1000, seed=2012)[:400]
    model = saw(best_theta(series(1000, seed=2012)))
    with forked_rng(3):
        guide = Amortized(DiagonalNormal(), Columns(columns, MLP(len(columns), hidden, 2)))
    ppvae.fit(model, guide, train, steps=steps, lr=lr, batch_size=256, progress=False)
    return ppvae.compare(model, guide, rows, num_samples=300), train


@pytest.mark.parametrize(
    "hidden", [[], pytest.param([16], marks=pytest.mark.slow), [64, 64]], ids=str
)
def test_no_width_of_an_encoder_of_x_alone_closes_the_gap(hidden):
    """Given x_n, x_{n−1} still has variance 1 in the stationary series, and q*'s mean 1/(1+a²)².

    So no function of x_n has a gap below ½ (1 + a²) / (1 + a²)² = 0.32 nats in expectation.
    """
    comparison, _ = trained([1], hidden)
    gap = comparison.dataset["amortization_gap"]
    value, stderr = comparison.mean("amortization_gap")
    assert value > 0.25
    over_rows = float(gap.std()) / math.sqrt(gap.size)
    assert value > 0.5 / PRECISION - 3 * math.hypot(over_rows, stderr)


def test_an_encoder_of_both_inputs_closes_it():
    comparison, _ = trained([0, 1], [16])
    value, stderr = comparison.mean("amortization_gap")
    assert value + 3 * stderr < 0.01


def test_explain_names_the_input_that_the_widest_encoder_lacks():
    comparison, train = trained([1], [64, 64])
    explanation = ppvae.explain(comparison, train, steps=200)
    assert explanation.cause == "missing_inputs"
    gap, stderr = (explanation.dataset[v].to_series() for v in ("gap", "gap_stderr"))
    # No width helps: what the missing input costs is 0.32 nats in expectation.
    assert abs(gap["missing_inputs"] - 0.5 / PRECISION) < 4 * stderr["missing_inputs"]
    assert gap["capacity"] < 0.02
    assert "missing inputs" in explanation.sentence()


# The linear model.

TAU, SIGMA, THETA = 1.155, 2.43, 0.7
SLOPE = TAU / (TAU**2 + SIGMA**2)
SCALE = SIGMA / math.sqrt(SIGMA**2 + TAU**2)


def linear(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).to(x), 1.0))
        pyro.sample("x", dist.Normal(THETA + TAU * z, SIGMA), obs=x)


def linear_rows(count, seed):
    with forked_rng(seed):
        return THETA + TAU * torch.randn(count) + SIGMA * torch.randn(count)


def test_the_optimum_of_the_linear_model_is_linear_in_x():
    assert abs(SLOPE - 0.15955) < 1e-5
    assert abs(SCALE - 0.90317) < 1e-5
    x = linear_rows(200, seed=0).double()
    fit = ppvae.fit_per_datapoint(linear, DiagonalNormal(), x)
    assert fit.converged.all()
    loc, log_scale = fit.guide.table("z").weight.detach().unbind(-1)
    design = torch.stack([torch.ones_like(x), x], dim=-1)
    (bias, slope) = torch.linalg.lstsq(design, loc[:, None]).solution[:, 0]
    assert abs(float(slope) - SLOPE) < 1e-3
    assert abs(float(bias) + SLOPE * THETA) < 1e-3
    assert float((loc - SLOPE * (x - THETA)).abs().max()) < 1e-3
    assert float((log_scale.exp() - SCALE).abs().max()) < 1e-3


def gap_of(loc, log_scale, x):
    """KL(N(loc, scale²) ‖ posterior), per datum."""
    off = (loc - SLOPE * (x - THETA)) / SCALE
    log_ratio = log_scale - math.log(SCALE)
    return 0.5 * (off**2 + torch.exp(2 * log_ratio) - 1) - log_ratio


def test_a_trained_linear_encoder_closes_the_gap_to_within_its_error():
    """To what its two slopes and two biases, read off, are off the exact ones: no more."""
    train, x = linear_rows(4000, seed=1), linear_rows(300, seed=2)
    with forked_rng(0):
        guide = Amortized(DiagonalNormal(), MLP(1, [], 2))
    for lr in (2e-2, 2e-3):
        ppvae.fit(linear, guide, train, steps=400, lr=lr, batch_size=512, progress=False)
    comparison = ppvae.compare(linear, guide, x)
    value, stderr = comparison.mean("amortization_gap")
    exact = float(gap_of(*guide.params(x).detach().unbind(-1), x).mean())
    assert abs(value - exact) < 3 * stderr + 1e-5
    assert value < 0.005
    assert abs(comparison.mean("approximation_gap")[0]) < 1e-3


def test_a_constant_encoder_has_the_closed_forms_gap():
    x = linear_rows(500, seed=3)
    best = torch.tensor([float(SLOPE * (x - THETA).mean()), math.log(SCALE)])
    constant = MLP(1, [], 2)
    with torch.no_grad():
        constant.layers[0].weight.zero_()
        constant.layers[0].bias.copy_(best)
    comparison = ppvae.compare(linear, Amortized(DiagonalNormal(), constant), x)
    each = gap_of(*best, x)
    exact = float(each.mean())
    # Half the variance of the optimal means, in units of the posterior's.
    assert exact == pytest.approx(float(0.5 * (SLOPE / SCALE) ** 2 * x.var(correction=0)), rel=1e-4)
    value, stderr = comparison.mean("amortization_gap")
    assert exact > 20 * stderr
    assert abs(value - exact) < 3 * stderr
    per_row = torch.as_tensor(comparison.dataset["amortization_gap"].values)
    error = torch.as_tensor(comparison.dataset["amortization_gap_stderr"].values)
    assert float(((per_row - each) / error.clamp(min=1e-5)).abs().max()) < 5
