"""Finding, listing and copying the shipped recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

import mmkit.recipes
from mmkit.config import load_recipe
from mmkit.errors import InputError
from mmkit.recipes import copy_recipe, describe, find_deepspeed, find_recipe, list_recipes, recipe_folders


def test_every_shipped_recipe_loads_and_says_what_it_is() -> None:
    shipped = list_recipes()
    assert {"demo-superclass", "demo-clipcap", "demo-llava-align", "demo-eval-mllm"} <= set(shipped)
    for name, path in shipped.items():
        assert path.stem == name
        recipe = load_recipe(path)
        assert len(describe(path)) > 20, f"{name} does not open with what it is"
        head = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
        command = recipe.stage if recipe.stage in ("eval", "probe") else "train"
        assert f"mmkit {command} {name}" in head, f"{name} does not show its launch line"


def test_found_by_name_and_by_path() -> None:
    path = find_recipe("demo-superclass")
    assert path.is_file()
    assert find_recipe(str(path)) == path


def test_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'demo-superclass'") as caught:
        find_recipe("demo-superclas")
    assert "`mmkit ls`" in str(caught.value)
    with pytest.raises(InputError, match="no recipe"):
        find_recipe(str(tmp_path))


def test_wheel_layout_wins_over_a_foreign_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = {kind: tmp_path / "_recipes" / kind for kind in recipe_folders()}
    for folder in wheel.values():
        folder.mkdir(parents=True)
    (wheel["encoders"] / "b.yaml").write_text("# B, the second\nstage: probe\n")
    (wheel["encoders"] / "a.yaml").write_text("#\n# A, the first\n")
    (wheel["eval"] / "c.yaml").write_text("stage: eval\n")
    monkeypatch.setattr(mmkit.recipes, "_WHEEL", wheel)
    assert list(list_recipes()) == ["a", "b", "c"]
    assert [describe(p) for p in list_recipes().values()] == ["A, the first", "B, the second", ""]


def test_deepspeed_by_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {**recipe_folders(), "deepspeed": tmp_path}
    monkeypatch.setattr(mmkit.recipes, "recipe_folders", lambda: folders)
    (tmp_path / "zero2.json").write_text("{}")
    assert find_deepspeed("zero2") == tmp_path / "zero2.json"
    assert find_deepspeed(str(tmp_path / "zero2.json")) == tmp_path / "zero2.json"
    with pytest.raises(InputError, match="one of: zero2"):
        find_deepspeed("zero9")


def test_copy_to_a_file_and_into_a_folder(tmp_path: Path) -> None:
    source = find_recipe("demo-probe").read_text()
    assert copy_recipe("demo-probe", tmp_path) == tmp_path / "demo-probe.yaml"
    new = copy_recipe("demo-probe", tmp_path / "deep" / "mine.yaml")
    assert new.read_text() == (tmp_path / "demo-probe.yaml").read_text() == source
    new.write_text("mine")
    with pytest.raises(InputError, match="file exists"):
        copy_recipe("demo-probe", new)
    assert new.read_text() == "mine"
    with pytest.raises(InputError, match="no recipe"):
        copy_recipe("demo-prob-e", tmp_path / "x")
    assert not (tmp_path / "x").exists()
