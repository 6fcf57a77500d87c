"""What does a CUDA device bring: steps against all peers, MNIST in full, TF32 and bfloat16?

    pip install -e ".[bench]"
    python benchmarks/gpu.py --root FOLDER --output gpu.md
    python benchmarks/gpu.py --root FOLDER --epochs 100 --part training precision

`steps` runs `svi_steps.py` on the device, with a hand-captured CUDA graph of hand-written torch
among the contestants. `training` fits the 784-400-20 VAE to static binarised MNIST for 3,280 epochs
at batch 100 and judges the test images. `precision` does so for fewer epochs and some seeds in
float32, TF32 and bfloat16, and judges all of them in float32.

This file was written on a machine without a CUDA device, where it says so and ends. On a device it
has never been run.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import ppvae
from ppvae import pairs
from ppvae.evidence import elbo_of

PARTS = ("steps", "training", "precision")
PRECISIONS = (None, "tf32", "bf16")
# Images judged at once.
BLOCK = 1000


def steps(options):
    """The table of `svi_steps.py` for the small VAE."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "steps.md"
        command = [sys.executable, str(Path(__file__).with_name("svi_steps.py"))]
        command += ["--device", options.device, "--toy", "--output", str(table)]
        command += ["--batches", *map(str, options.batches)]
        done = subprocess.run(command, check=False)
        text = table.read_text(encoding="utf-8") if table.exists() else "No table was written."
    ended = "" if done.returncode == 0 else f"\n\nIt ended with exit status {done.returncode}."
    return f"## Steps\n\n{text}{ended}"


def trained(train, epochs, options, precision=None, seed=0):
    """A pair after so many epochs, and the record of its run."""
    torch.manual_seed(seed)
    model, guide = pairs.vae(train.shape[1], 20, [400])
    record = ppvae.fit(
        model,
        guide,
        train,
        steps=max(1, epochs * len(train) // options.batch_size),
        batch_size=options.batch_size,
        device=options.device,
        precision=precision,
        compile=options.compile == "yes",
        seed=seed,
        progress=False,
    )
    if not record.completed:
        raise SystemExit(record.status)
    return model, guide, record


def judged(model, guide, test, draws):
    """The mean ELBO of the test images and its standard error, in float32."""
    device = next(model.parameters()).device
    blocks = test.to(device).split(BLOCK)
    estimates = [
        elbo_of(ppvae.log_weights(model, guide, rows, draws, seed=number))
        for number, rows in enumerate(blocks)
    ]
    mean = sum(each.mean * len(each.value) for each in estimates) / len(test)
    square = sum((each.mean_stderr * len(each.value)) ** 2 for each in estimates)
    return mean, square**0.5 / len(test)


def training(images, options):
    """Time and ELBO of the whole training."""
    model, guide, record = trained(images.train, options.epochs, options)
    value, error = judged(model, guide, images.test, options.draws)
    return (
        f"## Training\n\n{options.epochs:,} epochs at batch {options.batch_size}, "
        f"{record.steps:,} steps: {record.seconds / 60:.1f} minutes, "
        f"{record.seconds / record.steps * 1e6:,.0f} µs a step, with "
        f"all that came before. ELBO of {len(images.test):,} test images {value:.2f} ± "
        f"{error:.2f} nats.\n\n"
        f"```\n{record.compile_report}\n```"
    )


def precision(images, options):
    """ELBOs and seconds of training in each precision, as paired differences by seed."""
    epochs = max(1, min(options.epochs, options.precision_epochs))
    found = {kind: [] for kind in PRECISIONS}
    for seed in range(options.seeds):
        for kind in PRECISIONS:
            model, guide, record = trained(images.train, epochs, options, kind, seed)
            value, _ = judged(model, guide, images.test, options.draws)
            found[kind].append((value, record.seconds / record.steps))
    lines = [
        f"## Precision\n\n{epochs} epochs, {options.seeds} seeds; ELBO of the test images, judged "
        f"in float32, and its difference to training in float32 by seed.\n",
        "| precision | µs a step | ELBO | sd over seeds | difference |",
        "|---|---|---|---|---|",
    ]
    for kind, runs in found.items():
        values = [value for value, _ in runs]
        gaps = [value - other for value, (other, _) in zip(values, found[None], strict=True)]
        spread = statistics.stdev(values)
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        each = statistics.median(seconds for _, seconds in runs)
        difference = "–" if kind is None else f"{statistics.mean(gaps):+.3f} ± {error:.3f}"
        lines.append(
            f"| {kind or 'float32'} | {each * 1e6:,.0f} | {statistics.mean(values):.2f} | "
            f"{spread:.3f} | {difference} |"
        )
    return "\n".join(lines)


def main():
    """Run the parts that are asked for, and print Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--root", default="data", help="where MNIST is, or is put")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="*", default=[20, 128, 512])
    parser.add_argument("--epochs", type=int, default=3280)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--compile", choices=["yes", "no"], default="yes")
    parser.add_argument("--precision-epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--draws", type=int, default=100, help="per test image")
    parser.add_argument("--output", type=Path, help="write the Markdown here, too")
    options = parser.parse_args()
    if torch.device(options.device).type != "cuda":
        parser.error(f"--device: this is about CUDA devices; got {options.device}")
    if options.seeds < 2:
        parser.error(f"--seeds: at least 2, for a spread; got {options.seeds}")
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was run, and nothing is known of its speed.")
        return
    texts = [f"{torch.cuda.get_device_name(options.device)}, torch {torch.__version__}"]
    if "steps" in options.part:
        texts.append(steps(options))
    if {"training", "precision"} & set(options.part):
        images = ppvae.data.load("binarized-mnist", root=options.root)
        if "training" in options.part:
            texts.append(training(images, options))
        if "precision" in options.part:
            texts.append(precision(images, options))
    text = "\n\n".join(texts)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
