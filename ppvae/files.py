"""Files that grow by draws: netCDF and Zarr, written some draws at a time."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class DrawsFile(ABC):
    """A file that grows along the dimension of the draws."""

    path: Path

    @staticmethod
    def at(path: Path) -> DrawsFile:
        """The file for a path, by its suffix.

        Raises:
            ValueError: If there is something already, whole or in part, or nothing to hold it, or
                no such kind.
        """
        kinds = {".nc": _NetCDF, ".zarr": _Zarr}
        if path.suffix not in kinds:
            raise ValueError(f"path: expected a name that ends in .nc or .zarr; got {str(path)!r}.")
        if path.exists():
            raise ValueError(f"path: {str(path)!r} exists; remove it, or choose another.")
        partial = _partial(path)
        if partial.exists():
            raise ValueError(
                f"path: {str(partial)!r} exists: it is written by another process, or was left by "
                f"one that was killed. Wait, or remove it, or choose another path."
            )
        if not path.parent.is_dir():
            raise ValueError(f"path: there is no folder {str(path.parent)!r}; make it first.")
        if path.suffix == ".zarr" and find_spec("zarr") is None:
            raise ValueError(
                f"path: {str(path)!r} needs zarr, which is not installed: pip install "
                f"'ppvae[zarr]', or choose a name that ends in .nc."
            )
        return kinds[path.suffix](path)

    @contextmanager
    def in_place(self) -> Iterator[DrawsFile]:
        """A file to write to, which gets its name once it is whole."""
        partial = type(self)(_partial(self.path))
        try:
            yield partial
            partial.finish()
        except BaseException:
            partial.remove()
            raise
        partial.path.rename(self.path)

    @abstractmethod
    def put(self, group: str, dataset: xarray.Dataset) -> None:
        """Write a data set into a group, beside what is there."""

    @abstractmethod
    def append(self, group: str, dataset: xarray.Dataset, slots: tuple[slice, ...]) -> None:
        """Write further draws into a group.

        Args:
            group: The group.
            dataset: Draws.
            slots: Their place along the first dimensions; the last of these grows.
        """

    @abstractmethod
    def finish(self) -> None:
        """What is to be done when all is written."""

    @abstractmethod
    def remove(self) -> None:
        """Delete it, if it is there."""

    @abstractmethod
    def open(self) -> xarray.DataTree:
        """Open it; values are read when they are asked for."""


def _partial(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f"{path.name}.part")


class _NetCDF(DrawsFile):
    """One file, in HDF5."""

    def put(self, group: str, dataset: xarray.Dataset) -> None:
        mode: Any = "a" if self.path.exists() else "w"
        dataset.to_netcdf(self.path, mode=mode, group=group or None, engine="h5netcdf")

    def append(self, group: str, dataset: xarray.Dataset, slots: tuple[slice, ...]) -> None:
        import h5netcdf

        dim = str(next(iter(dataset.data_vars.values())).dims[len(slots) - 1])
        if slots[-1].start == 0:
            dataset.to_netcdf(
                self.path, mode="a", group=group, engine="h5netcdf", unlimited_dims=[dim]
            )
            return
        with h5netcdf.File(self.path, "a") as file:
            there = file[group]
            there.resize_dimension(dim, slots[-1].stop)
            for name, variable in dataset.variables.items():
                if dim in variable.dims:
                    where = slots if variable.ndim > 1 else slots[-1:]
                    there.variables[name][where] = variable.values

    def finish(self) -> None:
        pass

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def open(self) -> xarray.DataTree:
        import xarray

        return xarray.open_datatree(self.path, engine="h5netcdf")


class _Zarr(DrawsFile):
    """A folder of chunks, for stores that are far away."""

    # Version 2 of the format, as version 3 has no text and no index of a whole tree yet.

    def put(self, group: str, dataset: xarray.Dataset) -> None:
        dataset.to_zarr(self.path, mode="a", group=group, consolidated=False, zarr_format=2)

    def append(self, group: str, dataset: xarray.Dataset, slots: tuple[slice, ...]) -> None:
        if slots[-1].start == 0:
            self.put(group, dataset)
            return
        dim = next(iter(dataset.data_vars.values())).dims[len(slots) - 1]
        dataset.to_zarr(self.path, group=group, append_dim=dim, consolidated=False)

    def finish(self) -> None:
        import zarr

        zarr.consolidate_metadata(self.path)

    def remove(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)

    def open(self) -> xarray.DataTree:
        import xarray

        return xarray.open_datatree(self.path, engine="zarr")
