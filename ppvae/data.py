"""Named image data sets, each with a fixed split and an explicit binarisation.

- `digits`: 1,500 + 297 rows (train + test) of 8x8, by default `"threshold"`; inside
  scikit-learn, nothing to download.
- `mnist`: 60,000 + 10,000 of 28x28, `"static"`; from torchvision.
- `fashion-mnist`: 60,000 + 10,000 of 28x28, `"threshold"`; from torchvision.
- `binarized-mnist`: 60,000 + 10,000 of 28x28, `"static"` as given; `.amat` files.
- `frey`: 1,565 + 400 of 28x20, grey (`None`); `freyfaces.npy`.

A Bernoulli likelihood is a probability only on pixels in {0, 1}, so grey pixels are made binary
before they meet one:

- `"threshold"`: a pixel is 1 where its grey value is at least 0.5.
- `"static"`: each pixel is drawn once from Bernoulli(grey value), by `seed`, and then stays.
- `"dynamic"`: the grey values are kept as probabilities and `ImageData.draw` draws training rows
  anew, in every epoch say; `train` and `test` hold one fixed draw, the same as `"static"` has.
- `None`: grey values in [0, 1], for likelihoods with a continuous support.

An evidence or an ELBO is comparable only within one binarisation, and under `"static"` only within
one draw: `"static"` MNIST made here is not `binarized-mnist`. A model trained on one draw of its
training images should be judged on that draw or on held-out images: another draw of the training
images is neither, and shows a larger amortization gap.
"""

import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["NAMES", "Binarization", "Description", "ImageData", "describe", "load", "read_amat"]

Binarization = Literal["static", "dynamic", "threshold"]
"""How grey pixels became binary; see the module's text. `None` beside it means grey pixels."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """A data set split into training and test rows.

    Attributes:
        name: One of `NAMES`, or a name of your own.
        train: Training rows, `(num_train, x_dim)`, float32 in [0, 1].
        test: Test rows, `(num_test, x_dim)`, float32 in [0, 1].
        event_shape: Height and width of an image; a row is an image read line by line.
        binarization: How the pixels became binary, or `None` where they are grey.
        train_labels: Classes of the training rows, `(num_train,)`, int64, or `None`.
        test_labels: Classes of the test rows, `(num_test,)`, int64, or `None`.
        train_intensities: Grey values of the training rows, `(num_train, x_dim)`, float32 in
            [0, 1]; present only where `binarization` is `"dynamic"`.

    Raises:
        ValueError: The shapes above do not fit together.
    """

    name: str
    train: Tensor
    test: Tensor
    event_shape: tuple[int, ...]
    binarization: Binarization | None
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    train_intensities: Tensor | None = None

    def __post_init__(self) -> None:
        dim = math.prod(self.event_shape)
        num_train, num_test = len(self.train), len(self.test)
        expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
            ("train", self.train, (num_train, dim)),
            ("test", self.test, (num_test, dim)),
            ("train_labels", self.train_labels, (num_train,)),
            ("test_labels", self.test_labels, (num_test,)),
            ("train_intensities", self.train_intensities, (num_train, dim)),
        ]
        for field, value, shape in expected:
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"Expected {field} of shape {shape} for event_shape {self.event_shape}; "
                    f"got {tuple(value.shape)}. Rows are flat images."
                )
        if (self.binarization == "dynamic") != (self.train_intensities is not None):
            raise ValueError(
                'train_intensities go with binarization="dynamic" and with no other; '
                f"got binarization={self.binarization!r} "
                f"{'without' if self.train_intensities is None else 'with'} train_intensities."
            )

    def __repr__(self) -> str:
        pixels = "grey" if self.binarization is None else f"{self.binarization} binarisation"
        labels = "unlabelled" if self.train_labels is None else "labelled"
        shape = "x".join(map(str, self.event_shape))
        return (
            f"ImageData({self.name}: {len(self.train):,} train + {len(self.test):,} test rows "
            f"of {shape}, {pixels}, {labels})"
        )

    @property
    def x_dim(self) -> int:
        """Number of pixels in a row."""
        return self.train.shape[1]

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Draw binary pixels for training rows anew, each from Bernoulli(its grey value).

        One call an epoch, or one a minibatch, is dynamic binarisation. `train` does not change.

        Args:
            rows: Indices of training rows, `(batch,)`, integer, or a mask `(num_train,)`, bool.
            generator: The source of randomness, on the device of `train_intensities`. Use one for
                the whole training: a generator seeded anew repeats its draw.

        Returns:
            Pixels in {0, 1}, `(batch, x_dim)`, float32.

        Raises:
            ValueError: The data set does not have dynamic binarisation.

        Example:
            >>> import torch
            >>> from ppvae import data
            >>> digits = data.load("digits", binarization="dynamic")
            >>> generator = torch.Generator().manual_seed(1)
            >>> for epoch in range(2):
            ...     order = torch.randperm(len(digits.train), generator=generator)
            ...     x = digits.draw(order, generator)  # a fresh, shuffled epoch
            >>> x.shape
            torch.Size([1500, 64])
        """
        if self.train_intensities is None:
            raise ValueError(
                f"{self.name} has binarization={self.binarization!r}, which has nothing to draw. "
                'Load it with binarization="dynamic".'
            )
        return torch.bernoulli(self.train_intensities[rows], generator=generator)


