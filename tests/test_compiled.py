"""Compiled steps are the steps of eager Pyro, for every pair and objective, and stay so."""

import copy
import logging
import math
import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    autoguide,
    config_enumerate,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from test_pairs import PAIRS, data, loss_for
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader

import ppvae
from ppvae import graphs, pairs
from ppvae.compiled import CompileWarning, stepping
from ppvae.compiled.stepping import Stepper
from ppvae.families import DiagonalNormal
from ppvae.guides import PerDatapoint
from ppvae.objectives import (
    IWAE,
    VIMCO,
    BetaELBO,
    Cyclical,
    DReG,
    FreeBitsELBO,
    Linear,
    ScoreFunctionELBO,
    SemisupervisedELBO,
    StickingTheLanding,
)

pytestmark = pytest.mark.fills_store

GRAPH, EAGER = "replayed graph", "eager"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "compiling.md"


@pytest.fixture(autouse=True)
def replays(monkeypatch, request):
    """The second step of a signature is the first of its graph, which is not compiled further."""
    # Torch would write down each operation for pytest's own log.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    if not getattr(request.cls, "as_it_is", False):
        monkeypatch.setattr(Stepper, "_pays", lambda self, plan, tier: tier == "eager")


@pytest.fixture
def captures(monkeypatch):
    """The captures that were made."""
    made, capture = [], graphs.capture

    def counted(*args):
        made.append(args)
        return capture(*args)

    monkeypatch.setattr(graphs, "capture", counted)
    return made


@dataclass
class Case:
    """A pair, and what its steps need."""

    model: Any
    guide: Any
    loss: Any = field(default_factory=Trace_ELBO)
    optim: Any = field(default_factory=lambda: pyro.optim.Adam({"lr": 0.02}))
    # From the number of a step to its arguments, and what happens before it.
    arguments: Any = None
    before: Any = lambda step, svi, case: None
    modules: Any = ()
    steps: int = 10
    tier: str = GRAPH
    svi: Any = None

    def state(self):
        """All that a run changes."""
        held = dict(pyro.get_param_store().named_parameters())
        for at, module in enumerate(self.modules):
            held |= {f"{at}.{name}": value for name, value in module.state_dict().items()}
        return {name: value.detach().clone() for name, value in held.items()}


def run(kind, build):
    pyro.clear_param_store()
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(build, "default_dtype", before))
    try:
        return _run(kind, build)
    finally:
        torch.set_default_dtype(before)


def _run(kind, build):
    torch.manual_seed(0)
    case = build()
    case.svi = kind(case.model, case.guide, case.optim, case.loss)
    torch.manual_seed(1)
    losses = []
    for step in range(case.steps):
        case.before(step, case.svi, case)
        args, kwargs = case.arguments(step)
        loss = case.svi.step(*args, **kwargs)
        losses += [float(part) for part in (loss if isinstance(loss, tuple) else (loss,))]
    return case, losses, case.state(), torch.get_rng_state()


def ours(model, guide, optim, loss):
    return ppvae.SVI(model, guide, optim, loss, compile="auto")


def hold(build, rtol=1e-10, atol=1e-12):
    """Hold the steps of ours against those of Pyro from the same seed; return our run."""
    _, expected, wanted, stream = run(pyro.infer.SVI, build)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)
        case, losses, state, ours_stream = run(ours, build)
    np.testing.assert_allclose(losses, expected, rtol=rtol, atol=atol)
    assert [re.sub(r"_\d+", "", name) for name in state] == [
        re.sub(r"_\d+", "", name) for name in wanted
    ]
    for one, other in zip(state.values(), wanted.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)
    assert torch.equal(stream, ours_stream)
    said = case.svi.compile_report().signatures[-1]
    assert said.tier == case.tier, said.why
    return case


def rows(x):
    return lambda step: ((x,), {})


def of_pair(make, loss, dtype=torch.float64, **others):
    def build():
        model, guide = (part.to(dtype) for part in make())
        x = data(model, size=9).to(dtype)
        made = loss(guide, x)
        return Case(model, guide, made, arguments=rows(x), modules=[model, guide], **others)

    return build


def our_loss(guide, x):
    smooth = loss_for(guide, x) is TraceMeanField_ELBO
    return BetaELBO() if smooth else ScoreFunctionELBO(num_particles=2)


