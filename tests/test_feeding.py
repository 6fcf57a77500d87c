"""Minibatches that are brought to a device ahead of time."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

from ppvae import feeding, fit, pairs, training
from ppvae.feeding import Transfer, fits, loader_batches, prefetched, tensor_batches


class Recorded(Transfer):
    """Brings a batch at the time that it is waited for, and notes what was asked."""

    def __init__(self, device=None):
        self.calls = []
        self.starts = self.ends = 0

    def start(self, batch):
        self.calls.append(("start", self.starts))
        self.starts += 1
        return self.starts - 1, batch

    def finish(self, started):
        number, (rows, numbers) = started
        self.calls.append(("finish", number))
        return rows.clone(), None if numbers is None else numbers.clone()


class Free(NamedTuple):
    free: int
    total: int


def test_each_batch_is_on_its_way_before_the_one_before_it_is_used():
    transfer = Recorded()
    for number, (rows, _) in enumerate(
        prefetched([(torch.full((2,), float(n)), None) for n in range(3)], transfer)
    ):
        assert rows[0] == number
        transfer.calls.append(("used", number))
    assert transfer.calls == [
        ("start", 0),
        ("start", 1),
        ("finish", 0),
        ("used", 0),
        ("start", 2),
        ("finish", 1),
        ("used", 1),
        ("finish", 2),
        ("used", 2),
    ]
    assert list(prefetched([], Recorded())) == []


def _drawn(batches, count):
    """Batches, with draws of a program between them."""
    torch.manual_seed(0)
    out = []
    for rows, numbers in itertools.islice(batches, count):
        out += [rows, torch.rand(3)] + ([] if numbers is None else [numbers])
    return torch.cat([each.flatten().double() for each in out])


def test_rows_and_draws_are_the_same_with_a_transfer():
    """Also in the second and the third pass, whose orders are drawn when they begin."""
    x = torch.arange(20.0).reshape(10, 2)
    plain = _drawn(tensor_batches(x, 3), 8)
    assert torch.equal(_drawn(tensor_batches(x, 3, Recorded()), 8), plain)
    loader = DataLoader(x, batch_size=4, shuffle=True)
    plain = _drawn(loader_batches(loader, None, None, []), 8)
    assert torch.equal(_drawn(loader_batches(loader, None, None, [], Recorded()), 8), plain)


def test_unfit_rows_of_a_loader_are_refused_before_their_transfer():
    loader = DataLoader(torch.tensor([[1.0], [float("nan")]]), batch_size=1)
    batches = loader_batches(loader, None, None, [], Recorded())
    with pytest.raises(ValueError, match="NaN"):
        list(itertools.islice(batches, 2))
    with pytest.raises(ValueError, match="without batches"):
        next(loader_batches(DataLoader(torch.zeros(0, 1)), None, None, [], Recorded()))


def test_rows_stay_on_a_device_where_they_take_half_of_its_memory(monkeypatch):
    x = torch.zeros(100, dtype=torch.float32)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: Free(800, 10_000))
    assert fits(x, cuda)
    assert not fits(torch.zeros(101), cuda)
    assert fits(torch.zeros(101), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["tensor", "data set"])
def test_a_run_whose_rows_are_brought_is_the_same_run(monkeypatch, kind):
    """Draws on the same device as the rows' order, so that any draw out of turn would show."""
    model, guide = pairs.exponential_gaussian()
    x = model(size=50)
    data = x if kind == "tensor" else torch.utils.data.Subset(x, range(50))
    other = pairs.exponential_gaussian()
    for one, two in zip((model, guide), other, strict=True):
        two.load_state_dict(one.state_dict())
    options = {"steps": 12, "batch_size": 20, "progress": False}
    plain = fit(model, guide, data, **options)
    used = []

    def batches(source, *args):
        used.append(Recorded())
        return make(source, *args, used[-1])

    name = "tensor_batches" if kind == "tensor" else "loader_batches"
    make = getattr(feeding, name)
    if kind == "data set":
        monkeypatch.setattr(training, name, lambda a, b, c, d, _: batches(a, b, c, d))
    else:
        monkeypatch.setattr(training, name, batches)
    brought = fit(*other, data, **options)
    assert used[0].starts >= 12
    assert torch.equal(brought.losses, plain.losses)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a CUDA device")
def test_copies_to_a_device_hold_what_they_were_made_from():
    x = torch.arange(3000.0).reshape(1000, 3)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    plain = list(itertools.islice(tensor_batches(x, 64), 40))
    torch.manual_seed(0)
    brought = itertools.islice(tensor_batches(x, 64, feeding.CudaTransfer(device)), 40)
    for (rows, numbers), (there, their_numbers) in zip(plain, brought, strict=True):
        assert there.device == device
        assert torch.equal(there.cpu(), rows)
        assert torch.equal(their_numbers.cpu(), numbers)
