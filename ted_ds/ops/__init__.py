"""The numerics: losses with gradients written by hand or by kernels, each beside its plain torch reference."""

from ted_ds.config.choices import Divergence
from ted_ds.ops.divergence import TopK
from ted_ds.ops.eager_grad import eager_gradients
from ted_ds.ops.layer_loss import LayerLoss, linear_cosine_error, linear_squared_error, rms_normalized
from ted_ds.ops.logit_gemms import Head
from ted_ds.ops.logit_loss import linear_cross_entropy_kl, teacher_top_k, token_scores

__all__ = [
    "Divergence",
    "Head",
    "LayerLoss",
    "TopK",
    "eager_gradients",
    "linear_cosine_error",
    "linear_cross_entropy_kl",
    "linear_squared_error",
    "rms_normalized",
    "teacher_top_k",
    "token_scores",
]