def cases(table, *quick):
    """What a table's tests are run with. A capture takes a second: most run with --slow."""
    return [
        pytest.param(value, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, value in table.items()
    ]


every_pair = pytest.mark.parametrize(
    "make", cases(PAIRS, "exponential_gaussian", "semisupervised_vae", "vae, ConditionalFlow")
)


@every_pair
def test_every_pair_steps_as_it_does_in_pyro(make):
    hold(of_pair(make, our_loss))


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@every_pair
def test_every_pair_steps_as_it_does_with_pyros_objectives(make, loss):
    def chosen(guide, x):
        return loss() if loss_for(guide, x) is TraceMeanField_ELBO else TraceGraph_ELBO()

    build = of_pair(make, chosen)
    probe = build()
    build_eager = of_pair(make, chosen, tier=EAGER)
    hold(build_eager if isinstance(probe.loss, TraceGraph_ELBO) else build)


@pytest.mark.parametrize("name", ["vae", "factor_analysis", "vae, images"])
def test_single_precision(name):
    hold(of_pair(PAIRS[name], our_loss, torch.float32), rtol=1e-6, atol=1e-6)


def smooth():
    return pairs.vae(5, 2, [4], "gaussian")


def discrete():
    return pairs.sigmoid_belief_network(5, [3], [4])


def enumerated():
    """A mixture whose component is summed over."""

    def model(x):
        means = pyro.param("means", torch.tensor([-1.0, 1.0], dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.full((2,), 0.5, dtype=torch.float64)))
            pyro.sample("x", dist.Normal(means[z], 1.0), obs=x)

    @config_enumerate
    def guide(x):
        logits = pyro.param("logits", torch.zeros(9, 2, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits))

    return Case(
        model,
        guide,
        TraceEnum_ELBO(max_plate_nesting=1),
        arguments=rows(torch.linspace(-2, 2, 9, dtype=torch.float64)),
        tier=EAGER,
    )


def on(make, loss, tier=GRAPH):
    return of_pair(make, lambda guide, x: loss(), tier=tier)


# The table of docs/compiling.md.
OBJECTIVES = {
    "`Trace_ELBO()`": on(smooth, Trace_ELBO),
    "`Trace_ELBO(num_particles=3)`": on(smooth, lambda: Trace_ELBO(num_particles=3)),
    "`Trace_ELBO`, `vectorize_particles=True`": on(
        smooth,
        lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    ),
    "`Trace_ELBO()`, draws without a path": on(discrete, Trace_ELBO),
    "`TraceMeanField_ELBO()`": on(smooth, TraceMeanField_ELBO),
    "`BetaELBO()`": on(smooth, BetaELBO),
    "`BetaELBO(Linear(20))`": on(smooth, lambda: BetaELBO(Linear(20))),
    '`BetaELBO(0.5, weighs="log_q")`': on(smooth, lambda: BetaELBO(0.5, weighs="log_q")),
    "`FreeBitsELBO(0.1)`": on(smooth, lambda: FreeBitsELBO(0.1)),
    "`StickingTheLanding()`": on(smooth, StickingTheLanding),
    "`IWAE(3)`": on(smooth, lambda: IWAE(3)),
    "`DReG(3)`": on(smooth, lambda: DReG(3)),
    "`ScoreFunctionELBO(2)`": on(discrete, lambda: ScoreFunctionELBO(2)),
    "`VIMCO(3)`": on(discrete, lambda: VIMCO(3)),
    "`SemisupervisedELBO()`": on(
        lambda: pairs.semisupervised_vae(6, 2, 3, [4]), SemisupervisedELBO, EAGER
    ),
    "`RenyiELBO`": on(smooth, lambda: RenyiELBO(alpha=0.5, num_particles=3)),
    "`ReweightedWakeSleep`": on(smooth, lambda: ReweightedWakeSleep(num_particles=3)),
    "`TraceGraph_ELBO`": on(discrete, TraceGraph_ELBO, EAGER),
    "`TraceEnum_ELBO`": enumerated,
    "`JitTrace_ELBO` and its like": on(
        smooth, lambda: JitTrace_ELBO(ignore_jit_warnings=True), EAGER
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize(
    "build",
    cases(
        OBJECTIVES,
        "`Trace_ELBO()`",
        "`BetaELBO(Linear(20))`",
        "`VIMCO(3)`",
        "`ReweightedWakeSleep`",
        "`SemisupervisedELBO()`",
        "`TraceEnum_ELBO`",
    ),
)
def test_every_objective_steps_as_it_does_in_pyro(build):
    hold(build)


D = torch.float64


class Net(nn.Module):
    """A pair in classic Pyro, whose parts can be chosen."""

    def __init__(self, middle=None):
        super().__init__()
        self.encoder = nn.Linear(3, 4, dtype=D)
        self.middle = nn.Identity() if middle is None else middle
        self.decoder = nn.Linear(2, 3, dtype=D)
        self.weight = 1.0

    def model(self, x):
        pyro.module("net", self)
        scale = pyro.param("scale", torch.ones(3, dtype=D), constraint=constraints.positive)
        with pyro.plate("data", len(x)), poutine.scale(scale=self.weight):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(self.middle(z)), scale).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("net", self)
        with pyro.plate("data", len(x)):
            out = self.encoder(x)
            pyro.sample("z", dist.Normal(out[:, :2], out[:, 2:].exp()).to_event(1))


X = torch.linspace(-1, 2, 21, dtype=D).reshape(7, 3)


def net(middle=None, **others):
    def build():
        made = Net(None if middle is None else middle())
        others_now = {"arguments": rows(X), "modules": [made], **others}
        for name in ("loss", "optim"):
            if name in others:
                others_now[name] = others[name]()
        return Case(made.model, made.guide, **others_now)

    return build


def auto(make, model=None, tier=GRAPH):
    def standard(x):
        shift = pyro.param("shift", torch.zeros((), dtype=D))
        z = pyro.sample("z", dist.Gamma(x.new_full((2,), 2.0), 1.0).to_event(1))
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum() * w + shift, 1.0), obs=x)

    def build():
        model_now = standard if model is None else model
        guide = make(model_now)
        return Case(model_now, guide, arguments=rows(X[:, 0]), modules=[guide], tier=tier)

    build.default_dtype = D  # Which Pyro's guides take.
    return build


def subsampled():
    def model(x):
        loc = pyro.param("loc", torch.zeros((), dtype=D))
        with pyro.plate("data", len(x), subsample_size=3) as rows_now:
            z = pyro.sample("z", dist.Normal(loc, x.new_ones(3)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows_now])

    def guide(x):
        table = pyro.param("table", torch.zeros(7, 2, dtype=D))
        with pyro.plate("data", len(x), subsample_size=3) as rows_now:
            pyro.sample("z", dist.Normal(table[rows_now, 0], table[rows_now, 1].exp()))

    return Case(model, guide, arguments=rows(X[:, 0]))


