"""What all sections of a recipe are."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of keys; an unknown key is an error, never ignored."""

    # protected_namespaces: pydantic warns of keys such as model_args otherwise. allow_inf_nan: YAML has .inf and .nan.
    # frozen: the recipe in memory stays the one that was written to recipe.yaml.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
