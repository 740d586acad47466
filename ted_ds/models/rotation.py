"""A narrower residual stream by rotation: directions go in which hidden states do little, over whatever channels.

In a model with an RMSNorm before its linear maps, an orthogonal change of the basis of all hidden states changes
nothing: each norm's gain moves into the matrices that read it, these are rotated, and those that write hidden states
are rotated back. The first d directions of the basis are kept. A norm over d channels of D sees a mean square D / d
times as large, so its gain is sqrt(D / d), and its epsilon D / d times as large. SliceGPT (arXiv 2401.15024) has a
rotation for each block, and matrices between them; one for the whole model leaves its architecture as it is.

Which matrix reads which norm is measured on the family's tiny model, and so is whether the rotation is exact.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ted_ds.errors import ModelError, in_a_line
from ted_ds.models.families import Part, fitting_axes, sizes_of
from ted_ds.models.structure import find_blocks
from ted_ds.models.tiny import tiny_ids

TOLERANCE = 1e-9
"""Largest difference of logits in float64, as a share of the largest, of an exact rotation."""


_ROWS_ELEMENTS = 2**22
"""Elements of a tensor that are in its basis' dtype at a time."""


@dataclass(frozen=True)
class Role:
    """What a tensor has to do with hidden states.

    embedding and writer: it gives them, along `dim`; reader: it takes the output of `norm` along `dim`; norm: its gain.
    offset: what the norm adds to its weight (Gemma: 1). Names are those of `within`.
    """

    kind: Literal["embedding", "writer", "reader", "norm"]
    dim: int = 0
    norm: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Roles:
    """by_name: within a block, or of what is outside. scaled: embeddings are multiplied by the root of the width."""

    by_name: Mapping[str, Role]
    head: str
    scaled: bool


def within(name: str, stack: str) -> str:
    """A tensor's name within its block, or its last two parts: alike in all blocks, and in files of any prefix."""
    rest = name.removeprefix(f"{stack}.")
    return rest.partition(".")[2] if rest != name else ".".join(name.split(".")[-2:])


def rotation_roles(tiny: PreTrainedModel) -> Roles:
    """The roles of a family's tensors, measured on its tiny model.

    Raises ModelError if hidden states of the family cannot be rotated, with the reason.
    """
    family = tiny.config.model_type
    try:
        return _roles(tiny, family)
    except ModelError:
        raise
    except Exception as error:  # a family may not run in float64, or be built in its own way
        raise ModelError(f"the hidden states of a {family} cannot be rotated: {in_a_line(error)}") from error


def _roles(tiny: PreTrainedModel, family: str) -> Roles:
    stack, sizes = find_blocks(tiny).blocks_path, sizes_of(tiny.config)
    model = copy.deepcopy(tiny).double()
    readers, norms, scale = _watched(model, stack)
    offsets = {}
    for name, norm in norms.items():
        if (offset := _offset(norm)) is None:
            raise ModelError(f"the hidden states of a {family} cannot be rotated: {name} is no RMSNorm")
        if name not in readers.values():
            raise ModelError(f"the hidden states of a {family} cannot be rotated: no matrix reads what {name} gives")
        offsets[f"{name}.weight"] = offset
    if not hasattr(tiny.config, "rms_norm_eps"):
        raise ModelError(f"the hidden states of a {family} cannot be rotated: its config has no rms_norm_eps")
    embedding: Any = model.get_input_embeddings()
    roles: dict[str, Role] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own, module = within(name, stack), name.rpartition(".")[0]
        axes = fitting_axes(name, parameter.shape, sizes)
        dims = [dim for dim, axis in enumerate(axes) if axis is not None and axis.part is Part.CHANNEL]
        if own in offsets:
            roles[own] = Role("norm", offset=offsets[own])
        elif dims and model.get_submodule(module) is embedding:
            roles[own] = Role("embedding", dims[0])
        elif dims and own.rpartition(".")[0] in readers and parameter.ndim == 2:
            roles[own] = Role("reader", dims[0], f"{readers[own.rpartition('.')[0]]}.weight")
        elif dims:
            roles[own] = Role("writer", dims[0])
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    found = Roles(roles, f"{head}.weight", abs(scale - sizes[Part.CHANNEL] ** 0.5) < 1e-3 * scale)
    if not _exact(tiny, found, stack):
        raise ModelError(f"the hidden states of a {family} cannot be rotated: its logits would be others")
    return found


