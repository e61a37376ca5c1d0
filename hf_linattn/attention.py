"""The attention of a converted layer: the module that holds its new parameters, and the AttentionInterface entries.

One call: the model's attention module -> cache.update -> `linear_attention_forward` (registered as "hf_linattn") ->
`module.linear_attention` -> feature maps -> hf_linattn.kernels. Prefill and training run the sequence op, a single
token with a cache runs the step op, which updates the state in place.
"""

import sys

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import initialization as init

from hf_linattn.cache import LinearAttentionCacheLayer
from hf_linattn.config import LinearAttentionConfig
from hf_linattn.dropout import AttentionDropout
from hf_linattn.feature_maps import build_feature_map
from hf_linattn.gates import build_gate
from hf_linattn.kernels import (
    hedgehog_step,
    init_state,
    init_window_state,
    linear_attention,
    linear_attention_step,
    window_linear_attention,
    window_linear_attention_step,
)
from hf_linattn.kernels.dispatch import autocast_off
from hf_linattn.sequence import pack, sequence_layout, unpack
from hf_linattn.sinks import SinkKeys, SinkQueries

ATTENTION_NAME = "hf_linattn"

# exp(-1e4) is 0 in float32 whatever it is compared with, and unlike -inf it cannot become NaN.
SWITCHED_OFF = -1e4