def load(
    name: str = "digits",
    *,
    root: str | Path | None = None,
    binarization: Binarization | Literal["default"] | None = "default",
    download: bool = False,
    seed: int = 0,
) -> ImageData:
    """Load a named data set with its split and binarisation.

    The split of a data set never changes: MNIST and Fashion-MNIST have their own; the static
    binarised MNIST trains on its training and validation files together, as the published
    evidences do; the 8x8 digits are shuffled once and for all; Frey faces are a video, whose
    neighbouring frames are near copies, so the last 400 frames are held out and the order is kept.
    The test rows of `binarized-mnist` are grouped by digit: shuffle them before taking a subset.

    Args:
        name: One of `NAMES`.
        root: Folder of the files; `~/.cache/ppvae` if not given. One folder serves all data sets:
            `MNIST/raw` and `FashionMNIST/raw` as torchvision lays them out, `binarized_mnist` and
            `frey`, whose files may also lie in `root` itself. `digits` reads no files.
        binarization: See the module's text; `"default"` is the entry of its table. `None` means
            grey values.
        download: Let torchvision fetch missing files of `mnist` and `fashion-mnist` and unpack
            them in `root`; `.gz` files that already lie there are checked and only unpacked. The
            other data sets are never fetched.
        seed: Seed of the draw under `"static"` and `"dynamic"`; nothing else depends on it. The
            draw has its own generator: torch's global random state stays as it is.

    Returns:
        The rows, with labels where the data set has them.

    Raises:
        ValueError: An unknown name or binarisation, a binarisation that the data set cannot have,
            or files that are damaged or cannot be fetched or unpacked.
        FileNotFoundError: The files are not there; the message says which and where.
        ImportError: scikit-learn (`digits`) or torchvision (`mnist`, `fashion-mnist`) is missing.

    Sources:
        - `digits`: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI
          repository (its test part); grey values are counts 0 to 16 divided by 16.
        - `mnist`: LeCun, Cortes and Burges; grey values are bytes divided by 255, as they
          are for `fashion-mnist` and `frey`.
        - `fashion-mnist`: Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747.
        - `binarized-mnist`: Salakhutdinov and Murray 2008, "On the quantitative analysis of deep
          belief networks", in the split of Larochelle and Murray 2011, "The neural autoregressive
          distribution estimator".
        - `frey`: B. Frey's face in a video, from S. Roweis' page.

    Example:
        >>> from ppvae import data
        >>> digits = data.load("digits")
        >>> digits
        ImageData(digits: 1,500 train + 297 test rows of 8x8, threshold binarisation, labelled)
        >>> digits.train.unique()
        tensor([0., 1.])
        >>> data.load("digits", binarization=None).train[0].reshape(8, 8).max()
        tensor(1.)
    """
    if name not in _SOURCES:
        raise ValueError(f"Unknown data set {name!r}. Known: {', '.join(NAMES)}.")
    source = _SOURCES[name]
    chosen = source.default if binarization == "default" else binarization
    if chosen not in source.binarizations:
        raise ValueError(
            f"Expected a binarization of {name} among "
            f"{', '.join(map(repr, source.binarizations))}; got {binarization!r}."
        )
    grey = source.read(_folder(root), download)
    train, test = grey.train, grey.test
    if chosen == "threshold":
        train, test = (train >= 0.5).float(), (test >= 0.5).float()
    elif chosen is not None:
        # Where the files are binary already, pixels of 0 or 1 are their own draw.
        generator = torch.Generator().manual_seed(seed)
        train = torch.bernoulli(train, generator=generator)
        test = torch.bernoulli(test, generator=generator)
    return ImageData(
        name=name,
        train=train,
        test=test,
        event_shape=source.event_shape,
        binarization=chosen,
        train_labels=grey.train_labels,
        test_labels=grey.test_labels,
        train_intensities=grey.train if chosen == "dynamic" else None,
    )


