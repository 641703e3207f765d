"""Keys of the data section through the real command line: mixtures, columns, windows, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pipeline
import pyarrow
import pyarrow.parquet
import pytest

from mmkit.config import DataConfig
from mmkit.data.sources import SourceOptions, open_named, open_pairs, open_training_pairs, options_of
from mmkit.errors import InputError
from mmkit.training import loop


def world_rows() -> list[dict[str, str]]:
    path = pipeline.root() / "world" / "pairs_train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def parquet(folder: Path) -> Path:
    """Ten of the world's pairs in a table with its own column names."""
    rows = world_rows()[:10]
    pictures = [(pipeline.root() / "world" / row["image"]).read_bytes() for row in rows]
    table = pyarrow.table({"pic": pictures, "text": [row["caption"] for row in rows]})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=4)
    return folder / "a.parquet"


def test_a_table_with_its_own_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = parquet(tmp_path)
    assert (
        pipeline.mmkit(*pipeline.superclass(tmp_path / "run", f"data.train={path}", "data.image=pic", "data.caption=text")) == 0
    )
    assert pipeline.manifest(tmp_path / "run")["samples_in_data"] == 10
    assert pipeline.mmkit(*pipeline.superclass(tmp_path / "other", f"data.train={path}", "data.image=pic")) == 2
    assert "no column 'caption'; set data.caption; there are pic, text" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["superclass", "clipcap"])
def test_a_mixture_of_pairs(stage: str, tmp_path: Path) -> None:
    world = pipeline.root() / "world"
    run = tmp_path / "run"
    parts = f"[{{path: {world / 'pairs_train.jsonl'}, weight: 3}}, {{path: {world / 'shards'}, weight: 1}}]"
    arguments = pipeline.STAGES[stage](run, f"data.train={parts}", "data.limit=20", "data.image_root=null", "train.steps=2")
    assert pipeline.mmkit(*arguments) == 0
    assert pipeline.manifest(run)["samples_in_data"] == 40
    assert (run / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("key", "value", "place", "words"),
    [
        (
            "image",
            "pic",
            "shards",
            "image=pic has no effect on data of type webdataset; leave it out; it is for pairs",
        ),
        ("caption", "text", "captions_heldout.json", "caption=text has no effect on data of type coco"),
        (
            "streaming",
            "true",
            "pairs_train.jsonl",
            "streaming=True has no effect on data of type pairs; leave it out",
        ),
    ],
)
@pytest.mark.parametrize("stage", ["superclass", "clipcap"])
def test_keys_without_effect_are_refused(
    stage: str, key: str, value: str, place: str, words: str, tmp_path: Path, capsys
) -> None:
    arguments = pipeline.STAGES[stage](tmp_path / "run", f"data.train={pipeline.root()}/world/{place}", f"data.{key}={value}")
    assert pipeline.mmkit(*arguments) == 2
    assert f"data: {words}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_key_has_an_effect_where_one_of_several_data_sets_takes_it(tmp_path: Path) -> None:
    shards, table = pipeline.root() / "world" / "shards", parquet(tmp_path)
    names = {"image": "pic", "caption": "text"}
    both = DataConfig.model_validate({"train": [str(shards), str(table)], **names})
    assert len(open_training_pairs(both)) == 50
    held = DataConfig.model_validate({"train": str(shards), "val": str(table), **names})
    assert len(open_training_pairs(held)) == 40
    with pytest.raises(InputError, match="image=pic has no effect on data of type webdataset"):
        open_training_pairs(DataConfig.model_validate({"train": str(shards), **names}))
    with pytest.raises(InputError, match="image=pic has no effect on data of type webdataset"):
        open_named(str(shards), SourceOptions(image="pic"))
    assert len(open_named(str(table), SourceOptions(**names))) == 10


def test_a_mixture_of_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = pipeline.root() / "world"
    files = sorted(path for path in world.glob("*.json") if path.name.startswith("llava"))
    parts = ", ".join(f"{{path: {path}, weight: {n + 1}}}" for n, path in enumerate(files[:2]))
    run = tmp_path / "run"
    assert pipeline.mmkit(*pipeline.finetune(run, f"data.train=[{parts}]", "data.limit=12", "train.steps=2")) == 0
    assert pipeline.manifest(run)["samples_in_data"] == 12 * len(files[:2])
    bad = f"data.train=[{{path: {files[0]}, type: coco}}]"
    assert pipeline.mmkit(*pipeline.align(tmp_path / "bad", bad)) == 2
    assert "data type 'coco' holds no conversations; use llava or messages" in capsys.readouterr().err


