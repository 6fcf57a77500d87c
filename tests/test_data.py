"""Data sets: splits that never change, binarisations that are what they say, errors that help."""

import gzip
import os
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ppvae import data

REAL = Path(os.environ.get("PPVAE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real(folder: str) -> Path:
    if not (REAL / folder).is_dir():
        pytest.skip(f"no {folder} in {REAL}; set PPVAE_DATA to a folder that holds it")
    return REAL


def assert_drawn_from(draws: Tensor, intensities: Tensor) -> None:
    """The sums over each column of 0/1 draws `(..., rows, columns)` are those of their intensities
    within 5 standard errors, and pixels of intensity 0 or 1 are certain."""
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = intensities.double().expand(draws.shape).flatten(0, -2)
    drawn = draws.double().flatten(0, -2)
    assert torch.equal(drawn[p == 0], p[p == 0])
    assert torch.equal(drawn[p == 1], p[p == 1])
    excess, variance = (drawn - p).sum(0), (p * (1 - p)).sum(0)
    # A column of a few faint pixels is Poisson rather than normal: such columns count as one.
    faint = variance < 10
    excess = torch.cat([excess[~faint], excess[faint].sum()[None]])
    variance = torch.cat([variance[~faint], variance[faint].sum()[None]])
    assert (excess.abs() <= 5 * variance.sqrt()).all()


@pytest.fixture(scope="module")
def grey() -> data.ImageData:
    return data.load("digits", binarization=None)


# The 8x8 digits: split, labels, binarisations


def test_digits_have_the_documented_shapes_and_types(grey: data.ImageData) -> None:
    assert grey.name == "digits"
    assert grey.event_shape == (8, 8)
    assert grey.x_dim == 64
    assert grey.train.shape == (1500, 64)
    assert grey.test.shape == (297, 64)
    assert grey.train.dtype == grey.test.dtype == torch.float32
    assert grey.train_labels is not None
    assert grey.test_labels is not None
    assert grey.train_labels.shape == (1500,)
    assert grey.test_labels.shape == (297,)
    assert grey.train_labels.dtype == grey.test_labels.dtype == torch.int64
    assert grey.train_labels.unique().tolist() == grey.test_labels.unique().tolist() == [*range(10)]


def test_digits_split_is_a_partition_of_the_whole_set_with_its_labels(
    grey: data.ImageData,
) -> None:
    from sklearn.datasets import load_digits

    def keyed(pixels: Tensor, labels: Tensor | None) -> set[tuple[float, ...]]:
        assert labels is not None
        return set(map(tuple, torch.cat([pixels, labels[:, None].float()], 1).tolist()))

    bunch = load_digits()
    whole = keyed(torch.from_numpy(bunch.data).float() / 16, torch.from_numpy(bunch.target))
    train, test = keyed(grey.train, grey.train_labels), keyed(grey.test, grey.test_labels)
    assert len(whole) == 1797  # no two digits are equal, so sets lose nothing
    assert not train & test
    assert train | test == whole


def test_none_keeps_grey_values_in_sixteenths(grey: data.ImageData) -> None:
    assert grey.binarization is None
    assert (torch.cat([grey.train, grey.test]).unique() * 16).tolist() == [*range(17)]


def test_threshold_is_the_default_and_is_grey_at_least_one_half(grey: data.ImageData) -> None:
    digits = data.load()
    assert digits.binarization == "threshold"
    for binary, intensities in ((digits.train, grey.train), (digits.test, grey.test)):
        assert binary.dtype == torch.float32
        assert torch.equal(binary == 1, intensities >= 0.5)
        assert torch.equal(binary == 0, intensities < 0.5)


def test_split_does_not_depend_on_the_seed(grey: data.ImageData) -> None:
    other = data.load("digits", binarization=None, seed=5)
    assert torch.equal(other.train, grey.train)
    assert torch.equal(other.test, grey.test)


def test_static_is_one_draw_by_seed(grey: data.ImageData) -> None:
    first = data.load("digits", binarization="static", seed=1)
    again = data.load("digits", binarization="static", seed=1)
    other = data.load("digits", binarization="static", seed=2)
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.test, again.test)
    assert not torch.equal(first.train, other.train)
    assert not torch.equal(first.test, other.test)
    for drawn in (first, other):
        assert_drawn_from(drawn.train, grey.train)
        assert_drawn_from(drawn.test, grey.test)


def test_static_draw_is_the_same_under_every_version() -> None:
    # Figures quoted for this draw hold only as long as the draw stays: these counts pin it.
    digits = data.load("digits", binarization="static", seed=0)
    assert (int(digits.train.sum()), int(digits.test.sum())) == (29422, 5797)


@pytest.mark.parametrize("binarization", ["static", "dynamic", "threshold", None])
def test_global_random_state_is_untouched(binarization: data.Binarization | None) -> None:
    torch_state = torch.get_rng_state()
    numpy_state = pickle.dumps(np.random.get_state())
    digits = data.load("digits", binarization=binarization, seed=3)
    if binarization == "dynamic":
        digits.draw(torch.arange(4), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert pickle.dumps(np.random.get_state()) == numpy_state


def test_dynamic_holds_the_static_draw_and_the_intensities(grey: data.ImageData) -> None:
    dynamic = data.load("digits", binarization="dynamic", seed=4)
    static = data.load("digits", binarization="static", seed=4)
    assert torch.equal(dynamic.train, static.train)
    assert torch.equal(dynamic.test, static.test)
    assert static.train_intensities is None
    assert dynamic.train_intensities is not None
    assert torch.equal(dynamic.train_intensities, grey.train)


def test_dynamic_draws_differ_and_average_to_the_intensities(grey: data.ImageData) -> None:
    dynamic = data.load("digits", binarization="dynamic")
    before = dynamic.train.clone()
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([7, 3, 1499, 3])
    draws = torch.stack([dynamic.draw(rows, generator) for _ in range(400)])
    assert draws.shape == (400, 4, 64)
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0, 1], draws[0, 3])  # the same row twice is drawn twice
    for position, row in enumerate(rows.tolist()):
        assert_drawn_from(draws[:, position], grey.train[row])
    assert torch.equal(dynamic.train, before)


