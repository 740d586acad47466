"""Both stages as a plain torch loop that keeps everything: what the engines must reproduce."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from ted_ds.batch import IGNORED
from ted_ds.config.load import load_config
from ted_ds.config.schema import RunConfig
from ted_ds.data.loader import TrainingRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.distill.filter_learner import FilterProbe
from ted_ds.models.layer_map import LayerMap
from ted_ds.models.structure import find_structure
from ted_ds.ops import Head
from ted_ds.ops.reference import kl_sum, top_k_kl_sum
from ted_ds.pipeline.pair_plan import PairPlan, plan_pairs
from ted_ds.pipeline.schedule import learning_rate_schedule
from ted_ds.pipeline.stage0 import ModelPaths
from ted_ds.tasks.causal_lm import LMHead


def rows_of(run: RunConfig) -> TrainingRows:
    """The run's rows, a whole global batch a micro-batch, on one rank."""
    blocks = PackedBlocks(run.prepared_folder / "train")
    size = run.train.global_batch_size
    return TrainingRows(blocks, seed=run.seed, global_batch_size=size, micro_batch_size=size, rank=0, world_size=1)


def optimizer_of(parameters: list[nn.Parameter], run: RunConfig, rate: float, decay: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=run.optimizer.betas, eps=run.optimizer.epsilon)


