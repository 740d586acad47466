"""DeBERTa-v2's padding as the paper's code has it: a context of zeros, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from ted_ds.models.loading import checkpoint_activations
from ted_ds.models.padding import zero_padding_context
from tests.tiny_encoders import tiny_encoder

IDS = torch.tensor([[5, 7, 9, 11, 13, 15], [6, 8, 10, 0, 0, 0], [4, 0, 0, 0, 0, 0], [0, 0, 0, 6, 8, 10]])
"""Without padding, with it on the right, and on the left."""
MASK = (IDS != 0).long()
PADDING = MASK == 0


def deberta(*, zeroed: bool, blocks: int = 2) -> Any:
    model = tiny_encoder("deberta-v2", blocks=blocks)
    if zeroed:
        zero_padding_context(model)
    return model


def contexts(model: Any) -> list[torch.Tensor]:
    """Filled with every attention's context [B, S, D] as the model runs; register it after `zero_padding_context`."""
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, DisentangledSelfAttention):
            module.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    return seen


def states(model: Any) -> torch.Tensor:
    """The last hidden state, [B, S, D]."""
    return model.base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state


def test_the_context_of_padding_is_zero_and_real_tokens_do_not_notice() -> None:
    plain, zeroed = deberta(zeroed=False), deberta(zeroed=True)
    seen_plain, seen = contexts(plain), contexts(zeroed)
    with torch.no_grad():
        before, after = states(plain), states(zeroed)
    assert len(seen) == len(seen_plain) == 2
    for context, context_plain in zip(seen, seen_plain, strict=True):
        assert (context[PADDING] == 0).all()
        assert (context_plain[PADDING].abs().sum(-1) > 0.1).all()
        torch.testing.assert_close(context[~PADDING], context_plain[~PADDING], rtol=0, atol=1e-6)
    torch.testing.assert_close(after[~PADDING], before[~PADDING], rtol=0, atol=1e-6)
    assert (after - before)[PADDING].abs().max() > 0.1


def test_without_padding_nothing_changes() -> None:
    with torch.no_grad():
        plain, zeroed = (deberta(zeroed=z).base_model(input_ids=IDS[:1]).last_hidden_state for z in (False, True))
    assert torch.equal(plain, zeroed)


def test_other_families_are_left_alone() -> None:
    plain, zeroed = tiny_encoder("bert"), tiny_encoder("bert")
    zero_padding_context(zeroed)
    with torch.no_grad():
        assert torch.equal(states(plain), states(zeroed))


@pytest.mark.parametrize("recomputed", [False, True])
def test_no_gradient_reaches_the_attention_through_padding(recomputed: bool) -> None:
    norms = {}
    for zeroed in (False, True):
        model = deberta(zeroed=zeroed, blocks=1)
        if recomputed:
            checkpoint_activations(model.train())
        states(model)[PADDING].square().sum().backward()
        attention = model.base_model.encoder.layer[0].attention.self
        norms[zeroed] = [0.0 if p.grad is None else float(p.grad.norm()) for p in attention.parameters()]
        assert model.base_model.embeddings.word_embeddings.weight.grad[4].norm() == 0 or not zeroed
        assert model.base_model.encoder.layer[0].intermediate.dense.weight.grad.norm() > 0
    assert norms[True] == [0.0] * len(norms[True])
    assert max(norms[False]) > 0.1


def test_recomputed_blocks_have_the_same_gradients() -> None:
    """The recomputation in backward must zero the context again: the hook is the module's, not the pass's."""
    gradients = []
    for recomputed in (False, True):
        model = deberta(zeroed=True).train()
        if recomputed:
            checkpoint_activations(model)
        seen = contexts(model)
        states(model).square().sum().backward()
        assert len(seen) == (4 if recomputed else 2)
        assert all((context[PADDING] == 0).all() for context in seen)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
