"""Chats of a Hugging Face dataset, from the hub or a local folder.

Only this module imports the `datasets` library, and only when it is used: the import takes a
second, and only `hf:` sources need it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beagle_jax.data.chats import MAX_BAD_SHARE, Chat, Unread, chats_of
from beagle_jax.errors import UserError
from beagle_jax.hub_cache import snapshot_folder


def hub_chats(
    name: str,
    split: str,
    streaming: bool,
    max_bad_share: float = MAX_BAD_SHARE,
    unread: Unread = "ignore",
) -> Iterator[Chat]:
    """Reads the chats of a dataset, in the dataset's own order.

    name: `org/name[@revision]`, or a folder of data files, or one that `save_to_disk` wrote. split:
    in the notation of `datasets`, "train" or "train[:1%]". streaming: yields records while they are
    read and stores nothing on disk. Records have the formats of data/chats.py; an empty column
    counts as missing. unread: `data.unread`.

    Raises:
        UserError: the dataset or split does not exist, or too many records are not chats (the first
            is named).
    """
    where = f"hf:{name}[{split}]"
    dataset = _load(name, split, streaming)
    return chats_of(_records(dataset, where), where, max_bad_share, unread)


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
