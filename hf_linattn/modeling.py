"""Configuration and model classes of converted models, made on demand, and `linearize`.

One `model_type`, "hf_linattn", plus `base_model_type` (e.g. "llama") and the `linear_attention_config` block. For each
base type, `LinAttnLlamaConfig` and `LinAttnLlamaForCausalLM` are subclasses of the originals: a reload either gets the
converted model or fails, never softmax with left-over weights.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_linattn.attention import LinearAttention
from hf_linattn.cache import convert_cache
from hf_linattn.config import LinearAttentionConfig
from hf_linattn.decoding import CapturedStep, capture_config
from hf_linattn.layers import (
    attach,
    attention_modules,
    detach,
    linear_attention_modules,
    probe_conversion,
    stateful_layers,
)
from hf_linattn.remote_code import REMOTE_FILE, write_remote_code

MODEL_TYPE = "hf_linattn"
CLASS_PREFIX = "LinAttn"


def linearize(model: PreTrainedModel, config: LinearAttentionConfig | dict, *, probe: bool = True) -> PreTrainedModel:
    """Replace softmax attention by linear attention in every layer but `config.softmax_layers`, in place.

    Args:
        model (`PreTrainedModel`): a decoder with a language-model head, on any device and in any dtype.
        config (`LinearAttentionConfig` or `dict`): the attention form.
        probe (`bool`, defaults to `True`): run a few tokens and check the result (`layers.probe_conversion`); skip it
            only for a model without memory for its weights (meta device).

    Returns:
        `model` itself, its class now e.g. `LinAttnLlamaForCausalLM`. Its feature maps are initialised, not trained.

    Raises:
        ValueError: the model cannot be converted (the text says why), is converted already, or `softmax_layers` are
            not layers of it. The model is left as it was.
    """
    config = LinearAttentionConfig.from_dict(config)
    if isinstance(model, ConvertedModelMixin):
        raise ValueError("model: is converted already; load the original checkpoint to convert it in another way")
    base_type = model.config.model_type
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not isinstance(
        model, MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    ):
        raise ValueError(
            f"model: expected a causal language model that AutoModelForCausalLM loads, got {type(model).__name__} "
            f"(model_type {base_type!r})"
        )
    if not model._can_set_attn_implementation() or not attention_modules(model):
        raise ValueError(
            f"model: cannot convert a {base_type!r} model: it does not route its attention through Transformers' "
            "AttentionInterface (as of now neither do falcon, gptj and bloom). Convertible: llama, mistral, "
            "qwen2, qwen3, gemma, phi, phi3, olmo2, granite, gpt_neox, gpt2, opt and others"
        )
    config_class, model_class = converted_classes(base_type)
    with _restored_on_failure(model):
        model.config.__class__, model.__class__ = config_class, model_class
        model.config.model_type, model.config.base_model_type = MODEL_TYPE, base_type
        model.config.linear_attention_config = config.to_dict()
        model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict or ()) | {"linear_attention"}
        attach(model)
        model._reset_linear_attention()
        if probe:
            probe_conversion(model)
    return model


@contextmanager
def _restored_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """Within: a failure leaves the model as it was found."""
    classes, config_values, kept = type(model), dict(vars(model.config)), model._keep_in_fp32_modules_strict
    config_class, done = type(model.config), False
    try:
        yield
        done = True
    finally:
        if not done:
            detach(model)
            model.__class__, model.config.__class__ = classes, config_class
            vars(model.config).clear()
            vars(model.config).update(config_values)
            model._keep_in_fp32_modules_strict = kept


class ConvertedModelMixin:
    """What a converted class adds to its base: construction from config, cache, saving."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        attach(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in Transformers, but strict.

        Raises:
            ValueError: the weights lack a parameter, or have one this model does not. Transformers would initialise
                the former at random and drop the latter: another model under the same name.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                keys = ", ".join(sorted(map(str, info[kind]))[:5])
                raise ValueError(
                    f"{pretrained_model_name_or_path}: weights and config.json do not belong together: "
                    f"{len(info[kind])} {kind.replace('_', ' ')}, e.g. {keys}; convert or download the model again"
                )
        return (model, info) if output_loading_info else model

    def initialize_weights(self):
        # Not `_init_weights`: Transformers asks the inner model's, which does not know our modules. Parameters found
        # in the checkpoint are flagged and left alone.
        self._reset_linear_attention()
        super().initialize_weights()

    def _reset_linear_attention(self) -> None:
        for module in linear_attention_modules(self).values():
            module.reset_parameters()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if (cache := model_kwargs.get("past_key_values")) is not None:
            convert_cache(cache, stateful_layers(self))
            if generation_config.is_assistant:
                # Transformers did this before our layers were there to hear it.
                cache.activate_past_recording()

    def get_compiled_call(self, compile_config: CompileConfig | None):
        """As in Transformers; on a GPU, `generate` captures its decode step in a CUDA graph (see `decoding`)."""
        config = capture_config(self, compile_config)
        if config is None:
            return super().get_compiled_call(compile_config)
        return CapturedStep(super().get_compiled_call(config))

    def save_pretrained(self, save_directory: str | os.PathLike, *args, is_main_process: bool = True, **kwargs):
        """As in Transformers, plus the code file for `trust_remote_code=True`."""
        stem = REMOTE_FILE.removesuffix(".py")
        self.config.auto_map = {
            "AutoConfig": f"{stem}.{type(self.config).__name__}",
            "AutoModelForCausalLM": f"{stem}.{type(self).__name__}",
        }
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_remote_code(save_directory)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing: `save_pretrained` writes the code file and `auto_map` itself."""


class ConvertedConfigMixin:
    """What a converted config adds to its base: strictness, and no copying of code by Transformers."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        LinearAttentionConfig.from_dict(config_dict.get("linear_attention_config") or {})
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """See `ConvertedModelMixin.register_for_auto_class`."""


