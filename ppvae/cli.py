"""The command line: ``ppvae compare`` trains a pair, compares, prints and writes.

Here arguments are parsed, functions called and results printed, and no more. A mistake in the
arguments ends in one line on stderr and exit status 2.
"""

from __future__ import annotations

import math
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from click.shell_completion import CompletionItem, get_completion_class

from ppvae import data
from ppvae.catalogue import PAIRS
from ppvae.comparison import compare
from ppvae.explanation import Explanation, explain
from ppvae.ledger import Comparison
from ppvae.pooling import log_evidence
from ppvae.preparing import (
    FAMILIES,
    SAVED,
    Rows,
    SavedRun,
    Settings,
    load_run,
    prepare,
    restore,
    save_run,
    surroundings,
)
from ppvae.refinement import Refinement, refine
from ppvae.repairs import RepairCosts, repair_costs
from ppvae.reporting import clear, make_folder, record, write, write_settings
from ppvae.summaries import BelowBest, amortization_gap_at_most, as_json, below_best, summary
from ppvae.training import Fit, fit

# Exit statuses beside 0. A traceback of Python's own ends with 1.
_WRONG, _ABOVE, _INTERRUPTED = 2, 3, 130
# Nats that a row may promise and be left as it is.
_REFINE_TOLERANCE = 0.01


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


EXAMPLES = {
    "ppvae compare": (
        "A model of one positive latent whose log p(x) is known: trains its guide, prints what it "
        "loses and why, and writes the figures into ppvae-out."
    ),
    "ppvae compare --guide-family gamma --out gamma": (
        "The same with another family: does the approximation gap become smaller?"
    ),
    "ppvae compare --model vae --z-dim 2 --out digits": (
        "A VAE of handwritten digits. Two latents can be drawn: their scatter and grid too."
    ),
    "ppvae compare my_module:my_pair --data rows.npy": (
        "A model and a guide of your own, from my_module.py in this folder, on your own rows."
    ),
    "ppvae compare --resume ppvae-out --num-samples 5000": (
        "The pair of the first example once more, not trained again, with smaller errors."
    ),
    "ppvae compare --explain --repairs": (
        "Where the amortization gap comes from, and what mends it."
    ),
    "ppvae compare --json --quiet": "Everything that was found as one JSON document, for scripts.",
    "ppvae compare --max-amortization-gap 0.5": (
        "For a CI job: exit status 3 where the guide loses more than half a nat a datum."
    ),
}
"""Commands that --help shows, with what each is for."""

_STATUSES = {
    "0": "done",
    "2": "wrong arguments or input: one line on stderr says which",
    "3": "done, but above --max-amortization-gap",
    "130": "interrupted by Ctrl-C",
}


# --- Help --------------------------------------------------------------------------------------