def scaled_and_masked():
    mask = torch.tensor([True, False, True, True, False, True, True])
    factor = torch.full((7,), 2.0, dtype=D)

    def model(x):
        loc = pyro.param("loc", torch.zeros((), dtype=D))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask), poutine.scale(scale=factor):
            z = pyro.sample("z", dist.Normal(loc, x.new_ones(7)))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z, 1.0).mask(x > -0.5), obs=x)

    def guide(x):
        loc = pyro.param("q", torch.zeros(7, dtype=D))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask), poutine.scale(scale=factor):
            pyro.sample("z", dist.Normal(loc, x.new_ones(7)))

    def before(step, svi, case):
        if step == 5:  # Tensors that are changed in place are seen.
            factor.fill_(3.0)
            mask[0] = False

    return Case(model, guide, arguments=rows(X[:, 0]), before=before)


def bare_with_constraints():
    def model(x):
        rate = pyro.param("rate", torch.full((2,), 0.5, dtype=D), constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(1.0 + rate[0], x.new_ones(7)))
            pyro.sample("x", dist.Normal(z * rate[1], 1.0), obs=x)

    def guide(x):
        a = pyro.param("a", x.new_ones(7), constraint=constraints.positive)
        b = pyro.param("b", x.new_ones(7), constraint=constraints.greater_than(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(a, b))

    return Case(model, guide, arguments=rows(X[:, 0]))


def pyro_module():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.ones((), dtype=D), constraint=constraints.positive)
            self.linear = PyroModule[nn.Linear](3, 1, dtype=D)
            self.linear.weight = PyroSample(
                dist.Normal(torch.zeros((1, 3), dtype=D), 1).to_event(2)
            )

        def forward(self, x):
            mean = self.linear(x)[:, 0]
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mean, self.scale), obs=x[:, 0])

    model = Model()
    guide = autoguide.AutoNormal(model)
    return Case(model, guide, arguments=rows(X), modules=[model, guide])


def looped(test):
    """A guide with control flow."""

    def model(x):
        loc = pyro.param("loc", torch.zeros((), dtype=D))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, x.new_ones(7)))
            pyro.sample("x", dist.Normal(test(z), 1.0), obs=x)

    def guide(x):
        loc = pyro.param("q", torch.zeros(7, dtype=D))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, x.new_ones(7)))

    return Case(model, guide, arguments=rows(X[:, 0]), tier=EAGER)


def angular():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(x.new_zeros(7), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("q", torch.zeros(7, dtype=D))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.VonMises(loc, x.new_ones(7)))

    return Case(model, guide, ScoreFunctionELBO(2), arguments=rows(X[:, 0]), tier=EAGER)


PROGRAMS = {
    "classic `pyro.module` and functions": net(),
    "`pyro.param` with constraints": bare_with_constraints,
    "`PyroModule`, `PyroParam`, `PyroSample`": pyro_module,
    "`pyro.plate(subsample_size=...)`": subsampled,
    "`poutine.scale`, `poutine.mask`, numbers and tensors": scaled_and_masked,
    "batch normalisation": net(lambda: nn.BatchNorm1d(2, dtype=D)),
    "dropout": net(lambda: nn.Dropout(0.3)),
    "`AutoDelta`": auto(autoguide.AutoDelta),
    "`AutoNormal`": auto(autoguide.AutoNormal),
    "`AutoDiagonalNormal`": auto(autoguide.AutoDiagonalNormal),
    "`AutoMultivariateNormal`": auto(autoguide.AutoMultivariateNormal),
    "`AutoLowRankMultivariateNormal`": auto(autoguide.AutoLowRankMultivariateNormal),
    "`AutoIAFNormal`": auto(autoguide.AutoIAFNormal),
    "draws of `VonMises`": angular,
    "`if` or `while` on a tensor": lambda: looped(lambda z: z if z.sum() > 0 else -z),
    "`float(tensor)`, `tensor.numpy()`": lambda: looped(lambda z: z * float(z.detach().sum())),
    "draws of `random`, `numpy.random`": lambda: looped(lambda z: z + 0.0 * np.random.rand()),
}


@pytest.mark.parametrize(
    "build",
    cases(
        PROGRAMS,
        "`pyro.plate(subsample_size=...)`",
        "`poutine.scale`, `poutine.mask`, numbers and tensors",
        "batch normalisation",
        "dropout",
        "`AutoNormal`",
        "draws of `VonMises`",
        "`if` or `while` on a tensor",
        "draws of `random`, `numpy.random`",
    ),
)
def test_every_kind_of_program_steps_as_it_does_in_pyro(build):
    hold(build)


def at(number, act):
    """Something done before a step."""

    def before(step, svi, case):
        if step == number:
            act(svi, case)

    return before


def of_net(case):
    return case.modules[0]


def freeze(svi, case):
    of_net(case).decoder.requires_grad_(False)


def thaw(step, svi, case):
    of_net(case).decoder.requires_grad_(step >= 5)


def load_model(svi, case):
    state = {name: value * 0.5 for name, value in of_net(case).state_dict().items()}
    of_net(case).load_state_dict(state)


def load_optimizer(svi, case):
    for optimizer in case.optim.optim_objs.values():
        state = copy.deepcopy(optimizer.state_dict())
        for each in state["state"].values():
            each["exp_avg"] *= 3.0
            each["step"] += 7
        optimizer.load_state_dict(state)


def renew_optimizers(svi, case):
    case.optim.optim_objs.clear()


