"""Loading a model named on the command line: Hub id, folder, folder with one GGUF file, or path to a GGUF file."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Iterator

import gguf
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_linattn.errors import UserError


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, dense and ready to save, and its tokenizer.

    Args:
        name_or_path: Hub id; folder of a saved model; folder with exactly one `*.gguf` file; or path of a GGUF file.
        dtype: of the weights; None keeps the checkpoint's (float32 for GGUF).
        device: where to put the model; None leaves it on the CPU.
        gguf_file: name of the GGUF file in the folder or repository, needed when there are several.
        trust_remote_code: passed on to Transformers; never on by default.

    Raises:
        UserError: nothing there, ambiguous GGUF files, damaged weights, or a type Transformers cannot load.
    """
    name, options = _locate(name_or_path, gguf_file, trust_remote_code)
    try:
        with _gguf_read_once():
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(name, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return _load(name, options, dtype, device), tokenizer


def load_weights(
    name_or_path: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """The model of `load_model` alone: a tokenizer in a GGUF file takes longer to read than the weights."""
    name, options = _locate(name_or_path, gguf_file, trust_remote_code=False)
    return _load(name, options, dtype, device)


def _locate(name_or_path: str, gguf_file: str | None, trust_remote_code: bool) -> tuple[str, dict]:
    name, gguf_file = locate_model(str(name_or_path), gguf_file)
    options = {"trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    return name, options


def _load(name: str, options: dict, dtype, device) -> PreTrainedModel:
    load = _load_gguf if "gguf_file" in options else _load_safetensors
    try:
        model = load(name, dtype, options)
    except SafetensorError as error:
        raise UserError(
            f"{name}: its safetensors weights are damaged or cut short ({error}); download or save the model again"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(name, error) from error
    return (model if device is None else model.to(device)).eval()


def _cannot_load(name: str, error: BaseException) -> UserError:
    return UserError(f"{name}: cannot be loaded as a causal language model: {_first_paragraph(error)}")


def locate_model(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Folder or Hub id, and the GGUF file in it if there is one. Raises UserError as `load_model` does."""
    path = pathlib.Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{name}: there is no such GGUF file")
        return str(path.parent), path.name
    if path.is_dir():
        if gguf_file is None and not (path / "config.json").is_file():
            found = sorted(p.name for p in path.glob("*.gguf"))
            if len(found) != 1:
                what = (
                    f"several GGUF files ({', '.join(found)}): name one with --gguf-file"
                    if found
                    else "no GGUF file either"
                )
                raise UserError(f"{name}: the folder has no config.json and {what}; expected a saved model")
            gguf_file = found[0]
        if gguf_file is not None and not (path / gguf_file).is_file():
            raise UserError(f"{name}: the folder has no file {gguf_file!r}")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: there is no such folder; expected a Hub id (owner/name), a folder or a .gguf file")
    return name, gguf_file


def _load_safetensors(name: str, dtype, options: dict) -> PreTrainedModel:
    # Never pickled weights: loading those runs code.
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", use_safetensors=True, **options)


def _load_gguf(name: str, dtype, options: dict) -> PreTrainedModel:
    """Unpacked to dense weights, in a model that does not count as quantized: such a one would refuse to save."""
    if hasattr(transformers, "GgufConfig"):
        options = options | {"quantization_config": transformers.GgufConfig(dequantize=True)}
    with _gguf_read_once():
        packed = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or torch.float32, **options)
    values = packed.config.to_dict()
    values.pop("quantization_config", None)
    values.pop("_name_or_path", None)
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=packed.dtype)
    model.load_state_dict(packed.state_dict(), strict=True, assign=True)
    # Buffers that are not saved (rotary frequencies) are not in the state dict.
    for module, source in zip(model.modules(), packed.modules(), strict=True):
        for buffer in module._non_persistent_buffers_set:
            module.register_buffer(buffer, getattr(source, buffer), persistent=False)
    model.tie_weights()
    model.generation_config = packed.generation_config
    return model


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Within: what Transformers asks of the gguf library again and again is worked out once.

    It parses the file, mostly strings of the vocabulary, for the tokenizer, the config and the weights, and makes a
    table of all tensor names for each module of the model: two thirds of the time in which SmolLM2-135M loads.
    """
    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = _read_gguf, functools.cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


_GGUFReader = gguf.GGUFReader


def _read_gguf(path: str | os.PathLike) -> gguf.GGUFReader:
    path = pathlib.Path(path).resolve()
    status = path.stat()
    return _read_gguf_version(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _read_gguf_version(path: pathlib.Path, *_version: int) -> gguf.GGUFReader:
    return _GGUFReader(path)


def _first_paragraph(error: BaseException) -> str:
    return str(error).strip().split("\n\n")[0]
