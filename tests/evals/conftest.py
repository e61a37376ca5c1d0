"""Small local task files in the columns of the stock data sets, and a converted tiny model with its tokenizer."""

from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hf_linattn
from hf_linattn.evals.task_data import leaf_tasks, stock_tasks

MULTIPLE_CHOICE = [
    ("What do plants need to grow", ["sunlight", "a hat", "loud music", "money"], 0),
    ("Where do fish live", ["in trees", "in water", "in the clouds", "in books"], 1),
    ("Which of these is cold", ["fire", "the sun", "ice", "soup"], 2),
    ("How many legs has a spider", ["two", "four", "six", "eight"], 3),
    ("What is made from milk", ["cheese", "glass", "paper", "a very long rope of wool"], 0),
]
STORIES = [
    "the dog ran over the hill and came back to the house with the dog",
    "he opened the door and saw that behind it there was one more door",
    "she asked for some water and the old man went to fetch the water",
    "it was a cold night and nobody wanted to go out into that night",
]


def subjects(group: str) -> list[str]:
    return [stock_tasks().task_index[task].cfg["dataset_name"] for task in leaf_tasks(group)]


@pytest.fixture(scope="session")
def task_rows() -> dict[str, list[dict]]:
    """Rows by <task>/<split>, in the columns of the data sets the stock tasks download."""
    arc = [
        {
            "id": str(number),
            "question": question + "?",
            "choices": {"text": choices, "label": list("ABCD")},
            "answerKey": "ABCD"[answer],
        }
        for number, (question, choices, answer) in enumerate(MULTIPLE_CHOICE)
    ]
    mmlu = [
        {"question": f"{question} ({subject})?", "subject": subject, "choices": choices, "answer": answer}
        for question, choices, answer in MULTIPLE_CHOICE[:2]
        for subject in subjects("mmlu_social_sciences")
    ]
    return {
        "piqa/validation": [
            {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": answer % 2}
            for question, choices, answer in MULTIPLE_CHOICE
        ],
        "hellaswag/validation": [
            {
                "ind": number,
                "activity_label": "Playing chess",
                "ctx_a": story,
                "ctx_b": "then the cat",
                "ctx": story + " then the cat",
                "endings": MULTIPLE_CHOICE[number][1],
                "source_id": "x",
                "split": "val",
                "split_type": "indomain",
                "label": str(number),
            }
            for number, story in enumerate(STORIES)
        ],
        "arc_easy/test": arc,
        "arc_easy/validation": arc[:2],
        "sciq/validation": [
            {
                "question": question,
                "distractor3": choices[3],
                "distractor1": choices[1],
                "distractor2": choices[2],
                "correct_answer": choices[0],
                "support": "",
            }
            for question, choices, _ in MULTIPLE_CHOICE
        ],
        "lambada_openai/test": [{"text": story} for story in STORIES],
        "wikitext/test": [
            {"page": f" = Page {number} = \n \n " + " . ".join(STORIES) * (number + 2)} for number in range(3)
        ],
        "mmlu/test": mmlu,
        "mmlu/dev": mmlu,
    }


@pytest.fixture(scope="session")
def task_data(tmp_path_factory, task_rows):
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in task_rows.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    return folder


class Converted(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def converted():
    """A tiny Llama with one linear and one softmax layer and a window of 8: every prompt reaches beyond the window."""
    model = tiny_model("llama", max_position_embeddings=1024, num_hidden_layers=2)
    config = hf_linattn.LinearAttentionConfig(feature_map="hedgehog", window=8, softmax_layers=(1,))
    return Converted(hf_linattn.linearize(model, config).eval(), tiny_tokenizer())


@pytest.fixture(autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
