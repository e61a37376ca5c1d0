"""The dropout substitute of linear attention (arXiv 2510.21956 and its companion).

The N x N attention matrix never exists, so its entries cannot be dropped; the output is perturbed instead:
    mean_preserving:  o~ = o (1 + psi)            psi ~ N(0, p) per element: variance p, standard deviation sqrt(p)
    printed:          o~ = (1 - p) o (1 + psi)    as printed in the paper
`mean_preserving` is the default: evaluation uses o unchanged, so a training-time mean of (1 - p) o would be a shift
the next layer has to unlearn as p is annealed to 0.

The paper anneals p to 0 over training: `distillation.attention_dropout` of a recipe does, and
`hf_linattn.trainer_callback` does it for transformers.Trainer.
"""

import math

import torch
from torch import Tensor, nn


class AttentionDropout(nn.Module):
    """Perturbs `[B, T, H, V]` in training, does nothing in evaluation or at p = 0.

    Args:
        p (`float`): variance of the noise, in [0, 1).
        form (`str`): `"mean_preserving"` or `"printed"`.
    """

    def __init__(self, p: float | None, form: str):
        super().__init__()
        self.p, self.form = p, form

    def forward(self, o: Tensor, model_p: float = 0.0) -> Tensor:
        """`model_p` is the model's own attention dropout, used when no p is configured."""
        p = model_p if self.p is None else self.p
        if not self.training or p == 0.0:
            return o
        noisy = o * (1 + math.sqrt(p) * torch.randn_like(o))
        return (1 - p) * noisy if self.form == "printed" else noisy

    def extra_repr(self) -> str:
        return f"p={self.p}, form={self.form}"
