"""Names of other projects: each stands once, is explained where it counts, and is named in errors.

What each of them means is in test_config.py.
"""

import pytest
from test_config import TARGET, load

from beagle_jax.errors import UsageError

__all__ = ["load"]  # a fixture


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("decode: {depth: 5, levels: 3}", "decode.depth and decode.levels"),
        ("decode: {levels: 3, depth: 5}", "decode.levels and decode.depth"),
        ("decode: {num_draft_tokens: 8, total_token: 9}", "num_draft_tokens and decode.total_tok"),
        ("train: {late: {ttt_steps: 2, simulation_steps: 2}}", "ttt_steps and train.late.simula"),
        ("base_model: some/folder", "target.source and base_model"),
    ],
)
def test_two_names_of_one_setting_in_a_file_are_refused(load, text, names):
    with pytest.raises(UsageError, match=f"{names}.* are names of one setting"):
        load(TARGET + text)


def test_a_value_that_an_override_replaces_is_not_explained(load, capsys):
    load(TARGET + "decode: {depth: 5}", "decode.levels=2")
    assert "counts as EAGLE" not in capsys.readouterr().err


def test_an_alias_with_a_wrong_value_is_named(load):
    for value in ("5.0", "null", "true", "'5'"):
        with pytest.raises(UsageError, match=r"expected int \(decode.depth is written there\)"):
            load(TARGET + f"decode: {{depth: {value}}}")


def test_aliases_work_in_the_long_form_of_stages(load):
    stage = "{objective: test_time, ttt_length: 3}"
    stages = load(TARGET + f"train: {{stages: [{stage}]}}").train.stages
    assert stages[0].simulation_steps == 3
    with pytest.raises(UsageError, match=r"train.stages\[0\] has a setting under two names"):
        load(TARGET + "train: {stages: [{objective: late, ttt_steps: 3, simulation_steps: 3}]}")


@pytest.mark.parametrize("other", ["", "topk: 8, "])
def test_eagle_s_top_k_is_not_the_filter_of_sampling(load, capsys, other):
    config = load(TARGET + f"decode: {{{other}depth: 5, total_token: 60, top_k: 10}}")
    assert (config.decode.top_k, config.decode.topk) == (10, 8 if other else 4)
    note = "decode.top_k is the filter of sampling here; the top_k that EAGLE has"
    assert (note in capsys.readouterr().err) == (not other)
