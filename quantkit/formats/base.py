"""What a format is: the one place where quantkit's tensors become the words that a reader expects, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from quantkit.manifest import TensorRecord
from quantkit.model.source import Source
from quantkit.schema import Frozen
from quantkit.tensors import QuantizedTensor, StoredTensors

if TYPE_CHECKING:
    from quantkit.formats.layout import ArtifactLayout


@dataclass(frozen=True)
class LinearPlan:
    """What will be done to one linear: known from the recipe and the headers, before any weight is read.

    name: module name. method: the settings for it, None when it is skipped.
    """

    name: str
    out_features: int
    in_features: int
    method: Any | None


def calibrates(plans: Iterable[LinearPlan]) -> bool:
    """Whether some linear's method needs a calibration set."""
    return any(plan.method is not None and plan.method.calibrated for plan in plans)


class Writer(ABC):
    """Takes tensors one at a time, in the source's names, and puts an artifact's files into a folder."""

    substitutes: tuple[TensorRecord, ...] = ()
    """Records of tensors that are no planned linears and got another type than the one they should."""

    @abstractmethod
    def add(self, name: str, value: Tensor | QuantizedTensor, first_row: int = 0) -> int:
        """Store one tensor, such as "model.layers.0.mlp.up_proj.weight", or its rows from `first_row` on, one part
        after the other. Returns the bytes that these take in the file."""

    def takes_parts(self, name: str) -> bool:
        """Whether the rows of a tensor may come in parts; otherwise it comes whole."""
        return False

    @abstractmethod
    def finish(self) -> list[Path]:
        """Complete the files (headers, indexes, config, side files), fsync, and return every path written."""

    @abstractmethod
    def checkpoint(self) -> dict[str, Any]:
        """Put on disk what was added since the last checkpoint, and tell what `restore` needs to know of it: JSON."""

    @abstractmethod
    def restore(self, checkpoints: Sequence[Mapping[str, Any]]) -> None:
        """Go on behind all checkpoints of an earlier writer into the same folder, before anything is added.

        What that one wrote later, finished files included, is dropped. Raises DataError when the folder does not hold
        what had been written.
        """


class Format(Frozen, ABC):
    """The base of every format's settings; a subclass narrows `name` to a Literal and adds its fields."""

    name: str

    engines: ClassVar[tuple[str, ...]] = ()
    """Names of the engines in quantkit/engines/ that run this format, the preferred one first."""

    def misfits(self, plans: list[LinearPlan], source: Source) -> list[str]:
        """Every reason why this format cannot hold what is planned; one line each, with the layer's name."""
        return []

    @abstractmethod
    def writer(self, folder: Path, source: Source, plans: list[LinearPlan], dtype: Any) -> Writer:
        """A writer into a folder that is empty, or holds what the checkpoints for its `restore` tell of.

        dtype: torch dtype of the tensors that stay unquantized.
        """

    @abstractmethod
    def layout(self, source: Source, plans: list[LinearPlan], dtype: Any) -> ArtifactLayout:
        """What that writer will store, from the headers alone."""

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """Whether an artifact on disk is of this format; looks at config.json or the magic only."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> ArtifactSource:
        """Read an artifact back. Raises ModelError when a file is missing or damaged."""


class ArtifactSource(Source):
    """A finished artifact, read back: `read` decodes, `quantized` gives the codes themselves."""

    kind = "artifact"
    format_name: str
    quantization: Mapping[str, Any]  # the reader's own settings, such as quantization_config

    @abstractmethod
    def quantized(self, name: str) -> QuantizedTensor | None:
        """The quantized tensor behind a weight name such as "model.layers.0.mlp.up_proj.weight", or None if it is
        not."""

    @abstractmethod
    def stored_bytes(self, name: str) -> int:
        """Bytes in the file that stand for this weight: codes, scales, zeros, tables."""

    def problems(self, name: str) -> list[str]:
        """What about a stored weight no writer of this format leaves behind: parts, dtypes, shapes, values; one line
        each. Raises ModelError when it cannot be read."""
        return []


PackFunction = Callable[[str, QuantizedTensor], StoredTensors]
