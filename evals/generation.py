"""Tokens a second and memory of `generate`: a converted model beside the softmax it came from.

Both are the same weights: `softmax` runs the attention that the layers had, with the usual key-value cache. Contexts
are random tokens, read in pieces; `generate` takes over at the last one. A step's time is the difference of two calls
that generate different numbers of tokens, so that what is done once drops out. `static` is Transformers' static cache,
whose decode step `generate` compiles on a GPU: softmax as Transformers does, a converted model into one CUDA graph
(`hf_linattn.decoding`). `softmax_captured` gives softmax that graph too, so that the attention alone differs.

    tokens_per_s = batch (n_long - n_short) / (t_long - t_short)
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from hf_linattn import softmax_attention
from hf_linattn.evals.bench_timing import peak_bytes

MIB = 2**20
PREFILL_TOKENS = 16384
"""Tokens of all rows that prefill reads at once."""
CACHES, VARIANTS = ("dynamic", "static"), ("softmax", "softmax_captured", "student")
FIELDS = (
    "variant",
    "cache",
    "batch",
    "context",
    "prefill_s",
    "step_ms",
    "tokens_per_s",
    "cache_mib",
    "peak_mib",
    "note",
)


def generation_speed(
    model: PreTrainedModel,
    *,
    contexts: Iterable[int] = (1024, 4096, 16384, 65536),
    batches: Iterable[int] = (1, 16, 64),
    caches: Iterable[str] = CACHES,
    variants: Iterable[str] = VARIANTS,
    new_tokens: tuple[int, int] = (8, 104),
    runs: int = 3,
) -> Iterator[dict]:
    """Measure each combination, row by row.

    Args:
        model (`PreTrainedModel`): converted, on the device to measure.
        contexts, batches: prompt lengths in tokens, rows.
        caches: "dynamic" and "static".
        variants: "student"; "softmax", the same weights with the attention they had in Transformers' own `generate`;
            "softmax_captured", only for static caches on CUDA.
        new_tokens: the smaller and the larger number of generated tokens.
        runs: timed calls, of which the median counts.

    Yields:
        Rows in the fields of `FIELDS`; `note` says why figures are missing, e.g. for want of memory. `prefill_s` reads
        all but the last token. `peak_mib` is the growth of the device's memory over the weights, None off CUDA.
    """
    model.eval()
    for batch in batches:
        for context in contexts:
            for cache in caches:
                for variant in variants:
                    if variant == "softmax_captured" and (cache == "dynamic" or model.device.type != "cuda"):
                        continue  # nothing is captured there
                    row = dict.fromkeys(FIELDS)
                    row |= {"variant": variant, "cache": cache, "batch": batch, "context": context}
                    with _run_as(model, variant):
                        try:
                            row |= _measure(model, batch, context, cache, new_tokens, runs)
                        except torch.OutOfMemoryError:
                            row["note"] = "out of memory"
                    if model.device.type == "cuda":
                        torch.cuda.empty_cache()
                    torch.compiler.reset()
                    yield row


@contextlib.contextmanager
def _run_as(model: PreTrainedModel, variant: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if variant != "student":
            stack.enter_context(softmax_attention(model))
        if variant == "softmax":
            model.get_compiled_call = functools.partial(PreTrainedModel.get_compiled_call, model)
            stack.callback(delattr, model, "get_compiled_call")
        yield


@torch.no_grad()
def _measure(
    model: PreTrainedModel, batch: int, context: int, cache: str, new_tokens: tuple[int, int], runs: int
) -> dict[str, float | None]:
    is_cuda = model.device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, context), generator=generator).to(model.device)
    short, long = new_tokens
    # One static cache for all calls: another one, or another length, would be compiled or recorded anew when timed.
    static = StaticCache(config=model.config, max_cache_len=context + long) if cache == "static" else None

    def call(count: int, tokens: int = context) -> tuple[float, float, int]:
        past = DynamicCache(config=model.config) if static is None else static
        past.reset()
        return *_time_call(model, ids[:, :tokens], count, past), _cache_bytes(past)

    timings = {short: [], long: []}

    def time_calls() -> None:
        for count, taken in timings.items():
            taken.extend(call(count) for _ in range(runs))

    # Warms up and compiles: a step's graph is one for all prompts, two pieces of which suffice.
    call(short, min(context, 2 * max(1, PREFILL_TOKENS // batch)))
    peak = None
    if is_cuda:
        peak = peak_bytes(time_calls, model.device)
    else:
        time_calls()
    size = timings[short][0][2]
    if peak is not None and static is not None:
        peak += size  # there before the calls
    seconds = {n: statistics.median(generated for _, generated, _ in timings[n]) for n in timings}
    step = (seconds[long] - seconds[short]) / (long - short)
    return {
        "prefill_s": statistics.median(read for read, _, _ in timings[short] + timings[long]),
        "step_ms": 1e3 * step,
        "tokens_per_s": batch / step if step > 0 else None,
        "cache_mib": size / MIB,
        "peak_mib": None if peak is None else peak / MIB,
    }


def _time_call(model: PreTrainedModel, ids: Tensor, count: int, past: Cache) -> tuple[float, float]:
    """Seconds to read all tokens but the last into the empty cache `past`, and to generate `count` tokens greedily."""
    # Not by `generate`, which would compile a prefill in pieces into a static cache.
    started = _synchronized_time(model)
    for piece in ids[:, :-1].split(max(1, PREFILL_TOKENS // len(ids)), 1):
        model.base_model(input_ids=piece, past_key_values=past, use_cache=True)
    read = _synchronized_time(model)
    settings = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
    sequences = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=past, **settings)
    done = _synchronized_time(model)
    if sequences.shape[1] != ids.shape[1] + count:
        raise RuntimeError(f"generate: expected {count} new tokens, got {sequences.shape[1] - ids.shape[1]}")
    return read - started, done - read


def _cache_bytes(cache: Cache) -> int:
    """Bytes of every tensor that the layers of a cache hold, each storage once."""
    storages = {}

    def collect(value) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            collect(tuple(value.values()))
        elif isinstance(value, tuple | list):
            for item in value:
                collect(item)

    for layer in cache.layers:
        # The recorded forwards of assisted decoding belong to no ordinary step.
        collect({name: value for name, value in vars(layer).items() if name != "_history"})
    return sum(storages.values())


def _synchronized_time(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