def rates(factor):
    def act(svi, case):
        for optimizer in case.optim.optim_objs.values():
            optimizer.param_groups[0]["lr"] *= factor

    return act


def betas(svi, case):
    for optimizer in case.optim.optim_objs.values():
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def clear(svi, case):
    pyro.get_param_store()["scale"] = torch.full((3,), 2.0, dtype=D)


def clamp(gradient):
    return gradient.clamp(-0.1, 0.1)


def hook(svi, case):
    of_net(case).decoder.weight.register_hook(clamp)


def after_hook(svi, case):
    def clip(param):
        param.grad.clamp_(-0.1, 0.1)

    of_net(case).decoder.weight.register_post_accumulate_grad_hook(clip)


def half(module, args, output):
    return output * 0.5


def swap(svi, case):
    torch.manual_seed(9)
    of_net(case).middle = nn.Linear(2, 2, dtype=D)


def stepped(step, svi, case):
    if step and step % 3 == 0:
        case.optim.step()


def per_parameter(name):
    return {"lr": 0.05} if "decoder" in name else {"lr": 0.01, "betas": (0.8, 0.99)}


CHANGES = {
    "a parameter is frozen": (at(5, freeze), {}),
    "a parameter is thawed": (thaw, {}),
    "the model's state is loaded": (at(5, load_model), {}),
    "the optimizer's state is loaded": (at(5, load_optimizer), {}),
    "the optimizers are made anew": (at(5, renew_optimizers), {}),
    "a learning rate": (at(5, rates(0.1)), {}),
    "other options of Adam": (at(5, betas), {}),
    "a value in the store": (at(5, clear), {}),
    "a gradient hook": (at(5, hook), {}),
    "a hook after the gradient": (at(5, after_hook), {"tier": EAGER}),
    "a forward hook": (at(5, lambda s, c: of_net(c).decoder.register_forward_hook(half)), {}),
    "a module is replaced": (at(5, swap), {}),
    "a weight in Python": (at(5, lambda s, c: setattr(of_net(c), "weight", 0.3)), {}),
    "eval mode": (
        at(5, lambda s, c: of_net(c).eval()),
        {"middle": lambda: nn.BatchNorm1d(2, dtype=D)},
    ),
    "train mode again": (
        lambda step, s, c: of_net(c).train(step % 8 < 5),
        {"middle": lambda: nn.Dropout(0.3)},
    ),
    "the probability of a dropout": (
        at(5, lambda s, c: setattr(of_net(c).middle, "p", 0.9)),
        {"middle": lambda: nn.Dropout(0.3)},
    ),
    "double and back": (at(5, lambda s, c: of_net(c).float().double()), {}),
    "a parameter's data": (
        at(5, lambda s, c: setattr(of_net(c).decoder.bias, "data", torch.ones(3, dtype=D))),
        {},
    ),
    "a scheduler": (
        stepped,
        {
            "optim": lambda: pyro.optim.ExponentialLR(
                {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.5}
            )
        },
    ),
    "options by parameter": (
        at(0, lambda s, c: None),
        {"optim": lambda: pyro.optim.Adam(per_parameter)},
    ),
    "gradients clipped": (
        at(0, lambda s, c: None),
        {"optim": lambda: pyro.optim.Adam({"lr": 0.02}, {"clip_norm": 0.5})},
    ),
    "ClippedAdam": (
        at(0, lambda s, c: None),
        {"optim": lambda: pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9})},
    ),
    "AdamW": (at(0, lambda s, c: None), {"optim": lambda: pyro.optim.AdamW({"lr": 0.02})}),
    "SGD": (
        at(0, lambda s, c: None),
        {"optim": lambda: pyro.optim.SGD({"lr": 0.001, "momentum": 0.9})},
    ),
    "weight decay": (
        at(0, lambda s, c: None),
        {"optim": lambda: pyro.optim.Adam({"lr": 0.02, "weight_decay": 0.1})},
    ),
    "beta falls and rises": (
        at(0, lambda s, c: None),
        {"loss": lambda: BetaELBO(Cyclical(8, cycles=2))},
    ),
    "beta is set": (
        at(5, lambda s, c: setattr(c.loss, "schedule", 0.1)),
        {"loss": lambda: BetaELBO(1.0)},
    ),
    "the steps of a schedule are set": (
        at(5, lambda s, c: setattr(c.loss, "steps_taken", 1)),
        {"loss": lambda: BetaELBO(Linear(8))},
    ),
    "more particles": (at(5, lambda s, c: setattr(c.loss, "num_particles", 3)), {}),
}


@pytest.mark.filterwarnings("ignore:.*because requires_grad=False:UserWarning")
@pytest.mark.parametrize(
    "change",
    cases(
        CHANGES,
        "a parameter is frozen",
        "the optimizer's state is loaded",
        "a value in the store",
        "a hook after the gradient",
        "a module is replaced",
        "eval mode",
        "a scheduler",
        "ClippedAdam",
        "beta is set",
    ),
)
def test_what_changes_between_steps_is_seen(change):
    before, others = change
    hold(net(before=before, **others))


def test_the_table_of_the_page_is_what_was_tested():
    said = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| ") and cells[1] in ("graph", "eager"):
            said[cells[0]] = {"graph": GRAPH, "eager": EAGER}[cells[1]]
    tested = {
        name: build().tier for name, build in (OBJECTIVES | PROGRAMS).items() if "Jit" not in name
    }
    assert said.pop("`JitTrace_ELBO` and its like") == EAGER
    assert said == tested


