"""Recall at a distance: a passkey hidden in filler, and key-value pairs stated early and asked for at the end.

Short benchmarks fit inside an attention window; these prompts do not. Every prompt has exactly the asked number of
tokens of the model's own tokenizer, so a batch needs no padding and its size cannot change a figure by it. All answers
are read by teacher forcing from one forward pass: an answer token counts when it is the argmax after the true tokens.

Prompts are assembled from token ids of separately tokenised parts, filler cut at a token where a length demands it.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_linattn.errors import UserError
from hf_linattn.evals.scoring import check_length, last_logits

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSKEY_HEAD = "There is a pass key hidden in a long text. Find it and remember it."
PASSKEY_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
PASSKEY_QUESTION = " What is the pass key? The pass key is"

MQAR_PAIRS = 8
MQAR_HEAD = "Here is a list of names and words.\n"
MQAR_PAIR = "{name}:{value}\n"
MQAR_QUESTION = "\n\nHere is the same list of names and words again.\n"
MQAR_QUERY = "{name}:"
NAMES = """
Adam Alice Anna Ben Carl Clara David Diana Emma Eric Frank George Grace Henry Jack Jane John Julia Kate Laura Lucy
Maria Mark Martin Mary Paul Peter Rachel Robert Sarah Simon Thomas
"""
VALUES = """
apple ball bell bird boat book bottle box bread bridge camera car cat chair clock coat cup desk dog door egg fish flag
flower garden glass gun hat horse house key knife lamp map mirror orange pen phone piano plane plate radio ring rope
ship shoe stone sword table tent tree truck watch wheel window
"""

BATCH_TOKENS = 32768
"""Tokens of one batch: at most `batch_size` rows, fewer where the rows are long."""


class Prompt(NamedTuple):
    """One tokenised trial: `ids` of the exact length, `is_answer` true at every token that is scored."""

    ids: list[int]
    is_answer: list[bool]


def passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int] = (128, 256, 512, 1024, 2048, 4096),
    *,
    trials: int = 40,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, float]:
    """Share of trials in which every token of a hidden five-digit number is the argmax.

    Trial t of n hides the number t / (n - 1) of the way down the filler, so the depths are spread evenly.

    Args:
        model (`PreTrainedModel`): causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        lengths (`Sequence[int]`): prompt lengths in tokens, answer included.
        trials (`int`, defaults to 40): prompts per length.
        batch_size (`int`, defaults to 8): rows per forward pass, at most `BATCH_TOKENS` tokens together.
        seed (`int`, defaults to 0): the same seed gives the same prompts on any machine.
        progress (`Callable[[int, int], None]`, *optional*): called with (trials done, trials in all).

    Returns:
        `dict[int, float]`: length -> share of exact matches, in [0, 1].

    Raises:
        UserError: a length exceeds the model's positions or cannot hold the question.
    """
    prompts = _PasskeyPrompts(tokenizer, seed)
    return _score(model, prompts, lengths, trials, batch_size, progress, whole_answer=True)


def mqar(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int] = (128, 256, 512, 1024, 2048, 4096),
    *,
    trials: int = 40,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, float]:
    """Multi-query associative recall: share of answer tokens that are the argmax.

    Eight pairs ("Anna: lamp") open the text, filler follows, and all eight are asked for at the end in another order.
    Choosing at random among the stated values scores 1/8, among those not yet named again 0.34. Values are single
    tokens where the tokenizer has enough of them, else every token of a value counts.

    Args:
        model, tokenizer, lengths, trials, batch_size, seed, progress: as for `passkey`.

    Returns:
        `dict[int, float]`: length -> share of answer tokens recalled, in [0, 1].

    Raises:
        UserError: a length exceeds the model's positions or cannot hold the pairs and the questions.
    """
    prompts = _MqarPrompts(tokenizer, seed)
    return _score(model, prompts, lengths, trials, batch_size, progress, whole_answer=False)


class _Prompts:
    """Builds trials for one tokenizer; the parts are tokenised without special tokens, `bos` stands at the start."""

    name: str

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int):
        self.tokenizer = tokenizer
        self.bos = _prefix_ids(tokenizer)
        self.seed = seed
        self.sentences = self.encode(FILLER)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def filler(self, length: int, parts: list[list[int]]) -> list[int]:
        """As many tokens of filler as `parts` leave free of `length`."""
        fixed = sum(map(len, parts))
        if length < fixed:
            raise UserError(
                f"recall_lengths: expected at least {fixed} tokens, which one {self.name} prompt takes with this "
                f"tokenizer, got {length}; leave that length out"
            )
        space = length - fixed
        return (self.sentences * (space // len(self.sentences) + 1))[:space]


class _PasskeyPrompts(_Prompts):
    name = "passkey"

    def __call__(self, length: int, trial: int, trials: int) -> Prompt:
        draw = random.Random(f"passkey-{self.seed}-{length}-{trial}")
        key = f"{draw.randrange(10**5):05d}"
        head = self.bos + self.encode(PASSKEY_HEAD)
        needle = self.encode(PASSKEY_NEEDLE.format(key=key))
        question = self.encode(PASSKEY_QUESTION)
        answer = self.encode(PASSKEY_QUESTION + " " + key)[len(question) :]
        filler = self.filler(length, [head, needle, question, answer])
        before = round(len(filler) * trial / max(trials - 1, 1))
        ids = head + filler[:before] + needle + filler[before:] + question
        # Some tokenizers give the space before the digits a token of its own, which is no part of the number.
        is_digit = [bool(self.tokenizer.decode([token]).strip()) for token in answer]
        return Prompt(ids + answer, [False] * len(ids) + is_digit)


class _MqarPrompts(_Prompts):
    name = "mqar"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int):
        super().__init__(tokenizer, seed)
        single = [value for value in VALUES.split() if len(self.encode(" " + value)) == 1]
        self.values = single if len(single) >= MQAR_PAIRS else VALUES.split()

    def __call__(self, length: int, trial: int, trials: int) -> Prompt:
        draw = random.Random(f"mqar-{self.seed}-{length}-{trial}")
        pairs = list(zip(draw.sample(NAMES.split(), MQAR_PAIRS), draw.sample(self.values, MQAR_PAIRS), strict=True))
        stated = "".join(MQAR_PAIR.format(name=name, value=" " + value) for name, value in pairs)
        head = self.bos + self.encode(MQAR_HEAD + stated)
        tail = self.encode(MQAR_QUESTION)
        is_answer = [False] * len(tail)
        draw.shuffle(pairs)
        for name, value in pairs:
            query, answer, stop = map(self.encode, (MQAR_QUERY.format(name=name), " " + value, "\n"))
            tail += query + answer + stop
            is_answer += [False] * len(query) + [True] * len(answer) + [False] * len(stop)
        ids = head + self.filler(length, [head, tail])
        return Prompt(ids + tail, [False] * len(ids) + is_answer)


def _score(
    model: PreTrainedModel,
    prompts: Callable[[int, int, int], Prompt],
    lengths: Sequence[int],
    trials: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    *,
    whole_answer: bool,
) -> dict[int, float]:
    check_length(model, max(lengths), "lengths")
    model.eval()
    scores = {}
    for index, length in enumerate(lengths):
        hits: list[list[bool]] = []
        rows = max(1, min(batch_size, BATCH_TOKENS // length))
        for start in range(0, trials, rows):
            batch = [prompts(length, trial, trials) for trial in range(start, min(start + rows, trials))]
            hits += _answer_hits(model, batch)
            if progress is not None:
                progress(index * trials + len(hits), len(lengths) * trials)
        scores[length] = sum(map(all, hits)) / trials if whole_answer else sum(map(sum, hits)) / sum(map(len, hits))
    return scores


def _answer_hits(model: PreTrainedModel, batch: list[Prompt]) -> list[list[bool]]:
    ids = torch.tensor([prompt.ids for prompt in batch])
    is_answer = torch.tensor([prompt.is_answer for prompt in batch])
    first = int(is_answer.any(0).nonzero()[0])
    predicted = last_logits(model, ids[:, :-1], ids.shape[1] - first).argmax(-1).cpu()
    right = predicted == ids[:, first:]
    return [row[mask].tolist() for row, mask in zip(right, is_answer[:, first:], strict=True)]


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids the tokenizer puts before a text by itself, such as the beginning-of-sequence token."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    return full[: full.index(plain[0])]