def test_draw_repeats_with_its_generator_and_takes_masks() -> None:
    dynamic = data.load("digits", binarization="dynamic")
    mask = torch.arange(1500) < 10
    by_mask = dynamic.draw(mask, torch.Generator().manual_seed(6))
    by_index = dynamic.draw(torch.arange(10), torch.Generator().manual_seed(6))
    assert torch.equal(by_mask, by_index)


@pytest.mark.parametrize("binarization", ["static", "threshold", None])
def test_draw_needs_dynamic_binarisation(binarization: data.Binarization | None) -> None:
    digits = data.load("digits", binarization=binarization)
    with pytest.raises(ValueError, match='binarization="dynamic"'):
        digits.draw(torch.arange(3), torch.Generator())


# The record


def test_repr_says_what_the_data_are() -> None:
    assert repr(data.load("digits", binarization="static")) == (
        "ImageData(digits: 1,500 train + 297 test rows of 8x8, static binarisation, labelled)"
    )
    own = data.ImageData("own", torch.zeros(2, 6), torch.zeros(1, 6), (2, 3), None)
    assert repr(own) == "ImageData(own: 2 train + 1 test rows of 2x3, grey, unlabelled)"


def test_record_rejects_shapes_that_do_not_fit() -> None:
    rows = torch.zeros(2, 6)
    with pytest.raises(ValueError, match=r"Expected train of shape \(2, 4\).*got \(2, 6\)"):
        data.ImageData("own", rows, rows, (2, 2), None)
    with pytest.raises(ValueError, match=r"Expected test_labels of shape \(2,\).*got \(3,\)"):
        data.ImageData("own", rows, rows, (2, 3), None, test_labels=torch.zeros(3))
    with pytest.raises(ValueError, match="without train_intensities"):
        data.ImageData("own", rows, rows, (2, 3), "dynamic")
    with pytest.raises(ValueError, match="with train_intensities"):
        data.ImageData("own", rows, rows, (2, 3), "static", train_intensities=rows)


# Errors of load


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'omniglot'") as caught:
        data.load("omniglot")
    assert data.NAMES == ("digits", "mnist", "fashion-mnist", "binarized-mnist", "frey")
    assert all(name in str(caught.value) for name in data.NAMES)