class LinAttnConfig(PreTrainedConfig):
    """Registered as "hf_linattn"; `from_dict` gives the class for the config's `base_model_type`."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        base_type = config_dict.get("base_model_type")
        if base_type not in CONFIG_MAPPING:
            raise ValueError(
                f"config.json: base_model_type: expected a model type of this Transformers version, got "
                f"{base_type!r}; upgrade transformers, or convert the model again"
            )
        return converted_classes(base_type)[0].from_dict(config_dict, **kwargs)


# By model class, not by type: `llama` and `code_llama` share one.
_converted_classes: dict[type, tuple[type, type]] = {}


def converted_classes(base_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """`(LinAttn<Base>Config, LinAttn<Base>ForCausalLM)` of a Transformers model type, e.g. "llama"."""
    base_config = CONFIG_MAPPING[base_type]
    base_model = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    if base_model not in _converted_classes:
        config_class = type(
            CLASS_PREFIX + base_config.__name__,
            (ConvertedConfigMixin, base_config),
            {
                "__module__": __name__,
                "__annotations__": {"base_model_type": str, "linear_attention_config": "dict | None"},
                "model_type": MODEL_TYPE,
                "base_model_type": base_type,
                "linear_attention_config": None,
            },
        )
        keep_in_fp32 = getattr(base_model, "_keep_in_fp32_modules_strict", None) or ()
        model_class = type(
            CLASS_PREFIX + base_model.__name__,
            (ConvertedModelMixin, base_model),
            {
                "__module__": __name__,
                "config_class": config_class,
                "_can_set_attn_implementation_cached_value": True,
                # An FSDP group of its own: float32 parameters cannot share one with a bf16 layer.
                "_no_split_modules": [*(base_model._no_split_modules or ()), LinearAttention.__name__],
                "_keep_in_fp32_modules_strict": {*keep_in_fp32, "linear_attention"},
            },
        )
        _register_classes(config_class, model_class, base_model, base_type)
        _converted_classes[base_model] = (config_class, model_class)
    return _converted_classes[base_model]


def _register_classes(config_class, model_class, base_model, base_type) -> None:
    # Checkpoints of some types are stored in another layout (fused experts, embed_out); Transformers looks the
    # conversion up by class name or type, and ours are new ones.
    mapping = get_checkpoint_conversion_mapping(base_model.__name__) or get_checkpoint_conversion_mapping(base_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)
    # Picklable by name; and known as causal language models to pipelines and lm-eval.
    globals().update({config_class.__name__: config_class, model_class.__name__: model_class})
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MODEL_TYPE, model_class.__name__)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def __getattr__(name: str):
    """`auto_map` names classes such as LinAttnLlamaForCausalLM; they are made when asked for."""
    if name.startswith(CLASS_PREFIX):
        base_name = name.removeprefix(CLASS_PREFIX)
        for names in (CONFIG_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            for model_type, class_name in names.items():
                if class_name == base_name and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                    return next(c for c in converted_classes(model_type) if c.__name__ == name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The copy beside one repository's weights must not answer for other repositories of this model type.
if not __name__.startswith("transformers_modules"):
    AutoConfig.register(MODEL_TYPE, LinAttnConfig, exist_ok=True)
