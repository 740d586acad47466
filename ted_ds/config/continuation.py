"""Which keys make a recipe another run, and which of them another start on the same folder may change.

Every key of the schema stands in one of the two sets below; a test sees to it. What an earlier version of ted_ds
wrote is read through today's schema, so that a key that came later has its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ted_ds.config.load import ENVIRONMENT, reread
from ted_ds.config.schema import RunConfig

DECIDES = frozenset(
    {
        *("task", "method", "seed"),
        *("teacher.model", "teacher.dtype"),
        *("student.model", "student.init", "student.pretrained", "student.init_from_pretrained"),
        *("student.dtype", "student.dropout", "student.head_dropout"),
        *("filters.output_dim", "filters.nonlinear", "filters.layer_map", "filters.learning_rate"),
        *("filters.learn", "filters.skip_last"),
        *("filters.steps", "filters.epochs", "filters.warmup_steps", "filters.global_batch_size"),
        *("filters.head_dropout", "filters.token_fraction"),
        *("loss.kl_alpha", "loss.mse_alpha", "loss.temperature", "loss.divergence", "loss.kl_top_k"),
        *("loss.layer_loss", "loss.balance", "loss.layer_fade", "loss.mask_padding"),
        *("data.train", "data.validation", "data.extra_validation"),
        *("data.text_column", "data.text_columns", "data.label_column", "data.labels"),
        *("data.tokenizer", "data.train_tokenizer", "data.sequence_length", "data.doc_stride"),
        *("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.betas", "optimizer.epsilon"),
        *("optimizer.warmup_steps", "optimizer.schedule", "optimizer.final_ratio", "optimizer.gradient_clipping"),
        *("train.epochs", "train.global_batch_size"),
    }
)
"""Keys that decide the result: what is computed, in which precision, of which data, from which start; the scores."""

MAY_CHANGE = frozenset(
    {
        # where things are: rows, checkpoints and caches have fingerprints of their own
        *("output_dir", "data.prepared", "teacher.cache"),
        # how a step is computed: the split into ranks and micro-batches, sharding, memory against time
        *("deepspeed", "teacher.deepspeed", "teacher.sharding", "attn_implementation"),
        *("student.activation_checkpointing", "train.micro_batch_size", "data.processes"),
        # what may be loaded: of the models that come of it, names and shapes are compared
        *("teacher.trust_remote_code", "student.trust_remote_code", "data.trust_remote_code"),
        # prepared rows know what was left out, and refuse another setting if that makes a difference
        "data.skip_bad_rows",
        # says something before the run, and changes nothing in it
        "loss.probe_steps",
        # how long, how often, and what is said and kept
        *("train.steps", "train.evaluate_every", "train.save_every", "train.keep_last", "train.keep_every"),
        *("train.max_skipped_steps", "train.max_minutes", "train.timeout_minutes"),
        *("logging.every", "logging.tensorboard"),
    }
)
"""Keys that another start may change. What was computed so far stays as it is."""


FORMER_DEFAULTS = {
    "filters.layer_map": "uniform",
    "filters.learn": "always",
    "student.init.blocks": "uniform",
    "loss.layer_loss": "normalized_mse",
    "loss.mse_alpha": 10.0,
    "loss.balance": "none",
    "loss.layer_fade": 0.0,
}
"""Keys whose default was another one, or that were not there and now have another effect. A run that was begun with the
former one keeps it if its recipe leaves the key out."""


def as_begun(run: RunConfig, before: Mapping[str, Any]) -> RunConfig:
    """The recipe `run`, with those of `FORMER_DEFAULTS` that the run was begun with. before: its config.yaml."""
    for key, former in FORMER_DEFAULTS.items():
        *path, name = key.split(".")
        sections: list[Any] = [run]
        written: Any = before
        for part in path:
            sections.append(getattr(sections[-1], part, None))
            written = (written or {}).get(part)
        if sections[-1] is None or name in sections[-1].model_fields_set:
            continue
        if written is None or written.get(name, former) != former:
            continue
        changed = sections[-1].model_copy(update={name: former})
        for section, part in zip(reversed(sections[:-1]), reversed(path), strict=True):
            changed = section.model_copy(update={part: changed})
        run = changed
    return run


def deciding(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as JSON values, without the keys that may change and what is about the run: what a checkpoint keeps.

    Changes of the schema need an entry. A key that is removed: in `load.REMOVED`. A default that changes: in
    `FORMER_DEFAULTS`. A new key whose default is not what earlier versions computed: here, with the value that is.
    """
    kept = {name: value for name, value in recipe.items() if name not in MAY_CHANGE | {ENVIRONMENT}}
    for name, value in kept.items():
        if isinstance(value, dict):
            kept[name] = {key: inner for key, inner in value.items() if f"{name}.{key}" not in MAY_CHANGE}
    if "filters" in kept:
        kept["filters"].setdefault("learn", "always")
    return kept


def first_change(before: Mapping[str, Any], now: RunConfig | Mapping[str, Any], source: str) -> str | None:
    """`KEY: OLD VALUE, this recipe says NEW VALUE` of the first deciding key that differs; None if all are alike.

    before: a recipe as it was written, whole or its deciding part, in the file `source`; now: today's.
    Raises ConfigError if today's schema cannot read what was written.
    """
    old = _flat(reread(deciding(before), source).model_dump(mode="json"))
    new = _flat(now.model_dump(mode="json") if isinstance(now, RunConfig) else now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key}: {old.get(key)!s:.200}, this recipe says {new.get(key)!s:.200}"
    return None


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted deciding key -> value."""
    flat: dict[str, Any] = {}
    for name, value in deciding(recipe).items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat
