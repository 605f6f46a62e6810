"""Exported drafts of other target families: embedding scale and windows reach torch too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from family_cases import family  # noqa: F401  (the fixture)
from test_families import PROMPTS
from transformers import AutoModel

from beagle_jax.decoding.draft import grow
from beagle_jax.decoding.drafter import Known
from beagle_jax.decoding.kinds import trained_drafter
from beagle_jax.decoding.tree import static_tree
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec, init_draft
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.torch_export import check_parity, write_torch_folder

PATHS = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0))
ROOTS, TRUE = 8, 5
grown = jax.jit(grow, static_argnums=3)


def exported(target, folder):
    """Returns a random draft of a target, and torch's from its folder.

    The folder passed the converter's comparison.
    """
    spec = BeagleSpec.from_target(target.spec, init_std=0.3)
    draft = Draft(spec, init_draft(spec, jax.random.key(1)), None, {})
    (folder / "draft").mkdir()
    write_torch_folder(folder / "draft", draft, target.spec.vocab_size, "")
    check_parity(folder / "draft", draft, target.spec.vocab_size)
    return draft, AutoModel.from_pretrained(folder / "draft", trust_remote_code=True).eval()


def drafted(model, target, draft, module, embed) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the nodes below some roots over random states, from torch and from JAX."""
    h_BSD = np.random.default_rng(6).standard_normal(
        (ROOTS, TRUE, target.spec.hidden_size), np.float32
    )
    roots = np.arange(ROOTS, dtype=np.int32) * 7
    tree = __import__(type(module).__module__, fromlist=["Tree"]).Tree(PATHS)
    rows_VD = model.get_output_embeddings().weight
    true = module.keys_values(torch.from_numpy(h_BSD), torch.arange(TRUE))
    lengths_B = torch.full((ROOTS,), TRUE)
    theirs = module.draft(tree, torch.from_numpy(roots).long(), true, lengths_B, embed, rows_VD)
    cache = BeagleBlock(draft.spec).apply(
        {"params": draft.params},
        h_BSD,
        np.broadcast_to(np.arange(TRUE), (ROOTS, TRUE)),
        method="keys_values",
    )
    known = Known(jnp.asarray(roots), jnp.full(ROOTS, TRUE))
    ours = grown(trained_drafter(draft, target.params), cache, known, static_tree(PATHS))
    return theirs.token_BW.tolist(), ours.nodes.token_BW.tolist()


@pytest.mark.parametrize("family", ["llama 3 rope", "gemma 3"], indirect=True)
def test_torch_drafts_what_jax_drafts_and_writes_what_the_target_writes(family, tmp_path):
    model, target = family
    draft, module = exported(target, tmp_path)
    theirs, ours = drafted(model, target, draft, module, model.get_input_embeddings())
    assert theirs == ours
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        expected = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=24
        )
        assert torch.equal(module.generate(model, tokens, 24).sequences, expected)


@pytest.mark.parametrize("family", ["gemma 3"], indirect=True)
def test_planted_bug_the_embedding_without_its_scale(family, tmp_path):
    model, target = family
    bare = torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight)
    theirs, ours = drafted(model, target, *exported(target, tmp_path), bare)
    assert theirs != ours
