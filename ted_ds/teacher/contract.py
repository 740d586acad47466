"""What Stage II asks of a teacher. Any object with these members can be given to `DistillationModel.attach_teacher`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ted_ds.batch import Batch
from ted_ds.ops import Head
from ted_ds.teacher.collector import tapped

UseOutput = Callable[[Any, Head | None], object]
"""Takes what the task's readout gives of a batch (of a recorded teacher maybe a `TopK`), and the LM head if the task
has one."""


class Teacher(Protocol):
    """A frozen model and its filters, or what was recorded of them.

    Hidden states are not returned: whoever wants them puts forward hooks on `sources` before `stream` (see
    `tapped`), so that each state can be dropped before the next one exists.
    """

    @property
    def sources(self) -> Sequence[nn.Module] | Mapping[int, nn.Module]:
        """By block, the module whose output is that block's hidden state [B, S, D], or a tuple that begins with it.

        Only blocks of the layer map need one. The state must have no gradient.
        """
        ...

    @property
    def target_width(self) -> int:
        """F, the width of what `target` returns."""
        ...

    def target(self, pair: int, hidden: torch.Tensor) -> torch.Tensor:
        """f_t[pair](hidden), [B, S, F]: what the filtered student is compared with.

        hidden: what the pair's source gave. It is called while that source's hooks run.
        """
        ...

    def stream(self, batch: Batch, use_output: UseOutput | None = None, *, until: nn.Module | None = None) -> None:
        """Calls the sources in the order of the blocks without gradients, then `use_output` once, with gradients.

        `batch` holds this rank's rows and their numbers. Under ZeRO-3 every rank calls its modules in the same order,
        and the head's weight is whole while `use_output` runs. `no_grad`, not `inference_mode`: the states take part
        in the student's graph.
        until: the source after which nothing is needed, given only without `use_output`; it may be ignored.
        """
        ...

    def expect(self, batches: Sequence[Batch]) -> None:
        """Names the batches that `stream` will be given next, in order; a teacher that reads ahead needs it."""
        return

    def end_states(self) -> None:
        """No state is needed any more: the layer loss has faded out. A teacher that reads states may leave them."""
        return


def stream_states(
    teacher: Teacher,
    batch: Batch,
    sources: Sequence[nn.Module],
    on_output: Callable[[int, torch.Tensor], None],
    use_output: UseOutput | None = None,
) -> None:
    """One `stream` with `on_output(i, hidden)` as the module `sources[i]` ends, then `use_output`.

    sources: in the order in which they run. Without `use_output` the forward ends after the last of them.
    """
    with tapped(sources, on_output):
        teacher.stream(batch, use_output, until=None if use_output else sources[-1])