class _Option(click.Option):
    """An option that stands under a heading."""

    def __init__(self, *args: Any, group: str = "Other", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class _Command(click.Command):
    """A command whose help has its options under headings, and examples after them."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(context):
            line = param.get_help_record(context)
            if isinstance(param, click.Option) and line is not None:
                groups.setdefault(getattr(param, "group", "Other"), []).append(line)
        # --help comes last, and its heading too.
        for heading in sorted(groups, key=lambda name: name == "Other"):
            with formatter.section(heading):
                _write_rows(formatter, groups[heading])

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(formatter, EXAMPLES)
        with formatter.section("Exit status"):
            _write_rows(formatter, list(_STATUSES.items()), column=7)
        super().format_epilog(context, formatter)


class _Group(click.Group):
    """The commands, with a few examples after them."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        shown = dict(list(EXAMPLES.items())[:3])
        shown["ppvae models"] = "What can be built, and how its log p(x) is found."
        shown["ppvae data list"] = "The named data sets, and which of them are here."
        _write_examples(formatter, shown)
        with formatter.section("Exit status"):
            _write_rows(formatter, list(_STATUSES.items()), column=7)


def _write_examples(formatter: click.HelpFormatter, examples: Mapping[str, str]) -> None:
    with formatter.section("Examples"):
        for number, (command, shows) in enumerate(examples.items()):
            if number:
                formatter.write_paragraph()
            _write_rows(formatter, [(command, shows)], column=6)


def _write_rows(
    formatter: click.HelpFormatter, rows: Sequence[tuple[str, str]], column: int = 26
) -> None:
    """Words with what they mean beside them, or below; click would break both at hyphens."""
    for word, meaning in rows:
        lead = " " * formatter.current_indent + word
        if len(lead) > column - 2:
            formatter.write(f"{lead}\n")
            lead = ""
        text = textwrap.fill(
            meaning,
            formatter.width,
            initial_indent=lead.ljust(column),
            subsequent_indent=" " * column,
            break_on_hyphens=False,
        )
        formatter.write(f"{text}\n")


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


# --- What options are --------------------------------------------------------------------------


class _DataSource(click.ParamType):  # type: ignore[type-arg]  # Generic since click 8.5.
    """A named data set, or a file; completed as either."""

    name = "source"

    def shell_complete(
        self, context: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        names = [CompletionItem(name) for name in data.NAMES if name.startswith(incomplete)]
        # Of shells that take one of both, a file has to come first not to hide the names.
        return [CompletionItem(incomplete, type="file"), *names]


_FOLDER = click.Path(file_okay=False)


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


def _option(group: str, *names: str, **attributes: Any) -> Callable[[Any], Any]:
    return click.option(*names, cls=_Option, group=group, **attributes)


_JSON = click.option("--json", "as_document", is_flag=True, help="Print JSON.")


# --- Commands ----------------------------------------------------------------------------------


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(version("ppvae"), prog_name="ppvae")
@click.pass_context
def cli(context: click.Context) -> None:
    """Is my amortized guide good enough? Gaps per datum, in nats, for Pyro pairs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(name="compare", cls=_Command, epilog=_defaults_in_words())
@click.argument("pair", required=False)
@_option(
    "What is compared",
    "--model",
    type=click.Choice(list(_MODELS)),
    metavar="MODEL",
    help=f"The pair to build, where no PAIR is given: {', '.join(_MODELS)}.  "
    "[default: exponential-gaussian]",
)
@_option(
    "What is compared",
    "--data",
    "source",
    type=_DataSource(),
    metavar="NAME|FILE.npy",
    help=f"For a vae one of {', '.join(data.NAMES)} (default: digits), or rows in a .npy file. The "
    "other models draw their data where no file is given.",
)
@_option(
    "What is compared",
    "--guide-family",
    type=click.Choice(list(FAMILIES)),
    metavar="FAMILY",
    help=f"Of the guide: {', '.join(FAMILIES)}.",
)
@_option(
    "What is compared",
    "--z-dim",
    type=click.IntRange(min=1),
    metavar="N",
    help="Size of the latent.",
)
@_option(
    "What is compared",
    "--hidden",
    callback=_sizes,
    metavar="SIZES",
    help='Widths of the hidden layers, such as "100,100"; "" for a linear encoder.',
)
@_option(
    "What is compared",
    "--likelihood",
    type=click.Choice(["bernoulli", "gaussian"]),
    metavar="NAME",
    help="Of a vae: bernoulli or gaussian.  [default: bernoulli; gaussian for frey]",
)
@_option(
    "What is compared",
    "--root",
    type=_FOLDER,
    metavar="DIR",
    help="Folder of the named data sets' files.",
)
@_option(
    "What is compared",
    "--download",
    is_flag=True,
    help="Let mnist and fashion-mnist be fetched.",
)
@_option(
    "Training",
    "--steps",
    type=click.IntRange(min=0),
    metavar="N",
    help="Training steps; 0 for none.",
)
@_option("Training", "--batch-size", type=click.IntRange(min=1), metavar="N", help="Rows per step.")
@_option(
    "Training",
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    metavar="RATE",
    callback=_finite,
    help="Learning rate of Adam.",
)
@_option(
    "Training",
    "--resume",
    type=_FOLDER,
    metavar="DIR",
    help="Go on with the pair that an earlier run has trained, whose folder this is: its settings "
    "hold but for those of the comparison.",
)
@_option(
    "Comparison",
    "--num-data",
    type=click.IntRange(min=1),
    metavar="N",
    help="Held-out rows to compare on.",
)
@_option(
    "Comparison",
    "--num-samples",
    type=click.IntRange(min=100),
    metavar="N",
    default=1000,
    show_default=True,
    help="Draws per row and guide for the ELBOs.",
)
@_option(
    "Comparison",
    "--evidence",
    type=click.Choice(["auto", "pooled"]),
    metavar="HOW",
    default="auto",
    show_default=True,
    help="How log p(x) is found: auto, or pooled for ppvae.log_evidence, which takes each row to "
    "an error of 0.01 nats where it can, by annealing where weights have heavy tails.",
)
@_option(
    "Comparison",
    "--evidence-samples",
    type=click.IntRange(min=100),
    metavar="N",
    default=5000,
    show_default=True,
    help="Draws per row and guide for an importance-weighted evidence.",
)
@_option(
    "Comparison",
    "--max-steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Most evaluations per row to find q*.",
)
@_option(
    "Comparison",
    "--explain",
    "with_explanation",
    is_flag=True,
    help="Also split the amortization gap into its causes: two further trainings of --steps each, "
    "the model frozen.",
)
@_option(
    "Comparison",
    "--repairs",
    "with_repairs",
    is_flag=True,
    help="Also measure what each repair brings back and what it costs.",
)
@_option(
    "Comparison",
    "--max-amortization-gap",
    type=click.FloatRange(min=0),
    callback=_finite,
    metavar="NATS",
    help="End with exit status 3 unless the mean amortization gap is at most this: its mean, two "
    "errors, and what q* has still to gain where it has not converged.",
)
@_option(
    "What comes out",
    "--out",
    type=_FOLDER,
    metavar="DIR",
    help="For the files.  [default: ppvae-out, or the folder of --resume]",
)
@_option(
    "What comes out",
    "--json",
    "as_document",
    is_flag=True,
    help="Print one JSON document in place of the table.",
)
@_option(
    "What comes out",
    "--quiet",
    is_flag=True,
    help="Print nothing but errors, and the document of --json.",
)
@_option("What comes out", "--no-progress", is_flag=True, help="Show no progress bar.")
@_option(
    "Other",
    "--device",
    default="cpu",
    metavar="NAME",
    show_default=True,
    help="cpu, cuda or cuda:N.",
)
@_option(
    "Other",
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    metavar="N",
    default=0,
    show_default=True,
    help="Of everything that is drawn.",
)
@click.pass_context
def compare_command(
    context: click.Context,
    /,
    *,
    resume: str | None,
    max_amortization_gap: float | None,
    out: str | None,
    as_document: bool,
    quiet: bool,
    no_progress: bool,
    **options: Any,
) -> int:
    """Train a pair, then split its inference gap on held-out data.

    Prints the table, what dominates the gap and which repair pays, and writes figures, the ledger
    per datum (ledger.nc), the settings (settings.json) and the trained pair (trained.pt) into a
    folder.

    PAIR is a pair of your own, such as my_module:my_pair, importable from the current folder too:
    a tuple (model, guide), or a function without arguments that returns one. It needs --data
    rows.npy, with a datum in each row, and is trained first unless --steps 0 is given.

    Ctrl-C ends the training and goes on with what it has reached; once more, or later, it ends the
    run, which --resume takes up again.
    """
    saved = None if resume is None else _resumed(context, Path(resume), options)
    settings = _settings(**options) if saved is None else saved.settings
    folder = Path(out or resume or "ppvae-out")
    run = _Run(settings, saved, folder, max_amortization_gap, as_document, quiet, no_progress)
    with surroundings(settings), _warnings(shown=not quiet):
        return run.go()


@cli.group(name="data")
def data_group() -> None:
    """The named data sets."""


@data_group.command(name="list")
@click.option("--root", type=_FOLDER, metavar="DIR", help="Folder of their files.")
@_JSON
def data_list(root: str | None, as_document: bool) -> None:
    """Say of each data set what it is, and whether its files are here."""
    found = [data.describe(name, root=root) for name in data.NAMES]
    if as_document:
        click.echo(as_json({"data_sets": [asdict(each) for each in found]}))
        return
    for each in found:
        height, width = each.event_shape
        there = "yes"
        if each.missing:
            fetch = "; --download fetches them" if each.can_download else ""
            there = f"no, without {', '.join(each.missing)}{fetch}"
        _tell(
            each.name,
            {
                "rows": f"{each.num_train:,} to train on, {each.num_test:,} held out",
                "shape": f"{height} x {width}, {each.binarization or 'grey'}",
                "split": each.split,
                "source": each.source,
                "here": there,
            },
        )


@cli.command(name="models")
@_JSON
def models_command(as_document: bool) -> None:
    """Say of each ready-made pair what it is, and how its log p(x) is found."""
    built = {name.replace("-", "_"): name for name in _MODELS}
    if as_document:
        rows = [
            asdict(pair) | {"page": pair.page, "compare_model": built.get(pair.name)}
            for pair in PAIRS
        ]
        click.echo(as_json({"pairs": rows}))
        return
    for pair in PAIRS:
        _tell(
            pair.name,
            {
                "latent": pair.latent,
                "likelihood": pair.likelihood,
                "families": ", ".join(pair.families),
                "log p(x)": pair.evidence,
                "page": pair.page,
            }
            | (
                {"command": f"ppvae compare --model {built[pair.name]}"}
                if pair.name in built
                else {}
            ),
        )


def _tell(name: str, facts: Mapping[str, str]) -> None:
    """A name with what is known of it below."""
    click.echo(name)
    for key, text in facts.items():
        lead = f"  {key:<12}"
        click.echo(textwrap.fill(text, 79, initial_indent=lead, subsequent_indent=" " * len(lead)))
    click.echo()


_COMPLETION = """Print the script that completes ppvae's words in a shell.

Once:

\b
  bash   ppvae completion bash > ~/.ppvae.bash
         echo 'source ~/.ppvae.bash' >> ~/.bashrc
  zsh    ppvae completion zsh > ~/.ppvae.zsh
         echo 'source ~/.ppvae.zsh' >> ~/.zshrc
  fish   ppvae completion fish > ~/.config/fish/completions/ppvae.fish
"""


@cli.command(name="completion", help=_COMPLETION)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the script that completes ppvae's words in a shell."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "ppvae", "_PPVAE_COMPLETE").source())


# --- Settings ----------------------------------------------------------------------------------

# What a run that goes on may have otherwise.
_ANEW = {
    "num_samples": "num_samples",
    "evidence": "evidence",
    "evidence_samples": "evidence_samples",
    "max_steps": "max_steps",
    "with_explanation": "explain",
    "with_repairs": "repairs",
    "device": "device",
}
_OF_THE_RUN = {"resume", "max_amortization_gap", "out", "as_document", "quiet", "no_progress"}


def _resumed(context: click.Context, folder: Path, options: Mapping[str, Any]) -> SavedRun:
    changes = {}
    for param in context.command.params:
        name = str(param.name)
        source = context.get_parameter_source(name)
        if name in _OF_THE_RUN or source is not click.core.ParameterSource.COMMANDLINE:
            continue
        if name not in _ANEW:
            said = param.opts[0] if isinstance(param, click.Option) else "PAIR"
            raise click.UsageError(f"{said} does not go with --resume, whose settings hold.")
        changes[_ANEW[name]] = options[name]
    if "device" in changes:
        changes["device"] = str(_device(changes["device"]))
    saved = load_run(folder, changes)
    _device(saved.settings.device)
    return saved


def _settings(
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
    evidence: str,
    evidence_samples: int,
    max_steps: int | None,
    with_explanation: bool,
    with_repairs: bool,
    device: str,
    seed: int,
) -> Settings:
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
    return Settings(
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
        evidence=evidence,
        evidence_samples=evidence_samples,
        max_steps=max_steps,
        explain=with_explanation,
        repairs=with_repairs,
        device=str(_device(device)),
        seed=seed,
    )


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


class _StoppedError(Exception):
    """The run was interrupted, with something left that can be gone on with."""


@contextmanager
def _warnings(*, shown: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        if not shown:
            warnings.simplefilter("ignore")
        yield


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Let what is written be whole: an interrupt comes when it is."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class _Run:
    """A run of ``ppvae compare``."""

    settings: Settings
    saved: SavedRun | None
    out: Path
    limit: float | None
    as_document: bool
    quiet: bool
    no_progress: bool

    @property
    def progress(self) -> bool:
        return not (self.quiet or self.no_progress)

    @property
    def in_place(self) -> bool:
        """Whether the folder's results are of this very pair: they stay until there are others."""
        return self.saved is not None and self.saved.path.parent.resolve() == self.out.resolve()

    def say(self, text: str) -> None:
        if not (self.quiet or self.as_document):
            click.echo(text)

    def notice(self, text: str) -> None:
        if not self.quiet:
            click.echo(f"ppvae: {text}", err=True)

    def go(self) -> int:
        rows, model, guide = self.prepared()
        if self.saved is not None:
            restore(self.saved, model, guide, rows)
        make_folder(self.out)
        training = self.trained(rows, model, guide)
        try:
            with _ctrl_c_later():
                save_run(self.out, self.settings, model, guide, rows, training)
                if not self.in_place:
                    clear(self.out)
                    write_settings(self.settings, rows, training, self.out)
            return self.compared(rows, model, guide, training)
        except KeyboardInterrupt:
            raise _StoppedError(
                f"interrupted. The trained pair is in {self.out}; to go on: ppvae compare "
                f"--resume {self.out}"
            ) from None

    def prepared(self) -> tuple[Rows, Any, Any]:
        try:
            return prepare(self.settings)
        except ValueError as error:
            if self.saved is None:
                raise
            # What is wrong was given to an earlier run, perhaps in another folder.
            of = self.settings.pair or f"--model {self.settings.model}"
            of += f" --data {self.settings.data}" if self.settings.data else ""
            raise ValueError(
                f"--resume {self.saved.path.parent}, a run of {of}: {str(error).rstrip('.')}. Go "
                f"on in the folder in which it was begun, with what it was given."
            ) from error

    def trained(self, rows: Rows, model: Any, guide: Any) -> Fit | None:
        """The record of the training: this run's, or that of the run which it takes up."""
        settings = self.settings
        if self.saved is not None:
            self.say(f"Trained before ({self.saved.path}): {self.saved.training}")
            return self.saved.training
        if not settings.steps:
            return None
        training = fit(
            model,
            guide,
            rows.train,
            steps=settings.steps,
            batch_size=settings.batch_size,
            lr=settings.lr,
            device=settings.device,
            seed=settings.seed,
            progress=self.progress,
        )
        if training.status.startswith("interrupted"):
            if training.steps == 0:
                raise KeyboardInterrupt
            self.notice(f"training {training.status}; going on with what it has reached.")
        self.say(f"Trained on {len(rows.train):,} rows: {training}")
        return training

    def compared(self, rows: Rows, model: Any, guide: Any, training: Fit | None) -> int:
        settings, count = self.settings, len(rows.test)
        fewer = f"; {settings.num_data:,} were asked for" if count < settings.num_data else ""
        self.say(f"Comparing on {count:,} rows ({rows.origin}{fewer}).\n")
        evidence, began = None, time.perf_counter()
        if settings.evidence == "pooled":
            seed = settings.seed + 5  # `compare` draws with those before.
            evidence = log_evidence(model, guide, rows.test, seed=seed, progress=self.progress)
            self.say(f"log p(x): {evidence}\n")
        seconds = time.perf_counter() - began
        comparison = compare(
            model,
            guide,
            rows.test,
            fit=training,
            evidence=evidence,
            num_samples=settings.num_samples,
            evidence_samples=settings.evidence_samples,
            max_steps=settings.max_steps,
            seed=settings.seed,
            progress=self.progress,
        )
        # The numbers of the rows in their file or split, not among those that were compared.
        named = comparison.dataset.assign_coords(row=("data", rows.numbers.numpy()))
        if evidence is not None:
            named.attrs["seconds_evidence"] = seconds
        comparison = replace(comparison, dataset=named)
        self.say(str(comparison))
        results: dict[str, Explanation | RepairCosts] = {}
        try:
            refined = refine(
                model, guide, rows.test, tolerance=_REFINE_TOLERANCE, seed=settings.seed
            )
            below = below_best(refined, comparison, _REFINE_TOLERANCE)
            self.say(f"ppvae.refine on these rows: {_recovered(refined, below)}\n")
            for name, result in self.asked_for(comparison, rows, training):
                self.say(f"{result}\n")
                results[name] = result
        except KeyboardInterrupt:
            with _ctrl_c_later():
                write(settings, model, guide, rows, training, comparison, results, self.out)
            raise
        with _ctrl_c_later():
            written = write(settings, model, guide, rows, training, comparison, results, self.out)
        written.append(SAVED)
        self.say(f"Wrote {', '.join(written)} into {self.out}.")
        if self.as_document:
            known = record(settings, rows, training)
            found = (training, refined, below, results, str(self.out), written, self.limit)
            click.echo(as_json(summary(comparison, known, rows.origin, *found)))
        return self.judged(comparison)

    def asked_for(
        self, comparison: Comparison, rows: Rows, training: Fit | None
    ) -> Iterator[tuple[str, Explanation | RepairCosts]]:
        settings = self.settings
        # Repairs get as many steps as the training was to have.
        effort: dict[str, Any] = {"lr": settings.lr, "seed": settings.seed}
        effort["steps"] = max(settings.steps, 4) if settings.steps else 2000
        effort["progress"] = self.progress
        if settings.explain:
            batch_size = settings.batch_size
            yield "explanation", explain(comparison, rows.train, batch_size=batch_size, **effort)
        if settings.repairs:
            yield "repairs", repair_costs(comparison, rows.train, fit=training, **effort)

    def judged(self, comparison: Comparison) -> int:
        if self.limit is None:
            return 0
        most = amortization_gap_at_most(comparison)
        if most <= self.limit:
            return 0
        self.notice(
            f"the amortization gap may be {most:.4g} nats a datum, above "
            f"--max-amortization-gap {self.limit:g}."
        )
        return _ABOVE


def _recovered(done: Refinement, below: BelowBest) -> str:
    mean, error = done.mean_gain()
    said = (
        f"{mean:.4f} ± {error:.4f} nats a datum brought back at "
        f"{1000 * done.seconds / len(done.outcome):.2g} ms each; {done.count('accepted')} rows "
        f"accepted as they are, {done.count('refined')} refined, {done.count('given up')} given up."
    )
    if below.rows == 0:
        return said
    return (
        f"{said} In {below.rows} of the rows accepted or refined q* is still higher, by up to "
        f"{below.most:.3g} ± {below.stderr:.2g} nats. refine looks for no other mode than the one "
        f"that the guide has found; ppvae.fit_per_datapoint(..., init=guide) does."
    )


# --- The entry ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script.

    Args:
        arguments: Those of the command line if left out.

    Returns:
        The exit status: 0; 2 with one line on stderr where an argument or the input is wrong; 3
        where the gap is above what was allowed; 130 after an interrupt.

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
    except _StoppedError as stop:
        click.echo(f"ppvae: {stop}", err=True)
        return _INTERRUPTED
    except (click.Abort, KeyboardInterrupt):
        click.echo("ppvae: interrupted", err=True)
        return _INTERRUPTED
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    click.echo(f"ppvae: error: {' '.join(message.split())}", err=True)
    return _WRONG


if __name__ == "__main__":
    sys.exit(main())