@dataclass(frozen=True)
class Description:
    """What is known of a data set without reading it.

    Attributes:
        name: One of `NAMES`.
        num_train: Number of training rows.
        num_test: Number of test rows.
        event_shape: Height and width of an image.
        binarization: How its pixels become binary by default, or `None` where they stay grey.
        binarizations: All that may be asked for.
        split: How training and test rows are told apart.
        source: Where the images come from.
        missing: What is not there to read it: files, or a package.
        can_download: Whether ``load(..., download=True)`` fetches it.
    """

    name: str
    num_train: int
    num_test: int
    event_shape: tuple[int, int]
    binarization: Binarization | None
    binarizations: tuple[Binarization | None, ...]
    split: str
    source: str
    missing: tuple[str, ...]
    can_download: bool


def describe(name: str, *, root: str | Path | None = None) -> Description:
    """Say what a named data set is, and whether it could be loaded.

    Whether its files are whole is known only when they are loaded.

    Args:
        name: One of `NAMES`.
        root: Folder of the files, as in `load`.

    Raises:
        ValueError: An unknown name.
        ImportError: torchvision (`mnist`, `fashion-mnist`) is missing.

    Example:
        >>> from ppvae import data
        >>> digits = data.describe("digits")
        >>> digits.num_train, digits.num_test, digits.missing
        (1500, 297, ())
    """
    if name not in _SOURCES:
        raise ValueError(f"Unknown data set {name!r}. Known: {', '.join(NAMES)}.")
    source = _SOURCES[name]
    return Description(
        name=name,
        num_train=source.num_train,
        num_test=source.num_test,
        event_shape=source.event_shape,
        binarization=source.default,
        binarizations=source.binarizations,
        split=source.split,
        source=source.origin,
        missing=tuple(source.missing(_folder(root))),
        can_download=source.can_download,
    )


def _folder(root: str | Path | None) -> Path:
    return Path.home() / ".cache" / "ppvae" if root is None else Path(root).expanduser()


