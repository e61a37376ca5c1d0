"""What a conversion does: the frozen, validated tree that a YAML recipe is read into.

    load_recipe("standard", ("transfer.tokens=4_000_000",)) -> ConversionConfig

A recipe holds only what differs from the defaults below, which are the standard budget of a model of 135M parameters
on one GPU. Every key is checked: a misspelt one is an error that names the nearest known key, since a silently ignored
one would train another model than the one asked for.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer, model_validator

from hf_linattn.config import LinearAttentionConfig
from hf_linattn.conversion.validation import Section, build_config, nearest
from hf_linattn.errors import UserError

Schedule = Literal["cosine", "linear", "constant"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


class TransferConfig(Section):
    """Attention transfer: every converted layer learns its own softmax output.

    Args:
        tokens: training tokens; 0 skips the stage.
        sequence_length: tokens per row; at least 4 windows, or the linear part sees few keys.
        batch_size: rows per process and step.
        learning_rate: of the feature maps and gate weights.
        scalar_learning_rate: of `log_scale`, biases and decay rates, which barely move at the maps' rate.
        warmup: fraction of the steps.
        clip: norm to which each layer's gradient is clipped; layers are independent, so each is clipped alone.
        loss: `normalized_mse` divides each layer's squared error by its teacher's mean square, which makes layers
            comparable; `mse` does not.
        weights_loss: weight of the divergence between the attention weights themselves (attention_weights.py), taken
            over `weights_queries` queries a row drawn for each step; 0 leaves it out.
        repeat_fraction: share of the rows in which earlier spans come again (repeats.py), so that recall is asked for.
        calibrate: set `log_scale` in closed form from the first batch before training.
    """

    tokens: Tokens = 8_000_000
    sequence_length: Count = 1024
    batch_size: Count = 16
    learning_rate: Rate = 1e-2
    scalar_learning_rate: Rate = 2e-2
    betas: Betas = (0.9, 0.95)
    weight_decay: Rate = 0.0
    warmup: Fraction = 0.05
    schedule: Schedule = "cosine"
    clip: Annotated[float, Field(gt=0)] = 1.0
    loss: Literal["normalized_mse", "mse"] = "normalized_mse"
    weights_loss: Rate = 0.0
    weights_queries: Count = 128
    repeat_fraction: Fraction = 0.0
    calibrate: bool = True


class TrainingConfig(Section):
    """What logit distillation and fine-tuning share: one Accelerate loop over packed rows.

    Args:
        tokens: training tokens; 0 skips the stage.
        long_sequence_length, long_fraction: the last fraction of the tokens is trained at this length, with the rows
            of a step reduced in proportion.
        batch_size: rows per process and micro-batch; `gradient_accumulation` micro-batches make a step.
        learning_rate: of the LoRA matrices, or of the weights when `full`.
        feature_map_learning_rate: of the new parameters (feature maps, `log_scale`, gates).
        target_modules: names of the layers that get LoRA; null takes every linear layer of the attention modules.
        full: train weights themselves instead of LoRA.
        warmup: fraction of the steps.
        attention_dropout: p of the dropout substitute at the start, annealed to 0 by `attention_dropout_schedule`.
        repeat_fraction: share of the rows in which earlier spans come again (repeats.py).
    """

    tokens: Tokens = 25_000_000
    sequence_length: Count = 1024
    long_sequence_length: Count | None = None
    long_fraction: Fraction = 0.2
    batch_size: Count = 16
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    learning_rate: Rate = 5e-4
    feature_map_learning_rate: Rate = 1e-3
    betas: Betas = (0.9, 0.95)
    weight_decay: Rate = 0.0
    lora_rank: Count = 16
    lora_alpha: Count = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | None = None
    full: bool = False
    warmup: Fraction = 0.05
    schedule: Schedule = "cosine"
    clip: Annotated[float, Field(gt=0)] = 1.0
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    attention_dropout_schedule: Schedule = "linear"
    repeat_fraction: Fraction = 0.0

    @model_validator(mode="after")
    def _long_rows_share_the_batch(self):
        if self.long_sequence_length is not None and self.long_sequence_length % self.sequence_length:
            raise ValueError(
                f"long_sequence_length: expected a multiple of sequence_length ({self.sequence_length}), "
                f"got {self.long_sequence_length}"
            )
        return self


class DistillationConfig(TrainingConfig):
    """Logit distillation: `kl_weight` T^2 KL(teacher || student) + `ce_weight` next-token cross-entropy.

    Args:
        temperature: T of the KL term.
    """

    kl_weight: Rate = 1.0
    ce_weight: Rate = 0.1
    temperature: Annotated[float, Field(gt=0)] = 1.0


class SelfSamplingConfig(Section):
    """How `data.train: self` draws text from the teacher.

    Args:
        tokens: size of the corpus; null takes what the stages need.
        sequence_length: length at which a sample is cut; null takes the longest training row.
        batch_size: samples drawn together.
    """

    tokens: Count | None = None
    sequence_length: Count | None = None
    batch_size: Count = 256
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95


class DataConfig(Section):
    """Where the training text comes from.

    Args:
        train: Hub dataset id; a .parquet, .jsonl, .json or .txt file, or a folder of one of these; or `self`.
        subset, split: configuration and split of a Hub dataset.
        text_column: column that holds the text.
        streaming: read a Hub dataset without downloading it whole.
        max_documents: stop after this many documents; null reads until the stages have their tokens.
        validation_fraction: tokens held out.
        validation_rows: rows of the held-out part that are measured before and after each stage.
    """

    train: str = "HuggingFaceFW/fineweb-edu"
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    streaming: bool = True
    max_documents: Count | None = None
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    validation_rows: Count = 16
    self_sampling: SelfSamplingConfig = SelfSamplingConfig()

    def with_source(self, train: str) -> "DataConfig":
        """The same settings for another source, whose subset and split the recipe cannot know."""
        return self.model_copy(update={"train": train, "subset": None, "split": "train"})


class EvaluationConfig(Section):
    """What is measured after a conversion: lm-eval tasks, recall and perplexity far beyond the window.

    Args:
        limit: examples per task; null takes all.
        recall_lengths, recall_trials: context lengths of the recall tests and prompts per length.
        perplexity_length: tokens of the documents on which perplexity by position is measured.
    """

    tasks: tuple[str, ...] = ("hellaswag", "piqa", "arc_easy", "lambada_openai", "wikitext")
    batch_size: Count = 32
    limit: Count | None = None
    recall_lengths: tuple[Count, ...] = (128, 256, 512, 1024, 2048, 4096)
    recall_trials: Count = 40
    perplexity_length: Count = 8192


def _read_attention(value: Any) -> LinearAttentionConfig:
    return LinearAttentionConfig.from_dict(value) if isinstance(value, Mapping) else value


AttentionForm = Annotated[
    InstanceOf[LinearAttentionConfig], BeforeValidator(_read_attention), PlainSerializer(lambda form: form.to_dict())
]


class ConversionConfig(Section):
    """A whole conversion. `model` is the default of the command line's MODEL argument.

    Args:
        attention: what replaces softmax (`LinearAttentionConfig`).
        softmax_every: keep layers 0, n, 2n, ... as softmax whatever the depth of the model; not together with
            `attention.softmax_layers`.
        training_window: windows longer than this are cut to it while the stages train, so that rows of a few thousand
            tokens have far keys to learn from; null trains with the windows that the model keeps.
        checkpoint_every: steps between checkpoints.
        dtype: of the weights; `auto` is bfloat16 where the device computes it natively, else float32.
        deterministic: refuse algorithms whose result varies between runs, so that a resumed run repeats its losses.
    """

    name: str
    description: str = ""
    model: str | None = None
    attention: AttentionForm = LinearAttentionConfig()
    softmax_every: Annotated[int, Field(ge=2)] | None = None
    training_window: Count | None = None
    transfer: TransferConfig = TransferConfig()
    distillation: DistillationConfig = DistillationConfig()
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint_every: Count = 200
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    deterministic: bool = True

    @model_validator(mode="after")
    def _one_choice_of_softmax_layers(self):
        if self.softmax_every is not None and self.attention.softmax_layers:
            raise ValueError("softmax_every: expected null when attention.softmax_layers lists the layers")
        return self

    def attention_for(self, num_layers: int) -> LinearAttentionConfig:
        """The attention form of a model of `num_layers` layers, with `softmax_every` written out."""
        if self.softmax_every is None:
            return self.attention
        return dataclasses.replace(self.attention, softmax_layers=tuple(range(0, num_layers, self.softmax_every)))

    @property
    def tokens(self) -> int:
        """Training tokens of all stages."""
        return self.transfer.tokens + self.distillation.tokens

    @property
    def longest_row(self) -> int:
        """Length in tokens of the longest row any stage trains on."""
        return max(
            self.transfer.sequence_length,
            self.distillation.sequence_length,
            self.distillation.long_sequence_length or 0,
        )


class FinetuneConfig(TrainingConfig):
    """Further training of a converted model on next-token cross-entropy.

    Args:
        train_new_parameters: train feature maps, `log_scale` and gates beside LoRA.
        checkpoint_every, seed, dtype, deterministic: as in `ConversionConfig`.
    """

    tokens: Tokens = 10_000_000
    learning_rate: Rate = 1e-4
    feature_map_learning_rate: Rate = 1e-4
    train_new_parameters: bool = True
    data: DataConfig = DataConfig()
    checkpoint_every: Count = 200
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    deterministic: bool = True


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipe_folder().iterdir() if p.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path | None = None, overrides: Iterable[str] = ()) -> ConversionConfig:
    """Read a recipe.

    Args:
        name_or_path (`str` or `Path`, *optional*): shipped recipe or YAML file; default `standard`.
        overrides (`Iterable[str]`): `section.key=value` each, value in YAML; later ones win.

    Returns:
        `ConversionConfig`

    Raises:
        UserError: no such recipe, broken YAML, an unknown key (the nearest known one is named) or a wrong value.
    """
    name_or_path = "standard" if name_or_path is None else name_or_path
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"recipe: no file {path}; shipped recipes: {', '.join(recipe_names())}")
        text, source = path.read_text(encoding="utf-8"), str(path)
    elif str(name_or_path) in recipe_names():
        text, source = (_recipe_folder() / f"{name_or_path}.yaml").read_text(encoding="utf-8"), f"{name_or_path}.yaml"
    else:
        raise UserError(f"recipe: unknown {str(name_or_path)!r}{nearest(str(name_or_path), recipe_names())}")
    raw = _parse_yaml(text, source)
    raw.setdefault("name", Path(source).stem)
    return build_config(ConversionConfig, raw, overrides, source)


def load_finetune_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> FinetuneConfig:
    """Read fine-tuning settings from a YAML file (default: none) and `key=value` overrides, as `load_recipe` does."""
    raw, source = {}, "finetune"
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"config: no file {path}; expected a YAML file of fine-tuning settings")
        raw, source = _parse_yaml(Path(path).read_text(encoding="utf-8"), str(path)), str(path)
    return build_config(FinetuneConfig, raw, overrides, source)


def pick_recipe(num_parameters: int, device_type: str, model_type: str) -> str:
    """Name of the recipe `convert` uses when none is named.

    Args:
        num_parameters (`int`): of the model.
        device_type (`str`): `torch.device.type` the conversion will run on.
        model_type (`str`): `config.model_type` of the model.
    """
    if device_type == "cpu":
        return "quick"
    if num_parameters < 3e8:
        return "smollm2-135m"
    if model_type == "llama" and num_parameters < 2e9:
        return "llama-3.2-1b"
    if model_type == "qwen3" and num_parameters > 5e9:
        return "qwen3-8b"
    return "standard"


def _recipe_folder():
    return resources.files("hf_linattn.recipes")


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{source}: expected a mapping of recipe keys, got {type(raw).__name__}")
    return raw
