"""A tiny Llama's config, and tensors in memory for the loader."""

LLAMA = {
    "model_type": "llama",
    "vocab_size": 12,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


class Held:
    """Tensors in memory, for the loader; a name may occur twice."""

    def __init__(self, pairs):
        self._pairs = list(pairs)

    def shapes(self):
        return [(name, array.shape) for name, array in self._pairs]

    def read(self, name, index, dtype):
        return dict(self._pairs)[name][index].astype(dtype)