def read_amat(path: str | Path, *, x_dim: int = 784) -> Tensor:
    """Read an `.amat` file of binary rows: one row a line, `0` or `1` separated by single spaces.

    The bytes are checked and taken as they are, without parsing numbers: 50,000 rows of 784 pixels
    take about a second.

    Args:
        path: The file; one whose name ends in `.gz` is unpacked while reading.
        x_dim: Number of values in a line.

    Returns:
        The rows, `(num_rows, x_dim)`, float32 in {0, 1}.

    Raises:
        ValueError: The content is not of that form, or the archive is damaged.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip archive: {error}.") from error
    # Line ends of other systems, a space before the line end and a missing last line end are the
    # only liberties; after this each value takes two bytes, itself and its separator.
    content = content.replace(b"\r\n", b"\n").replace(b" \n", b"\n")
    if not content.endswith(b"\n"):
        content += b"\n"
    values = np.frombuffer(content, dtype=np.uint8)
    form = f"Expected lines of {x_dim} values 0 or 1 separated by single spaces in {path}"
    if values.size % (2 * x_dim):
        raise ValueError(
            f"{form}, {2 * x_dim} bytes each; got {values.size:,} bytes, not a multiple of that. "
            "Is the file complete, and is x_dim right?"
        )
    pairs = values.reshape(-1, x_dim, 2)
    digits, separators = pairs[:, :, 0] - ord("0"), pairs[:, :, 1]
    wrong = (digits > 1).any(1) | (separators[:, :-1] != ord(" ")).any(1)
    wrong |= separators[:, -1] != ord("\n")
    if wrong.any():
        raise ValueError(f"{form}; line {int(wrong.argmax()) + 1:,} is not of that form.")
    return torch.from_numpy(digits.astype(np.float32))


class _Grey(NamedTuple):
    """What a reader returns: pixels in [0, 1] as they are in the files, split, with labels."""

    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None


def _optional(module: str, requirement: str, name: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'The data set {name} needs {module}: pip install "{requirement}".'
        ) from error


def _read_digits(_root: Path, _download: bool) -> _Grey:
    bunch = _optional("sklearn.datasets", "ppvae[examples]", "digits").load_digits()
    # NumPy's legacy stream is frozen, so the split is the same under every version.
    order = np.random.RandomState(0).permutation(len(bunch.data))
    rows = torch.from_numpy(bunch.data[order]).float() / 16
    labels = torch.from_numpy(bunch.target[order]).long()
    return _Grey(rows[:1500], rows[1500:], labels[:1500], labels[1500:])


def _no_sklearn(_root: Path) -> list[str]:
    return [] if find_spec("sklearn") else ["scikit-learn"]


def _torchvision_files(name: str, class_name: str) -> Callable[[Path], list[str]]:
    def missing(root: Path) -> list[str]:
        dataset = getattr(_optional("torchvision.datasets", "torchvision", name), class_name)
        names = [Path(address).stem for address, _ in dataset.resources]
        return [file for file in names if not (root / class_name / "raw" / file).is_file()]

    return missing


def _torchvision_reader(name: str, class_name: str) -> Callable[[Path, bool], _Grey]:
    def read(root: Path, download: bool) -> _Grey:
        dataset = getattr(_optional("torchvision.datasets", "torchvision", name), class_name)
        folder = root / class_name / "raw"
        missing = _torchvision_files(name, class_name)(root)
        if missing and not download:
            raise FileNotFoundError(
                f"{name}: {', '.join(missing)} not found in {folder}. Pass the folder that holds "
                f"{class_name}/raw as root, or download=True to fetch what is missing; .gz files "
                "that are there already are only unpacked."
            )
        # On damaged files torchvision raises whatever its parser trips over, assertions included.
        try:
            parts = [dataset(root, train=train, download=download) for train in (True, False)]
        except Exception as error:
            raise ValueError(
                f"{name}: could not {'fetch, unpack or read' if download else 'read'} the files "
                f"in {folder}: {error}. Check that the folder can be written, or remove damaged "
                "files and load with download=True."
            ) from error
        for part, num_rows in zip(parts, (60_000, 10_000), strict=True):
            images, labels = tuple(part.data.shape), tuple(part.targets.shape)
            if images != (num_rows, 28, 28) or labels != (num_rows,):
                raise ValueError(
                    f"{name}: expected {num_rows} images of 28x28 with a label each in {folder}; "
                    f"got images {images} and labels {labels}. Remove the files and load with "
                    "download=True."
                )
        train, test = (part.data.flatten(1).float() / 255 for part in parts)
        return _Grey(train, test, parts[0].targets.long(), parts[1].targets.long())

    return read


def _find(name: str, root: Path, folder: str, files: list[str]) -> Path:
    """The first of the files, which are alternatives, in `root/folder` or in `root`."""
    places = [root / folder, root]
    for place in places:
        for file in files:
            if (place / file).is_file():
                return place / file
    raise FileNotFoundError(
        f"{name}: {' or '.join(files)} not found in {' or '.join(map(str, places))}. "
        "This data set is not downloaded: pass the folder that holds the files as root."
    )


def _not_found(name: str, folder: str, *files: list[str]) -> Callable[[Path], list[str]]:
    """The files that are missing, of lists of alternatives."""

    def missing(root: Path) -> list[str]:
        lost = []
        for alternatives in files:
            try:
                _find(name, root, folder, alternatives)
            except FileNotFoundError:
                lost.append(alternatives[0])
        return lost

    return missing


_AMAT = {"train": 50_000, "valid": 10_000, "test": 10_000}


def _amat_files(part: str) -> list[str]:
    file = f"binarized_mnist_{part}.amat"
    return [file, f"{file}.gz"]


def _read_binarized_mnist(root: Path, _download: bool) -> _Grey:
    name = "binarized-mnist"
    parts = []
    for part, num_rows in _AMAT.items():
        path = _find(name, root, "binarized_mnist", _amat_files(part))
        rows = read_amat(path)
        if len(rows) != num_rows:
            raise ValueError(f"{name}: expected {num_rows} rows in {path}; got {len(rows)}.")
        parts.append(rows)
    train, valid, test = parts
    return _Grey(torch.cat([train, valid]), test)


def _read_frey(root: Path, _download: bool) -> _Grey:
    path = _find("frey", root, "frey", ["freyfaces.npy"])
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"frey: {path} is not a readable .npy file: {error}") from error
    if pixels.shape != (1965, 560) or pixels.dtype != np.uint8:
        raise ValueError(
            f"frey: expected (1965, 560) bytes (uint8) in {path}; "
            f"got {pixels.shape} of {pixels.dtype}."
        )
    rows = torch.from_numpy(pixels).float() / 255
    return _Grey(rows[:1565], rows[1565:])


@dataclass(frozen=True)
class _Source:
    """How to read a data set, and what may be asked of it and said of it."""

    read: Callable[[Path, bool], _Grey]
    missing: Callable[[Path], list[str]]
    num_train: int
    num_test: int
    event_shape: tuple[int, int]
    default: Binarization | None
    split: str
    origin: str
    can_download: bool = False
    binarizations: tuple[Binarization | None, ...] = ("static", "dynamic", "threshold", None)


_SOURCES: dict[str, _Source] = {
    "digits": _Source(
        _read_digits,
        _no_sklearn,
        *(1_500, 297, (8, 8), "threshold"),
        split="shuffled once and for all",
        origin="Alpaydin and Kaynak 1998, UCI repository; inside scikit-learn",
    ),
    "mnist": _Source(
        _torchvision_reader("mnist", "MNIST"),
        _torchvision_files("mnist", "MNIST"),
        *(60_000, 10_000, (28, 28), "static"),
        split="its own",
        origin="LeCun, Cortes and Burges; from torchvision",
        can_download=True,
    ),
    "fashion-mnist": _Source(
        _torchvision_reader("fashion-mnist", "FashionMNIST"),
        _torchvision_files("fashion-mnist", "FashionMNIST"),
        *(60_000, 10_000, (28, 28), "threshold"),
        split="its own",
        origin="Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747; from torchvision",
        can_download=True,
    ),
    "binarized-mnist": _Source(
        _read_binarized_mnist,
        _not_found("binarized-mnist", "binarized_mnist", *map(_amat_files, _AMAT)),
        *(60_000, 10_000, (28, 28), "static"),
        split="training with validation files, against test",
        origin="Salakhutdinov and Murray 2008, split of Larochelle and Murray 2011",
        binarizations=("static",),
    ),
    "frey": _Source(
        _read_frey,
        _not_found("frey", "frey", ["freyfaces.npy"]),
        *(1_565, 400, (28, 20), None),
        split="the last 400 frames of the video held out",
        origin="B. Frey's face in a video, from S. Roweis' page",
    ),
}

NAMES: tuple[str, ...] = tuple(_SOURCES)
"""The names that `load` knows."""
