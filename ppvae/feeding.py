"""Minibatches for training, brought to the device ahead of the step that needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ppvae.isolation import check_rows

Batch = tuple[Tensor, Tensor | None]
"""Rows, and their numbers in the data where they are known."""

Batches = Iterator[Batch]
"""Minibatches without end."""

# Rows of a tensor are kept on a CUDA device if they take at most this part of its free memory.
RESIDENT_PART = 0.5


class Transfer(ABC):
    """A way of bringing tensors to where the steps are."""

    @abstractmethod
    def start(self, batch: Batch) -> Any:
        """Begin to bring a batch, without waiting for it."""

    @abstractmethod
    def finish(self, started: Any) -> Batch:
        """The batch, to be used by whatever comes next on the device."""


class CudaTransfer(Transfer):
    """From pinned memory by a stream of its own, beside the work of the current one.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, batch: Batch) -> Any:
        """Queue the copies."""
        rows, numbers = batch
        with torch.cuda.stream(self._stream):
            copies = self._copy(rows), None if numbers is None else self._copy(numbers)
            # Not the stream, which by then will be busy with the next batch.
            return copies, self._stream.record_event()

    def _copy(self, part: Tensor) -> Tensor:
        if part.device.type == "cpu" and not part.is_pinned():
            part = part.pin_memory()
        # Torch keeps pinned memory until the copy is over.
        return part.to(self._device, non_blocking=True)

    def finish(self, started: Any) -> Batch:
        """Let the current stream wait for the copies; Python does not."""
        (rows, numbers), copied = started
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for part in (rows, numbers):
            if part is not None:
                # Its memory is not given away before the steps that use it are over.
                part.record_stream(current)
        return rows, numbers


def prefetched(batches: Iterable[Batch], transfer: Transfer) -> Iterator[Batch]:
    """The same batches, each one's transfer begun before the one before it is handed out.

    Args:
        batches: In order; of one pass, as what comes after its last is asked for early.
        transfer: Who brings them.
    """
    waiting: Any = None
    some = False
    for batch in batches:
        started = transfer.start(batch)
        if some:
            yield transfer.finish(waiting)
        waiting, some = started, True
    if some:
        yield transfer.finish(waiting)


def fits(x: Tensor, device: torch.device) -> bool:
    """Whether all rows are kept on the device: where they take half of its free memory at most."""
    if x.device == device or device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return x.numel() * x.element_size() <= RESIDENT_PART * free


def tensor_batches(x: Tensor, batch_size: int, transfer: Transfer | None = None) -> Batches:
    """Minibatches of rows without end, each with its rows' numbers, in a fresh order per pass.

    The order is that of torch's generator of the CPU, which is read once at the start of a pass.

    Args:
        x: All rows.
        batch_size: Rows per minibatch; at most all of them.
        transfer: How they get to where the steps are, if the rows are kept elsewhere.
    """
    size = min(batch_size, len(x))
    while True:
        order = torch.randperm(len(x)).to(x.device)
        chunks = (order[at : at + size] for at in range(0, len(x) - size + 1, size))
        passed = ((x[rows], rows) for rows in chunks)
        yield from passed if transfer is None else prefetched(passed, transfer)


def loader_batches(
    loader: DataLoader[Any],
    device: torch.device | None,
    dtype: torch.dtype | None,
    modules: list[Any],
    transfer: Transfer | None = None,
) -> Batches:
    """The minibatches of a `DataLoader`, again and again.

    Args:
        loader: Its items are rows, or tuples that begin with them.
        device: Where to bring them; `None` leaves them where they are.
        dtype: Of the rows; `None` leaves them as they are.
        modules: Whose parameters the rows have to be beside.
        transfer: How they get to the device, ahead of time.

    Raises:
        ValueError: If there are none, or rows are unfit.
    """

    def one_pass() -> Iterator[Batch]:
        for item in loader:
            rows = item[0] if isinstance(item, (tuple, list)) else item
            rows = rows.to(dtype) if dtype is not None and rows.is_floating_point() else rows
            if transfer is not None:
                check_rows(rows)  # Here, where looking at values waits for no device.
                yield rows, None
                continue
            rows = rows.to(device=device) if device is not None else rows
            check_rows(rows, *modules)
            yield rows, None

    while True:
        empty = True
        for batch in one_pass() if transfer is None else prefetched(one_pass(), transfer):
            empty = False
            yield batch
        if empty:
            raise ValueError("x is a DataLoader without batches: expected at least one.")
