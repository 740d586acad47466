"""Stage 0: the student's initial weights, cut out of the teacher's checkpoint or made at random.

From file to file: one tensor of the teacher at a time, and never more than one output file's worth in memory.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import cached_file

from ted_ds.config.schema import InitConfig
from ted_ds.errors import ModelError
from ted_ds.models.channels import ChannelScores, KeptChannels, WidthSizes
from ted_ds.models.layer_map import keep_blocks
from ted_ds.models.structure import ModelStructure, find_structure

SHARD_BYTES = 5_000_000_000
"""An output file is closed once it holds this much; so much host memory is needed, plus one tensor."""

_FFN_NAMES = ("intermediate_size", "ffn_dim", "n_inner")
_TIED_WIDTH = ("gpt2", "gpt_neox", "opt")  # families whose hidden_size must be num_heads * head_dim
_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists of a config with an entry a block


def init_student(
    teacher: str | None,
    init: InitConfig,
    output_dir: Path,
    *,
    seed: int = 0,
    tokenizer_vocab_size: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Writes the student's initial weights as a Hugging Face folder, renamed into place when it is whole.

    teacher: folder or hub id with safetensors weights; not used by `init.config` (a random start by `seed`,
    float32). A cut keeps the teacher's dtype; width is cut by weight norms, see `ted_ds.models.channels`.
    tokenizer_vocab_size: V of a random start whose config gives none, and the least it may give.
    Raises ModelError for a teacher that cannot be read or cut, sizes that do not fit it, or a bad config.
    """
    if output_dir.exists():
        raise ModelError(f"{output_dir} exists already: delete it to make the initial student anew")
    temporary = output_dir.with_name(output_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if init.config is not None:
        _random_student(init.config, temporary, seed, tokenizer_vocab_size, trust_remote_code)
    elif teacher is not None:
        _cut_student(teacher, init, temporary, trust_remote_code)
    else:
        raise ModelError("student.init cuts the student out of a teacher, and there is none: give teacher.model")
    temporary.rename(output_dir)


class Checkpoint:
    """The tensors of a model's safetensors files, read one at a time, by the model's own parameter names."""

    def __init__(self, name_or_path: str, base_prefix: str) -> None:
        self.name_or_path = name_or_path
        self._prefix = f"{base_prefix}."
        self._file_of = _tensor_files(name_or_path)

    def __contains__(self, name: str) -> bool:
        return self._key(name) is not None

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its dtype, on the CPU; ModelError where no file has it."""
        key = self._key(name)
        if key is None:
            raise ModelError(f"the checkpoint {self.name_or_path} has no tensor {name!r}, which its config asks for")
        with safe_open(self._file_of[key], framework="pt") as tensors:
            return tensors.get_tensor(key)

    def _key(self, name: str) -> str | None:
        # checkpoints saved from the bare backbone lack its prefix, others were saved with one too many
        keys = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((key for key in keys if key in self._file_of), None)


def _tensor_files(name_or_path: str) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    if single := _find(name_or_path, "model.safetensors"):
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if index := _find(name_or_path, "model.safetensors.index.json"):
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file: _find(name_or_path, file) for file in sorted(set(weight_map.values()))}
        if missing := [file for file, path in files.items() if path is None]:
            raise ModelError(f"{name_or_path} lacks {missing[0]}, which its index names: download it again")
        return {name: path for name, file in weight_map.items() if (path := files[file])}
    for pickled in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if _find(name_or_path, pickled):
            raise ModelError(
                f"{name_or_path} has only pickled weights ({pickled}), Stage 0 reads safetensors: convert it by "
                f"AutoModelForCausalLM.from_pretrained({name_or_path!r}, dtype='auto').save_pretrained(FOLDER)"
            )
    raise ModelError(f"{name_or_path} has no model.safetensors: is it a model's folder or hub id?")


def _find(name_or_path: str, file: str) -> Path | None:
    """A model's file: in its folder, or downloaded into the hub's cache; None where there is none."""
    try:
        found = cached_file(name_or_path, file)
    except OSError:
        return None
    return Path(found) if found else None


def _cut_student(teacher: str, init: InitConfig, folder: Path, trust_remote_code: bool) -> None:
    config = _teacher_config(teacher, trust_remote_code)
    structure = _on_meta(config, trust_remote_code)
    checkpoint = Checkpoint(teacher, structure.model.base_model_prefix)
    blocks = keep_blocks(init.blocks, init.num_blocks, structure.num_blocks)
    sizes = width_sizes(config)
    student_sizes = _requested_sizes(sizes, init, config)
    names = _Names(structure, blocks, checkpoint)
    student_config = _student_config(config, structure.num_blocks, blocks, sizes, student_sizes)
    if names.untied:
        student_config.tie_word_embeddings = False
    student = _on_meta(student_config, trust_remote_code)
    kept = _score(checkpoint, names, sizes, student_sizes) if student_sizes != sizes else None
    folder.mkdir(parents=True)
    _write(_cut_tensors(checkpoint, names, kept, student), folder)
    student_config.architectures = [type(student.model).__name__]
    student_config.save_pretrained(folder)
    if generation := _find(teacher, "generation_config.json"):
        shutil.copyfile(generation, folder / "generation_config.json")


def _teacher_config(teacher: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(teacher, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"teacher {teacher!r} could not be found: {str(error).splitlines()[0]}") from error


def _on_meta(config: PreTrainedConfig, trust_remote_code: bool) -> ModelStructure:
    with torch.device("meta"):
        return find_structure(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


class _Names:
    """The tensors to write: the teacher's name and block, the name inside the block, the student's name."""

    def __init__(self, structure: ModelStructure, blocks: tuple[int, ...], checkpoint: Checkpoint) -> None:
        self._path = f"{structure.blocks_path}."
        self._new_block = {old: new for new, old in enumerate(blocks)}
        tied: dict[str, str] = structure.model.all_tied_weights_keys
        # transformers does not tie what the config calls tied where the file has two different tensors
        self.untied = {
            target
            for target, source in tied.items()
            if target in checkpoint
            and source in checkpoint
            and not torch.equal(checkpoint.read(target), checkpoint.read(source))
        }
        # a tied tensor is written once, whichever of its names the teacher's file has
        self._stored_as = {
            source: target for target, source in tied.items() if source not in checkpoint and target in checkpoint
        }
        skipped = tied.keys() - self.untied
        self._all = [name for name in structure.model.state_dict() if name not in skipped]

    def __iter__(self) -> Iterator[tuple[str, int | None, str, str]]:
        for name in self._all:
            stored = self._stored_as.get(name, name)
            if not name.startswith(self._path):
                yield stored, None, ".".join(name.split(".")[-2:]), name
                continue
            index, _, local = name.removeprefix(self._path).partition(".")
            if int(index) in self._new_block:
                yield stored, int(index), local, f"{self._path}{self._new_block[int(index)]}.{local}"


def width_sizes(config: PreTrainedConfig) -> WidthSizes:
    """The sizes of a config's blocks, whatever the family calls them."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    ffn = next((size for name in _FFN_NAMES if (size := getattr(config, name, None))), 4 * hidden)
    return WidthSizes(
        hidden=hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        ffn=ffn,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
    )


def _requested_sizes(teacher: WidthSizes, init: InitConfig, config: PreTrainedConfig) -> WidthSizes:
    for name, size in (
        ("hidden_size", teacher.hidden),
        ("num_heads", teacher.heads),
        ("intermediate_size", teacher.ffn),
    ):
        wanted = getattr(init, name)
        if wanted is not None and wanted > size:
            raise ModelError(f"student.init.{name} is {wanted}, the teacher has {size}: a cut cannot add channels")
    hidden = init.hidden_size or teacher.hidden
    heads = init.num_heads or teacher.heads
    if config.model_type in _TIED_WIDTH:
        heads = _heads_of_tied_width(teacher, init, hidden, config.model_type)
    kv_heads = heads if teacher.kv_heads == teacher.heads else teacher.kv_heads
    if heads % kv_heads:
        raise ModelError(
            f"student.init.num_heads is {heads}, which is no multiple of the teacher's {kv_heads} key/value heads: "
            f"every one keeps equally many of its {teacher.heads // kv_heads} query heads"
        )
    return WidthSizes(hidden, heads, kv_heads, init.intermediate_size or teacher.ffn, teacher.head_dim)


def _heads_of_tied_width(teacher: WidthSizes, init: InitConfig, hidden: int, model_type: str) -> int:
    heads = init.num_heads or hidden // teacher.head_dim
    if heads * teacher.head_dim != hidden:
        raise ModelError(
            f"hidden_size {hidden} of the student is not num_heads {heads} * head size {teacher.head_dim} "
            f"= {heads * teacher.head_dim}, as {model_type} needs it: set student.init.hidden_size to "
            f"{heads * teacher.head_dim}, or change num_heads"
        )
    return heads


def _student_config(
    teacher: PreTrainedConfig, num_blocks: int, blocks: tuple[int, ...], sizes: WidthSizes, student: WidthSizes
) -> PreTrainedConfig:
    config = copy.deepcopy(teacher)
    for name in _PER_BLOCK:
        entries = getattr(config, name, None)
        if isinstance(entries, list) and len(entries) == num_blocks:
            setattr(config, name, [entries[b] for b in blocks])
    if (window := getattr(config, "max_window_layers", None)) is not None:
        config.max_window_layers = sum(b < window for b in blocks)
    config.num_hidden_layers = len(blocks)
    if student == sizes:
        return config
    config.hidden_size = student.hidden
    config.num_attention_heads = student.heads
    setattr(config, next(name for name in _FFN_NAMES if hasattr(config, name)), student.ffn)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = student.kv_heads
    if hasattr(config, "word_embed_proj_dim"):
        config.word_embed_proj_dim = student.hidden
    if config.model_type not in _TIED_WIDTH:
        config.head_dim = student.head_dim
    return config


def _score(checkpoint: Checkpoint, names: _Names, sizes: WidthSizes, student_sizes: WidthSizes) -> KeptChannels:
    scores = ChannelScores(sizes)
    for stored, block, local, _ in names:
        scores.add(block, local, checkpoint.read(stored))
    return scores.best(student_sizes)


def _cut_tensors(
    checkpoint: Checkpoint, names: _Names, kept: KeptChannels | None, student: ModelStructure
) -> Iterator[tuple[str, torch.Tensor]]:
    """The student's tensors by name, checked against the shapes that its config asks for."""
    shapes = {name: tuple(t.shape) for name, t in student.model.state_dict().items()}
    for stored, block, local, name in names:
        tensor = checkpoint.read(stored)
        if kept is not None:
            tensor = kept.cut(block, local, tensor)
        if tuple(tensor.shape) != shapes.get(name):
            raise ModelError(
                f"the teacher's {stored!r} gives {tuple(tensor.shape)}, the student's config asks for "
                f"{shapes.get(name)}: Stage 0 does not know this family well enough to cut it"
            )
        yield name, tensor.contiguous()


def _write(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Writes model.safetensors, or files of about SHARD_BYTES with an index, one in memory at a time."""
    files: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = held = 0

    def close() -> None:
        save_file(shard, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > SHARD_BYTES:
            close()
            held = 0
        shard[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    close()
    _name_files(files, total, folder)


def _name_files(files: list[list[str]], total: int, folder: Path) -> None:
    """Gives the parts the names that transformers looks for, which hold the number of parts."""
    if len(files) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for part, names in enumerate(files):
        file = f"model-{part + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{part}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _random_student(
    given: dict[str, Any], folder: Path, seed: int, tokenizer_vocab_size: int | None, trust_remote_code: bool
) -> None:
    vocabulary = {} if tokenizer_vocab_size is None else {"vocab_size": tokenizer_vocab_size}
    if tokenizer_vocab_size and given.get("vocab_size", tokenizer_vocab_size) < tokenizer_vocab_size:
        raise ModelError(
            f"student.init.config.vocab_size is {given['vocab_size']}, data.tokenizer has {tokenizer_vocab_size} "
            "ids: leave vocab_size out, or raise it"
        )
    try:
        config = AutoConfig.for_model(**(vocabulary | given))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    # whatever transformers raises here (its own types among it), it raises about the recipe's values
    except Exception as error:
        message = str(error).strip() or type(error).__name__
        raise ModelError(f"student.init.config {given} is refused by transformers: {message}") from error
    find_structure(model)
    model.save_pretrained(folder)
