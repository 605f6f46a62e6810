"""Chats of a dataset of the Hugging Face hub, or of a local folder that the `datasets` library
reads.

The library is imported here and nowhere else: it takes a second, and nothing but `hf:` sources
needs it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beagle_jax.data.chats import MAX_BAD_SHARE, Chat, chats_of
from beagle_jax.errors import UserError
from beagle_jax.hub_cache import snapshot_folder


def hub_chats(
    name: str, split: str, streaming: bool, max_bad_share: float = MAX_BAD_SHARE
) -> Iterator[Chat]:
    """Chats of `org/name[@revision]`, or of a folder of data files or of `save_to_disk`, in the
    dataset's own order.

    split: as `datasets` writes it, "train" or "train[:1%]". streaming: records come as they are
    read, and nothing is kept on disk. Records have the forms of data/chats.py; a column that is
    empty counts as absent. Raises UserError for a dataset or split that is not there, and naming
    the record for anything that is not a chat.
    """
    where = f"hf:{name}[{split}]"
    dataset = _load(name, split, streaming)
    return chats_of(_records(dataset, where), where, max_bad_share)


def _load(name: str, split: str, streaming: bool) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.source: hf:{name} needs the datasets library ({error}); install it with pip "
            "install 'datasets>=4,<6', or give a .jsonl file"
        ) from error
    folder = snapshot_folder(Path(name).expanduser(), "data.source")
    try:
        if any((folder / file).exists() for file in ("dataset_dict.json", "dataset_info.json")):
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    raise UserError(
                        f"data.split: {split!r} is not in {folder}; it holds {', '.join(saved)}"
                    )
                saved = saved[split]
            return saved.to_iterable_dataset() if streaming else saved
        path, _, revision = (str(folder), "", "") if folder.is_dir() else name.partition("@")
        return datasets.load_dataset(
            path, revision=revision or None, split=split, streaming=streaming
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data.source: hf:{name}, split {split!r}, cannot be opened ({error})"
        ) from error


def _records(dataset: Any, where: str) -> Iterator[tuple[Any, str]]:
    number = 0
    try:
        for number, record in enumerate(dataset, 1):
            yield record, f"{where}, record {number}"
    except OSError as error:
        raise UserError(
            f"{where}: reading stopped after record {number} ({error}); run again to go on"
        ) from error