def plain_stage2(recipe: Path, *, steps: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """(losses of every step, gradients of the first) of a finished run's recipe, from its own filters."""
    run = load_config(recipe, [])
    teacher = AutoModelForCausalLM.from_pretrained(run.teacher.model).eval()
    student = AutoModelForCausalLM.from_pretrained(_start(run))
    pairs, filters_t, filters_s = _filters(run)
    rows = rows_of(run)
    parameters = [*student.parameters(), *filters_s.parameters()]
    rate = run.optimizer
    optimizer = optimizer_of(parameters, run, rate.learning_rate, rate.weight_decay)
    schedule = learning_rate_schedule(
        rate.schedule,
        warmup_steps=rate.warmup_steps,
        total_steps=run.train.steps,
        final_ratio=rate.final_ratio,
    )
    squares: list[float] = []
    losses, gradients = [], {}
    balance = PlainBalance(run.loss.mse_alpha, len(pairs))
    by_token = run.loss.layer_loss in ("rms_mse", "cosine")
    for step in range(steps):
        (batch,) = rows.micro_batches(step)
        with torch.no_grad():
            out_t, hidden_t = _forward(teacher, batch, [j for _, j in pairs])
            states_t = [f(h) for f, h in zip(filters_t, hidden_t, strict=True)]
            if by_token:
                states_t = [_by_rms(state) for state in states_t]
        if not squares:
            raw = run.loss.layer_loss != "normalized_mse"
            squares = [1.0 if raw else float(state.double().square().mean()) for state in states_t]
        out_s, hidden_s = _forward(student, batch, [i for i, _ in pairs])
        mask = batch.targets != IGNORED
        z_s, z_t, targets = out_s.logits[mask], out_t.logits[mask], batch.targets[mask]
        pred = F.cross_entropy(z_s, targets)
        if run.loss.kl_top_k:
            kl = top_k_kl_sum(z_s, z_t, targets, run.loss.temperature, run.loss.kl_top_k) / len(targets)
        else:
            kl = kl_sum(z_s, z_t, targets, run.loss.temperature, run.loss.divergence) / len(targets)
        logits = pred + run.loss.kl_alpha * kl
        fade = max(0.0, 1 - step / (run.loss.layer_fade * run.train.steps)) if run.loss.layer_fade else 1.0
        constant = run.loss.balance == "none"
        own = hidden_s if constant else [h.detach().requires_grad_() for h in hidden_s]
        states_s = [f(h) for f, h in zip(filters_s, own, strict=True)]
        if run.loss.layer_loss == "cosine":
            each = [1 - F.cosine_similarity(s, t, dim=-1).mean() for s, t in zip(states_s, states_t, strict=True)]
        else:
            each = [F.mse_loss(s, t) / q for s, t, q in zip(states_s, states_t, squares, strict=True)]
        layer = torch.stack(each).mean() if each and fade else torch.zeros(())
        optimizer.zero_grad(set_to_none=False)
        if constant or not pairs or not fade:
            loss = logits + run.loss.mse_alpha * fade * layer
            loss.backward()
        else:
            weights = balance.backward(logits, layer, hidden_s, own, fade)
            loss = logits + sum(w * e for w, e in zip(weights, each, strict=True)) / len(each)
        if step == 0:
            named = [("student", student), ("filters", filters_s)]
            of_all = {f"{side}.{n}": p.grad for side, module in named for n, p in module.named_parameters()}
            gradients = {n: gradient.clone() for n, gradient in of_all.items() if gradient is not None}
        nn.utils.clip_grad_norm_(parameters, run.optimizer.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = rate.learning_rate * schedule(step)
        optimizer.step()
        terms = {"loss": loss, "pred_loss": pred, "kl_loss": kl if run.loss.kl_alpha else 0 * kl, "layer_loss": layer}
        losses.append({name: float(value.detach()) for name, value in terms.items()})
    return losses, gradients


class PlainBalance:
    """`loss.balance: gradient` with every gradient whole: the logits' and each pair's, at each pair's state."""

    def __init__(self, share: float, num_pairs: int) -> None:
        self._share, self._means = share, [(0.0, 0.0, 0.0)] * num_pairs

    def backward(
        self,
        logits: torch.Tensor,
        layer: torch.Tensor,
        hidden: list[torch.Tensor],
        own: list[torch.Tensor],
        fade: float,
    ) -> list[float]:
        """Adds a step's gradients; returns the pairs' weights. own: copies of `hidden`, of which `layer` is."""
        layer.backward()
        pulls = [h.grad for h in own]
        counted = [square for _, dot, square in self._means if dot >= 0]
        known = self._means[-1][0] > 0 and sum(counted) > 0
        weight = self._share * fade * ((self._means[-1][0] / sum(counted)) ** 0.5 if known else 1e-6)
        weights = [weight * (1e-6 if dot < 0 else 1.0) for _, dot, _ in self._means]
        outputs, scaled = [logits, *hidden], [None, *(w * g for w, g in zip(weights, pulls, strict=True))]
        now = []
        for k in range(len(hidden)):
            above = [0, *range(k + 2, len(outputs))]
            (main,) = torch.autograd.grad(
                [outputs[i] for i in above], hidden[k], [scaled[i] for i in above], retain_graph=True
            )
            now.append(
                tuple(float((a * b).double().sum()) for a, b in ((main, main), (main, pulls[k]), (pulls[k],) * 2))
            )
        torch.autograd.backward(outputs, scaled)
        if any(map(any, self._means)):
            now = [
                tuple(0.9 * a + 0.1 * b for a, b in zip(old, new, strict=True))
                for old, new in zip(self._means, now, strict=True)
            ]
        self._means = now
        return weights


def plain_stage1(recipe: Path, side: str, *, steps: int) -> list[float]:
    """Stage I's losses of one side, by one backward through everything."""
    run = load_config(recipe, [])
    path = run.teacher.model if side == "teacher" else _start(run)
    model = AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)
    structure = find_structure(model)
    pairs = _pairs(run)
    assert pairs is not None
    plan = pairs.teacher if side == "teacher" else pairs.student
    head = LMHead(structure.final_norm, Head(structure.lm_head.weight, None), vocab_size=1)
    torch.manual_seed(run.seed)
    probes = nn.ModuleList(FilterProbe(f, head) for f in plan.build())
    schedule = learning_rate_schedule("linear", warmup_steps=steps // 10, total_steps=steps, final_ratio=0.0)
    optimizer = optimizer_of(list(probes.parameters()), run, run.filters.learning_rate.teacher, 0.0)
    rows, losses = rows_of(run), []
    for step in range(steps):
        (batch,) = rows.micro_batches(step)
        each = []
        for probe, block in zip(probes, plan.blocks, strict=True):
            states = probe.filter(_block(model, batch, block))
            if plan.output_dim != plan.width:
                states = F.linear(states, probe.up_weight, probe.up_bias)
            logits = _logits_behind(model, batch, states)
            each.append(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED))
        loss = torch.stack(each).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(probes.parameters(), run.optimizer.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = run.filters.learning_rate.teacher * schedule(step)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _start(run: RunConfig) -> str:
    """The student that the run begins with."""
    return run.student.model or str(run.output_dir / "initial_student")


def _logits_behind(model: nn.Module, batch, states: torch.Tensor) -> torch.Tensor:
    """What the model itself makes of `states` in place of its last block's output."""
    block = find_structure(model).blocks[-1]
    handle = block.register_forward_hook(lambda m, i, out: (states, *out[1:]) if isinstance(out, tuple) else states)
    logits: torch.Tensor = model(batch.input_ids).logits
    handle.remove()
    return logits


def _forward(model: nn.Module, batch, blocks: list[int]):
    """(outputs, the raw outputs of the blocks), of one forward."""
    seen: dict[int, torch.Tensor] = {}
    handles = [
        find_structure(model)
        .blocks[j]
        .register_forward_hook(lambda m, i, out, j=j: seen.__setitem__(j, out[0] if isinstance(out, tuple) else out))
        for j in blocks
    ]
    output = model(batch.input_ids)
    for handle in handles:
        handle.remove()
    return output, [seen[j] for j in blocks]


def _block(model: nn.Module, batch, index: int) -> torch.Tensor:
    """The raw output of one block."""
    return _forward(model, batch, [index])[1][0]


def _by_rms(hidden: torch.Tensor) -> torch.Tensor:
    return hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _pairs(run: RunConfig) -> PairPlan | None:
    return plan_pairs(run, ModelPaths(_start(run), run.teacher.model))


def _filters(run: RunConfig) -> tuple[LayerMap, nn.ModuleList, nn.ModuleList]:
    """(pairs, teacher filters, student filters) as the run starts Stage II with."""
    plan = _pairs(run)
    if plan is None:
        return (), nn.ModuleList(), nn.ModuleList()
    torch.manual_seed(run.seed)
    student = plan.student.build()
    if plan.teacher is None:
        return plan.layer_map, nn.ModuleList(nn.Identity() for _ in plan.layer_map), student
    teacher = plan.teacher.build().requires_grad_(False)
    for side, bank in (("teacher", teacher), ("student", student)):
        bank.load_state_dict(load_file(run.output_dir / f"{side}_filters" / "filters.safetensors"))
    return plan.layer_map, teacher, student
