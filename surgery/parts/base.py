"""What a checkpoint may be given of a prefix, in place of the prefix: one kind of part, one file.

A kind says what `config.eab` holds of it, which tensors that asks for, and how they are read while the prefix runs. How
it works at run time is a file of `runtime`. To add one:

* derive from `Kind` in a file of its own, and name it in `parts.KINDS`;
* write its file of `runtime`, call it in `eab_runtime.install`, name its module in `eab_runtime.HELD`, and the file in
  `converted.derived.RUNTIME_FILES`;
* have `anatomy` find where it goes, and say so in `Anatomy.eab`; `converted.entries.EabEntry` checks what is said, and
  `anatomy.sites.ADDED` names the module.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from ..anatomy.sites import Anatomy

Keep = Callable[[str, torch.Tensor], None]  # the name of a tensor within the trunk, and what it holds


class Kind(abc.ABC):
    """One kind of part. Stateless.

    Args (of the class):
        name: what it is called where it is counted and checked.
        key: its entry of `config.eab`: name of a module in the trunk -> what there is to know about it.
        held: the module in which its tensors are, within each that the entry names.
    """

    name: ClassVar[str]
    key: ClassVar[str]
    held: ClassVar[str]

    @abc.abstractmethod
    def shapes(self, n: int, declared: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name within the trunk -> shape of every tensor for `n` tokens of a prefix, in the order of the file.

        `declared`: what `config.eab` holds under `key`.
        """

    @abc.abstractmethod
    def values(self, held: Any) -> dict[str, torch.Tensor]:
        """What a module `held` holds, by the last part of the tensors' names: by a call, which hooks need."""

    @abc.abstractmethod
    def reading(self, anatomy: Anatomy, trunk: torch.nn.Module, keep: Keep) -> contextlib.AbstractContextManager[None]:
        """While active, `keep` is told each tensor of a prefix that runs through the original, alone, in one row."""
