"""CUDA graphs, as far as a machine without CUDA can tell.

Tensors of a fake CUDA device hold no data, but refuse to meet those of another device, and to be
looked at. `FakeCuda` stands for the recording itself: it replays by running again.
"""

import contextlib
import copy

import pyro
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from ppvae import SVI, graphs, objectives, pairs
from ppvae.compiled import stepping
from ppvae.compiled.evaluating import capturable
from ppvae.families import FullRankNormal, named
from ppvae.graphs import CompileError, running
from ppvae.isolation import private_store

OBJECTIVES = {
    "bayesian_neural_network": [objectives.BetaELBO()],
    "exponential_gaussian": [
        objectives.BetaELBO(num_particles=2),
        objectives.IWAE(3),
        objectives.DReG(3),
        objectives.StickingTheLanding(),
        objectives.ScoreFunctionELBO(),
    ],
}
DEFAULT = [objectives.BetaELBO()]


class FakeCuda:
    """What `torch.cuda` has for graphs, run at once and again at each replay."""

    def __init__(self, fails=None):
        self.calls, self.fails = [], fails
        self.recorded = None

    def install(self, monkeypatch):
        for name in ("CUDAGraph", "Stream", "current_stream", "stream", "graph", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        # Its tensors are on the CPU.
        monkeypatch.setattr(running, "not_recordable", lambda graph: None)
        return self

    def CUDAGraph(self):
        return self

    def Stream(self, *_):
        return self

    current_stream = Stream

    def wait_stream(self, _):
        self.calls.append("wait")

    def device(self, _):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def stream(self, _):
        self.calls.append("warm up")
        yield

    @contextlib.contextmanager
    def graph(self, _):
        self.calls.append("record")
        yield
        if self.fails:
            raise RuntimeError(self.fails)

    def replay(self):
        self.calls.append("replay")
        self.recorded()


def _counted(cuda):
    """A graph that changes a tensor which it holds, and its runner into fixed memory."""
    total = torch.zeros(2)

    def add(x):
        total.add_(x)
        return [total * 2]

    graph = graphs.capture(add, [torch.zeros(2)])
    runner, memory = graphs.replayed(graph), []

    def into_memory(*inputs):
        def again():
            (out,) = runner(*inputs)
            if memory:
                memory[0].copy_(out)
            else:
                memory.append(out)

        cuda.recorded = again
        again()
        return memory

    return total, graph, into_memory


def test_a_recorded_runner_copies_inputs_in_and_outputs_out(monkeypatch):
    cuda = FakeCuda().install(monkeypatch)
    total, graph, runner = _counted(cuda)
    total.fill_(5.0)
    state = torch.get_rng_state()
    run = graphs.cuda_graph(runner, graph, [torch.ones(2)])
    assert cuda.calls == ["wait", "warm up", "wait", "record"]
    assert total.tolist() == [5.0, 5.0]  # Put back after the runs that warmed up.
    assert torch.equal(torch.get_rng_state(), state)
    given = torch.tensor([1.0, 2.0])
    (first,) = run(given)
    (second,) = run(torch.tensor([10.0, 20.0]))
    assert cuda.calls[4:] == ["replay", "replay"]
    assert first.tolist() == [12.0, 14.0]  # Not overwritten by the second replay.
    assert second.tolist() == [32.0, 54.0]
    assert given.tolist() == [1.0, 2.0]


def test_a_failure_to_record_is_said_and_puts_back_what_was_changed(monkeypatch):
    cuda = FakeCuda("operation not permitted when stream is capturing\nmore").install(monkeypatch)
    total, graph, runner = _counted(cuda)
    with pytest.raises(CompileError, match="no CUDA graph: operation not permitted .* capturing$"):
        graphs.cuda_graph(runner, graph, [torch.ones(2)])
    assert total.tolist() == [0.0, 0.0]
    with pytest.raises(CompileError, match="share memory"):
        graphs.cuda_graph(runner, graph, [torch.ones(1).expand(2)])


@pytest.mark.fills_store
@pytest.mark.parametrize("fails", [None, "no memory left"])
def test_steps_go_on_where_recording_fails(monkeypatch, fails):
    """On a device that says that it is CUDA; the values are those of steps without it."""
    monkeypatch.setattr(stepping, "_CAPTURE_SECONDS", 0.0)
    model, guide = pairs.exponential_gaussian()
    x = model(size=20)
    start = copy.deepcopy(model.state_dict()), copy.deepcopy(guide.state_dict())
    losses = {}
    for mode in (False, "auto"):
        pyro.clear_param_store()
        model.load_state_dict(start[0])
        guide.load_state_dict(start[1])
        with monkeypatch.context() as patch:
            if mode == "auto":
                patch.setattr(stepping.Captured, "device", property(lambda _: torch.device("cuda")))

                def record(runner, graph, inputs):
                    if fails:
                        raise CompileError(fails)
                    return runner

                patch.setattr(graphs, "cuda_graph", record)
                patch.setattr(torch.cuda, "synchronize", lambda _: None)
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objectives.BetaELBO(), mode)
            torch.manual_seed(0)
            losses[mode] = torch.stack([svi.step(x) for _ in range(12)])
            report = svi.compile_report().signatures[0]
    torch.testing.assert_close(losses["auto"], losses[False])
    assert report.tier == "replayed graph" + ("" if fails else " in a CUDA graph")
    assert (fails in report.why) if fails else ("one by one" not in report.why)


