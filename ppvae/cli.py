"""The command line: ``ppvae compare`` trains a pair, compares, prints and writes.

Everything that is computed is computed by the library; here arguments are parsed, functions called
and results written. A mistake in the arguments ends in one line on stderr and exit status 2.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from ppvae import data, families, pairs, plots
from ppvae.comparison import Comparison, compare
from ppvae.density import Program, log_weights
from ppvae.guides import per_datapoint
from ppvae.isolation import check_rows, forked_rng, private_store
from ppvae.local import fit_per_datapoint
from ppvae.training import Fit, fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FAMILIES: Mapping[str, Callable[[int | None], families.Family]] = {
    "diagonal-normal": families.DiagonalNormal,
    "full-rank-normal": families.FullRankNormal,  # type: ignore[dict-item]
    "log-normal": families.LogNormal,
    "gamma": families.Gamma,
    "weibull": families.Weibull,
    "truncated-normal": families.TruncatedNormal,
}


@dataclass(frozen=True)
class _Defaults:
    """What a model takes where the command line is silent."""

    family: str
    z_dim: int | None
    hidden: tuple[int, ...]
    steps: int
    batch_size: int
    lr: float
    num_data: int
    # How many rows are drawn to train on, where the data come from the model.
    simulated: int = 10_000


_MODELS = {
    "exponential-gaussian": _Defaults("log-normal", None, (32, 32), 2000, 512, 3e-3, 200),
    "factor-analysis": _Defaults("diagonal-normal", 3, (), 2000, 256, 1e-2, 200),
    "ppca": _Defaults("diagonal-normal", 3, (), 2000, 256, 1e-2, 200),
    "vae": _Defaults("diagonal-normal", 8, (100,), 4000, 128, 1e-3, 100),
}
_OWN = _Defaults("", None, (), 2000, 128, 1e-3, 100)
_SIMULATED_DIM = 6


def _defaults_in_words() -> str:
    """What is taken where the command line is silent, a paragraph for each model."""
    lines = []
    for name, its in [*_MODELS.items(), ("a PAIR of your own", _OWN)]:
        options = {
            "guide-family": its.family or None,
            "z-dim": its.z_dim,
            "hidden": ",".join(map(str, its.hidden)) or ('""' if its.family else None),
            "steps": its.steps,
            "batch-size": its.batch_size,
            "lr": its.lr,
            "num-data": its.num_data,
        }
        given = " ".join(f"--{key} {value}" for key, value in options.items() if value is not None)
        lines.append(f"Defaults of {name}: {given}")
    return "\n\n".join(lines)


@dataclass(frozen=True)
class _Settings:
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
    evidence_samples: int
    max_steps: int | None
    device: str
    seed: int


@dataclass(frozen=True)
class _Rows:
    """Rows to train on and rows to compare on, with what figures want to know of them."""

    train: Tensor
    test: Tensor
    # The number of each compared row: in the file, in the test split, or among the simulated.
    numbers: Tensor
    origin: str
    event_shape: tuple[int, ...] | None = None
    all_test: Tensor | None = None
    labels: Tensor | None = None


# --- Commands ----------------------------------------------------------------------------------


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("ppvae"), prog_name="ppvae")
@click.pass_context
def cli(context: click.Context) -> None:
    """Is my amortized guide good enough? Gaps per datum, in nats, for Pyro pairs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _sizes(context: click.Context, param: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise click.BadParameter(f"expected positive numbers such as 100,100; got {value!r}.")
    return tuple(int(part) for part in parts)


def _finite(context: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


@cli.command(name="compare", epilog=_defaults_in_words())
@click.argument("pair", required=False)
@click.option(
    "--model",
    type=click.Choice(list(_MODELS)),
    help="The pair to build, where no PAIR is given.  [default: exponential-gaussian]",
)
@click.option(
    "--data",
    "source",
    metavar="NAME|FILE.npy",
    help=f"For a vae one of {', '.join(data.NAMES)} (default: digits), or rows in a .npy file. The "
    "other models draw their data where no file is given.",
)
@click.option("--root", metavar="DIR", help="Folder of the named data sets' files.")
@click.option("--download", is_flag=True, help="Let mnist and fashion-mnist be fetched.")
@click.option("--guide-family", type=click.Choice(list(_FAMILIES)), help="Of the guide.")
@click.option("--z-dim", type=click.IntRange(min=1), help="Size of the latent.")
@click.option(
    "--hidden",
    callback=_sizes,
    metavar="SIZES",
    help='Widths of the hidden layers, such as "100,100"; "" for a linear encoder.',
)
@click.option(
    "--likelihood",
    type=click.Choice(["bernoulli", "gaussian"]),
    help="Of a vae.  [default: bernoulli; gaussian for frey]",
)
@click.option("--steps", type=click.IntRange(min=0), help="Training steps; 0 for none.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Rows per step.")
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    callback=_finite,
    help="Learning rate of Adam.",
)
@click.option("--num-data", type=click.IntRange(min=1), help="Held-out rows to compare on.")
@click.option(
    "--num-samples",
    type=click.IntRange(min=100),
    default=1000,
    show_default=True,
    help="Draws per row and guide for the ELBOs.",
)
@click.option(
    "--evidence-samples",
    type=click.IntRange(min=100),
    default=5000,
    show_default=True,
    help="Draws per row and guide for an importance-weighted evidence.",
)
@click.option(
    "--max-steps", type=click.IntRange(min=1), help="Most evaluations per row to find q*."
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--out", default="ppvae-out", show_default=True, metavar="DIR", help="For the files.")
@click.option("--no-progress", is_flag=True, help="Show no progress bar.")
@click.pass_context
def compare_command(
    context: click.Context,
    *,
    pair: str | None,
    model: str | None,
    source: str | None,
    root: str | None,
    download: bool,
    guide_family: str | None,
    z_dim: int | None,
    hidden: tuple[int, ...] | None,
    likelihood: str | None,
    steps: int | None,
    batch_size: int | None,
    lr: float | None,
    num_data: int | None,
    num_samples: int,
    evidence_samples: int,
    max_steps: int | None,
    device: str,
    seed: int,
    out: str,
    no_progress: bool,
) -> None:
    """Train a pair, then split its inference gap on held-out data.

    Prints the table, and writes figures, the ledger per datum (ledger.nc) and the settings
    (settings.json) into a folder.

    PAIR is a pair of your own, such as my_module:my_pair, importable from the current folder too:
    a tuple (model, guide), or a function without arguments that returns one. It needs --data
    rows.npy, with a datum in each row, and is trained first unless --steps 0 is given.
    """
    name = None if pair is not None else (model or "exponential-gaussian")
    default = _OWN if name is None else _MODELS[name]
    foreign = {"--root": root, "--download": download or None, "--likelihood": likelihood}
    if name != "vae":
        _refuse(foreign, f"--model {name}" if name else "a PAIR of your own")
    sized = {"--z-dim": z_dim}
    if name == "exponential-gaussian":
        _refuse(sized, f"--model {name}, whose latent is a scalar")
    if name is None:
        built = {"--model": model, "--guide-family": guide_family, "--hidden": hidden}
        _refuse(sized | built, "a PAIR of your own")
    if name == "vae":
        source = source or "digits"
        if source not in data.NAMES:
            _refuse(
                foreign | {"--likelihood": None}, f"--data {source}, which is no named data set"
            )
        likelihood = likelihood or ("gaussian" if source == "frey" else "bernoulli")
    settings = _Settings(
        pair=pair,
        model=name,
        data=source,
        root=root,
        download=download,
        guide_family=None if name is None else guide_family or default.family,
        z_dim=z_dim or default.z_dim,
        hidden=None if name is None else default.hidden if hidden is None else hidden,
        likelihood=likelihood,
        steps=default.steps if steps is None else steps,
        batch_size=batch_size or default.batch_size,
        lr=lr or default.lr,
        num_data=num_data or default.num_data,
        num_samples=num_samples,
        evidence_samples=evidence_samples,
        max_steps=max_steps,
        device=str(_device(device)),
        seed=seed,
    )
    if pair is not None:
        context.with_resource(_current_folder_importable())
    elif name != "vae" or source == "digits":
        context.with_resource(_one_thread())
    _compare(settings, Path(out), progress=not no_progress)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small are no faster on two cores, and on busy ones many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refuse(options: Mapping[str, Any], where: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise click.UsageError(f"{option} does not go with {where}.")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise click.UsageError(f"--device: expected cpu, cuda or cuda:N; got {name!r}.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise click.UsageError(
                f"--device {name}: there is no such device here (CUDA devices: {count}). "
                f"Use --device cpu."
            )
    return device


# --- A run -------------------------------------------------------------------------------------


# What any run writes: an earlier run's files must not stand beside this one's.
_WRITTEN = (
    *("ledger.nc", "settings.json", "toy_posterior.png", "gap_against_x.png", "gap_bars.png"),
    *("gap_sorted.png", "samples.png", "reconstructions.png", "latent_scatter.png"),
    "latent_grid.png",
)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(
            f"--out {out}: cannot write into this folder ({error.strerror})."
        ) from error


def _compare(settings: _Settings, out: Path, *, progress: bool) -> None:
    rows, model, guide = _prepare(settings)
    _check(settings, model, guide, rows)
    _make_folder(out)
    training: Fit | None = None
    if settings.steps:
        training = fit(
            model,
            guide,
            rows.train,
            steps=settings.steps,
            batch_size=settings.batch_size,
            lr=settings.lr,
            device=settings.device,
            seed=settings.seed,
            progress=progress,
        )
        click.echo(f"Trained on {len(rows.train):,} rows: {training}")
    fewer = f"; {settings.num_data:,} were asked for" if len(rows.test) < settings.num_data else ""
    click.echo(f"Comparing on {len(rows.test):,} rows ({rows.origin}{fewer}).\n")
    comparison = compare(
        model,
        guide,
        rows.test,
        fit=training,
        num_samples=settings.num_samples,
        evidence_samples=settings.evidence_samples,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )
    click.echo(str(comparison))
    click.echo()
    for name in _WRITTEN:
        (out / name).unlink(missing_ok=True)
    written = [_write_ledger(comparison, rows, out), _write_settings(settings, rows, out)]
    written += _write_figures(settings, model, guide, rows, comparison, out)
    click.echo("Wrote " + ", ".join(path.name for path in written) + f" into {out}.")


def _prepare(settings: _Settings) -> tuple[_Rows, Any, Any]:
    """The rows and the pair, both on the device; the same seed gives the same ones."""
    if settings.pair is not None:
        if settings.data is None:
            raise click.UsageError("A PAIR of your own needs its rows: --data FILE.npy.")
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
                raise click.UsageError(
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
    return rows, model, guide


def _build(settings: _Settings, x_dim: int) -> tuple[Any, Any]:
    assert settings.guide_family is not None
    assert settings.hidden is not None
    family = _FAMILIES[settings.guide_family](settings.z_dim)
    if settings.model == "exponential-gaussian":
        return pairs.exponential_gaussian(family, hidden=settings.hidden)
    assert settings.z_dim is not None
    if settings.model == "vae":
        assert settings.likelihood is not None
        return pairs.vae(x_dim, settings.z_dim, settings.hidden, settings.likelihood, family)
    build = pairs.ppca if settings.model == "ppca" else pairs.factor_analysis
    return build(x_dim, settings.z_dim, family, hidden=settings.hidden)


def _simulate(model: Any, settings: _Settings) -> _Rows:
    count = _MODELS[settings.model or ""].simulated
    with private_store(), forked_rng(settings.seed + 1), torch.no_grad():
        x = model(size=count + settings.num_data).to(settings.device)
    test = x[count:]
    return _Rows(x[:count], test, torch.arange(len(test)), "drawn from the model, held out")


def _vae_rows(settings: _Settings) -> _Rows:
    assert settings.data is not None
    if settings.data not in data.NAMES:
        if not settings.data.endswith(".npy"):
            raise click.UsageError(
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
    images = data.load(
        settings.data,
        root=settings.root,
        binarization=binarization,
        download=settings.download,
        seed=settings.seed,
    )
    order = _shuffled(len(images.test), settings.seed)
    chosen = order[: settings.num_data].sort().values
    test = images.test.to(settings.device)
    return _Rows(
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


def _split(x: Tensor, settings: _Settings, event_shape: tuple[int, ...] | None = None) -> _Rows:
    """Hold out at most a fifth of the rows of a file; without training all may be compared."""
    count = settings.num_data
    if settings.steps:
        if len(x) < 2:
            raise click.UsageError(
                f"--data {settings.data}: training and comparing take at least 2 rows; got "
                f"{len(x)}. Use --steps 0 to compare without training."
            )
        count = min(count, max(1, len(x) // 5))
    order = _shuffled(len(x), settings.seed)
    chosen = order[:count].sort().values
    rest = order[count:].sort().values
    test = x[chosen].to(settings.device)
    origin = f"held out of {settings.data}" if settings.steps else f"of {settings.data}"
    return _Rows(x[rest].to(settings.device), test, chosen, origin, event_shape, test)


def _read_rows(path: str) -> Tensor:
    if not Path(path).is_file():
        hint = " Named data sets go with --model vae." if path in data.NAMES else ""
        raise click.UsageError(f"--data: there is no file {path}.{hint}")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise click.UsageError(
            f"--data: {path} is not a readable .npy file of numbers; write it with numpy.save."
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.ndim == 0:
        raise click.UsageError(
            f"--data: expected an array of numbers with a datum in each row in {path}; got "
            f"{getattr(array, 'dtype', type(array).__name__)} of shape "
            f"{getattr(array, 'shape', None)}."
        )
    return torch.as_tensor(array).to(torch.get_default_dtype())


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _own_pair(name: str) -> tuple[Any, Any]:
    module_name, separator, attribute = name.partition(":")
    if not (module_name and separator and attribute):
        raise click.UsageError(f"PAIR: expected my_module:my_pair; got {name!r}.")
    module_name = module_name.removesuffix(".py")
    # The module is the user's: whatever it raises is theirs to read, in one line.
    try:
        module = import_module(module_name)
    except Exception as error:
        raise click.UsageError(f"PAIR: cannot import {module_name}: {_said(error)}") from error
    if not hasattr(module, attribute):
        raise click.UsageError(f"PAIR: the module {module_name} has no {attribute!r}.")
    found = getattr(module, attribute)
    if callable(found):
        try:
            found = found()
        except Exception as error:
            raise click.UsageError(
                f"PAIR: {name}() failed: {_said(error)}. PAIR is a tuple (model, guide), or a "
                f"function without arguments that returns one."
            ) from error
    if not (isinstance(found, tuple) and len(found) == 2 and all(map(callable, found))):
        raise click.UsageError(
            f"PAIR: expected {name} to be a tuple (model, guide), or a function without arguments "
            f"that returns one; got {type(found).__name__}."
        )
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _check(settings: _Settings, model: Program, guide: Program, rows: _Rows) -> None:
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
        raise click.UsageError(
            f"PAIR: {settings.pair} fails on rows of shape {tuple(few.shape)}: {_said(error)}"
        ) from error


# --- What is written ---------------------------------------------------------------------------


def _write_ledger(comparison: Comparison, rows: _Rows, out: Path) -> Path:
    path = out / "ledger.nc"
    path.unlink(missing_ok=True)
    ledger = comparison.dataset.assign_coords(row=("data", rows.numbers.numpy()))
    ledger.to_netcdf(path, engine="h5netcdf")
    return path


def _write_settings(settings: _Settings, rows: _Rows, out: Path) -> Path:
    path = out / "settings.json"
    device = torch.device(settings.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    record = asdict(settings) | {
        "rows_trained_on": len(rows.train) if settings.steps else 0,
        "rows_compared": len(rows.test),
        "device_name": name or platform.machine(),
        "versions": {
            "ppvae": version("ppvae"),
            "torch": torch.__version__,
            "pyro": version("pyro-ppl"),
            "python": platform.python_version(),
        },
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _write_figures(
    settings: _Settings, model: Any, guide: Any, rows: _Rows, comparison: Comparison, out: Path
) -> list[Path]:
    draw: dict[str, tuple[tuple[float, float], Callable[[Axes], Axes]]] = {
        "gap_bars": ((3.6, 3.4), lambda ax: plots.gap_bars(comparison, ax=ax)),
        "gap_sorted": ((5.5, 3.8), lambda ax: plots.gap_sorted(comparison, ax=ax)),
    }
    written = []
    if settings.model == "exponential-gaussian":
        draw["gap_against_x"] = (
            (5.5, 3.8),
            lambda ax: plots.gap_against(comparison, rows.test, label="x", ax=ax),
        )
        written.append(_write_toy(model, guide, settings, out))
    if settings.model == "vae":
        draw |= _vae_figures(model, guide, rows)
    for name, (size, into) in draw.items():
        figure, (ax,) = _figure(size)
        into(ax)
        written.append(_save(figure, out / f"{name}.png"))
    return written


def _vae_figures(
    model: Any, guide: Any, rows: _Rows
) -> dict[str, tuple[tuple[float, float], Callable[[Axes], Axes]]]:
    draw: dict[str, tuple[tuple[float, float], Callable[[Axes], Axes]]] = {}
    shape, test = rows.event_shape, rows.all_test
    assert test is not None
    if shape is not None:
        draw["samples"] = ((5, 3.4), lambda ax: plots.samples(model, shape, ax=ax))
        draw["reconstructions"] = (
            (6, 1.4),
            lambda ax: plots.reconstructions(model, guide, rows.test[:10], shape, ax=ax),
        )
    if model.z_dim == 2:
        draw["latent_scatter"] = (
            (5, 5),
            lambda ax: plots.latent_scatter(guide, test, rows.labels, ax=ax),
        )
        if shape is not None:
            draw["latent_grid"] = ((5, 5), lambda ax: plots.latent_grid(model, shape, ax=ax))
    return draw


def _write_toy(model: Any, guide: Any, settings: _Settings, out: Path) -> Path:
    x = torch.tensor([1.5, 0.0], device=settings.device)
    local = fit_per_datapoint(
        model, None, x, init=guide, max_steps=settings.max_steps, seed=settings.seed
    )

    figure, axes = _figure((9, 3.8), columns=2)
    for row, ax in enumerate(axes):
        plots.toy_posterior(x, guide, local, row=row, ax=ax)
    return _save(figure, out / "toy_posterior.png")


def _figure(size: tuple[float, float], columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot: no display is asked for.
    figure = Figure(figsize=size, layout="constrained")
    return figure, [figure.add_subplot(1, columns, 1 + index) for index in range(columns)]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


# --- The entry ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script.

    Args:
        arguments: Those of the command line if left out.

    Returns:
        The exit status: 0, or 2 with one line on stderr where an argument is wrong.

    Example:
        >>> main(["--version"])
        ppvae, version 0.1.0
        0
    """
    try:
        status = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="ppvae",
            standalone_mode=False,
        )
    except click.ClickException as error:
        return _fail(error.format_message())
    except (ValueError, OSError, ImportError) as error:
        return _fail(str(error) or type(error).__name__)
    except (click.Abort, KeyboardInterrupt):
        click.echo("ppvae: interrupted", err=True)
        return 130
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    click.echo(f"ppvae: error: {' '.join(message.split())}", err=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
