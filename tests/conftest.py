"""Options and fixtures of the test suite, and the guard around Pyro's and torch's global state.

The guard is a plugin rather than a handful of fixtures in this file, because fixtures of
`tests/conftest.py` would not reach the doctests of the package.
"""

import os
import random
import sys
import zlib
from collections.abc import Iterator

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One process per core already; also for what the tests start themselves.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch.distributions import Distribution

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ppvae")
    group.addoption("--device", default="cpu", help="the device of the tests, such as cuda:0")
    group.addoption(
        "--dtype",
        default="float32",
        choices=sorted(DTYPES),
        help="torch's default dtype in the tests; those that claim exactness ask for float64",
    )
    group.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    if device.type != "cpu":
        # Also for what test modules make when they are imported.
        torch.set_default_device(device)
    config.pluginmanager.register(StateGuard(config), "ppvae-state-guard")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and any(item.nodeid in config.args for item in slow):
        return  # a test asked for by its full name runs
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


class Switches:
    """The process-wide settings that a test has to leave as it found them."""

    def __init__(self) -> None:
        self.values = {
            "torch.get_default_dtype()": torch.get_default_dtype(),
            "torch.get_default_device()": torch.get_default_device(),
            "torch.get_num_threads()": torch.get_num_threads(),
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
            "Distribution._validate_args": Distribution._validate_args,
            "pyro.settings.get()": pyro.settings.get(),
            "Pyro's stack of effect handlers": list(_PYRO_STACK),
        }

    def restore(self) -> None:
        torch.set_default_dtype(self.values["torch.get_default_dtype()"])
        device = self.values["torch.get_default_device()"]
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_num_threads(self.values["torch.get_num_threads()"])
        torch.set_grad_enabled(self.values["torch.is_grad_enabled()"])
        pyro.settings.set(**self.values["pyro.settings.get()"])
        Distribution._validate_args = self.values["Distribution._validate_args"]
        _PYRO_STACK[:] = self.values["Pyro's stack of effect handlers"]

    def changed_since(self, before: "Switches") -> list[str]:
        return [
            f"{name}: {before.values[name]} before, {after} after"
            for name, after in self.values.items()
            if after != before.values[name]
        ]


def store_identities() -> dict[str, int]:
    """The parameters in Pyro's global store, by name and by which tensor it is."""
    return {name: id(p) for name, p in pyro.get_param_store().get_state()["params"].items()}


class StateGuard:
    """Every test starts from the same state, and leaves it as it found it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.fixture
    def device(self) -> torch.device:
        """The device that --device names."""
        return torch.device(self.config.getoption("--device"))

    @pytest.fixture
    def dtype(self) -> torch.dtype:
        """The dtype that --dtype names; torch's default during the tests."""
        return DTYPES[self.config.getoption("--dtype")]

    @pytest.fixture(autouse=True)
    def _same_start(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Seed from the test's own name, empty the store, and put everything back afterwards."""
        at_rest = Switches()
        torch.set_default_dtype(DTYPES[self.config.getoption("--dtype")])
        pyro.clear_param_store()
        seed = zlib.crc32(request.node.nodeid.encode())
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
        pyro.clear_param_store()
        at_rest.restore()
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Compare the state before and after the test itself; fixtures are free to prepare it."""
        before, store_before = Switches(), store_identities()
        # In the state's dictionary lie the tensors themselves: while they are held, no other
        # tensor can take one's id.
        held = pyro.get_param_store().get_state()
        result = yield
        changes = Switches().changed_since(before)
        fills_store = item.get_closest_marker("fills_store") or isinstance(item, pytest.DoctestItem)
        if not fills_store:
            store_after = store_identities()
            for name in sorted(store_before.keys() | store_after.keys()):
                if name not in store_before:
                    changes.append(f"the parameter store gained {name!r}")
                elif name not in store_after:
                    changes.append(f"the parameter store lost {name!r}")
                elif store_before[name] != store_after[name]:
                    changes.append(f"the parameter store's {name!r} is another tensor")
        del held
        if changes:
            pytest.fail(
                "The test changed global state (mark it `fills_store` if it only fills Pyro's "
                "parameter store, and means to):\n  " + "\n  ".join(changes),
                pytrace=False,
            )
        return result