CONSTANT = torch.tensor(0.5)


needs_fake_cuda = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="torch 2.6 asks for a driver even of a CUDA device that is not there",
)


def _on_fake_cuda(function):
    """The graph of a function of one tensor on a CUDA device that is not there."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x = torch.ones(3, device="cuda")
    return graphs.capture(function, [x])


@needs_fake_cuda
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: [x * 2 + torch.tensor(0.5)], None),
        (lambda x: [x + torch.zeros(()).sum()], None),
        (lambda x: [x + torch.rand_like(x)], None),
        (lambda x: [x * CONSTANT], "may change"),
        (lambda x: [x * (CONSTANT * 2)], "may change"),
        (lambda x: [x * torch.rand(())], "draws on the CPU"),
        (lambda x: [x.cpu()], "waits for the device"),
    ],
)
def test_what_the_cpu_computes_is_frozen_only_where_it_is_constant(function, words):
    reason = graphs.not_recordable(_on_fake_cuda(function))
    assert (reason is None) if words is None else (words in reason)


@needs_fake_cuda
def test_a_full_covariance_brings_its_places_to_a_device_once(monkeypatch):
    """The device is torch's meta device, which holds no data and can stand for any other."""
    known = {}
    monkeypatch.setattr(named, "_ON_DEVICE", known)
    params = torch.zeros(2, 9, device="meta")
    for _ in range(2):
        loc, tril = FullRankNormal(3).gaussian(params)
        assert tril.device == loc.device == params.device
    assert len(known) == 1
    assert FullRankNormal(3).from_gaussian(loc, tril).shape == params.shape
    family = FullRankNormal(2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        family.gaussian(torch.zeros(2, 5, device="cuda"))
    assert len(known) == 1  # Without data they would be of no use to anyone else.


def _to_fake_cuda(mode, *modules):
    """Copies of modules on a fake CUDA device; `Module.to` cannot swap the parameters."""
    with FakeCopyMode(mode):
        copies = copy.deepcopy(modules)
    moved = {}
    for part in (part for module in copies for part in module.modules()):
        for place in (part._parameters, part._buffers):
            for name, old in place.items():
                if old is not None:
                    new = old.detach().to("cuda")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    place[name] = moved.setdefault(id(old), (new, old))[0]
    return copies


@needs_fake_cuda
@pytest.mark.parametrize("name", pairs.__all__)
def test_a_loss_on_a_device_waits_for_nothing_and_can_be_recorded(name):
    """The forward pass: the gradients of fake CUDA tensors need a CUDA device."""
    model, guide = getattr(pairs, name)()
    with private_store():
        rows = model(size=4)
    rows = (rows[0] if isinstance(rows, tuple) else rows).detach()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x = torch.zeros(rows.shape, device="cuda")
        there = _to_fake_cuda(mode, model, guide)
    for loss in OBJECTIVES.get(name, DEFAULT):

        def value(x, loss=loss):
            with private_store(), capturable():
                return [loss.differentiable_loss(*there, x).detach()]

        graph = graphs.capture(value, [x])
        assert {tensor.device.type for tensor in graph.held} >= {"cuda"}
        assert graphs.not_recordable(graph) is None