def test_unknown_binarisation_lists_the_possible_ones() -> None:
    with pytest.raises(ValueError, match="'static', 'dynamic', 'threshold', None; got 'sttic'"):
        data.load("digits", binarization="sttic")  # type: ignore[arg-type]


@pytest.mark.parametrize("binarization", ["dynamic", "threshold", None])
def test_binarized_mnist_is_static_only(
    binarization: data.Binarization | None, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="binarized-mnist among 'static'; got"):
        data.load("binarized-mnist", root=tmp_path, binarization=binarization)


@pytest.mark.parametrize(
    ("name", "module", "requirement"),
    [
        ("digits", "sklearn.datasets", "ppvae[examples]"),
        ("mnist", "torchvision.datasets", "torchvision"),
        ("fashion-mnist", "torchvision.datasets", "torchvision"),
    ],
)
def test_missing_package_says_what_to_install(
    name: str, module: str, requirement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(f'{module}: pip install "{requirement}"')):
        data.load(name, root=tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "folder"),
    [
        ("binarized-mnist", "binarized_mnist_train.amat.gz", "binarized_mnist"),
        ("frey", "freyfaces.npy", "frey"),
        ("mnist", "train-images-idx3-ubyte", "MNIST/raw"),
        ("fashion-mnist", "t10k-labels-idx1-ubyte", "FashionMNIST/raw"),
    ],
)
def test_missing_files_are_named_with_their_places(
    name: str, file: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "raw" in folder:
        pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, root=tmp_path)
    assert file in str(caught.value)
    assert str(tmp_path / folder) in str(caught.value)

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name)
    assert str(tmp_path / ".cache" / "ppvae" / folder) in str(caught.value)


# Files of binary rows


ROWS = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    "content",
    [b"0 1 1\n1 0 0\n", b"0 1 1\n1 0 0", b"0 1 1 \n1 0 0 \n", b"0 1 1\r\n1 0 0\r\n"],
    ids=["plain", "no last line end", "spaces before line ends", "carriage returns"],
)
@pytest.mark.parametrize("suffix", [".amat", ".amat.gz"])
def test_read_amat(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    rows = data.read_amat(file, x_dim=3)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, ROWS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "1 bytes, not a multiple"),
        (b"0 1 1\n1 0", "not a multiple"),
        (b"0 1\n1 0\n0 1\n", "line 1 "),
        (b"0 1 1\n1 2 0\n", "line 2 "),
        (b"0 1 1\n1,0,0\n", "line 2 "),
        (b"0 1 1\n.5 10\n", "line 2 "),
    ],
    ids=["empty", "torn", "narrow", "not binary", "commas", "not digits"],
)
def test_read_amat_rejects_other_content(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.amat"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.read_amat(file, x_dim=3)
    assert str(file) in str(caught.value)


def test_read_amat_rejects_a_damaged_archive(tmp_path: Path) -> None:
    file = tmp_path / "rows.amat.gz"
    whole = gzip.compress(b"0 1 1\n" * 1000)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (b"0 1 1\n", whole[:-12], bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged gzip archive"):
            data.read_amat(file, x_dim=3)


def test_binarized_mnist_joins_train_and_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"train": (50_000, 0.0), "valid": (10_000, 1.0), "test": (10_000, 0.0)}
    for part in parts:
        (tmp_path / f"binarized_mnist_{part}.amat").touch()

    def constant_rows(path: Path) -> Tensor:
        num_rows, value = parts[path.stem.removeprefix("binarized_mnist_")]
        return torch.full((1, 1), value).expand(num_rows, 784)

    monkeypatch.setattr(data, "read_amat", constant_rows)
    digits = data.load("binarized-mnist", root=tmp_path)
    assert digits.train.shape == (60_000, 784)
    assert digits.test.shape == (10_000, 784)
    assert (digits.train[:50_000] == 0).all()
    assert (digits.train[50_000:] == 1).all()


def test_binarized_mnist_with_too_few_rows_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "binarized_mnist"
    folder.mkdir()
    file = folder / "binarized_mnist_train.amat"
    file.write_bytes(b" ".join([b"0"] * 784) + b"\n")
    with pytest.raises(ValueError, match=r"expected 50000 rows in .*; got 1"):
        data.load("binarized-mnist", root=tmp_path)


def test_damaged_frey_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "freyfaces.npy"
    for content in (b"", b"not an array"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a readable \.npy file"):
            data.load("frey", root=tmp_path)
    np.save(file, np.zeros((5, 560), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"expected \(1965, 560\) bytes .* got \(5, 560\)"):
        data.load("frey", root=tmp_path)


def test_damaged_mnist_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"not an image file")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"not a label file")
    with pytest.raises(ValueError, match="mnist: could not read the files"):
        data.load("mnist", root=tmp_path)
    for part in ("train", "t10k"):
        images = struct.pack(">4i", 0x803, 2, 28, 28) + bytes(2 * 784)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 2) + bytes(2))
    with pytest.raises(ValueError, match=r"expected 60000 images .*got images \(2, 28, 28\)"):
        data.load("mnist", root=tmp_path)


