"""The converted layers of a model: attaching them, choosing what they run, and proving that they are used.

Each converted attention module gets its own shallow copy of the config naming our AttentionInterface entry; the other
layers, and mask building, keep the implementation the model was loaded with.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_linattn.attention import ATTENTION_NAME, LinearAttention
from hf_linattn.cache import convert_cache
from hf_linattn.config import LinearAttentionConfig

CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")

# A prompt this long runs through every part of the attention function and stays inside any sensible window.
PROBE_LENGTH = 8


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Every self-attention module of a decoder, by layer index."""
    return {
        m.layer_idx: m
        for m in model.modules()
        if getattr(m, "layer_idx", None) is not None and type(m).__name__.endswith("Attention")
    }


def linear_attention_modules(model: nn.Module) -> dict[int, LinearAttention]:
    """The `LinearAttention` that runs in every converted layer, by layer index; looks through PEFT's wrappers."""
    # PEFT's `modules_to_save` keeps the original beside its copy, in this order; the copy is what runs and trains.
    return {
        i: [x for x in m.linear_attention.modules() if isinstance(x, LinearAttention)][-1]
        for i, m in attention_modules(model).items()
        if hasattr(m, "linear_attention")
    }


def stateful_layers(model: nn.Module) -> list[int]:
    """Layers whose cache entry is a state right now: the converted ones, but none within `softmax_attention`."""
    return [
        i
        for i, m in attention_modules(model).items()
        if m.config._attn_implementation == ATTENTION_NAME and hasattr(m, "linear_attention")
    ]


