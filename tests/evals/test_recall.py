"""Passkey and associative recall: the prompts, the counting, batch size, refusals."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model, tiny_tokenizer

from hf_linattn.errors import UserError
from hf_linattn.evals import recall
from hf_linattn.evals.recall import MQAR_PAIRS, mqar, passkey

LENGTHS = (320, 700)
TRIALS = 6


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def characters(ids, tokenizer):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_passkey_prompts(tokenizer):
    prompts = recall._PasskeyPrompts(tokenizer, 0)
    places, keys = [], []
    for trial in range(TRIALS):
        prompt = prompts(700, trial, TRIALS)
        text = characters(prompt.ids, tokenizer)
        assert len(prompt.ids) == len(prompt.is_answer) == 700
        keys.append(text[-5:])
        assert keys[-1].isdigit()
        assert prompt.is_answer == [False] * 695 + [True] * 5
        assert text.count(keys[-1]) == 3
        assert text.startswith(recall.PASSKEY_HEAD)
        places.append(text.index(" The pass key is") - len(recall.PASSKEY_HEAD))
    assert len(set(keys)) == TRIALS
    filler = 700 - len(recall.PASSKEY_HEAD) - len(recall.PASSKEY_NEEDLE.format(key="00000"))
    filler -= len(recall.PASSKEY_QUESTION) + 6
    assert places == [round(filler * trial / (TRIALS - 1)) for trial in range(TRIALS)]
    assert prompts(700, 3, TRIALS) == recall._PasskeyPrompts(tokenizer, 0)(700, 3, TRIALS)
    assert prompts(700, 3, TRIALS) != recall._PasskeyPrompts(tokenizer, 1)(700, 3, TRIALS)


def test_mqar_prompts(tokenizer):
    prompt = recall._MqarPrompts(tokenizer, 0)(700, 2, TRIALS)
    assert len(prompt.ids) == len(prompt.is_answer) == 700
    text = characters(prompt.ids, tokenizer).replace("<unk>", "\n")
    stated, asked = text.split(recall.MQAR_QUESTION)
    stated = dict(line.split(": ") for line in stated.splitlines()[1 : 1 + MQAR_PAIRS])
    asked = dict(line.split(": ") for line in asked.splitlines())
    assert len(stated) == MQAR_PAIRS
    assert stated == asked
    assert list(stated) != list(asked)
    expected = "".join(" " + value for value in asked.values())
    assert characters([token for token, is_answer in zip(*prompt, strict=True) if is_answer], tokenizer) == expected


def next_tokens(wrong=()):
    """Stands in for the model: predicts the next token of every row, but for the cells (row, column from the end)."""
    rows = 0

    def predict(model, input_ids, keep):
        nonlocal rows
        true = torch.cat([input_ids[:, 1:], predict.last[rows : rows + len(input_ids), None]], 1)[:, -keep:]
        for row, column in wrong:
            if rows <= row < rows + len(input_ids):
                true[row - rows, -column] += 1
        rows += len(input_ids)
        return F.one_hot(true, 128).float()

    return predict


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [([], 1.0), ([(4, 2)], 5 / 6), ([(4, 2), (4, 5), (0, 1)], 4 / 6)],
    ids=["all-right", "one-digit", "two-trials"],
)
def test_passkey_counts_whole_numbers(wrong, expected, tokenizer, monkeypatch):
    model = tiny_model("llama")
    stub = next_tokens(wrong)
    prompts = recall._PasskeyPrompts(tokenizer, 0)
    stub.last = torch.tensor([prompts(320, trial, TRIALS).ids[-1] for trial in range(TRIALS)])
    monkeypatch.setattr(recall, "last_logits", stub)
    assert passkey(model, tokenizer, (320,), trials=TRIALS, batch_size=4) == {320: pytest.approx(expected)}


def test_mqar_counts_tokens(tokenizer, monkeypatch):
    prompts = recall._MqarPrompts(tokenizer, 0)
    trials = [prompts(400, trial, TRIALS) for trial in range(TRIALS)]
    total = sum(sum(prompt.is_answer) for prompt in trials)
    # The last token of a prompt is the line break, the one before it the last letter of the last value.
    stub = next_tokens([(1, 2), (5, 2), (3, 1)])
    stub.last = torch.tensor([prompt.ids[-1] for prompt in trials])
    monkeypatch.setattr(recall, "last_logits", stub)
    assert mqar(tiny_model("llama"), tokenizer, (400,), trials=TRIALS) == {400: pytest.approx(1 - 2 / total)}


@pytest.mark.parametrize("task", [passkey, mqar])
def test_batch_size_changes_no_figure(task, converted):
    results = [
        task(converted.model, converted.tokenizer, LENGTHS, trials=TRIALS, batch_size=size) for size in (1, 4, 6)
    ]
    assert results[0] == results[1] == results[2]
    assert set(results[0]) == set(LENGTHS)


def test_a_model_that_copies_recalls_everything(tokenizer):
    """End to end through a real forward: the head is replaced by one that looks the answer up in the prompt."""
    model = tiny_model("llama", max_position_embeddings=1024)
    prompts = recall._PasskeyPrompts(tokenizer, 0)
    following = {}
    for trial in range(TRIALS):
        ids = prompts(320, trial, TRIALS).ids
        following[tuple(ids[:-1])] = ids

    def look_up(_, args, kwargs, output):
        rows = kwargs["input_ids"].tolist()
        true = torch.tensor([following[tuple(row)][1:] for row in rows])
        output.logits = F.one_hot(true[:, -output.logits.shape[1] :], 128).float()
        return output

    hook = model.register_forward_hook(look_up, with_kwargs=True)
    assert passkey(model, tokenizer, (320,), trials=TRIALS) == {320: 1.0}
    hook.remove()
    assert passkey(model, tokenizer, (320,), trials=TRIALS) == {320: 0.0}


def test_progress_ends_at_the_number_of_prompts(converted):
    calls = []
    passkey(converted.model, converted.tokenizer, LENGTHS, trials=3, batch_size=2, progress=lambda *c: calls.append(c))
    assert calls == [(2, 6), (3, 6), (5, 6), (6, 6)]


@pytest.mark.parametrize("task", [passkey, mqar])
def test_length_beyond_the_positions(task, tokenizer):
    with pytest.raises(UserError, match=r"lengths: expected at most 512 tokens.*got 1024; use lengths up to 512"):
        task(tiny_model("llama"), tokenizer, (320, 1024), trials=1)


@pytest.mark.parametrize("task", [passkey, mqar])
def test_length_too_short_for_the_prompt(task, tokenizer):
    expected = rf"expected at least \d+ tokens, which one {task.__name__} prompt takes .*got 64; leave that length out"
    with pytest.raises(UserError, match=expected):
        task(tiny_model("llama"), tokenizer, (64,), trials=1)


def test_a_tokenizers_own_opening_token_stands_first():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for prompts in (recall._PasskeyPrompts(tokenizer, 0), recall._MqarPrompts(tokenizer, 0)):
        ids = prompts(400, 0, 1).ids
        assert ids[0] == 1
        assert ids.count(1) == 1
        assert len(ids) == 400