def _watched(model: PreTrainedModel, stack: str) -> tuple[dict[str, str], dict[str, nn.Module], float]:
    """Module -> the norm whose output it reads; the norms over hidden states; the scale of embeddings."""
    width = model.config.hidden_size
    given: dict[int, tuple[str, torch.Tensor]] = {}
    readers: dict[str, str] = {}
    norms: dict[str, nn.Module] = {}
    handles = []

    def give(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            given[output.untyped_storage().data_ptr()] = name, output  # kept: its address is not used again

        return hook

    def read(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor):
                found = given.get(inputs[0].untyped_storage().data_ptr())
                if found is not None:
                    readers[name] = found[0]

        return hook

    for path, module in model.named_modules():
        weight, own = getattr(module, "weight", None), within(f"{path}.weight", stack).rpartition(".")[0]
        if not isinstance(weight, torch.Tensor):
            continue
        if weight.ndim == 1 and weight.numel() == width:
            norms[own] = module
            handles.append(module.register_forward_hook(give(own)))
        elif weight.ndim == 2:
            handles.append(module.register_forward_pre_hook(read(own)))
    first: list[torch.Tensor] = []
    blocks = find_blocks(model).blocks
    handles.append(blocks[0].register_forward_pre_hook(lambda module, inputs: first.append(inputs[0])))
    ids = tiny_ids(model.config)
    with torch.no_grad():
        model(input_ids=ids)
        embedding: Any = model.get_input_embeddings()
        embedded = embedding.weight[ids]
    for handle in handles:
        handle.remove()
    return readers, norms, float((first[0] / embedded).median()) if first else 1.0


def _offset(norm: nn.Module) -> float | None:
    """What an RMSNorm adds to its weight: y = (weight + offset) * x / rms(x); None if it is another norm."""
    weight: Any = norm.weight
    x = torch.randn(5, weight.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 100
    with torch.no_grad():
        gain = norm(x) * x.square().mean(-1, keepdim=True).sqrt() / x
    weight = weight.detach()
    offset = (gain - weight).mean().round()
    return offset.item() if bool((gain - weight - offset).abs().max() < 1e-4) else None


@dataclass(frozen=True)
class Rotation:
    """basis: [D, d], orthonormal columns; d may be D."""

    roles: Roles
    basis: torch.Tensor

    def gain(self, role: Role, weight: torch.Tensor) -> torch.Tensor:
        """[D] what a norm multiplies by."""
        return weight.to(self.basis.dtype) + role.offset

    def turned(
        self,
        role: Role,
        tensor: torch.Tensor,
        gain: torch.Tensor | None = None,
        basis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A tensor of the teacher as the student has it, in its dtype.

        gain: of the norm that a reader reads. basis: [D, d], in place of the rotation's own.
        """
        width, kept = self.basis.shape
        if role.kind == "norm":
            return torch.full((kept,), (width / kept) ** 0.5 - role.offset, dtype=tensor.dtype)
        basis = self.basis if basis is None else basis
        scale = (width / kept) ** 0.5 if role.kind == "embedding" and self.roles.scaled else 1.0
        return in_basis(tensor, role.dim, basis, gain, scale)


def in_basis(
    tensor: torch.Tensor, dim: int, basis: torch.Tensor, gain: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """`tensor` with its dimension `dim`, of D entries, in a basis [D, d], contiguous and in its own dtype.

    gain: [D], joins it before. Rows go a part at a time: an LM head in float64 would be the largest tensor of Stage 0.
    """
    along = tensor.movedim(dim, -1)
    rows = along.reshape(-1, along.shape[-1])
    parts = []
    for part in rows.split(max(1, _ROWS_ELEMENTS // rows.shape[1])):
        wide = part.to(basis.dtype)
        parts.append(((wide if gain is None else wide * gain) @ basis * scale).to(tensor.dtype))
    return torch.cat(parts).reshape(*along.shape[:-1], basis.shape[1]).movedim(-1, dim).contiguous()


def principal_basis(moments: torch.Tensor) -> torch.Tensor:
    """[D, D] float32: orthonormal directions, those of the largest mean squares first. moments: [D, D]."""
    directions: torch.Tensor = torch.linalg.eigh(moments.double()).eigenvectors  # by rising eigenvalues
    return directions.flip(1).float()


def _exact(tiny: PreTrainedModel, roles: Roles, stack: str) -> bool:
    """Whether a tiny model, rotated at random and not cut, has the same logits in float64."""
    width = tiny.config.hidden_size
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
    rotation = Rotation(roles, basis)
    teacher = copy.deepcopy(tiny).double()
    config = copy.deepcopy(tiny.config)
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        student = type(tiny)(config).double().eval()
    own = teacher.state_dict()
    state = {}
    for name, tensor in own.items():
        role = roles.by_name.get(within(name, stack))
        state[name] = tensor
        if role is not None:
            gain = None
            if role.norm is not None:
                norm = next(n for n in own if within(n, stack) == role.norm and _same_place(n, name, stack))
                gain = rotation.gain(roles.by_name[role.norm], own[norm])
            state[name] = rotation.turned(role, tensor, gain)
    student.load_state_dict(state)
    ids = tiny_ids(config)
    with torch.no_grad():
        expected, found = (_in_float64(model, roles, stack)(input_ids=ids).logits for model in (teacher, student))
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _in_float64(model: PreTrainedModel, roles: Roles, stack: str) -> PreTrainedModel:
    """The model with its norms in float64: transformers has them in float32 whatever the model's dtype is."""

    def plain(weight: torch.Tensor, offset: float) -> Any:
        return lambda x: (weight + offset) * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    for name, module in model.named_modules():
        role = roles.by_name.get(within(f"{name}.weight", stack))
        if role is not None and role.kind == "norm":
            module.forward = plain(module.weight, role.offset)
    return model


def _same_place(one: str, other: str, stack: str) -> bool:
    """Whether two names are of the same block, or both of none."""

    def block(name: str) -> str:
        rest = name.removeprefix(f"{stack}.")
        return rest.partition(".")[0] if rest != name else ""

    return block(one) == block(other)
