"""Masks against their drawn examples, the worked example of method.md 4.4, and brute force."""

import jax.numpy as jnp
import numpy as np
import pytest
from late_oracle import bank_masks

from beagle_jax.model.masks import causal_mask, early_block_mask, window_start

# method.md 4.4: L = 8, k = 3, offset 2. Per query: the true keys it sees, and the predicted keys at
# steps 1, 2, 3.
EXAMPLE = {
    0: ([], [[], [], []]),
    1: ([0], [[], [], []]),
    2: ([0, 1], [[], [], []]),
    3: ([0, 1], [[], [2], [2]]),
    4: ([0, 1], [[], [2], [2, 3]]),
    5: ([0, 1, 2, 3, 4], [[], [], []]),
    6: ([0, 1, 2, 3, 4], [[], [5], [5]]),
    7: ([0, 1, 2, 3, 4], [[], [5], [5, 6]]),
}


def _seen(mask_LL) -> dict[int, list[int]]:
    return {query: np.flatnonzero(line).tolist() for query, line in enumerate(np.asarray(mask_LL))}


def test_worked_example():
    true_LL = early_block_mask(jnp.array([[8]]), 8, 3, jnp.int32(2))[0]
    assert _seen(true_LL) == {query: true for query, (true, _) in EXAMPLE.items()}
    for step in (1, 2, 3):
        bank_true, bank_predicted = bank_masks(8, 3, jnp.int32(2), step)
        assert _seen(bank_true) == _seen(true_LL)
        assert _seen(bank_predicted) == {
            query: predicted[step - 1] for query, (_, predicted) in EXAMPLE.items()
        }


def test_planted_bug_offset_ignored():
    wrong = early_block_mask(jnp.array([[8]]), 8, 3, jnp.int32(0))[0]
    with pytest.raises(AssertionError):
        assert _seen(wrong) == {query: true for query, (true, _) in EXAMPLE.items()}


def test_causal_example():
    assert _seen(causal_mask(jnp.array([2]), 3)[0]) == {0: [0], 1: [0, 1], 2: [0, 1]}


def test_window_start_example():
    np.testing.assert_array_equal(
        window_start(jnp.arange(8), 3, jnp.int32(2)), [0, 1, 2, 2, 2, 5, 5, 5]
    )


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_early_mask_by_brute_force(window):
    lengths = [11, 7]
    for offset in range(window):
        mask_BLL = np.asarray(
            early_block_mask(jnp.array(lengths)[:, None], 11, window, jnp.int32(offset))
        )
        for line, length in enumerate(lengths):
            for query in range(11):
                start = query if query < offset else offset + (query - offset) // window * window
                expected = [key for key in range(11) if key < start and key < length]
                assert np.flatnonzero(mask_BLL[line, query]).tolist() == expected
                assert all(key < query for key in expected)


def test_window_one_is_strictly_causal():
    mask_LL = early_block_mask(jnp.array([[9]]), 9, 1, jnp.int32(0))[0]
    np.testing.assert_array_equal(mask_LL, np.tril(np.ones((9, 9), bool), -1))
