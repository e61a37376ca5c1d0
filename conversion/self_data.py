"""`data: self`: a training corpus sampled from the teacher, so that a conversion needs no data at all.

The student is to repeat the teacher's distribution, and the teacher's own samples come from it. They start from the
beginning-of-text token, from short openings of many kinds of text, and, for a chat model, from its own template at the
point where a user's turn begins, so that it writes both sides of a conversation.
"""

from collections.abc import Callable, Iterator

import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_linattn.conversion.config import SelfSamplingConfig
from hf_linattn.errors import UserError

OPENINGS = (
    "The", "In", "A", "It was", "When", "Once upon a time", "According to", "We", "I", "There are", "One of the",
    "Question:", "How to", "Why", "What is", "Chapter 1", "Introduction", "Abstract:", "# ", "## ", "1. ", "- ",
    "def ", "import ", "class ", "<html>", "Dear", "On Monday", "For many years", "During the war", "Scientists",
    "The history of", "She said", "He looked", "To make", "Step 1:", "Let x", "The following", "Today", "If you",
)  # fmt: skip
SHORTEST_SAMPLE = 16
PLACEHOLDER = "\x00"


def sample_documents(
    model: PreTrainedModel,
    tokenizer,
    config: SelfSamplingConfig,
    *,
    tokens: int,
    sequence_length: int,
    seed: int,
    report: Callable[[int], None] = lambda tokens: None,
) -> Iterator[list[int]]:
    """Documents written by `model`, as token ids, until `tokens` have been given.

    Args:
        model (`PreTrainedModel`): the teacher, before it is converted.
        tokenizer: its tokenizer.
        config (`SelfSamplingConfig`): batch size, temperature, top_p.
        tokens (`int`): stop at this many.
        sequence_length (`int`): prompt and continuation together.
        seed (`int`): the same seed, model and device give the same documents.
        report (`Callable`): called with the number of tokens so far.

    Raises:
        UserError: a tokenizer without beginning- and end-of-text token, or a model whose every sample ends at once.
    """
    prompts, turn = _prompts(tokenizer), _user_turn(tokenizer)
    end = _end_tokens(model, tokenizer)
    given = batch_idx = 0
    while given < tokens:
        first = batch_idx * config.batch_size
        chosen = [prompts[n % len(prompts)] for n in range(first, first + config.batch_size)]
        torch.manual_seed(seed + batch_idx)
        rows = _generate(model, chosen, config, sequence_length)
        # A conversation is one document, though each of its turns ends with an end-of-text token.
        pieces = [[row] if prompt == turn else _split(row, end) for row, prompt in zip(rows, chosen, strict=True)]
        documents = [piece for row in pieces for piece in row if len(piece) >= min(SHORTEST_SAMPLE, sequence_length)]
        if not documents:
            raise UserError(
                "data: self: every sample of the model ends within a few tokens; give a text file or a Hub dataset"
            )
        for document in documents:
            given += len(document)
            yield document
        batch_idx += 1
        report(min(given, tokens))


def _generate(model, prompts, config: SelfSamplingConfig, sequence_length: int) -> list[list[int]]:
    """One row of `sequence_length` tokens per prompt; past an end-of-text token the model writes the next document."""
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    # Any token will do where the attention mask is 0.
    input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    attention_mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    own, was_training = model.generation_config, model.training
    # The model's own settings (stop tokens, penalties, top_k) would change the distribution that is sampled from.
    model.generation_config = GenerationConfig()
    try:
        output = model.eval().generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max(1, sequence_length - longest),
            do_sample=True,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=0,
            pad_token_id=0,
        )
    finally:
        model.generation_config = own
        model.train(was_training)
    return [row[longest - len(p) :] for row, p in zip(output.tolist(), prompts, strict=True)]


def _split(row: list[int], end: set[int]) -> list[list[int]]:
    """The documents of a row: cut after every end-of-text token but a leading one, which only starts the sample."""
    pieces, piece = [], row[:1]
    for token in row[1:]:
        piece.append(token)
        if token in end:
            pieces.append(piece)
            piece = []
    return [*pieces, piece] if piece else pieces


def _end_tokens(model, tokenizer) -> set[int]:
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in (*configured, tokenizer.eos_token_id) if token is not None}


def _prompts(tokenizer) -> list[list[int]]:
    """Beginning-of-text alone, openings, and the start of a user's turn, interleaved."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError(
            "data: self: the tokenizer has neither a beginning- nor an end-of-text token to start a sample from; "
            "give a text file or a Hub dataset"
        )
    turn = _user_turn(tokenizer)
    prompts = []
    for opening in OPENINGS:
        ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
        prompts += [[start], [start, *ids]]
        if turn:
            prompts.append(turn)
    return prompts


def _user_turn(tokenizer) -> list[int] | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    text = tokenizer.apply_chat_template([{"role": "user", "content": PLACEHOLDER}], tokenize=False)
    return tokenizer(text.split(PLACEHOLDER)[0], add_special_tokens=False)["input_ids"] or None