def test_a_window_is_part_of_the_order(tmp_path: Path) -> None:
    world = pipeline.root() / "world"
    losses = {}
    for window in (100, 3):
        run = tmp_path / str(window)
        # Row groups of four: with three samples a window each of them is one.
        arguments = pipeline.superclass(run, f"data.train={parquet(tmp_path)}", "data.image=pic", "data.caption=text")
        assert pipeline.mmkit(*arguments, f"data.shuffle_window={window}", "train.steps=2", "train.batch_size=4") == 0
        losses[window] = pipeline.losses(run)
    assert losses[100] != losses[3]
    assert world.is_dir()


def test_the_loader_gets_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    real = loop.make_loader

    def watched(*positional: object, **named: object) -> object:
        seen.update(named)
        return real(*positional, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "make_loader", watched)
    arguments = pipeline.superclass(tmp_path / "run", "data.prefetch=5", "data.timeout=77", "data.workers=1", "train.steps=1")
    assert pipeline.mmkit(*arguments) == 0
    assert (seen["prefetch"], seen["timeout"], seen["workers"]) == (5, 77.0, 1)


def test_readers_get_the_keys(tmp_path: Path) -> None:
    keys = {"image": "a", "caption": "b", "streaming": True, "shuffle_window": 7, "cache": str(tmp_path), "cache_gib": 0.5}
    options = options_of(DataConfig.model_validate({"train": "x", **keys}), "hf", "root")
    assert (options.kind, options.image_root, options.image, options.caption) == ("hf", "root", "a", "b")
    assert (options.streaming, options.window) == (True, 7)
    assert (options.cache.folder, options.cache.limit) == (tmp_path, 1 << 29)


def test_a_killed_loader_worker_is_one_line_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from mmkit.data.sources import tars

    read = tars.TarShard.read
    main = os.getpid()

    def read_or_die(self: tars.TarShard, row: int) -> object:
        # As the system ends a process that takes too much memory.
        if os.getpid() != main and row == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, row)

    monkeypatch.setattr(tars.TarShard, "read", read_or_die)
    arguments = pipeline.superclass(tmp_path / "run", "data.workers=1", "train.steps=12")
    assert pipeline.mmkit(*arguments) == 2
    told = capsys.readouterr().err
    assert "data.workers: a loader worker died" in told and "bug in mmkit" not in told
    monkeypatch.undo()
    assert pipeline.mmkit(*arguments) == 0


def test_half_a_data_set_is_not_one_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    original = next((pipeline.root() / "world" / "shards").glob("*.tar")).read_bytes()
    (folder / "0.tar").write_bytes(original)
    (folder / "1.tar").write_bytes(b"\x1f\x8b" + original[2:])
    arguments = pipeline.superclass(tmp_path / "run", f"data.train={folder}", "train.steps=2")
    assert pipeline.mmkit(*arguments) == 2
    told = capsys.readouterr().err
    count = len(open_pairs(str(folder)))
    assert f"{count} of {2 * count} samples cannot be used, over the limit of 1.00%" in told
    assert pipeline.mmkit(*arguments, "data.max_skipped=0.5", "--restart") == 0
    assert pipeline.manifest(tmp_path / "run")["skipped"] == count


def test_bad_rows_beyond_a_limit_stop_nothing(tmp_path: Path) -> None:
    rows = world_rows()[:40]
    lines = [json.dumps(row if i < 36 else {**row, "caption": ""}) for i, row in enumerate(rows)]
    path = pipeline.root() / "world" / "some_bad.jsonl"
    path.write_text("\n".join(lines))
    arguments = pipeline.superclass(
        tmp_path / "run", f"data.train={path}", "data.limit=16", "data.max_skipped=0.11", "train.steps=1"
    )
    assert pipeline.mmkit(*arguments) == 0


@pytest.mark.slow
def test_processes_that_see_different_data_do_not_train(tmp_path: Path) -> None:
    # As where one machine cannot read a shard: each process has its own folder under the same name.
    for rank in range(2):
        (tmp_path / f"{rank}").mkdir()
        (tmp_path / f"{rank}" / "r.jsonl").write_text("\n".join(map(json.dumps, world_rows()[: 20 + rank])))
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        "from mmkit import cli\n"
        "from mmkit.data import sources\n"
        "real = sources.open_training_pairs\n"
        "import mmkit.training.stages.pairs as stage\n"
        "def other(data):\n"
        f"    return real(data.model_copy(update={{'train': '{tmp_path}/' + os.environ['RANK'] + '/r.jsonl'}}))\n"
        "stage.open_training_pairs = other\n"
        "cli.main(sys.argv[1:])\n"
    )
    root = f"data.image_root={pipeline.root() / 'world'}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = pipeline.python(*launch, *pipeline.superclass(tmp_path / "run", root))
    assert done.returncode != 0
    assert "data.train: the processes see different data (20 and 21 usable samples); look for files" in done.stderr, done.stderr[
        -2000:
    ]
