"""Graphs of functions of tensors: what is captured, what is refused, and what is noticed."""

import importlib
import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ppvae import graphs
from ppvae.graphs import NotCapturableError, Watch, capture, far_apart, products, replayed

# Its name is also that of a function of the package.
recorder = importlib.import_module("ppvae.graphs.capturing")


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class TestCapture:
    def test_a_graph_computes_what_the_function_does(self):
        weight = nn.Parameter(torch.randn(3, 2))

        def function(x):
            loss = (x @ weight).tanh().square().sum()
            return [loss.detach(), *torch.autograd.grad(loss, [weight])]

        graph = capture(function, [torch.randn(5, 3)])
        for _ in range(3):
            x = torch.randn(5, 3)
            assert same(replayed(graph)(x), function(x))
        assert graph.num_inputs == 1
        assert any(held is weight for held in graph.held)

    def test_random_numbers_are_those_of_the_function_and_fresh(self):
        def function(x):
            dropped = nn.functional.dropout(x, 0.5)
            return [
                x + torch.randn(4),
                dropped,
                torch._standard_gamma(x.exp()),
                torch.poisson(x.exp()),
                torch.bernoulli(x.sigmoid()),
                torch.multinomial(x.softmax(0), 2),
                torch.randperm(4),
            ]

        x = torch.randn(4)
        run = replayed(capture(function, [x]))
        torch.manual_seed(3)
        first, second = run(x), run(x)
        torch.manual_seed(3)
        assert same(first, function(x))
        assert same(second, function(x))
        assert not torch.equal(first[0], second[0])

    def test_capturing_computes_draws_and_changes_nothing(self):
        buffer, calls = torch.zeros(3), []
        count, part, out = torch.zeros(()), torch.zeros(3), torch.zeros(())

        def function(x):
            calls.append(graphs.capturing())
            buffer.add_(x)
            # What no input takes part in.
            count.add_(1)
            part[1] += 1
            torch.add(count, 1, out=out)
            return [buffer + torch.randn(3)]

        state = torch.get_rng_state()
        graph = capture(function, [torch.ones(3)])
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(t, torch.zeros_like(t)) for t in (buffer, count, part, out))
        assert calls == [True, True]
        assert not graphs.capturing()
        replayed(graph)(torch.ones(3))
        assert torch.equal(buffer, torch.ones(3))
        assert count == 1
        assert torch.equal(part, torch.tensor([0.0, 1.0, 0.0]))
        assert out == 2
        assert len(calls) == 2

    def test_held_tensors_are_read_at_each_call(self):
        layer, constant = nn.BatchNorm1d(2, dtype=torch.float64), torch.ones((), dtype=torch.double)
        layer.eval()

        def function(x):
            return [layer(x) * constant]

        x = torch.randn(4, 2, dtype=torch.float64)
        run = replayed(capture(function, [x]))
        before = run(x)[0]
        with torch.no_grad():
            layer.weight.fill_(2.0)
            layer.running_mean.fill_(0.5)
            constant.fill_(3.0)
        after = run(x)[0]
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, function(x)[0].detach(), rtol=1e-14, atol=0)

    @pytest.mark.parametrize(
        ("function", "why"),
        [
            (lambda x: [x if x.sum() > 0 else -x], "value of a tensor"),
            (lambda x: [x * float(x.sum())], "value of a tensor"),
            (lambda x: [x * math.exp(x.sum())], "value of a tensor"),
            (lambda x: [x[: int(x.sum())]], "value of a tensor"),
            (lambda x: [x + torch.as_tensor(x.numpy())], r"\.numpy\(\)"),
            (lambda x: [x + torch.as_tensor(np.asarray(x))], r"out of torch"),
            (lambda x: [x * len(x[x > 0])], "value of a tensor"),
            (lambda x: [x * random.random()], "generators of Python or NumPy"),
            (lambda x: [x * np.random.rand()], "generators of Python or NumPy"),
        ],
        ids=[
            "if",
            "float",
            "math",
            "index",
            "numpy",
            "asarray",
            "size",
            "random",
            "np.random",
        ],
    )
    def test_what_hangs_on_values_is_refused(self, function, why):
        with pytest.raises(NotCapturableError, match=why):
            capture(function, [torch.ones(3)])

    def test_what_hangs_on_the_value_of_a_parameter_is_refused(self):
        """Torch itself takes a parameter for a constant, and freezes its value."""
        weight = nn.Parameter(torch.ones(()))
        for read in (float, bool, lambda w: w.numpy(force=True), lambda w: 2.0 if w > 0 else 3.0):
            with pytest.raises(NotCapturableError):
                capture(lambda x, read=read: [x * read(weight)], [torch.ones(3)])

    def test_what_differs_from_run_to_run_is_refused(self):
        count = itertools.count()
        with pytest.raises(NotCapturableError, match="different operations"):
            capture(lambda x: [x * next(count)], [torch.ones(3)])
        with pytest.raises(NotCapturableError, match="differ from run to run"):
            capture(lambda x: [x * torch.tensor([next(count)] * 3)], [torch.ones(3)])

    def test_the_generators_of_python_are_looked_at_also_where_a_draw_is_not_used(self):
        with pytest.raises(NotCapturableError, match="generators of Python"):
            capture(lambda x: [x if random.random() < 2 else -x], [torch.ones(3)])

    def test_item_is_the_tensor_where_only_sums_and_products_follow(self):
        def function(x):
            return [torch.as_tensor(x.sum().item() * 2 + 1)]

        run = replayed(capture(function, [torch.ones(3)]))
        x = torch.randn(3)
        torch.testing.assert_close(run(x)[0], function(x)[0])

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: [x * x.tolist()[0]],
            lambda x: [x[x > 0], x[x > 0].mean()],
            lambda x: [torch.ones(x[x > 0].shape) * x.sum()],
            lambda x: [x.nonzero() * 1.0],
            lambda x: [x.repeat_interleave((x > 0).long() + 1)],
        ],
        ids=["tolist", "mask", "shape", "nonzero", "repeat"],
    )
    def test_values_and_shapes_that_stay_tensors_are_live(self, function):
        run = replayed(capture(function, [torch.tensor([1.0, -1.0, 2.0])]))
        for x in (torch.tensor([3.0, 1.0, 2.0]), torch.tensor([-3.0, -1.0, 2.0])):
            assert same(run(x), function(x))

    def test_a_function_that_captures_is_refused(self):
        with pytest.raises(NotCapturableError, match="captures a function itself"):
            capture(lambda x: [x, capture(lambda y: [y], [x]).held], [torch.ones(3)])
        assert not graphs.capturing()

    def test_an_error_of_the_function_is_said(self):
        with pytest.raises(NotCapturableError, match="ZeroDivisionError"):
            capture(lambda x: [x / (1 // 0)], [torch.ones(3)])


class Part:
    """An object of a user's class, whose instances hold settings."""

    rate = 0.1

    def __init__(self):
        self.beta = 1.0
        self.nested = {"a": [1.0, 2.0]}
        self.array = np.zeros(3)


SCALE, TABLE, PART = 1.0, [0.1, 0.2], Part()


def reads_globals(x):
    return x * SCALE * TABLE[0] * PART.beta


def outer(x):
    return [reads_globals(y) for y in x]


class Net(nn.Module):
    power = 2

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.part, self.betas, self.table = Part(), [0.5], {"kl": 1.0}
        self.kind = torch.float32
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, x):
        return self.layer(x) * SCALE


def assign(owner, name, value):
    return lambda net: setattr(owner(net), name, value)


CHANGES = {
    "a number": (assign(lambda n: n, "power", 3), "power"),
    "a new attribute": (assign(lambda n: n, "fresh", 3), "fresh"),
    "a flag": (lambda n: n.layer[1].eval(), "training"),
    "a number of a layer": (assign(lambda n: n.layer[1], "p", 0.1), "p"),
    "a dtype": (assign(lambda n: n, "kind", torch.float64), "kind"),
    "a parameter": (assign(lambda n: n.layer[0], "bias", nn.Parameter(torch.ones(2))), "bias"),
    "a buffer": (assign(lambda n: n, "shift", torch.ones(2)), "shift"),
    "a module": (assign(lambda n: n, "layer", nn.Linear(2, 2)), "layer"),
    "a module in a container": (lambda n: n.layer.__setitem__(0, nn.Linear(2, 2)), "0"),
    "a module more": (lambda n: n.layer.append(nn.Linear(2, 2)), "2"),
    "a module deleted": (lambda n: n.layer.__delitem__(1), "1"),
    "a hook": (lambda n: n.layer[0].register_forward_hook(lambda *a: None), ""),
    "an item of a list": (lambda n: n.betas.__setitem__(0, 0.6), "an item of a list"),
    "a list that grows": (lambda n: n.betas.append(0.6), "the length of a list"),
    "an entry of a dict": (lambda n: n.table.update(kl=0.5), "kl"),
    "a new entry of a dict": (lambda n: n.table.update(kl2=0.5), "kl2"),
    "an attribute of an object": (assign(lambda n: n.part, "beta", 0.5), "beta"),
    "deep inside of an object": (
        lambda n: n.part.nested["a"].__setitem__(1, 9.0),
        "an item of a list",
    ),
    "another object": (assign(lambda n: n, "part", Part()), "part"),
    "a NumPy array": (lambda n: n.part.array.__setitem__(1, 9.0), "a NumPy array"),
    "a method": (assign(lambda n: n, "forward", lambda x: x), "forward"),
}


class TestWatch:
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
    def test_a_change_is_noticed_and_named(self, change):
        alter, name = change
        net = Net()
        watch = Watch([net])
        assert watch.changed() is None
        alter(net)
        said = watch.changed()
        assert said is not None
        assert name in said

    def test_what_stays_equal_is_no_change(self):
        net = Net()
        watch = Watch([net])
        net.part.beta, net.betas, net.table = float("1.0"), [0.5], {"kl": 1.0}
        net.train()
        with torch.no_grad():
            net.layer[0].weight.fill_(3.0)
            net.shift.fill_(2.0)
        assert watch.changed() is None
        net.table["kl"] = 0.5
        assert watch.changed() is not None

    def test_classes_and_global_names(self, monkeypatch):
        here = globals()
        for owner, name, value in (
            (here, "SCALE", 0.5),
            (here, "TABLE", [0.1, 0.3]),
            (here, "PART", Part()),
            (here, "reads_globals", lambda x: x),
        ):
            watch = Watch([outer])
            assert watch.changed() is None
            with monkeypatch.context() as patch:
                patch.setitem(owner, name, value)
                assert watch.changed() == name
            assert watch.changed() is None
        for kind, name, value in ((Part, "rate", 0.2), (Net, "power", 3), (Net, "forward", outer)):
            watch = Watch([Net()])
            with monkeypatch.context() as patch:
                patch.setattr(kind, name, value)
                assert watch.changed() == name
        # The forward of a module uses a global name too.
        watch = Watch([Net()])
        monkeypatch.setitem(here, "SCALE", 0.5)
        assert watch.changed() == "SCALE"

    def test_closures_defaults_and_bound_methods(self):
        def make(beta=0.5):
            weights = [1.0]

            def inner(x, factors=weights):
                nonlocal beta
                return x * beta * factors[0]

            def put(value):
                nonlocal beta
                beta = value

            return inner, put, weights

        inner, put, weights = make()
        watch = Watch([inner])
        put(0.25)
        assert watch.changed() == "a variable of a closure"
        put(0.5)
        assert watch.changed() is None
        weights[0] = 2.0
        assert watch.changed() == "an item of a list"
        net = Net()
        watch = Watch([net.forward])
        net.part.beta = 3.0
        assert watch.changed() == "beta"

    def test_entries_and_what_is_ignored(self):
        place = {"a": object(), "b": 1}
        watch = Watch([], [(place, "a")])
        place["b"] = 2
        assert watch.changed() is None
        place["a"] = object()
        assert watch.changed() == "a"
        del place["a"]
        assert watch.changed() == "a"
        part = Part()
        watch = Watch([part], ignoring=("beta",))
        part.beta = 7.0
        assert watch.changed() is None

    def test_what_a_run_has_set_is_put_back(self):
        net, count = Net(), 0

        def runs():
            nonlocal count
            count += 1
            net.shift, net.power, net.fresh = torch.ones(2), 3, 1
            net.part.beta = 0.5
            net.betas.append(1.0)
            net.table["new"] = 2.0
            net.part.nested["a"][0] = 7.0

        shift, watch = net.shift, Watch([net, runs])
        runs()
        assert watch.changed() is not None
        watch.put_back()
        assert watch.changed() is None
        assert net.shift is shift
        assert (count, net.power, net.part.beta) == (0, 2, 1.0)
        assert (net.betas, net.table, net.part.nested["a"]) == ([0.5], {"kl": 1.0}, [1.0, 2.0])
        assert not hasattr(net, "fresh")

    def test_what_holds_itself_and_numbers_that_are_none(self):
        part = Part()
        part.itself, part.nested["self"], part.nan = part, part.nested, math.nan
        watch = Watch([part])
        assert watch.changed() is None
        part.nan = float("nan")
        assert watch.changed() is None


class TestFarApart:
    def test_rounding_is_near_and_more_is_not(self):
        for dtype, limit in ((torch.float32, 1e-4), (torch.float64, 1e-8)):
            one = torch.randn(50, dtype=dtype)
            noise = torch.randn(50, dtype=dtype)
            noise *= one.norm() / noise.norm()
            assert far_apart([one], [one + 0.9 * limit * noise]) is None
            gap = far_apart([one], [one + 1.2 * limit * noise])
            assert gap == pytest.approx(1.2 * limit, rel=0.02)

    def test_small_differences_of_large_numbers_are_near(self):
        large, small = torch.full((4,), 1e4), torch.full((4,), 1e-3)
        assert far_apart([large, small], [large, 1.1 * small]) is None
        assert far_apart([small], [1.1 * small]) == pytest.approx(0.1, rel=1e-3)

    def test_nan_equals_nan_alone(self):
        nan = torch.tensor([math.nan, 1.0])
        assert far_apart([nan], [nan.clone()]) is None
        assert far_apart([nan], [torch.ones(2)]) == math.inf
        assert far_apart([torch.ones(2)], [torch.ones(1)]) == math.inf
        assert far_apart([torch.tensor([True])], [torch.tensor([False])]) == 1.0


def operands(m, k, n, left, right):
    """Matrices, each as it lies in memory or as the transpose of what lies there."""
    a = torch.randn(k, m).t() if left else torch.randn(m, k)
    b = torch.randn(n, k).t() if right else torch.randn(k, n)
    return a, b


def test_a_first_capture_waits_until_what_it_would_have_saved_has_paid_for_it(monkeypatch):
    monkeypatch.setattr(recorder._State, "forgone", 0.0)
    lost, calls = 0.0, 0
    while not recorder.capture_pays(coming=0.5, each=0.01):
        lost, calls = lost + 0.01, calls + 1
    # What is lost by waiting and what is to come make up the seconds of loading.
    assert lost + 0.5 == pytest.approx(recorder._LOADING_SECONDS, abs=0.02)
    monkeypatch.setattr(recorder._State, "forgone", None)
    assert recorder.capture_pays(coming=0.5, each=0.01)
    assert not recorder.capture_pays(coming=0.2, each=0.01)


def test_what_saves_less_than_a_capture_takes_is_never_captured(monkeypatch):
    for forgone in (0.0, 100.0, None):
        monkeypatch.setattr(recorder._State, "forgone", forgone)
        assert not recorder.capture_pays(coming=0.1, each=0.01)


@pytest.mark.parametrize("refused", [False, True])
def test_the_tools_are_loaded_once_also_where_the_capture_fails(monkeypatch, refused):
    monkeypatch.setattr(recorder._State, "forgone", 0.0)
    if refused:
        with pytest.raises(NotCapturableError):
            capture(lambda x: [x * float(x.sum())] if x.sum() > 0 else [x], [torch.ones(2)])
    else:
        capture(lambda x: [2 * x], [torch.ones(2)])
    assert recorder._State.forgone is None


@pytest.fixture(params=[products.Way.FLIPPED, products.Way.ONEDNN], ids=["flipped", "oneDNN"])
def other_way(request, monkeypatch):
    if request.param is products.Way.ONEDNN and not products._available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "fastest_way", lambda *args: request.param)
    monkeypatch.setattr(products, "_SMALL", 0)
    return request.param


four_ways = pytest.mark.parametrize(
    ("left", "right"), list(itertools.product((False, True), repeat=2))
)


class Sizes(TorchDispatchMode):
    """Notes the sizes of the matrices that are multiplied inside."""

    def __init__(self):
        super().__init__()
        self.of = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.of.append(tuple(tuple(a.shape) for a in args))
        return func(*args, **(kwargs or {}))


class TestProducts:
    @four_ways
    def test_another_way_gives_the_same_product(self, other_way, left, right):
        a, b = operands(17, 9, 5, left, right)
        bias = torch.randn(5)
        graph = capture(lambda a, b, bias: [a @ b, torch.addmm(bias, a, b)], [a, b, bias])
        before = graph.module.code
        module, changed = products.with_fastest_products(graph.module)
        assert changed == 2
        by_onednn = module.code.count("ops.ppvae.onednn_product")
        assert by_onednn == (2 if other_way is products.Way.ONEDNN else 0)
        assert "aten.addmm" not in module.code
        for found, expected in zip(module(a, b, bias), graph.module(a, b, bias), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert found.stride() == expected.stride()
        # The graph itself stays as it was.
        assert graph.module.code == before

    def test_gradients_of_a_layer_are_the_same(self, other_way):
        layer = nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3))

        def function(x):
            loss = layer(x).square().sum()
            return [loss.detach(), *torch.autograd.grad(loss, list(layer.parameters()))]

        x = torch.randn(17, 9)
        graph = capture(function, [x])
        module, changed = products.with_fastest_products(graph.module)
        assert changed == 5
        for found, expected in zip(module(x, *graph.held), function(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_other_kinds_of_products_stay(self, other_way):
        wide = torch.randn(17, 5)
        double = torch.randn(9, 5, dtype=torch.float64)
        a, b = operands(17, 9, 5, left=False, right=False)

        def function(a, b):
            return [
                torch.addmm(wide, a, b),  # A matrix is added, and no row.
                a.double() @ double,
                a[:0] @ b,
                torch.addmm(b[0], a, b, beta=2.0),
            ]

        _, changed = products.with_fastest_products(capture(function, [a, b]).module)
        assert changed == 0

    def test_small_products_are_left_alone(self, monkeypatch):
        monkeypatch.setattr(products, "fastest_way", lambda *args: pytest.fail("measured"))
        graph = capture(lambda a, b: [a @ b], operands(17, 9, 5, left=False, right=False))
        assert products.with_fastest_products(graph.module)[1] == 0

    def test_the_choice_is_measured_once_for_a_shape(self, monkeypatch):
        monkeypatch.setattr(products, "_fastest", {})
        races = []
        ways = 3 if products._available() else 2
        monkeypatch.setattr(
            products, "_race", lambda *runs: races.append(runs) or [1.0, 0.5, 1.0][:ways]
        )
        a, b = operands(17, 9, 5, left=False, right=False)
        turned = operands(17, 9, 5, left=True, right=False)
        state = torch.get_rng_state()
        assert products.fastest_way(a, b, False) is products.Way.FLIPPED
        assert products.fastest_way(torch.zeros_like(a), b, False) is products.Way.FLIPPED
        assert len(races) == 1
        products.fastest_way(a, b, True)
        products.fastest_way(*turned, False)
        assert len(races) == 3
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_ways_of_a_race_are_what_they_are_called(self):
        """All give the same product; the flipped one of (n, k) with (k, m)."""
        a, b = operands(17, 9, 5, left=False, right=True)
        for bias in (None, torch.randn(5)):
            ways = products._ways(a, b, bias)
            for way in ways.values():
                torch.testing.assert_close(way(), a @ b + (0 if bias is None else bias))
            with Sizes() as seen:
                ways[products.Way.FLIPPED]()
            assert seen.of == [((5, 9), (9, 17))]

    def test_a_product_of_a_flipped_product_is_looked_at_too(self, other_way):
        a, b, c = torch.randn(17, 9), torch.randn(9, 5), torch.randn(5, 4)
        graph = capture(lambda a, b, c: [(a @ b) @ c], [a, b, c])
        module, changed = products.with_fastest_products(graph.module)
        assert changed == 2
        torch.testing.assert_close(module(a, b, c)[0], a @ b @ c)

    def test_one_bias_for_all_columns_stays(self, other_way):
        a, b = operands(17, 9, 5, left=False, right=False)
        graph = capture(lambda a, b: [torch.addmm(a[0, :1], a, b)], [a, b])
        assert products.with_fastest_products(graph.module)[1] == 0

    def test_another_way_has_to_be_clearly_faster(self, monkeypatch):
        if not products._available():
            pytest.skip("this build of torch has no oneDNN")
        a, b = operands(4, 4, 4, left=False, right=False)
        given, flipped, onednn = products.Way
        for seconds, best in (
            ([1.0, 0.7, 1.0], flipped),
            ([1.0, 0.9, 1.1], given),
            ([1.0, 1.5, 0.9], given),
            ([1.0, 0.7, 0.6], flipped),  # No clear margin over the second best.
            ([1.0, 0.7, 0.5], onednn),
            ([1.0, 0.8, 0.7], onednn),
        ):
            monkeypatch.setattr(products, "_fastest", {})
            monkeypatch.setattr(products, "_race", lambda *runs, seconds=seconds: seconds)
            assert products.fastest_way(a, b, False) is best

    def test_a_race_gives_the_least_time_of_each(self):
        """The one is fast in its first round alone, after the call that warms up."""
        seconds = iter([0.0, 0.0, *[0.02] * 100])
        one, other = products._race(lambda: time.sleep(next(seconds)), lambda: time.sleep(0.005))
        assert one < 0.005 <= other < 0.02

    @pytest.mark.slow
    @four_ways
    def test_compiled_products_are_the_same(self, other_way, left, right):
        a, b = operands(17, 9, 5, left, right)
        bias = torch.randn(5)
        graph = capture(lambda a, b, bias: [a @ b, torch.addmm(bias, a, b)], [a, b, bias])
        run, changed = graphs.compiled(graph, [a, b, bias])
        assert changed == 2
        for found, expected in zip(run(a, b, bias), graph.module(a, b, bias), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert found.stride() == expected.stride()


RECENT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


@pytest.mark.slow
@pytest.mark.skipif(not RECENT, reason="this torch looks up graphs of its own front end alone")
def test_a_graph_that_was_compiled_before_is_found_again(tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits = []
    for _ in range(2):
        counters.clear()
        x = torch.rand(5)
        run, _ = graphs.compiled(capture(lambda x: [torch.sin(x) * 1.2345], [x]), [x])
        assert torch.allclose(run(x)[0], torch.sin(x) * 1.2345)
        hits.append(counters["inductor"]["fxgraph_cache_hit"])
    assert hits == [0, 1]


@pytest.mark.slow
@pytest.mark.skipif(not RECENT, reason="this torch compiles dropout to other draws: not adopted")
def test_compiling_keeps_the_stream_of_draws_and_disturbs_nothing():
    def function(x):
        coins = torch.bernoulli(torch.full((4,), 0.5))
        return [x + torch.randn(4), nn.functional.dropout(x, 0.5), coins, torch.rand(4)]

    x = torch.randn(4)
    state = torch.get_rng_state()
    run, _ = graphs.compiled(capture(function, [x]), [x])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    found = [run(x), run(x)]
    torch.manual_seed(3)
    for each in found:
        for one, other in zip(each, function(x), strict=True):
            torch.testing.assert_close(one, other)


def test_what_the_compiler_says_is_passed_on(monkeypatch):
    from torch import _inductor

    def fails(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(_inductor, "compile", fails)
    graph = capture(lambda x: [x + 1], [torch.ones(3)])
    with pytest.raises(graphs.CompileError, match=r"^RuntimeError: no C\+\+ compiler$"):
        graphs.compiled(graph, [torch.ones(3)])
