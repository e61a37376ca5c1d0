"""Which variants of a converted model are scored, and how a model becomes one of them.

- `teacher`: the model before conversion, a second checkpoint;
- `student`: the converted model as it runs;
- `window_only`: the student with its linear branch switched off. What the student scores above this control is what
  the linear attention contributes; short benchmarks fit inside the window and show no difference.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from hf_linattn import window_only
from hf_linattn.errors import UserError

VARIANTS = ("teacher", "student", "window_only")

ModelLoader = Callable[[], PreTrainedModel]


def check_variants(variants: Sequence[str], has_teacher: bool) -> list[str]:
    """The variants to score, in the order of `VARIANTS`; `teacher` is left out where there is none.

    Raises:
        UserError: an unknown variant.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"variants: expected some of {', '.join(VARIANTS)}, got {variant!r}")
    return [variant for variant in VARIANTS if variant in variants and (has_teacher or variant != "teacher")]


@contextlib.contextmanager
def as_variant(model: PreTrainedModel, variant: str) -> Iterator[PreTrainedModel]:
    """Within: `model` runs as `variant`; only `window_only` changes it."""
    with window_only(model) if variant == "window_only" else contextlib.nullcontext():
        yield model


class LazyModel:
    """A model given as itself or as a function that loads it at first use; a loaded one is freed by `release`.

    Args:
        source (`PreTrainedModel` or `ModelLoader`): the model, or what returns it.
        device (`str` or `torch.device`, *optional*): where it runs; None leaves it where it is.
    """

    def __init__(self, source: PreTrainedModel | ModelLoader, device: str | torch.device | None = None):
        self._loader = None if isinstance(source, torch.nn.Module) else source
        self._model = source if self._loader is None else None
        self._device = device

    def get(self) -> PreTrainedModel:
        if self._model is None:
            self._model = self._loader()
        if self._device is not None:
            self._model.to(self._device)
        return self._model.eval()

    def release(self) -> None:
        """Frees a model this object has loaded, so that the next one need not share the memory with it."""
        if self._loader is not None and self._model is not None:
            self._model = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
