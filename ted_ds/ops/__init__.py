"""The numerics: losses whose gradients are written by hand, and their plain-torch specification.

`reference` holds the specification of each; Triton kernels may replace the inside of a function here,
never its signature.
"""

from ted_ds.config.choices import Divergence
from ted_ds.ops.divergence import TopK
from ted_ds.ops.eager_grad import eager_gradients
from ted_ds.ops.layer_loss import linear_squared_error
from ted_ds.ops.logit_loss import Head, linear_cross_entropy_kl, teacher_top_k, token_scores

__all__ = [
    "Divergence",
    "Head",
    "TopK",
    "eager_gradients",
    "linear_cross_entropy_kl",
    "linear_squared_error",
    "teacher_top_k",
    "token_scores",
]
