"""Continual pre-training: next-token CE and KL by the fused loss, Stage I behind the frozen LM head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ted_ds.batch import Batch, BatchCounts, on_device
from ted_ds.config.data_section import DataConfig
from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import LossConfig
from ted_ds.config.tasks import TaskSpec
from ted_ds.data.documents import iter_documents
from ted_ds.data.manifests import Entries
from ted_ds.data.packed import PackedBlocks
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.evaluation.perplexity import document_perplexity
from ted_ds.job.world import World, logger
from ted_ds.models.filters import Filter, FilterPlan, fresh_linear
from ted_ds.models.loading import DTYPES, meta_model, resident_readout
from ted_ds.models.readout import LogitHead
from ted_ds.models.structure import LMStructure, find_structure
from ted_ds.ops import Head, TopK, linear_cross_entropy_kl, teacher_top_k, token_scores
from ted_ds.tasks.base import (
    CachedOutput,
    DisposableHead,
    Field,
    Reading,
    Task,
    TaskLosses,
)
from ted_ds.tasks.text import TextData, prepare_text, train_text_tokenizer
from ted_ds.telemetry.flops import gemm_flops, logit_loss_flops


class CausalLM(Task):
    """pred_loss and kl_loss are means over target tokens; [tokens, V] is never whole in memory.

    vocab_size: how many ids the tokenizer has. Rows of either LM head beyond it are padding and take no
        part in CE or KL, so that padding a vocabulary changes nothing.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @classmethod
    def from_spec(cls, spec: TaskSpec, world: World, vocab_size: int) -> CausalLM:
        """Of `vocab_size` ids."""
        return cls(vocab_size)

    @classmethod
    def train_tokenizer(cls, data: DataConfig, spec: TaskSpec) -> None:
        """A SentencePiece model."""
        train_text_tokenizer(data)

    @classmethod
    def prepare(cls, data: DataConfig, spec: TaskSpec, tokenizer: Tokenizer, folder: Path) -> dict[str, PackedBlocks]:
        """Packed blocks."""
        return prepare_text(data, tokenizer, folder)

    def open_data(self, run: RunConfig, tokenizer: Tokenizer) -> TextData:
        """Packed blocks."""
        return TextData.open(run, tokenizer, self)

    def readout(self, model: Any) -> LogitHead:
        """Reads last hidden states [B, S, D]."""
        return LogitHead(find_structure(model))

    def losses(
        self, student: Reading, teacher: Reading | None, batch: Batch, counts: BatchCounts, loss: LossConfig
    ) -> TaskLosses:
        """CE and KL from hidden states and LM heads, in chunks of tokens; a recorded teacher may give a `TopK`."""
        assert student.head is not None
        output_t: Any = None if teacher is None else teacher.output
        recorded = isinstance(output_t, TopK)
        hidden_t = None if teacher is None or recorded else output_t.flatten(0, -2)
        targets = counts.targets.clamp_min(1).to(torch.promote_types(student.output.dtype, torch.float32))
        total, pred_sum, kl_sum = linear_cross_entropy_kl(
            student.output.flatten(0, -2),
            student.head,
            batch.targets.flatten(),
            hidden_t,
            None if teacher is None else teacher.head,
            pred_scale=1.0 / targets,
            kl_scale=loss.kl_alpha / targets,
            temperature=loss.temperature,
            divergence=loss.divergence,
            top_k=output_t if recorded else loss.kl_top_k,
            vocab_size=self.vocab_size,
        )
        return TaskLosses(total, pred_sum / targets, kl_sum / targets)

    def predict(self, student: Reading, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum of NLL in nats, float64; number of targets; the sum over the documents' own tokens alone)."""
        assert student.head is not None
        nll, _ = token_scores(
            student.output.flatten(0, -2), student.head, batch.targets.flatten(), vocab_size=self.vocab_size
        )
        own = nll if batch.own is None else nll.masked_fill(~batch.own.flatten(), 0.0)
        return nll.sum(dtype=torch.float64), BatchCounts.of(batch).targets, own.sum(dtype=torch.float64)

    def disposable_head(self, model: PreTrainedModel, run: RunConfig, world: World, side: str) -> LMHead:
        """The model's own final norm and LM head."""
        norm, head = resident_readout(model, world.device)
        fraction = run.filters.token_fraction
        return LMHead(norm, head, vocab_size=self.vocab_size, token_fraction=fraction, seed=run.seed)

    def cached_outputs(self, run: RunConfig, teacher: str) -> list[CachedOutput]:
        """Of `loss.kl_top_k`, the likeliest ids; the last hidden states serve every run."""
        assert run.teacher is not None
        model = meta_model(teacher, run.spec.kind, trust_remote_code=run.teacher.trust_remote_code)
        exact = LastHiddenStates(find_structure(model), run.teacher.dtype)
        if run.loss.kl_top_k is None:
            return [exact]
        return [TopLogits(run.loss.kl_top_k, run.loss.temperature, self.vocab_size), exact]

    def logit_flops(self, tokens: int, *widths: int) -> int:
        """The fused loss's."""
        return logit_loss_flops(tokens, self.vocab_size, *widths)

    def score_files(
        self,
        model: Any,
        tokenizer: Tokenizer,
        entries: Entries,
        world: World,
        *,
        length: int,
        stride: int,
        batch_size: int,
    ) -> dict[str, Any]:
        """See `document_perplexity`."""
        logger.info("each document is scored by itself (a run's validation_perplexity: in rows, after other documents)")
        documents = iter_documents(entries, tokenizer)
        return document_perplexity(
            model, tokenizer, documents, length=length, batch_size=batch_size, device=world.device
        )


class LMHead(DisposableHead):
    """Stage I's head: the model's own frozen final norm and LM head, behind `Linear(F -> D)` if F is not D.

    final_norm, head: whole on every rank (V * D elements, the same as one gather of the LM head; they never
        change, so they are gathered once instead of K times a step).
    token_fraction: share of the positions that each filter sees of every step; unbiased, and Stage I's
        cost, K passes through the LM head, shrinks with it.
    """

    def __init__(
        self, final_norm: nn.Module, head: Head, *, vocab_size: int, token_fraction: float = 1.0, seed: int = 0
    ) -> None:
        self._final_norm, self._head = final_norm, head
        self._norm_dtype = next((p.dtype for p in final_norm.parameters()), head.weight.dtype)  # NanoChat's has none
        self._vocab_size, self._token_fraction, self._seed = vocab_size, token_fraction, seed

    def tensors(self, filter_: Filter) -> dict[str, nn.Parameter]:
        """`up_weight` [D, F] and `up_bias` [D], if F is not D."""
        if filter_.output_dim == filter_.width:
            return {}
        weight, bias = fresh_linear(filter_.output_dim, filter_.width)
        return {"up_weight": weight, "up_bias": bias}

    def inputs(self, hidden: torch.Tensor, batch: Batch, index: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The states [N, D] and targets [N] of this step's positions."""
        length = batch.input_ids.shape[1]
        positions = on_device(self._positions(length, index, step), batch.targets.device)
        targets = batch.targets.index_select(1, positions).flatten()
        return hidden.index_select(1, positions).flatten(0, 1), targets

    def loss(
        self,
        states: torch.Tensor,
        targets: torch.Tensor,
        tensors: dict[str, torch.Tensor],
        batch: Batch,
        counts: BatchCounts,
        *,
        training: bool,
    ) -> torch.Tensor:
        """CE, its sum over the positions seen scaled up to all of them."""
        length = batch.input_ids.shape[1]
        scale = length / (self._seen(length) * counts.targets.clamp_min(1).double())
        if tensors:
            states = nn.functional.linear(states, tensors["up_weight"], tensors["up_bias"])
        states = self._final_norm(states.to(self._norm_dtype))
        return linear_cross_entropy_kl(states, self._head, targets, pred_scale=scale, vocab_size=self._vocab_size)[0]

    def flops(self, tokens: int, plan: FilterPlan) -> int:
        """The LM head, whose weight is frozen, and the layer before it."""
        up = 3 * gemm_flops(tokens, plan.output_dim, plan.width) if plan.output_dim != plan.width else 0
        return 2 * gemm_flops(tokens, plan.width, self._vocab_size) + up

    def _seen(self, length: int) -> int:
        return max(1, round(self._token_fraction * length))

    def _positions(self, length: int, index: int, step: int) -> torch.Tensor:
        """The positions that filter `index` sees at `step`, the same in every row, on every rank."""
        draw = np.random.default_rng([self._seed, step, index]).permutation(length)
        return torch.from_numpy(np.sort(draw[: self._seen(length)]))


class LastHiddenStates(CachedOutput):
    """A causal LM's hidden states after its final norm, [B, S, D]: with its LM head they give the live losses."""

    def __init__(self, structure: LMStructure, dtype: str) -> None:
        numbers = structure.vocab_rows * (structure.width + (structure.lm_head.bias is not None))
        head = {
            "softcap": structure.logit_softcap,
            "scale": structure.logit_scale,
            "bytes": numbers * DTYPES[dtype].itemsize,
        }
        super().__init__({"hidden": Field(dtype, structure.width)}, head=head)

    def record(self, output: torch.Tensor, head: Head | None) -> dict[str, torch.Tensor]:
        """As they are."""
        return {"hidden": output}

    def restore(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, S, D]."""
        return values["hidden"]


class TopLogits(CachedOutput):
    """A causal LM's k likeliest ids of each token, their log-probabilities at the temperature, and that of the rest."""

    def __init__(self, k: int, temperature: float, vocab_size: int) -> None:
        k = min(k, vocab_size)
        self._k, self._temperature, self._vocab_size = k, temperature, vocab_size
        fields = {
            "top_ids": Field("int32", k),
            "top_log_probs": Field("float16", k),
            "top_log_rest": Field("float32", 1),
        }
        super().__init__(fields, {"loss.temperature": temperature, "vocab_size": vocab_size})

    def record(self, output: torch.Tensor, head: Head | None) -> dict[str, torch.Tensor]:
        """From the last hidden states [B, S, D] and the LM head."""
        assert head is not None
        top = teacher_top_k(
            output.flatten(0, -2),
            head,
            self._k,
            temperature=self._temperature,
            vocab_size=self._vocab_size,
        )
        shape = output.shape[:-1]
        return {
            "top_ids": top.ids.view(*shape, self._k),
            "top_log_probs": top.log_probs.view(*shape, self._k),
            "top_log_rest": top.log_rest.view(*shape, 1),
        }

    def restore(self, values: dict[str, torch.Tensor]) -> TopK:
        """Of [B * S] tokens."""
        ids, log_probs = (values[name].flatten(0, 1) for name in ("top_ids", "top_log_probs"))
        return TopK(ids, log_probs.float(), values["top_log_rest"].flatten())
