"""The decode step of `generate`, captured in a CUDA graph once a call and replayed for every further token.

`generate` compiles the decode step of a static cache with mode "reduce-overhead". Before each step TorchDynamo then
looks at its guards, and PyTorch's own CUDA graphs at the address of every parameter and state. Nothing of that can
change between two steps of one call: it is looked at once, as the graph is captured.
"""

import dataclasses
import logging
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import Cache, CompileConfig

logger = logging.getLogger(__name__)


def capture_config(model: nn.Module, config: CompileConfig | None) -> CompileConfig | None:
    """How to compile a step that is then captured; None where it must stay as Transformers compiles it.

    Those are other devices than CUDA or several, a compile configuration of the user's, and hooks of others, which
    would run at the capture and not at a replay.
    """
    config = config or CompileConfig()
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or devices.pop().type != "cuda" or _has_foreign_hooks(model):
        return None
    if (config.backend, config.mode, config.options) != ("inductor", "reduce-overhead", None):
        return None
    return dataclasses.replace(config, mode="default")


class CapturedStep:
    """`forward`, whose third and later calls with the same kinds of inputs replay a CUDA graph.

    The first call runs `forward`, compiles it and shows whether a step leaves its cache in place; the second captures.
    What a call returns is overwritten by the next one, as with PyTorch's own CUDA graphs. For the calls of one
    `generate` only: a replay knows nothing of changes to the model.

    Args:
        forward: one compiled step, called by keyword with a `past_key_values`; returns a `ModelOutput`.
    """

    def __init__(self, forward: Callable):
        self.forward = forward
        self._captures = True
        self._kinds: list | None = None
        self._static: list = []
        self._output = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, **inputs):
        leaves, structure = tree_flatten(inputs, is_leaf=lambda x: isinstance(x, Cache))
        kinds = [structure, *map(_kind, leaves)]
        if kinds == self._kinds:
            if self._replay is None:
                self._capture(leaves, structure)
            if self._replay is not None:
                for static, new in zip(self._static, leaves, strict=True):
                    if isinstance(new, Tensor):
                        static.copy_(new)
                self._replay()
                return self._output
        before = _cache_layout(inputs["past_key_values"])
        output = self.forward(**inputs)
        self._kinds, self._replay = None, None
        # Other outputs, e.g. hidden states, are kept by `generate` without a copy. Pieces of a prompt are no steps.
        outputs = {name for name, value in output.items() if value is not None}
        ids = inputs.get("input_ids")
        is_step = outputs <= {"logits", "past_key_values"} and ids is not None and ids.shape[1] == 1
        if self._captures and is_step and before == _cache_layout(inputs["past_key_values"]):
            self._kinds = kinds
        return output

    def _capture(self, leaves: list, structure: TreeSpec) -> None:
        self._static = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        inputs = tree_unflatten(self._static, structure)
        try:
            self._replay, self._output = capture(lambda: self.forward(**inputs))
        except RuntimeError as error:
            logger.warning(
                "generate: the decode step runs without a CUDA graph, as it could not be captured: %s", error
            )
            self._captures = False


def capture(function: Callable) -> tuple[Callable[[], None], object]:
    """`(replay, result)`: a CUDA graph of `function`, which is not run, and what it returned, filled by a replay."""
    graph = torch.cuda.CUDAGraph()
    # Other threads of a server may allocate meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


def _has_foreign_hooks(model: nn.Module) -> bool:
    package = __name__.rpartition(".")[0]
    return any(
        not getattr(hook, "__module__", "").startswith(package)
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    )


def _kind(value) -> tuple | object:
    """Equal for values that one graph can serve: shape, dtype and strides of a tensor, identity of anything else."""
    return (value.shape, value.dtype, value.stride(), value.device) if isinstance(value, Tensor) else _plain(value)


def _cache_layout(cache: Cache) -> list:
    """Where a cache's tensors lie, and its plain values. A step that changes these cannot be replayed."""

    def layout(value):
        if isinstance(value, Tensor):
            return value.data_ptr()
        if isinstance(value, tuple | list | deque):
            return [layout(item) for item in value]
        if isinstance(value, dict):
            return {name: layout(item) for name, item in value.items()}
        return _plain(value)

    return [layout(vars(layer)) for layer in cache.layers]


def _plain(value):
    return value if isinstance(value, bool | int | float | str | None) else id(value)
