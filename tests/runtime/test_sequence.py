"""Padding and packing as packed sequences."""

import pytest
import torch

from hf_linattn.sequence import pack, sequence_layout, token_validity, unpack

CPU = torch.device("cpu")


def layout(mask=None, positions=None, shape=(2, 5), past=0, has_state=False):
    as_tensor = lambda x: None if x is None else torch.tensor(x)  # noqa: E731
    return sequence_layout(as_tensor(mask), as_tensor(positions), shape, CPU, past, has_state)


def test_ordinary_batch_needs_no_layout():
    assert layout() is None
    assert layout(mask=[[1] * 5] * 2) is None
    assert layout(positions=[[0, 1, 2, 3, 4]]) is None
    assert layout(mask=[[1] * 5] * 2, positions=[[7, 8, 9, 10, 11]] * 2) is None


@pytest.mark.parametrize(
    ("mask", "indices"),
    [
        ([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [2, 3, 4, 5, 6, 7, 8, 9]),
        ([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], [0, 1, 2, 5, 6, 7, 8, 9]),
        ([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], [0, 2, 4, 5, 6, 7, 8, 9]),
    ],
    ids=["left", "right", "holes"],
)
def test_padding(mask, indices):
    found = layout(mask=mask)
    assert found.indices.tolist() == indices
    assert found.cu_seqlens.tolist() == [0, 3, 8]
    assert found.cu_seqlens.dtype == torch.int32
    assert found.final is None


def test_empty_row():
    assert layout(mask=[[0] * 5, [1] * 5]).cu_seqlens.tolist() == [0, 0, 5]


def test_resets_start_sequences_and_the_last_one_holds_the_final_state():
    found = layout(positions=[[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    assert found.indices is None
    assert found.cu_seqlens.tolist() == [0, 2, 5, 10]
    assert found.final.tolist() == [1, 2]


def test_padding_positions_are_not_resets():
    # generate() gives padded tokens an arbitrary position.
    found = layout(mask=[[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], positions=[[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    assert found.cu_seqlens.tolist() == [0, 3, 8]
    assert found.final is None


def test_resets_with_padding_and_an_empty_row():
    found = layout(
        mask=[[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
        positions=[[0, 1, 0, 1, 9], [0] * 5, [0, 0, 1, 0, 1]],
        shape=(3, 5),
    )
    # row 0: [0, 2) [2, 4), row 1: empty, row 2: [4, 5) [5, 7) [7, 9)
    assert found.cu_seqlens.tolist() == [0, 2, 4, 4, 5, 7, 9]
    assert found.final.tolist() == [1, 2, 5]


def test_a_carried_state_continues_each_row():
    assert layout(positions=[[5, 6, 0, 1, 2]] * 2, past=5, has_state=True) is None


def test_memo_notices_a_mask_changed_in_place():
    mask = torch.ones(2, 5, dtype=torch.long)
    assert sequence_layout(mask, None, (2, 5), CPU) is None
    mask[0, 0] = 0
    assert sequence_layout(mask, None, (2, 5), CPU).cu_seqlens.tolist() == [0, 4, 9]


@pytest.mark.parametrize("past", [0, 3])
def test_validity_from_every_kind_of_mask(past):
    expected = torch.tensor([[False, True, True, True], [True, True, True, True]])
    two = torch.cat([torch.ones(2, past, dtype=torch.long), expected.long()], 1)
    causal = torch.ones(4, past + 4, dtype=torch.bool).tril(past)
    boolean = causal & two.bool()[:, None, None, :]
    additive = torch.where(boolean, 0.0, torch.finfo(torch.float32).min)
    static = torch.nn.functional.pad(boolean, (0, 6))
    for mask in (two, two[:, past:], boolean, additive, static):
        assert torch.equal(token_validity(mask, 4, past), expected)
    assert token_validity(None, 4, past) is None


def test_pack_and_unpack():
    found = layout(mask=[[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    x = torch.randn(2, 5, 3, 2)
    packed = pack(x, found)
    assert torch.equal(packed, torch.cat([x[0, 2:], x[1, :4]])[None])
    back = unpack(packed, found, (2, 5))
    assert torch.equal(back[0, 2:], x[0, 2:])
    assert torch.equal(back[1, :4], x[1, :4])
    assert back[0, :2].abs().sum() == back[1, 4:].abs().sum() == 0
    assert pack(None, found) is None
