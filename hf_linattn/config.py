"""What replaces softmax in which layers: the `linear_attention_config` block of config.json.

An attention form = feature map x decay x window x normaliser (docs: README, "What is replaced"). The block is written
once by `linearize` and read again by every reload, so it is strict: an unknown or ill-typed entry is an error, since a
silently dropped one would load the weights into another function.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

FeatureMapName = Literal["hedgehog", "elu", "relu", "identity", "performer", "cosformer", "taylor", "t2r"]
DecayName = Literal["fixed", "scalar"]
DropoutForm = Literal["mean_preserving", "printed"]


@dataclass(frozen=True)
class LinearAttentionConfig:
    """The linear attention of a converted model.

    Args:
        feature_map (`str`, defaults to `"hedgehog"`): phi, applied to q and k after RoPE; one of `hedgehog`, `elu`,
            `relu`, `identity` (L2-normalised q and k with f(x) = a + b x), `performer`, `cosformer`, `taylor`, `t2r`.
        feature_map_kwargs (`dict`): options of the feature map, e.g. `{"feature_dim": 32}`.
        rotary_features (`bool`, defaults to `True`): `False` takes RoPE off q and k again before the feature map, so
            that far keys are told apart by what they are, not by where, and positions beyond those of training look
            like any other. The softmax window keeps RoPE.
        sinks (`int`, defaults to 0): number of first tokens of a sequence whose weight, once they are far, is learned
            on its own (hf_linattn/sinks.py), beside all other far keys.
        far_length (`int`, *optional*): tokens beyond which the weights of far keys shrink with their number, so that
            positions beyond those of training find no more far mass than training had.
        window (`int`, defaults to 64): number of most recent keys, the query's own included, that keep exact softmax.
            0 = no window: pure linear attention.
        layer_windows (`dict[int, int]`): layer index -> window, for layers whose window differs from `window`. Layers
            that recall gain from a long one, at a constant cost in memory.
        softmax_layers (`tuple[int, ...]`): indices of the layers left as they are.
        decay (`str`, *optional*): `None`, `"fixed"` (one learned decay per KV head) or `"scalar"` (per token and KV
            head, computed from the layer's hidden states).
        decay_kwargs (`dict`): options of the decay, e.g. `{"half_life": [256, 1024], "learned": False}`.
        normalize (`bool`, defaults to `True`): divide by the sum of the weights. A window requires it.
        a, b (`float`, *optional*): coefficients of f(x) = a + b x on x = phi(q).phi(k); `None` takes the feature map's
            own (1 and 1 for `identity`, else 0 and 1).
        dropout (`float`, *optional*): variance p of the dropout substitute (hf_linattn/dropout.py); `None` takes the
            model's own attention dropout.
        dropout_form (`str`, defaults to `"mean_preserving"`): `"mean_preserving"`, o (1 + psi), which keeps the mean
            that evaluation sees, or `"printed"`, (1 - p) o (1 + psi), as in the paper.

    Raises:
        ValueError: a value outside its range; the text names the argument and what is allowed.
    """

    feature_map: FeatureMapName = "hedgehog"
    feature_map_kwargs: dict[str, Any] = field(default_factory=dict)
    rotary_features: bool = True
    sinks: int = 0
    far_length: int | None = None
    window: int = 64
    layer_windows: dict[int, int] = field(default_factory=dict)
    softmax_layers: tuple[int, ...] = ()
    decay: DecayName | None = None
    decay_kwargs: dict[str, Any] = field(default_factory=dict)
    normalize: bool = True
    a: float | None = None
    b: float | None = None
    dropout: float | None = None
    dropout_form: DropoutForm = "mean_preserving"

    def __post_init__(self):
        _check_choice("feature_map", self.feature_map, get_args(FeatureMapName))
        _check_choice("decay", self.decay, (None, *get_args(DecayName)))
        _check_choice("dropout_form", self.dropout_form, get_args(DropoutForm))
        for name in ("feature_map_kwargs", "decay_kwargs"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}: expected a dict of options, got {getattr(self, name)!r}")
        if self.decay_kwargs and self.decay is None:
            raise ValueError(f"decay_kwargs: expected a decay beside them, got {self.decay_kwargs} with decay=None")
        if not isinstance(self.rotary_features, bool):
            raise ValueError(f"rotary_features: expected True or False, got {self.rotary_features!r}")
        if not _is_int(self.sinks) or self.sinks < 0:
            raise ValueError(f"sinks: expected an integer >= 0, got {self.sinks!r}")
        if self.far_length is not None and (not _is_int(self.far_length) or self.far_length < 1):
            raise ValueError(f"far_length: expected a number of tokens >= 1 or None, got {self.far_length!r}")
        if not _is_int(self.window) or self.window < 0:
            raise ValueError(f"window: expected an integer >= 0 (0 = no softmax window), got {self.window!r}")
        if self.window and not self.normalize:
            raise ValueError(
                "normalize: a softmax window shares its denominator with the linear part, so normalize must be True "
                f"when window > 0, got normalize={self.normalize!r} with window={self.window}; change one"
            )
        object.__setattr__(self, "layer_windows", _read_layer_windows(self.layer_windows, self.window))
        if isinstance(self.softmax_layers, (str, bytes)) or not hasattr(self.softmax_layers, "__iter__"):
            raise ValueError(f"softmax_layers: expected a list of layer indices, got {self.softmax_layers!r}")
        layers = list(self.softmax_layers)
        if not all(_is_int(i) and i >= 0 for i in layers):
            raise ValueError(f"softmax_layers: expected layer indices >= 0, got {layers}")
        object.__setattr__(self, "softmax_layers", tuple(sorted(set(layers))))
        for name in ("a", "b"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (int, float)):
                raise ValueError(f"{name}: expected a number or None, got {value!r}")
        if self.dropout is not None and not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout: expected a number in [0, 1) or None, got {self.dropout!r}")

    def window_of(self, layer: int) -> int:
        """Window of a converted layer."""
        return self.layer_windows.get(layer, self.window)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict, every field included so that later defaults cannot change a saved model."""
        return dataclasses.asdict(self) | {"softmax_layers": list(self.softmax_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LinearAttentionConfig":
        """Inverse of `to_dict`. Raises ValueError naming the nearest known key for an unknown one."""
        if isinstance(values, cls):
            return values
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                raise ValueError(f"linear_attention_config: unknown key {key!r}{hint}")
        return cls(**values)


def _read_layer_windows(windows: Any, default: int) -> dict[int, int]:
    """`windows` by ascending layer; JSON has turned the keys into strings."""
    if not isinstance(windows, dict):
        raise ValueError(f"layer_windows: expected a dict of layer index to window, got {windows!r}")
    found = {}
    for key, window in windows.items():
        layer = int(key) if isinstance(key, str) and key.isdecimal() else key
        if not _is_int(layer) or layer < 0 or not _is_int(window) or window < 1:
            raise ValueError(
                f"layer_windows: expected layer indices >= 0 and windows >= 1, got {key!r}: {window!r}; correct it"
            )
        found[layer] = window
    if found and not default:
        raise ValueError(
            "layer_windows: expected {} together with window=0, since layers either all share their denominator with "
            f"a window or none does, got {found}; set window to 1 or more"
        )
    return dict(sorted(found.items()))


def _check_choice(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
