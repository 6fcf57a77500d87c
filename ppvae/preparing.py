"""What a run of the command line starts from: its settings, its rows and its pair, or a saved run.

A mistake in them is a `ValueError` of one sentence or two, which names the argument.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from ppvae import data, families, pairs
from ppvae.density import Program, log_weights
from ppvae.guides import per_datapoint
from ppvae.isolation import (
    check_rows,
    evaluation_mode,
    forked_rng,
    modules_of,
    private_store,
)
from ppvae.training import Fit

FAMILIES: Mapping[str, Callable[[int | None], families.Family]] = {
    "diagonal-normal": families.DiagonalNormal,
    "full-rank-normal": families.FullRankNormal,  # type: ignore[dict-item]
    "log-normal": families.LogNormal,
    "gamma": families.Gamma,
    "weibull": families.Weibull,
    "truncated-normal": families.TruncatedNormal,
}
_SIMULATED_DIM = 6
# How many rows are drawn to train on, where the data come from the model.
_SIMULATED_ROWS = 10_000
# The trained pair, in the folder of a run.
SAVED = "trained.pt"
# What is kept of a training's record.
_KEPT = ("losses", "elapsed", "seconds", "status", "completed", "steps", "batch_size")


@dataclass(frozen=True)
class Settings:
    """All that a run depends on, with every default filled in."""

    pair: str | None
    model: str | None
    data: str | None
    root: str | None
    download: bool
    guide_family: str | None
    z_dim: int | None
    hidden: tuple[int, ...] | None
    likelihood: str | None
    steps: int
    batch_size: int
    lr: float
    num_data: int
    num_samples: int
    evidence: str
    evidence_samples: int
    max_steps: int | None
    explain: bool
    repairs: bool
    device: str
    seed: int


@dataclass(frozen=True)
class Rows:
    """Rows to train on and rows to compare on, with what figures want to know of them."""

    train: Tensor
    test: Tensor
    # The number of each compared row: in the file, in the test split, or among the simulated.
    numbers: Tensor
    origin: str
    event_shape: tuple[int, ...] | None = None
    all_test: Tensor | None = None
    labels: Tensor | None = None


@contextmanager
def surroundings(settings: Settings) -> Iterator[None]:
    """The process as a run of these settings needs it; afterwards it is as it was."""
    with ExitStack() as stack:
        if settings.pair is not None:
            stack.enter_context(_current_folder_importable())
        elif settings.model != "vae" or settings.data == "digits":
            stack.enter_context(_one_thread())
        yield


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small are no faster on two cores, and on busy ones many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(settings: Settings) -> tuple[Rows, Any, Any]:
    """The rows, the model and the guide, on the device; the same seed gives the same ones.

    Raises:
        ValueError: If a file or a pair cannot be read, or the rows and the pair do not go together.
    """
    if settings.pair is not None:
        if settings.data is None:
            raise ValueError("A PAIR of your own needs its rows: --data FILE.npy.")
        rows = _split(_read_rows(settings.data), settings)
        with forked_rng(settings.seed):
            model, guide = _own_pair(settings.pair)
    elif settings.model == "vae":
        rows = _vae_rows(settings)
        with forked_rng(settings.seed):
            model, guide = _build(settings, rows.train.shape[1])
    else:
        given = None if settings.data is None else _read_rows(settings.data)
        if given is not None:
            wanted = 1 if settings.model == "exponential-gaussian" else 2
            if given.dim() != wanted:
                shape = "(rows,)" if wanted == 1 else "(rows, x_dim)"
                raise ValueError(
                    f"--data {settings.data}: {settings.model} takes an array of shape {shape}; "
                    f"got {tuple(given.shape)}."
                )
        with forked_rng(settings.seed):
            x_dim = _SIMULATED_DIM if given is None or given.dim() == 1 else given.shape[1]
            model, guide = _build(settings, x_dim)
        rows = _simulate(model, settings) if given is None else _split(given, settings)
    for part in (model, guide):
        if isinstance(part, nn.Module):
            part.to(settings.device)
    _check(settings, model, guide, rows)
    return rows, model, guide


def _build(settings: Settings, x_dim: int) -> tuple[Any, Any]:
    assert settings.guide_family is not None
    assert settings.hidden is not None
    family = FAMILIES[settings.guide_family](settings.z_dim)
    if settings.model == "exponential-gaussian":
        return pairs.exponential_gaussian(family, hidden=settings.hidden)
    assert settings.z_dim is not None
    if settings.model == "vae":
        assert settings.likelihood is not None
        return pairs.vae(x_dim, settings.z_dim, settings.hidden, settings.likelihood, family)
    build = pairs.ppca if settings.model == "ppca" else pairs.factor_analysis
    return build(x_dim, settings.z_dim, family, hidden=settings.hidden)


def _simulate(model: Any, settings: Settings) -> Rows:
    with private_store(), forked_rng(settings.seed + 1), torch.no_grad():
        x = model(size=_SIMULATED_ROWS + settings.num_data).to(settings.device)
    train, test = x[:_SIMULATED_ROWS], x[_SIMULATED_ROWS:]
    return Rows(train, test, torch.arange(len(test)), "drawn from the model, held out")


def _vae_rows(settings: Settings) -> Rows:
    assert settings.data is not None
    if settings.data not in data.NAMES:
        if not settings.data.endswith(".npy"):
            raise ValueError(
                f"--data: expected one of {', '.join(data.NAMES)} or a .npy file; got "
                f"{settings.data!r}."
            )
        x = _read_rows(settings.data)
        shape = tuple(x.shape[1:]) if x.dim() == 3 else None
        return _split(x.flatten(1), settings, event_shape=shape)
    binarization: Any = "default"
    if settings.likelihood == "gaussian" and settings.data != "binarized-mnist":
        binarization = None
    elif settings.likelihood == "bernoulli" and settings.data == "frey":
        binarization = "threshold"
    try:
        images = data.load(
            settings.data,
            root=settings.root,
            binarization=binarization,
            download=settings.download,
            seed=settings.seed,
        )
    except (FileNotFoundError, ValueError) as error:
        # The way out, by the options of the command line.
        said = str(error).replace("as root", "as --root").replace("download=True", "--download")
        raise ValueError(said) from error
    order = _shuffled(len(images.test), settings.seed)
    chosen = order[: settings.num_data].sort().values
    test = images.test.to(settings.device)
    return Rows(
        images.train.to(settings.device),
        test[chosen.to(settings.device)],
        chosen,
        f"test split of {settings.data}",
        images.event_shape,
        test,
        images.test_labels,
    )


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _split(x: Tensor, settings: Settings, event_shape: tuple[int, ...] | None = None) -> Rows:
    """Hold out at most a fifth of the rows of a file; without training all may be compared."""
    count = settings.num_data
    if settings.steps:
        if len(x) < 2:
            raise ValueError(
                f"--data {settings.data}: training and comparing take at least 2 rows; got "
                f"{len(x)}. Use --steps 0 to compare without training."
            )
        count = min(count, max(1, len(x) // 5))
    order = _shuffled(len(x), settings.seed)
    chosen = order[:count].sort().values
    rest = order[count:].sort().values
    test = x[chosen].to(settings.device)
    origin = f"held out of {settings.data}" if settings.steps else f"of {settings.data}"
    return Rows(x[rest].to(settings.device), test, chosen, origin, event_shape, test)


def _read_rows(path: str) -> Tensor:
    if not Path(path).is_file():
        hint = " Named data sets go with --model vae." if path in data.NAMES else ""
        raise ValueError(f"--data: there is no file {path}.{hint}")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"--data: {path} is not a readable .npy file of numbers; write it with numpy.save."
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.ndim == 0:
        raise ValueError(
            f"--data: expected an array of numbers with a datum in each row in {path}; got "
            f"{getattr(array, 'dtype', type(array).__name__)} of shape "
            f"{getattr(array, 'shape', None)}."
        )
    return torch.as_tensor(array).to(torch.get_default_dtype())


def _own_pair(name: str) -> tuple[Any, Any]:
    module_name, separator, attribute = name.partition(":")
    if not (module_name and separator and attribute):
        raise ValueError(f"PAIR: expected my_module:my_pair; got {name!r}.")
    module_name = module_name.removesuffix(".py")
    # The module is the user's: whatever it raises is theirs to read, in one line.
    try:
        module = import_module(module_name)
    except Exception as error:
        raise ValueError(f"PAIR: cannot import {module_name}: {_said(error)}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"PAIR: the module {module_name} has no {attribute!r}.")
    found = getattr(module, attribute)
    if callable(found):
        try:
            found = found()
        except Exception as error:
            raise ValueError(
                f"PAIR: {name}() failed: {_said(error)}. PAIR is a tuple (model, guide), or a "
                f"function without arguments that returns one."
            ) from error
    if not (isinstance(found, tuple) and len(found) == 2 and all(map(callable, found))):
        raise ValueError(
            f"PAIR: expected {name} to be a tuple (model, guide), or a function without arguments "
            f"that returns one; got {type(found).__name__}."
        )
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _check(settings: Settings, model: Program, guide: Program, rows: Rows) -> None:
    """Refuse rows, or a pair that does not fit them, before anything is trained."""
    for part in (rows.train, rows.test) if settings.steps else (rows.test,):
        check_rows(part, model, guide, name="--data")
    few = rows.test[:2]
    try:
        for part in (rows.train, rows.test) if settings.steps else (rows.test,):
            log_weights(model, guide, part, num_samples=2, seed=settings.seed)
        per_datapoint(guide, few, model=model)
    except ValueError:
        raise
    except Exception as error:
        # Shapes that do not fit inside of a pair of one's own come as torch reports them.
        if settings.pair is None:
            raise
        raise ValueError(
            f"PAIR: {settings.pair} fails on rows of shape {tuple(few.shape)}: {_said(error)}"
        ) from error


# --- A run that goes on ------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedRun:
    """A trained pair as it was written, and what it was trained with."""

    path: Path
    settings: Settings
    training: Fit | None
    state: Mapping[str, Any]


def save_run(
    out: Path, settings: Settings, model: Program, guide: Program, rows: Rows, training: Fit | None
) -> None:
    """Write the pair, the record of its training and the settings into the folder.

    An earlier file stays whole until the new one is.
    """
    state = {
        "settings": asdict(settings),
        "modules": {name: m.state_dict() for name, m in _modules(model, guide).items()},
        "bare": {name: p.detach().clone() for name, p in _bare(model, guide, rows).items()},
        "training": None if training is None else {key: getattr(training, key) for key in _KEPT},
        "rows": rows.test,
    }
    partial = out / f"{SAVED}.part"
    torch.save(state, partial)
    os.replace(partial, out / SAVED)


def load_run(folder: Path, changes: Mapping[str, Any]) -> SavedRun:
    """Read what `save_run` wrote, with some of the settings changed.

    Raises:
        ValueError: If there is nothing, or nothing that can be read.
    """
    path = folder / SAVED
    if not path.is_file():
        raise ValueError(
            f"--resume {folder}: there is no {SAVED}, which a run leaves in its folder once it "
            f"has trained."
        )
    try:
        # Tensors, numbers and words alone: nothing in the file is run.
        state = torch.load(path, map_location="cpu", weights_only=True)
        record = state["settings"]
        if record["hidden"] is not None:
            record["hidden"] = tuple(record["hidden"])
        settings = Settings(**{f.name: record[f.name] for f in fields(Settings)} | dict(changes))
        training = None if state["training"] is None else Fit(**state["training"])
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume {folder}: {SAVED} is damaged, or of another version of ppvae: {_said(error)}"
        ) from error
    return SavedRun(path, settings, training, state)


def restore(saved: SavedRun, model: Program, guide: Program, rows: Rows) -> None:
    """Give a pair, as `prepare` made it, the parameters that were saved.

    Raises:
        ValueError: If the pair or its rows are not what they were.
    """
    before = saved.state["rows"].to(rows.test)
    if before.shape != rows.test.shape or not torch.allclose(before, rows.test, atol=1e-5):
        raise ValueError(
            f"--resume {saved.path.parent}: the rows of {saved.settings.data or 'the model'} are "
            f"no longer those that were held out. Train again."
        )
    modules, bare = _modules(model, guide), _bare(model, guide, rows)
    for what, have, had in (
        ("modules", modules, saved.state["modules"]),
        ("parameters", bare, saved.state["bare"]),
    ):
        if set(have) != set(had):
            raise ValueError(
                f"--resume {saved.path.parent}: the pair has the {what} {sorted(have)}; trained "
                f"were {sorted(had)}. Train again."
            )
    try:
        for name, module in modules.items():
            module.load_state_dict(saved.state["modules"][name])
        for name, param in bare.items():
            param.data.copy_(saved.state["bare"][name])
    except RuntimeError as error:
        raise ValueError(
            f"--resume {saved.path.parent}: the pair is not the one that was trained: {error}"
        ) from error


def _modules(model: Program, guide: Program) -> dict[str, nn.Module]:
    """All modules of a pair by a name that a second run gives them too."""
    named = {"model": model, "guide": guide}
    out = {name: part for name, part in named.items() if isinstance(part, nn.Module)}
    others = [m for m in modules_of(model, guide) if all(m is not known for known in out.values())]
    return out | {f"module {number}": module for number, module in enumerate(others)}


def _bare(model: Program, guide: Program, rows: Rows) -> dict[str, Tensor]:
    """The parameters that bare ``pyro.param`` statements of a pair have in Pyro's store."""
    used: dict[str, Any] = {"params": {}, "constraints": {}}
    few = rows.test[:2]
    with forked_rng(0, few.device), evaluation_mode(model, guide), torch.no_grad():
        with pyro.get_param_store().scope(used):
            model(few), guide(few)
        names = {name for name, p in used["params"].items() if not isinstance(p, nn.Parameter)}
        with private_store(keep_bare=True):
            if names:
                model(few), guide(few)
            params = pyro.get_param_store().get_state()["params"]
    return {name: params[name] for name in names}