class LinearAttention(nn.Module):
    """Everything a converted layer adds, in one module, so that FSDP, PEFT and checkpoints see one unit; float32.

    Args:
        config (`LinearAttentionConfig`): the attention form.
        num_heads, num_kv_heads, head_dim (`int`): of the layer.
        hidden_size (`int`): width of the layer's input, read by a data-dependent gate.
        window (`int`): of this layer.
        max_positions (`int`, *optional*): the model's longest sequence, read by position-dependent feature maps.
    """

    def __init__(
        self,
        config: LinearAttentionConfig,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int,
        window: int,
        max_positions: int | None = None,
    ):
        super().__init__()
        self.window, self.normalize = window, config.normalize
        self.rotary_features = config.rotary_features
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        # The control of every evaluation: False leaves the softmax window alone (hf_linattn.window_only).
        self.linear_branch = True
        options = {"max_positions": max_positions, "options": config.feature_map_kwargs}
        self.feature_map_q = build_feature_map(config.feature_map, num_heads, head_dim, **options)
        self.feature_map_k = build_feature_map(config.feature_map, num_kv_heads, head_dim, **options)
        self.a = self.feature_map_q.default_a if config.a is None else float(config.a)
        self.b = self.feature_map_q.default_b if config.b is None else float(config.b)
        if self.a and config.far_length is not None:
            raise ValueError(
                f"far_length: expected None with a constant term, whose weight does not shrink, got "
                f"{config.far_length} with a={self.a}; set a to 0"
            )
        self.sinks = config.sinks
        if config.sinks or config.far_length is not None:
            self.feature_map_q = SinkQueries(self.feature_map_q, config.sinks, config.far_length)
        if config.sinks:
            self.feature_map_k = SinkKeys(self.feature_map_k, config.sinks)
        if self.window:
            # Natural log of the weight of the linear part beside exp(scale q.k), per query head.
            self.log_scale = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.gate = build_gate(config.decay, num_kv_heads, hidden_size, config.decay_kwargs) if config.decay else None
        self.dropout = AttentionDropout(config.dropout, config.dropout_form)

    def reset_parameters(self) -> None:
        """Initial values, in place; parameters already loaded from a checkpoint are left alone."""
        for module in (self.feature_map_q, self.feature_map_k, self.gate):
            if module is not None:
                module.reset_parameters()
        if self.window:
            init.zeros_(self.log_scale)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        scaling: float,
        position_ids: Tensor | None = None,
        hidden_states: Tensor | None = None,
        cache_layer: LinearAttentionCacheLayer | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        feature_inputs: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Causal attention over the new tokens and the cached state.

        Args:
            query: `[B, H, T, D]`, RoPE applied. key, value: `[B, H_kv, T, D]`, the new tokens only.
            attention_mask: `[B, S]` or `[B, 1, T, S]`; only padding is read from it (sequence.py).
            scaling: the model's softmax scale.
            position_ids: `[B or 1, T]`; resets start a new sequence.
            hidden_states: `[B, T, hidden]`, for a data-dependent gate.
            cache_layer: where the state lives; None in training.
            sliding_window: the teacher's own window, which ours must not exceed to equal it on short prompts.
            softcap: the teacher's tanh cap on logits.
            dropout: the model's attention dropout in training.
            feature_inputs: query and key as the feature maps see them, from the function of this name; None for
                `query` and `key` as they are.

        Returns:
            `[B, T, H, V]`, contiguous, in value's dtype.
        """
        query, key, value = in_autocast_dtype(query, key, value)
        inputs = (query, key) if feature_inputs is None else in_autocast_dtype(*feature_inputs)
        with autocast_off(query.device):
            q_len = query.shape[2]
            past = 0 if cache_layer is None else cache_layer.get_seq_length() - q_len
            is_step = q_len == 1 and cache_layer is not None
            features = self._features(query, key, value, inputs, scaling, position_ids, past, hidden_states, is_step)
            options = self._options(scaling, sliding_window, softcap)
            if is_step:
                o = self._decode(features, options, cache_layer)
            else:
                prefill = self._prefill if cache_layer is None else self._prefill_outside_graphs
                o = prefill(features, options, cache_layer, attention_mask, position_ids, past)
        return self.dropout(o.to(value.dtype), dropout).contiguous()

    def _features(
        self, query, key, value, feature_inputs, scaling, position_ids, past, hidden_states, is_step
    ) -> dict[str, Tensor]:
        """The tensors of the op, `[B, T, H, *]` views; `[B, H, *]` for a step."""
        positions = position_ids
        if positions is None or positions.ndim != 2:
            positions = (torch.arange(query.shape[2], device=query.device) + past).unsqueeze(0)
        q, k, v = (x[:, :, 0] if is_step else x.transpose(1, 2) for x in (query, key, value))
        phi_q, phi_k = self._apply_maps(*feature_inputs, positions, scaling**0.5, is_step)
        tensors = (
            {"q": q, "k": k, "v": v, "phi_q": phi_q, "phi_k": phi_k}
            if self.window
            else {"q": phi_q, "k": phi_k, "v": v}
        )
        if self.gate is not None:
            gates = self.gate(hidden_states)
            tensors |= {n: t[:, 0] if is_step and n == "g" else t for n, t in gates.items()}
        return tensors

    def _apply_maps(self, query, key, positions, root, is_step) -> tuple[Tensor, Tensor]:
        """phi_q and phi_k of `query` and `key`, as the op takes them."""
        if is_step and (q_map := self.feature_map_q.for_step()) is not None:
            k_map = self.feature_map_k.for_step()
            step = hedgehog_step(query[:, :, 0], key[:, :, 0], positions[:, 0], q_map, k_map, scale=root)
            if step is not None:
                return step
        return tuple(
            x[:, :, 0] if is_step else x.transpose(1, 2)
            for x in (
                _in_dtype(self.feature_map_q(query * root, positions), query.dtype),
                _in_dtype(self.feature_map_k(key * root, positions), key.dtype),
            )
        )

    def _options(self, scaling, sliding_window, softcap) -> dict:
        if not self.window:
            return {"a": self.a, "b": self.b, "normalize": self.normalize}
        # A model cast as a whole, `model.to(torch.bfloat16)`, casts its parameters; the op wants float32.
        log_scale = self.log_scale.float()
        if not self.linear_branch:
            log_scale = torch.full_like(log_scale, SWITCHED_OFF)
        return {
            "window": self.window if sliding_window is None else min(self.window, sliding_window),
            "scale": scaling,
            "softcap": softcap,
            "log_scale": log_scale,
            "a": self.a,
            "b": self.b,
        }

    def _attend(self, tensors, options, state=None, cu_seqlens=None, output_final_state=False):
        op = window_linear_attention if self.window else linear_attention
        return op(
            **tensors, **options, initial_state=state, cu_seqlens=cu_seqlens, output_final_state=output_final_state
        )

    def _prefill(self, tensors, options, cache_layer, attention_mask, position_ids, past) -> Tensor:
        batch, q_len = tensors["q"].shape[:2]
        state = None if cache_layer is None else cache_layer.load()
        layout = sequence_layout(
            attention_mask, position_ids, (batch, q_len), tensors["q"].device, past, has_state=state is not None
        )
        keep = cache_layer is not None
        if layout is None:
            o, final_state = self._attend(tensors, options, state, output_final_state=keep)
        else:
            packed = {n: t if n == "g_gamma" else pack(t, layout) for n, t in tensors.items()}
            o, final_state = self._attend(packed, options, state, layout.cu_seqlens, keep)
            o = unpack(o, layout, (batch, q_len))
            if keep and layout.final is not None:
                final_state = type(final_state)(
                    *(t if t is None or t.ndim == 0 else t[layout.final] for t in final_state)
                )
        if keep:
            # Undoing tokens of a padded batch would need per-row lengths; assisted decoding has one row.
            cache_layer.record(state, q_len, None if layout is not None else self._replay(tensors, options, state))
            cache_layer.store(final_state)
        return o

    # `generate` compiles a prompt read in pieces into a static cache. A state made there would belong to CUDA graphs,
    # whose next replay writes over it.
    _prefill_outside_graphs = torch.compiler.disable(_prefill)

    def _replay(self, tensors, options, state):
        def advance(keep: int):
            kept = {n: t if n == "g_gamma" else t[:, :keep] for n, t in tensors.items()}
            return self._attend(kept, options, state, output_final_state=True)[1]

        return advance

    def _decode(self, tensors, options, cache_layer) -> Tensor:
        state = cache_layer.load()
        if state is None:
            cache_layer.store(self._empty_state(tensors, options))
            state = cache_layer.load()
        if cache_layer.record_past:
            cache_layer.record(state, 1, lambda keep: cache_layer.state)
        step = window_linear_attention_step if self.window else linear_attention_step
        # The ring knows its length.
        options.pop("window", None)
        return step(**tensors, state=state, **options).unsqueeze(1)

    def _empty_state(self, tensors, options):
        k, v = tensors["k"], tensors["v"]
        batch, heads = k.shape[:2]
        if not self.window:
            return init_state(
                batch, heads, k.shape[-1], v.shape[-1], device=k.device, a=self.a, normalize=self.normalize
            )
        return init_window_state(
            batch,
            heads,
            k.shape[-1],
            tensors["phi_k"].shape[-1],
            v.shape[-1],
            window=options["window"],
            a=self.a,
            decay=self.gate is not None,
            dtype=k.dtype,
            device=k.device,
        )

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, window={self.window}"


def _in_dtype(features: Tensor, dtype: torch.dtype) -> Tensor:
    # The exponentials in some maps reach beyond float16; its largest number is still a weight, infinity is none.
    if dtype == torch.float16:
        features = features.clamp_max(torch.finfo(dtype).max)
    return features.to(dtype)


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`tensors`, all on one device, in the dtype of the autocast they are under; unchanged outside of one."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)


def feature_inputs(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict) -> tuple[Tensor, Tensor]:
    """`query` and `key` as the feature maps of `module` see them: with RoPE, or turned back by the same angle.

    `kwargs` are those of the attention function. The model's own function turns back, however it pairs dimensions.

    Raises:
        ValueError: without `rotary_features`, for a model without rotary embeddings.
    """
    # SmolLM3 has layers without RoPE.
    if module.linear_attention.rotary_features or not getattr(module, "use_rope", True):
        return query, key
    rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    angles = kwargs.get("linattn_position_embeddings")
    if rotate is None or angles is None:
        raise ValueError(
            f"rotary_features: expected True for {type(module).__name__}, which has no rotary embedding, got False"
        )
    cos, sin = angles
    # Some models turn the first dimensions of a head only.
    turned = rotate(query[..., : cos.shape[-1]], key[..., : cos.shape[-1]], cos, -sin)
    return tuple(torch.cat([x, y[..., cos.shape[-1] :]], -1) for x, y in zip(turned, (query, key), strict=True))


def linear_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """The function behind `attn_implementation="hf_linattn"`: `[B, H, T, D]` in, `([B, T, H, V], None)` out.

    `kwargs` is Transformers' contract: whatever reached the attention module arrives here. What changes the attention
    is read or refused; the rest (e.g. `use_cache`) does not concern it.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            "cache: a linear-attention layer has no paged key-value cache, so generate_batch() and continuous "
            "batching cannot serve this model; use generate()"
        )
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError(
            "s_aux: attention sinks are not supported; leave this layer softmax (softmax_layers)"
        )
    o = module.linear_attention(
        query,
        key,
        value,
        attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        position_ids=kwargs.get("position_ids"),
        hidden_states=kwargs.get("linattn_hidden_states"),
        cache_layer=kwargs.get("linattn_cache"),
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        dropout=dropout,
        feature_inputs=feature_inputs(module, query, key, kwargs),
    )
    return o, None


def linear_attention_mask(*, q_length: int, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """The mask a model of converted layers only hands to them: the 2-D padding mask, or None. Causality is built in.

    Without this entry Transformers would pass no mask at all, and padding would be read as text.
    """
    return None if q_length == 1 else attention_mask


AttentionInterface.register(ATTENTION_NAME, linear_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, linear_attention_mask)