class TestSignatures:
    def test_a_step_is_captured_once(self, captures):
        case, _, _, _ = run(ours, net())
        assert len(captures) == 1
        [said] = case.svi.compile_report().signatures
        assert said.steps == {"eager": 1, GRAPH: case.steps - 1}
        assert said.arguments == "(float64[7, 3])"

    def test_shapes_and_strides_have_graphs_of_their_own(self, captures):
        shapes = [X, X[:4], X, X[:4], X.t().contiguous().t(), X, X.t().contiguous().t()]
        build = net(arguments=lambda step: ((shapes[step],), {}), steps=len(shapes))
        case = hold(build)
        assert len(captures) == 3
        assert len(case.svi.compile_report().signatures) == 3

    @pytest.mark.slow
    def test_numbers_flags_and_names_have_graphs_of_their_own(self, captures):
        def model(x, factor, *, flag, kind):
            loc = pyro.param("loc", torch.zeros((), dtype=D))
            sign = {"plus": 1.0, "minus": -1.0}[kind]
            with pyro.plate("data", len(x)), poutine.scale(scale=factor):
                z = pyro.sample("z", dist.Normal(loc, x.new_ones(7)))
                pyro.sample("x", dist.Normal(z * sign if flag else -z, 1.0), obs=x)

        def guide(x, factor, **_):
            loc = pyro.param("q", torch.zeros(7, dtype=D))
            with pyro.plate("data", len(x)), poutine.scale(scale=factor):
                pyro.sample("z", dist.Normal(loc, x.new_ones(7)))

        calls = [
            ((X[:, 0], 2.0), {"flag": True, "kind": "plus"}),
            ((X[:, 0], 0.5), {"flag": True, "kind": "plus"}),
            ((X[:, 0], 0.5), {"flag": False, "kind": "plus"}),
            ((X[:, 0], 0.5), {"flag": True, "kind": "minus"}),
            # The same as a tensor is live.
            ((X[:, 0], torch.tensor(2.0)), {"flag": True, "kind": "plus"}),
            ((X[:, 0], torch.tensor(0.5)), {"flag": True, "kind": "plus"}),
        ]
        hold(lambda: Case(model, guide, arguments=lambda step: calls[step % 6], steps=18))
        assert len(captures) == 5

    @pytest.mark.slow
    def test_lists_and_dictionaries_of_tensors_are_arguments(self, captures):
        made = Net()
        build = lambda: Case(  # noqa: E731
            lambda batch: made.model(batch["x"][0]),
            lambda batch: made.guide(batch["x"][0]),
            arguments=lambda step: (({"x": [X + step, 3.0]},), {}),
            modules=[made],
        )
        start = copy.deepcopy(made.state_dict())
        hold(lambda: made.load_state_dict(start) and build())
        assert len(captures) == 1

    def test_an_argument_that_may_change_unseen_runs_eagerly(self):
        class Settings:
            shift = 0.0

        settings, made = Settings(), {}

        def build():
            made["net"] = Net()
            return Case(
                lambda x, settings: made["net"].model(x + settings.shift),
                lambda x, settings: made["net"].guide(x),
                before=lambda step, s, c: setattr(settings, "shift", 0.1 * step),
                arguments=lambda step: ((X, settings), {}),
                tier=EAGER,
            )

        said = hold(build).svi.compile_report().signatures[0]
        assert "An argument is no tensor, number, word or module" in said.why

    @pytest.mark.slow
    def test_surroundings_count(self, captures):
        def inside(step, svi, case):
            pyro.settings.set(validate_distributions_pyro=step % 4 < 2)

        before = pyro.settings.get("validate_distributions_pyro")
        try:
            hold(net(before=inside))
        finally:
            pyro.settings.set(validate_distributions_pyro=before)
        assert len(captures) == 2

    def test_a_step_inside_of_a_handler_is_a_step_inside_of_a_handler(self):
        def both(kind):
            pyro.clear_param_store()
            torch.manual_seed(0)
            made = Net()
            svi = kind(made.model, made.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
            losses = [float(svi.step(X)) for _ in range(3)]
            with poutine.scale(scale=0.1):
                losses += [float(svi.step(X)) for _ in range(3)]
            return losses + [float(svi.step(X)) for _ in range(2)]

        np.testing.assert_allclose(both(ppvae.SVI), both(pyro.infer.SVI), rtol=1e-10)

    @pytest.mark.slow
    def test_without_gradients_nothing_is_trained(self):
        def both(kind):
            pyro.clear_param_store()
            torch.manual_seed(0)
            made = Net()
            svi = kind(made.model, made.guide, pyro.optim.SGD({"lr": 0.001}), Trace_ELBO())
            losses = [float(svi.step(X)) for _ in range(3)]
            before = copy.deepcopy(made.state_dict())
            with torch.no_grad():
                losses += [float(svi.step(X)) for _ in range(3)]
            assert all(torch.equal(before[name], v) for name, v in made.state_dict().items())
            return losses + [float(svi.step(X)) for _ in range(3)]

        np.testing.assert_allclose(both(ppvae.SVI), both(pyro.infer.SVI), rtol=1e-10)

    @pytest.mark.slow
    def test_autocast_has_graphs_of_its_own(self):
        def both(kind):
            pyro.clear_param_store()
            torch.manual_seed(0)
            made = Net().float()
            svi = kind(made.model, made.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
            out = []
            for step in range(8):
                with torch.autocast("cpu", torch.bfloat16, enabled=step % 2 == 1):
                    out.append(float(svi.step(X.float())))
            return out

        pyro.get_param_store()["scale"] = torch.ones(3)
        np.testing.assert_allclose(both(ppvae.SVI), both(pyro.infer.SVI), rtol=1e-5)


class TestRefusals:
    def test_one_warning_says_why(self):
        case = looped(lambda z: z if z.sum() > 0 else -z)
        svi = ours(case.model, case.guide, case.optim, case.loss)
        svi.step(X[:, 0])
        with pytest.warns(CompileWarning) as caught:
            svi.step(X[:, 0])
        [said] = caught
        assert str(said.message).startswith("Steps run eagerly. No graph of this step: it needs")
        assert "compile=False" in str(said.message)
        assert said.filename == __file__
        for _ in range(3):
            svi.step(X[:, 0])
        [signature] = svi.compile_report().signatures
        assert signature.steps == {"eager": 5}
        assert signature.why in str(svi.compile_report())

    def test_what_changes_at_every_call_is_refused_by_name(self):
        class Counting(Net):
            calls = 0

            def guide(self, x):
                self.calls += 1
                return super().guide(x)

        made = Counting()
        svi = ours(made.model, made.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        svi.step(X)
        with pytest.warns(CompileWarning, match="calls changes at every call"):
            svi.step(X)

    def test_a_buffer_that_is_set_at_each_call_stays_what_it_is(self):
        """A capture would leave a tensor without data in it."""

        class Average(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("mean", torch.zeros(2, dtype=D))
                self.calls, self.past = 0, []

            def forward(self, z):
                self.mean = 0.9 * self.mean + 0.1 * z.detach().mean(0)
                self.calls += 1
                self.past.append(self.calls)
                return z - self.mean

        case = hold(net(Average, tier=EAGER))
        assert case.modules[0].middle.past == list(range(1, 11))

    @pytest.mark.slow
    def test_what_changes_again_and_again_is_left_to_pyro(self, captures):
        def moved(step, svi, case):
            case.modules[0].weight = 1.0 - 0.05 * step

        case = hold(net(before=moved, steps=20, tier=EAGER))
        assert len(captures) == 3
        assert "weight changes again and again" in case.svi.compile_report().signatures[0].why

    def test_objectives_that_are_always_eager_are_no_reason_to_warn(self):
        model, guide = discrete()
        x = data(model, size=5)
        svi = ours(model, guide, pyro.optim.Adam({"lr": 0.02}), TraceGraph_ELBO())
        svi.step(x)
        svi.step(x)  # Warnings are errors.
        svi = ppvae.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), TraceGraph_ELBO(), True)
        svi.step(x)
        with pytest.warns(CompileWarning, match="TraceGraph_ELBO"):
            svi.step(x)

    def test_compile_false_never_captures(self, captures):
        made = Net()
        svi = ppvae.SVI(
            made.model, made.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), compile=False
        )
        for _ in range(4):
            svi.step(X)
        assert not captures
        assert svi.compile_report().signatures[0].why == "compile=False."
        with pytest.raises(ValueError, match='compile must be True, False or "auto"; got 7'):
            ppvae.SVI(made.model, made.guide, pyro.optim.Adam({}), Trace_ELBO(), compile=7)

    def test_a_graph_that_computes_something_else_is_not_used(self, monkeypatch):
        """Its first step is checked against an eager one."""
        replayed = graphs.replayed

        def wrong(graph):
            right = replayed(graph)

            def run(*inputs):
                loss, *rest = right(*inputs)
                return [loss * 1.01, *rest]

            return run

        monkeypatch.setattr(graphs, "replayed", wrong)
        made = Net()
        svi = ours(made.model, made.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        svi.step(X)
        with pytest.warns(CompileWarning, match=r"differs from an eager one.*by 0\.0"):
            svi.step(X)

    def test_gradients_that_an_objective_changes_itself_are_checked_too(self):
        class Clipping(Trace_ELBO):
            def loss_and_grads(self, model, guide, *args, **kwargs):
                loss = super().loss_and_grads(model, guide, *args, **kwargs)
                for _, param in pyro.get_param_store().named_parameters():
                    if param.grad is not None:
                        param.grad.clamp_(-0.1, 0.1)
                return loss

        hold(net(loss=Clipping, tier=EAGER))


class TestBadRows:
    def test_impossible_rows_are_pyros_error_and_change_nothing(self):
        model, guide = pairs.vae(3, 2, [4])
        good = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        svi = ours(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        for _ in range(4):
            svi.step(good)
        assert svi.compile_report().signatures[0].tier == GRAPH
        before = copy.deepcopy(guide.state_dict())
        steps = [o.state[p]["step"].clone() for p, o in svi.optim.optim_objs.items()]
        with pytest.raises(ValueError, match="probability of values 0 and 1 alone"):
            svi.step(good + 0.5)
        assert all(torch.equal(before[name], v) for name, v in guide.state_dict().items())
        assert steps == [o.state[p]["step"] for p, o in svi.optim.optim_objs.items()]
        svi.step(good)
        assert svi.compile_report().signatures[0].tier == GRAPH

    def test_a_model_that_is_told_not_to_judge_does_not(self, captures):
        """Grey pixels as Bernoulli, where the model has switched validation off."""

        def model(x):
            p = pyro.param("p", torch.full((3,), 0.4, dtype=D))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                logits = z[:, None] + p
                fn = dist.Bernoulli(logits=logits, validate_args=False).expand([len(x), 3])
                pyro.sample("x", fn.to_event(1), obs=x.clamp(0, 1))

        def guide(x):
            loc = pyro.param("loc", torch.zeros(7, dtype=D))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, x.new_ones(7)))

        case = hold(lambda: Case(model, guide, arguments=rows(X)))
        assert case.svi.compile_report().signatures[0].steps == {"eager": 1, GRAPH: 9}

    def test_a_loss_that_is_no_number_is_what_it_is_in_pyro(self):
        """Draws and running statistics as if the graph had not been tried."""
        bad = X.clone()
        bad[0, 0] = math.nan

        def both(kind):
            pyro.clear_param_store()
            torch.manual_seed(0)
            made = Net(nn.BatchNorm1d(2, dtype=D))
            svi = kind(made.model, made.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
            with pyro.validation_enabled(False), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                losses = [float(svi.step(bad if step == 5 else X)) for step in range(6)]
            return losses, made.state_dict(), torch.get_rng_state()

        flag = torch.distributions.Distribution._validate_args
        try:
            (losses, state, stream), (expected, wanted, theirs) = (
                both(ppvae.SVI),
                both(pyro.infer.SVI),
            )
        finally:
            torch.distributions.Distribution.set_default_validate_args(flag)
        assert math.isnan(losses[5])
        np.testing.assert_allclose(losses, expected, rtol=1e-10)
        for name, value in state.items():
            torch.testing.assert_close(value, wanted[name], equal_nan=True)
        assert torch.equal(stream, theirs)

    def test_an_error_inside_of_the_graph_is_pyros_to_say(self):
        """Of a matrix that is no covariance, torch says so in other words than Pyro."""
        cov = torch.eye(2, dtype=D)

        def model(x):
            z = pyro.sample("z", dist.MultivariateNormal(x.new_zeros(2), cov))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

        def guide(x):
            loc = pyro.param("loc", torch.zeros(2, dtype=D))
            pyro.sample("z", dist.MultivariateNormal(loc, torch.eye(2, dtype=D)))

        svi = ours(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        for _ in range(3):
            svi.step(X[:, 0])
        assert svi.compile_report().signatures[0].tier == GRAPH
        cov.fill_(-1.0)
        with pytest.raises(ValueError, match="PositiveDefinite"):
            svi.step(X[:, 0])


class TestLives:
    def test_copies_and_pickles_of_a_model_go_on_alone(self):
        model, guide = smooth()
        x = torch.randn(13, 5)
        ppvae.fit(model, guide, x, steps=6, progress=False)
        for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
            before = copy.deepcopy(twin.state_dict())
            again = ppvae.fit(model, guide, x, steps=6, progress=False)
            assert again.compile_report.signatures[0].tier == GRAPH
            assert all(torch.equal(before[name], v) for name, v in twin.state_dict().items())
            assert not torch.equal(next(guide.parameters()), next(twin.parameters()))
        for parameter in guide.parameters():
            assert type(parameter) is nn.Parameter
            assert parameter.grad is None

    @pytest.mark.slow
    def test_two_pairs_in_one_process(self):
        def both(kind):
            pyro.clear_param_store()
            torch.manual_seed(0)
            svis = []
            for _ in range(2):
                model, guide = (part.to(D) for part in smooth())
                svis.append(kind(model, guide, pyro.optim.Adam({"lr": 0.02}), BetaELBO()))
            x = torch.randn(6, 5, dtype=D)
            return [float(svi.step(x + at)) for _ in range(6) for at, svi in enumerate(svis)]

        np.testing.assert_allclose(both(ppvae.SVI), both(pyro.infer.SVI), rtol=1e-10)

    def test_other_work_with_the_pair_does_not_cost_its_graph(self, captures):
        model, guide = smooth()
        x = torch.randn(6, 5)
        svi = ours(model, guide, pyro.optim.Adam({"lr": 0.02}), BetaELBO())
        for step in range(8):
            svi.step(x)
            if step % 2:
                ppvae.elbo(model, guide, x)
                svi.evaluate_loss(x)
                model.eval()
                model.train()
        assert len(captures) == 1

    def test_the_loss_is_a_tensor_in_the_precision_of_the_pair(self):
        made = Net()
        svi = ours(made.model, made.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        losses = [svi.step(X) for _ in range(4)] + [svi.evaluate_loss(X)]
        assert {(loss.shape, loss.dtype, loss.requires_grad) for loss in losses} == {
            (torch.Size([]), D, False)
        }


def fits(make, x, **options):
    """The same run of `fit`, eagerly and with a graph, and their modules."""
    out = []
    for mode in (False, "auto"):
        torch.manual_seed(0)
        model, guide = (part.to(D) for part in make())
        given = {name: value() if callable(value) else value for name, value in options.items()}
        options_now = {"steps": 12, "batch_size": 5, "lr": 0.02} | given
        record = ppvae.fit(model, guide, x, compile=mode, progress=False, **options_now)
        out.append((record, [*model.state_dict().values(), *guide.state_dict().values()]))
    return out


def hold_fits(make, x, **options):
    (eager, wanted), (ours_now, state) = fits(make, x, **options)
    torch.testing.assert_close(ours_now.losses, eager.losses, rtol=1e-6, atol=1e-9)
    for one, other in zip(state, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert ours_now.status == eager.status
    assert {s.tier for s in eager.compile_report.signatures} == {EAGER}
    return ours_now


class TestFit:
    def test_a_pair_and_its_default_objective(self):
        record = hold_fits(smooth, torch.randn(13, 5, dtype=D))
        assert record.compile_report.signatures[0].steps == {"eager": 1, GRAPH: 11}

    def test_a_table_with_a_row_for_each_datum(self):
        def make():
            model = ppvae.models.FactorAnalysis(4, 2)
            return model, PerDatapoint(DiagonalNormal(2), 13)

        record = hold_fits(make, torch.randn(13, 4, dtype=D))
        assert record.compile_report.signatures[0].tier == GRAPH

    @pytest.mark.slow
    def test_a_loader_with_a_short_last_batch(self, captures):
        x = torch.randn(13, 5, dtype=D)
        record = hold_fits(smooth, DataLoader(x, batch_size=5))
        tiers = [s.tier for s in record.compile_report.signatures]
        assert tiers == [GRAPH, GRAPH]
        assert len(captures) == 2

    def test_latents_that_all_rows_share(self):
        def make():
            return pairs.bayesian_neural_network(num_data=13)

        model, _ = make()
        with torch.no_grad(), ppvae.isolation.private_store():
            x = model(size=13).to(D)
        hold_fits(make, x)

    @pytest.mark.slow
    def test_pseudo_inputs(self):
        x = (torch.rand(13, 6) < 0.5).to(D)
        hold_fits(lambda: pairs.vae(6, 2, [4], pseudo_inputs=4), x)

    def test_a_schedule(self):
        hold_fits(smooth, torch.randn(13, 5, dtype=D), loss=lambda: BetaELBO(Linear(8)))

    def test_a_run_that_diverges(self):
        model, guide = pairs.exponential_gaussian()
        record = ppvae.fit(model, guide, torch.rand(50) * 3, steps=500, lr=1e6, progress=False)
        assert record.status.startswith("diverged at step")
        assert record.steps == len(record.losses) < 500
        assert all(torch.isfinite(p).all() for p in guide.parameters())

    def test_an_interrupt(self, monkeypatch):
        model, guide = smooth()
        calls, replayed = [], graphs.replayed

        def interrupting(graph):
            right = replayed(graph)

            def run(*inputs):
                calls.append(1)
                if len(calls) > 10:  # The first was the check.
                    raise KeyboardInterrupt
                return right(*inputs)

            return run

        monkeypatch.setattr(graphs, "replayed", interrupting)
        record = ppvae.fit(model, guide, torch.randn(13, 5), steps=50, progress=False)
        assert record.status == "interrupted after 10 of 50 steps"
        assert len(record.losses) == 10


class TestCompiled:
    """With torch's compiler; each costs many seconds."""

    as_it_is = True

    def test_svi(self):
        def both(kind, **mode):
            torch.manual_seed(0)
            model, guide = pairs.vae(6, 2, [8])
            x = (torch.rand(9, 6) < 0.5).float()
            svi = kind(model, guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO(), **mode)
            torch.manual_seed(1)
            return svi, torch.tensor([float(svi.step(x)) for _ in range(12)])

        svi, losses = both(ppvae.SVI, compile=True)
        _, expected = both(pyro.infer.SVI)
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
        [said] = svi.compile_report().signatures
        assert said.tier == "compiled", said.why
        assert said.compile_seconds > 0
        assert said.steps == {"eager": 1, "compiled": 11}

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["a table", "a schedule"])
    def test_fit(self, name):
        def make():
            if name == "a schedule":
                return smooth()
            return ppvae.models.FactorAnalysis(5, 2), PerDatapoint(DiagonalNormal(2), 13)

        x = torch.randn(13, 5)
        records = []
        for mode in (False, True):
            torch.manual_seed(0)
            model, guide = make()
            loss = BetaELBO(Linear(8)) if name == "a schedule" else None
            record = ppvae.fit(
                model, guide, x, loss=loss, steps=12, batch_size=5, compile=mode, progress=False
            )
            records.append((record, [*guide.parameters(), *model.parameters()]))
        (eager, wanted), (ours_now, found) = records
        torch.testing.assert_close(ours_now.losses, eager.losses, rtol=1e-5, atol=1e-6)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert ours_now.compile_report.signatures[0].tier == "compiled"

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["`IWAE(3)`", "batch normalisation", "dropout"])
    def test_others(self, name, monkeypatch):
        monkeypatch.setattr(Stepper, "_pays", lambda self, plan, tier: True)
        build = (OBJECTIVES | PROGRAMS)[name]

        def compiled():
            case = build()
            case.tier = "compiled"
            return case

        hold(compiled, rtol=1e-9)


class TestAuto:
    """When a graph is made: once the steps to come pay for it."""

    as_it_is = True

    def plan(self, seconds, taken, total=None, tier=EAGER):
        plan = stepping._Plan("()")
        plan.steps, plan.timed, plan.seconds = {tier: taken}, {tier: 10}, {tier: 10 * seconds}
        stepper = Stepper(None, "auto", total)
        stepper._taken = taken + 1
        return stepper._pays(plan, tier)

    def test_few_short_steps_do_not_pay(self):
        assert not self.plan(1e-3, 100)
        assert self.plan(1e-3, 10_000)
        assert self.plan(1.0, 20)

    def test_where_the_number_of_steps_is_known_it_counts_what_is_left(self):
        assert self.plan(1e-3, 20, total=10_000)
        assert not self.plan(1e-3, 9_990, total=10_000)

    def test_a_few_eager_steps_come_first(self):
        plan = stepping._Plan("()")
        plan.steps, plan.timed, plan.seconds = {EAGER: 3}, {EAGER: 2}, {EAGER: 1e6}
        stepper = Stepper(None, "auto")
        stepper._taken = 4
        assert not stepper._pays(plan, EAGER)
        assert Stepper(None, True)._pays(plan, EAGER)

    def test_short_runs_are_eager_throughout(self, captures):
        model, guide = smooth()
        record = ppvae.fit(model, guide, torch.randn(13, 5), steps=20, progress=False)
        assert not captures
        [said] = record.compile_report.signatures
        assert said.steps == {"eager": 20}
        assert said.pays_after is None
