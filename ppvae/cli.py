"""The command line: ``ppvae compare`` trains a pair, compares, prints and writes.

Here arguments are parsed, functions called and results printed, and no more. A mistake in the
arguments ends in one line on stderr and exit status 2.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from ppvae import data
from ppvae.comparison import compare
from ppvae.explanation import Explanation, explain
from ppvae.preparing import FAMILIES, Settings, prepare, surroundings
from ppvae.refinement import Refinement, refine
from ppvae.repairs import RepairCosts, repair_costs
from ppvae.reporting import make_folder, write
from ppvae.training import Fit, fit


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


_MODELS = {
    "exponential-gaussian": _Defaults("log-normal", None, (32, 32), 2000, 512, 3e-3, 200),
    "factor-analysis": _Defaults("diagonal-normal", 3, (), 2000, 256, 1e-2, 200),
    "ppca": _Defaults("diagonal-normal", 3, (), 2000, 256, 1e-2, 200),
    "vae": _Defaults("diagonal-normal", 8, (100,), 4000, 128, 1e-3, 100),
}
_OWN = _Defaults("", None, (), 2000, 128, 1e-3, 100)


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
@click.option("--guide-family", type=click.Choice(list(FAMILIES)), help="Of the guide.")
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
@click.option(
    "--explain",
    "with_explanation",
    is_flag=True,
    help="Also split the amortization gap into its causes: two further trainings of --steps each, "
    "the model frozen.",
)
@click.option(
    "--repairs",
    "with_repairs",
    is_flag=True,
    help="Also measure what each repair brings back and what it costs.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--out", default="ppvae-out", show_default=True, metavar="DIR", help="For the files.")
@click.option("--no-progress", is_flag=True, help="Show no progress bar.")
def compare_command(
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
    with_explanation: bool,
    with_repairs: bool,
    device: str,
    seed: int,
    out: str,
    no_progress: bool,
) -> None:
    """Train a pair, then split its inference gap on held-out data.

    Prints the table, what dominates the gap and which repair pays, and writes figures, the ledger
    per datum (ledger.nc) and the settings (settings.json) into a folder.

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
    settings = Settings(
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
        explain=with_explanation,
        repairs=with_repairs,
        device=str(_device(device)),
        seed=seed,
    )
    with surroundings(settings):
        _compare(settings, Path(out), progress=not no_progress)


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


def _compare(settings: Settings, out: Path, *, progress: bool) -> None:
    rows, model, guide = prepare(settings)
    make_folder(out)
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
    # The numbers of the rows in their file or split, not among those that were compared.
    named = comparison.dataset.assign_coords(row=("data", rows.numbers.numpy()))
    comparison = replace(comparison, dataset=named)
    click.echo(str(comparison))
    done = refine(model, guide, rows.test, seed=settings.seed)
    click.echo(f"ppvae.refine on these rows: {_recovered(done)}\n")
    results: dict[str, Explanation | RepairCosts] = {}
    # Repairs get as many steps as the training had.
    effort: dict[str, Any] = {"lr": settings.lr, "seed": settings.seed}
    effort["steps"] = max(settings.steps, 4) if settings.steps else 2000
    if settings.explain:
        results["explanation"] = explain(
            comparison, rows.train, batch_size=settings.batch_size, **effort
        )
    if settings.repairs:
        results["repairs"] = repair_costs(comparison, rows.train, fit=training, **effort)
    for result in results.values():
        click.echo(f"{result}\n")
    written = write(settings, model, guide, rows, comparison, results, out)
    click.echo(f"Wrote {', '.join(written)} into {out}.")


def _recovered(done: Refinement) -> str:
    mean, error = done.mean_gain()
    return (
        f"{mean:.4f} ± {error:.4f} nats a datum brought back at "
        f"{1000 * done.seconds / len(done.outcome):.2g} ms each; {done.count('accepted')} rows "
        f"accepted as they are, {done.count('refined')} refined, {done.count('given up')} given up."
    )


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
