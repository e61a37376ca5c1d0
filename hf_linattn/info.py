"""What `hf-linattn info` shows: versions, device, the op backend and why, and what a converted model keeps in memory.

A model is described from its config alone: it is built on the meta device, so that no weight is read.
"""

import math
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_linattn.attention import LinearAttention
from hf_linattn.errors import UserError
from hf_linattn.kernels import init_state, init_window_state
from hf_linattn.kernels.cuda_library import compiled_build_info, compiled_library_path, compiled_library_problem
from hf_linattn.kernels.dispatch import explain
from hf_linattn.layers import attention_modules, linear_attention_modules
from hf_linattn.loading import locate_model
from hf_linattn.modeling import MODEL_TYPE

PACKAGES = ("hf_linattn", "torch", "transformers", "accelerate", "peft", "datasets", "lm-eval", "safetensors", "trl")


@dataclass(frozen=True)
class ModelFacts:
    """A converted model, as its config describes it.

    Args:
        base_type (`str`): model type before conversion, e.g. "llama".
        layers, softmax_layers: number of layers, and indices of those that keep softmax.
        attention (`dict`): the `linear_attention_config` block.
        dtype (`torch.dtype`): of the weights, window keys and values.
        state_bytes (`int`): per sequence, all converted layers together, whatever the length.
        kv_bytes_per_token (`int`): what the same layers would keep per token as softmax layers.
        softmax_kv_bytes_per_token (`int`): what the layers left as softmax still keep per token.
        max_positions (`int`): longest sequence the model was made for.
    """

    base_type: str
    layers: int
    softmax_layers: tuple[int, ...]
    attention: dict
    dtype: torch.dtype
    state_bytes: int
    kv_bytes_per_token: int
    softmax_kv_bytes_per_token: int
    max_positions: int

    @property
    def break_even_length(self) -> int:
        """The shortest context, in tokens, from which the state is no larger than the KV cache it replaces."""
        return math.ceil(self.state_bytes / self.kv_bytes_per_token)

    def lines(self) -> dict[str, str]:
        """Label -> text, as `hf-linattn info` prints it."""
        form = {name: value for name, value in self.attention.items() if name != "softmax_layers"}
        kept = ", ".join(map(str, self.softmax_layers)) or "none"
        name = str(self.dtype).removeprefix("torch.")
        return {
            "model": f"{self.base_type}, {self.layers} layers, {name}",
            "attention": ", ".join(f"{key} {value}" for key, value in form.items() if value not in (None, {})),
            "softmax layers": kept,
            "state per sequence": f"{self.state_bytes:,} bytes, at any length",
            "KV cache replaced": f"{self.kv_bytes_per_token:,} bytes per token",
            "KV cache kept": f"{self.softmax_kv_bytes_per_token:,} bytes per token, in the softmax layers",
            "break-even": f"{self.break_even_length:,} tokens; the state is the smaller one beyond",
        }


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def check_device(name: str | None) -> torch.device:
    """The device called `name`, or the default one for None.

    Raises:
        UserError: no such kind of device, or none of it here.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"--device: expected cpu, cuda or cuda:N, got {name!r}: {str(error).splitlines()[0]}"
        ) from None
    present = default_device().type
    if device.type not in ("cpu", present):
        raise UserError(f"--device: {name!r} was asked for, but this machine has {present}; use --device {present}")
    if device.index is not None and device.type != "cpu" and device.index >= torch.accelerator.device_count():
        raise UserError(f"--device: {name!r} was asked for, but there are {torch.accelerator.device_count()} devices")
    return device


def device_name(device: torch.device) -> str:
    """What a report calls `device`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def environment_facts(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Label -> text: versions, device, compiled kernels, and which op backend runs there for `dtype` and why.

    Args:
        device (`torch.device`): where the ops would run.
        dtype (`torch.dtype`, *optional*): of q, k and v; default bfloat16.

    Raises:
        UserError: HF_LINATTN_BACKEND names a backend that does not exist or cannot run.
    """
    try:
        backend, reason = explain(device, dtype or torch.bfloat16)
    except ValueError as error:
        raise UserError(str(error)) from error
    facts = {"python": platform.python_version()}
    facts |= {name: found for name in PACKAGES if (found := _version(name))}
    facts["device"] = device_name(device)
    facts["compiled kernels"] = _compiled_kernels()
    facts["op backend"] = f"{backend} ({reason})"
    return facts


def model_facts(folder: str | Path) -> ModelFacts:
    """Read a converted model's config.

    Args:
        folder (`str` or `Path`): folder or Hub id.

    Raises:
        UserError: nothing there, or not a converted model.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no model config could be read: {_first_line(error)}") from error
    if config.model_type != MODEL_TYPE:
        raise UserError(
            f"{folder}: expected a converted model, got a plain {config.model_type!r} one; convert it first: "
            f"hf-linattn convert {folder} -o OUT"
        )
    dtype = config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    linear = linear_attention_modules(model)
    softmax_layers = tuple(sorted(set(attention_modules(model)) - set(linear)))
    any_layer = next(iter(linear.values()))
    return ModelFacts(
        base_type=config.base_model_type,
        layers=len(attention_modules(model)),
        softmax_layers=softmax_layers,
        attention=config.linear_attention_config,
        dtype=dtype,
        state_bytes=sum(state_bytes(module, dtype) for module in linear.values()),
        kv_bytes_per_token=sum(_kv_bytes(module, dtype) for module in linear.values()),
        softmax_kv_bytes_per_token=len(softmax_layers) * _kv_bytes(any_layer, dtype),
        max_positions=_max_positions(config),
    )


def source_facts(name_or_path: str) -> tuple[int, str]:
    """(number of parameters, model type) of a model to convert, from its config alone.

    Raises:
        UserError: nothing there, or no causal language model.
    """
    name, gguf_file = locate_model(name_or_path, None)
    try:
        config = AutoConfig.from_pretrained(name, **({"gguf_file": gguf_file} if gguf_file else {}))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(f"{name_or_path}: no model config could be read: {_first_line(error)}") from error
    return model.num_parameters(), config.model_type


def state_bytes(module: LinearAttention, dtype: torch.dtype) -> int:
    """Bytes that one converted layer keeps per sequence: fp32 sums, and the window's keys and values in `dtype`."""
    heads, features, head_dim = module.num_kv_heads, module.feature_map_k.feature_dim, module.head_dim
    if module.window:
        state = init_window_state(
            1,
            heads,
            head_dim,
            features,
            head_dim,
            window=module.window,
            a=module.a,
            decay=module.gate is not None,
            dtype=dtype,
            device="meta",
        )
    else:
        state = init_state(1, heads, features, head_dim, a=module.a, normalize=module.normalize, device="meta")
    return sum(tensor.nbytes for tensor in state if tensor is not None)


def _compiled_kernels() -> str:
    build = compiled_build_info()
    if build is None:
        return compiled_library_problem
    return f"{compiled_library_path()}, for {build['architectures'].replace(',', ', ')}, CUDA {build['cuda']}"


def _kv_bytes(module: LinearAttention, dtype: torch.dtype) -> int:
    return 2 * module.num_kv_heads * module.head_dim * dtype.itemsize


def _max_positions(config) -> int:
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    limits = [limit for name in names if (limit := getattr(config.get_text_config(), name, None))]
    return int(limits[0]) if limits else sys.maxsize


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