def test_unwritable_root_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="Check that the folder can be written"):
        data.load("mnist", root=file, download=True)


# The real files, where they are


def test_real_binarized_mnist() -> None:
    root = real("binarized_mnist")
    digits = data.load("binarized-mnist", root=root)
    assert digits.binarization == "static"
    assert digits.train.shape == (60_000, 784)
    assert digits.test.shape == (10_000, 784)
    assert digits.event_shape == (28, 28)
    assert digits.train_labels is None
    assert digits.test_labels is None
    for rows in (digits.train, digits.test):
        assert ((rows == 0) | (rows == 1)).all()
        assert abs(float(rows.mean()) - 0.131) < 0.003  # MNIST's mean grey value is 0.1307
    valid = next((root / "binarized_mnist").glob("binarized_mnist_valid.amat*"))
    assert torch.equal(digits.train[50_000:], data.read_amat(valid))


@pytest.mark.parametrize(
    ("name", "folder", "default", "density"),
    [
        ("mnist", "MNIST", "static", 0.1307),
        ("fashion-mnist", "FashionMNIST", "threshold", 0.2860),
    ],
)
def test_real_torchvision_sets(
    name: str, folder: str, default: str, density: float, tmp_path: Path
) -> None:
    pytest.importorskip("torchvision")
    shutil.copytree(real(folder) / folder / "raw", tmp_path / folder / "raw")
    for path in (tmp_path / folder, *(tmp_path / folder).rglob("*")):
        path.chmod(0o755)  # the source may be read-only, and the archives are unpacked beside it
    with pytest.raises(FileNotFoundError, match=r"\.gz files that are there already"):
        data.load(name, root=tmp_path)
    grey = data.load(name, root=tmp_path, binarization=None, download=True)
    assert grey.train.shape == (60_000, 784)
    assert grey.test.shape == (10_000, 784)
    assert grey.event_shape == (28, 28)
    assert grey.train.dtype == torch.float32
    assert (float(grey.train.min()), float(grey.train.max())) == (0.0, 1.0)
    assert abs(float(grey.train.mean()) - density) < 1e-4  # the mean in common normalisations
    assert grey.train_labels is not None
    assert grey.test_labels is not None
    assert grey.train_labels.unique().tolist() == [*range(10)]
    assert grey.test_labels.shape == (10_000,)

    binary = data.load(name, root=tmp_path)  # unpacked by now: no download needed
    assert binary.binarization == default
    if default == "threshold":
        assert torch.equal(binary.train == 1, grey.train >= 0.5)
        assert torch.equal(binary.test == 1, grey.test >= 0.5)
    else:
        assert_drawn_from(binary.train[:5_000], grey.train[:5_000])
        assert_drawn_from(binary.test[:5_000], grey.test[:5_000])


def test_real_frey_is_the_video_in_order() -> None:
    root = real("frey")
    faces = data.load("frey", root=root)
    assert faces.binarization is None
    assert faces.event_shape == (28, 20)
    assert faces.train.shape == (1565, 560)
    assert faces.test.shape == (400, 560)
    video = torch.from_numpy(np.load(root / "frey" / "freyfaces.npy"))
    assert torch.equal((torch.cat([faces.train, faces.test]) * 255).round().to(torch.uint8), video)
