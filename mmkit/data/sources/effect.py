"""Which keys change how a data set is read; set where they change nothing, they are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

from mmkit.errors import InputError

# Tables and rows have columns of any name; shards, COCO and LLaVA files fix what picture and caption are called.
_NAMED = ("pairs", "parquet", "hf")
PAIR_KEYS: Mapping[str, tuple[str, ...]] = {"image": _NAMED, "caption": _NAMED, "streaming": ("hf",)}
# Not `label`: a shipped recipe that names one is run on folders, which name classes by themselves, by `data.train=FOLDER` alone.
LABELLED_KEYS: Mapping[str, tuple[str, ...]] = {"image": ("jsonl", "hf")}


def check_keys(
    given: Any, defaults: Mapping[str, Any], kinds: Collection[str], *, where: object, readers: Mapping[str, tuple[str, ...]]
) -> None:
    """Refuse keys that no reader of these kinds looks at.

    Args:
        given: Has the keys as attributes: a recipe's data section, or `mmkit.data.sources.SourceOptions`.
        defaults: Key to the value that it has when nobody sets it.
        kinds: Of all data sets that are read with these keys; one that takes a key is enough.
        where: For the message.
        readers: Key to the kinds that look at it.

    Raises:
        InputError: Whoever sets such a key expects an effect.
    """
    for key, takers in readers.items():
        # By value: a resolved recipe names all keys.
        if getattr(given, key) != defaults[key] and not set(takers) & set(kinds):
            what = f"{key}={getattr(given, key)} has no effect on data of type {', '.join(sorted(set(kinds)))}"
            raise InputError(what, where=where, mend=f"leave it out; it is for {', '.join(takers)}")


def defaults_of(section: type[BaseModel]) -> dict[str, Any]:
    """Key to default of a recipe's section."""
    return {name: field.default for name, field in section.model_fields.items()}
