"""Registers Beagle drafts with vLLM.

vLLM calls `register` in each of its processes. It needs no import of vLLM's layers before one of
them loads a draft.
"""

NAME = "BeagleForCausalLM"  # `architectures` in config.json of a draft


def register() -> None:
    """Tells vLLM which class computes a Beagle draft.

    vLLM looks the draft up under the name in its config.json, and then under the same with "Eagle"
    before it: what its EAGLE proposer runs.
    """
    from vllm import ModelRegistry

    for name in (NAME, f"Eagle{NAME}"):
        ModelRegistry.register_model(name, f"beagle_vllm.draft:{NAME}")
