"""Rows in which earlier spans come again: text on which a model without memory of what it has read must fail.

Ordinary text asks for recall now and then. Here every stretch of new text is followed by a copy of a span from
anywhere before it, so that predicting the copy takes finding where it came from. The original model does that
(induction), which makes its distribution there a lesson that needs no labels.
"""

import numpy as np

# Tokens of one copied span, and of the new text before it: drawn log-uniformly.
SPAN_TOKENS = (4, 64)
# Where copies begin, as a share of the row: there must be something to copy from.
FIRST_COPY = 0.125
# Sources lie at least this far back, where the row is long enough: inside a window nothing has to be remembered.
NEAREST_SOURCE = 128


def with_repeats(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A row of the same length in which spans of new text and copies of earlier spans take turns.

    Args:
        ids (`np.ndarray` `[T]`): token ids; read as one document.
        rng (`np.random.Generator`): draws lengths and places.

    Returns:
        `np.ndarray` `[T]`, of the same dtype.
    """
    row = ids.copy()
    end = max(1, int(len(row) * FIRST_COPY))
    while end < len(row):
        span = min(_length(rng), len(row) - end, end)
        # Near and far sources alike: log-uniform too.
        nearest = min(max(span, NEAREST_SOURCE), end)
        start = end - max(nearest, int(np.exp(rng.uniform(np.log(nearest), np.log(end)))))
        row[end : end + span] = row[start : start + span]
        end += span + _length(rng)
    return row


def _length(rng: np.random.Generator) -> int:
    low, high = SPAN_TOKENS
    return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))
