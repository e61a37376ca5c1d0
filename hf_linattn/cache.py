"""The state of a converted layer inside Transformers' own `Cache`: constant size, whatever the context.

The one hidden edge of the design is here. Transformers hands the cache to the attention module, which calls
`cache.update(k, v)` and passes only the result to the attention function. So `update` returns the new k and v
untouched, a forward pre-hook (linearize.py) gives the cache layer to the attention function, and that one reads and
stores the state.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer, StaticLayer

# Assisted decoding undoes at most a round of drafted tokens, each drafted by one forward.
MAX_RECORDED_FORWARDS = 64


class _Forward(NamedTuple):
    length: int
    before: tuple | None
    replay: Callable[[int], tuple]


class LinearAttentionCacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """Holds one layer's `LinearAttentionState` or `WindowLinearAttentionState` (fp32 sums; window keys and values).

    Args:
        max_cache_len (`int`, *optional*): length of the static cache layer this one replaces. The state does not need
            it; the masks of a static cache are sized by it.
    """

    is_sliding, is_compileable, is_croppable, supports_early_init = False, True, True, False

    def __init__(self, max_cache_len: int | None = None):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self)
        self.max_cache_len = max_cache_len
        # A tensor in a static cache, as in Transformers' StaticLayer: an int would recompile the decode step.
        self.seen: int | Tensor = 0 if max_cache_len is None else torch.tensor(0, dtype=torch.int64)
        self.state: tuple | None = None
        self._history: deque[_Forward] = deque(maxlen=MAX_RECORDED_FORWARDS)

    # What Transformers calls -----------------------------------------------------------------------------------------
    @torch.compiler.disable
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if isinstance(self.seen, Tensor):
            self.seen = self.seen.to(self.device)
            torch._dynamo.mark_static_address(self.seen)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Counts the new tokens and returns their k and v `[B, H_kv, T, D]` as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int | Tensor:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.seen + query_length if self.max_cache_len is None else self.max_cache_len), 0

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        self.seen = self.seen.zero_() if isinstance(self.seen, Tensor) else 0
        self.has_previous_state[0] = False
        self._history.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `tokens_to_remove` tokens (given negative), which recorded forwards must have added.

        Raises:
            RuntimeError: not recorded (`activate_past_recording`), or further back than the record: a sum cannot
                forget what it does not remember separately.
        """
        remove = abs(int(tokens_to_remove))
        recorded = sum(forward.length for forward in self._history)
        if remove > recorded:
            raise RuntimeError(
                f"crop: cannot remove {remove} tokens from a linear-attention state, of which the last {recorded} are "
                "recorded; call cache.activate_past_recording() before the forwards to undo, or start anew"
            )
        self.seen -= remove
        while remove:
            forward = self._history.pop()
            if forward.length > remove:
                keep = forward.length - remove
                self.state = forward.replay(keep)
                self._history.append(forward._replace(length=keep))
                remove = 0
            else:
                self.state = forward.before
                remove -= forward.length
        self.has_previous_state[0] = self.state is not None

    def offload(self) -> None:
        """Stays on the device: `Cache.update` offloads before the attention function runs, and the state is small."""

    def prefetch(self) -> None:
        """See `offload`."""

    # What the attention function calls -------------------------------------------------------------------------------
    def load(self) -> tuple | None:
        """The state of the tokens seen before this forward, or None."""
        return self.state if self.has_previous_state[0] else None

    def store(self, state: tuple) -> None:
        """Replace the state. A state of the same shapes is copied in place, which compiled decoding relies on."""
        state = type(state)(*(None if t is None else t.detach() for t in state))
        if self.state is not None and not self.record_past and _same_shapes(self.state, state):
            for old, new in zip(self.state, state, strict=True):
                if old is not None and old is not new:
                    old.copy_(new)
        else:
            self.state = state
            if not torch.compiler.is_compiling():
                for t in state:
                    if t is not None:
                        torch._dynamo.mark_static_address(t)
        self.has_previous_state[0] = True

    def record(self, before: tuple | None, length: int, replay: Callable[[int], tuple] | None) -> None:
        """With `activate_past_recording`: keep what `crop` needs to undo a forward of `length` tokens.

        Args:
            before: the state it started from.
            replay: gives the state after the first n of its tokens; None forgets all records (padded batches).
        """
        if not self.record_past:
            return
        if replay is None:
            self._history.clear()
            return
        before = None if before is None else type(before)(*(None if t is None else t.clone() for t in before))
        self._history.append(_Forward(length, before, replay))

    def _map(self, f: Callable[[Tensor], Tensor]) -> None:
        def apply(state):
            # `slot` is one position for all rows; every other member is [N, ...].
            return None if state is None else type(state)(*(t if t is None or t.ndim == 0 else f(t) for t in state))

        self.state = apply(self.state)
        self._history.clear()


def _same_shapes(old: tuple, new: tuple) -> bool:
    return type(old) is type(new) and all(
        (a is None) == (b is None) and (a is None or (a.shape == b.shape and a.dtype == b.dtype))
        for a, b in zip(old, new, strict=True)
    )


def convert_cache(cache: Cache, layer_indices: Iterable[int]) -> Cache:
    """Put a `LinearAttentionCacheLayer` at each of `layer_indices`, in place.

    Raises:
        ValueError: a layer already holds softmax keys and values.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    for i in layer_indices:
        while len(cache.layers) <= i and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[i]
        if isinstance(layer, LinearAttentionCacheLayer):
            continue
        # A static layer that is not initialised reports 0 as an int; an initialised one is filled.
        if layer.is_initialized and int(layer.get_seq_length()) > 0:
            raise ValueError(
                f"past_key_values: layer {i} already holds softmax keys and values, which cannot become a linear-"
                "attention state; start from an empty cache"
            )
        cache.layers[i] = LinearAttentionCacheLayer(layer.max_cache_len if isinstance(layer, StaticLayer) else None)
    return cache