def attach(model: PreTrainedModel) -> None:
    """Give every converted layer its `LinearAttention`, dispatch and cache hook; the form is in the config.

    Runs in the constructor of converted classes and in `linearize`.
    """
    config = LinearAttentionConfig.from_dict(model.config.linear_attention_config)
    modules = attention_modules(model)
    for name in ("softmax_layers", "layer_windows"):
        if unknown := sorted(set(getattr(config, name)) - set(modules)):
            raise ValueError(f"{name}: {unknown} are not layers of this model, which has 0 to {max(modules)}")
    model.softmax_implementation = model.config._attn_implementation
    for i, module in modules.items():
        if i in config.softmax_layers:
            continue
        module.linear_attention = _build(config, model.config, module, config.window_of(i))
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = ATTENTION_NAME
        module.register_forward_pre_hook(_give_state, with_kwargs=True)
    _route_masks(model)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`."""
    for module in attention_modules(model).values():
        if hasattr(module, "linear_attention"):
            del module.linear_attention
            module.config = model.config
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook is _give_state:
                    module._forward_pre_hooks.pop(key)
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
    if hasattr(model, "softmax_implementation"):
        model.config._attn_implementation_internal = model.softmax_implementation
        del model.softmax_implementation


def _build(config: LinearAttentionConfig, model_config, module: nn.Module, window: int) -> LinearAttention:
    num_heads = model_config.num_attention_heads
    # Of the module, not the config: some configs carry a num_key_value_heads that their model does not read.
    num_kv_heads = num_heads // getattr(module, "num_key_value_groups", 1)
    head_dim = getattr(module, "head_dim", None) or model_config.hidden_size // num_heads
    with torch.device(next(module.parameters()).device):
        return LinearAttention(
            config,
            num_heads,
            num_kv_heads,
            head_dim,
            model_config.hidden_size,
            window,
            getattr(model_config, "max_position_embeddings", None),
        )


def _give_state(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook: cache layer, hidden states and RoPE's angles reach the attention function by keyword."""
    cache = next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
    # Softmax in a converted layer (softmax_attention) keeps the ordinary cache.
    if cache is not None and hasattr(cache, "layers") and module.config._attn_implementation == ATTENTION_NAME:
        layers = convert_cache(cache, [module.layer_idx])
        kwargs["linattn_cache"] = layers.layers[module.layer_idx]
    if module.linear_attention.gate is not None:
        kwargs["linattn_hidden_states"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if not module.linear_attention.rotary_features:
        kwargs["linattn_position_embeddings"] = kwargs.get("position_embeddings")
    return args, kwargs


def _route_masks(model: PreTrainedModel) -> None:
    """Masks are built once for the model. Softmax layers need theirs; without any, 2-D padding masks replace the
    N x N masks that nothing would read."""
    has_softmax = len(linear_attention_modules(model)) < len(attention_modules(model))
    model.config._attn_implementation_internal = model.softmax_implementation if has_softmax else ATTENTION_NAME


@contextmanager
def dispatch_to(model: nn.Module, name: str, layers: Collection[int] | None = None) -> Iterator[None]:
    """Within: converted layers call the AttentionInterface entry `name`, with the masks of the model's own softmax.

    `layers` are the indices of those that do, by default all; the others stay linear.
    """
    model = _converted_model(model)
    modules = [
        m
        for i, m in attention_modules(model).items()
        if hasattr(m, "linear_attention") and (layers is None or i in layers)
    ]
    before = model.config._attn_implementation_internal
    try:
        model.config._attn_implementation_internal = model.softmax_implementation
        for module in modules:
            module.config._attn_implementation_internal = name
        yield
    finally:
        model.config._attn_implementation_internal = before
        for module in modules:
            module.config._attn_implementation_internal = ATTENTION_NAME


@contextmanager
def softmax_attention(model: nn.Module, layers: Collection[int] | None = None) -> Iterator[None]:
    """Within: converted layers, or those in `layers`, run the softmax attention they had.

    For all of them, the same weights give the teacher.
    """
    with dispatch_to(model, _converted_model(model).softmax_implementation, layers):
        yield


@contextmanager
def window_only(model: nn.Module) -> Iterator[None]:
    """Within: converted layers keep their softmax window and lose the linear part: the control of every evaluation.

    Raises:
        ValueError: a model without window, which would attend to nothing.
    """
    modules = linear_attention_modules(_converted_model(model)).values()
    if not all(m.window for m in modules):
        raise ValueError(
            "window_only: this model has no softmax window (window=0), so nothing would be left to attend to"
        )
    try:
        for module in modules:
            module.linear_branch = False
        yield
    finally:
        for module in modules:
            module.linear_branch = True


@contextmanager
def windows_of_at_most(model: nn.Module, longest: int | None) -> Iterator[None]:
    """Within: windows of more than `longest` tokens are cut to it; None leaves all as they are.

    A window is no parameter: what a layer learns beside a short one holds beside a longer one.
    """
    modules = linear_attention_modules(_converted_model(model)).values()
    windows = [module.window for module in modules]
    try:
        for module in modules:
            module.window = module.window if longest is None else min(module.window, longest)
        yield
    finally:
        for module, window in zip(modules, windows, strict=True):
            module.window = window


def set_attention_dropout(model: nn.Module, p: float) -> None:
    """Set p of the dropout substitute in every converted layer; a training loop anneals it to 0 (dropout.py)."""
    if not 0 <= p < 1:
        raise ValueError(f"p: expected a number in [0, 1), got {p!r}")
    for module in linear_attention_modules(model).values():
        module.dropout.p = p


def _converted_model(model: nn.Module) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module, "softmax_implementation"):
            return module
    raise ValueError("model: expected a converted model; call hf_linattn.linearize(model, config) first")


def probe_conversion(model: PreTrainedModel) -> None:
    """Run a few tokens and check what a conversion must not get wrong.

    Every converted layer calls our attention function; later tokens do not change earlier logits; and, since a prompt
    shorter than the window must be exactly the teacher, logits equal the softmax ones.

    Raises:
        ValueError: a check fails; says which.
    """
    modules = linear_attention_modules(model)
    calls: dict[int, int] = dict.fromkeys(modules, 0)
    hooks = [m.register_forward_pre_hook(lambda *_, i=i: calls.update({i: calls[i] + 1})) for i, m in modules.items()]
    ids = _probe_tokens(model)
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            if silent := sorted(i for i, n in calls.items() if n == 0):
                raise ValueError(_refusal(model, f"its layers {silent} never call the attention function"))
            other = model(input_ids=changed, use_cache=False).logits[0].float()
            with softmax_attention(model):
                teacher = model(input_ids=ids, use_cache=False).logits[0].float()
            exact = all(m.window >= PROBE_LENGTH for m in modules.values())
            if exact:
                # Without the linear part, so that a teacher whose own sliding window is shorter still compares.
                with window_only(model):
                    inside = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if not torch.isfinite(logits).all():
        raise ValueError(_refusal(model, "the converted model gives NaN or infinite logits on a short prompt"))
    if (leak := _relative_change(other[:-1], logits[:-1])) > tolerance:
        raise ValueError(_refusal(model, f"a later token changes earlier logits by {leak:.1%}: it is not causal"))
    if exact and (gap := _relative_change(inside, teacher)) > tolerance:
        why = f"inside the window its logits differ by {gap:.1%}, so its attention is not softmax(scale q.k)"
        raise ValueError(_refusal(model, why))


def _relative_change(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


def _probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    """`[1, PROBE_LENGTH]`, spread over the vocabulary: its first and last entries are special tokens, on whose huge
    activations bf16 rounding alone moves logits by more than the probe allows."""
    spread = torch.linspace(0, model.config.vocab_size - 1, PROBE_LENGTH + 2).long()[1:-1]
    return spread.unsqueeze(0).to(model.get_input_embeddings().weight.device)


def _refusal(model: PreTrainedModel, why: str) -> str:
    model_type = getattr(model.config, "base_model_type", None) or model.config.model_type
    return (
        f"model: cannot convert a {model_type!r} model: {why}. Convertible models route every layer's attention "
        "through Transformers' AttentionInterface, e.g. llama, mistral, qwen2, qwen3, gemma2, phi3, gpt_neox, opt"
    )
