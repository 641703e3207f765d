"""``mmkit data``: make the demo world, look into a data set, write shards.

Each command returns the lines that it has to say; `mmkit.cli` prints them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# What `data inspect` and `data pack` read, by the names of a recipe's data section.
PairData = Annotated[str, typer.Argument(metavar="DATA", help="Pairs, as data.train of a recipe: file, folder, shards, hf:NAME.")]
PairKind = Annotated[str, typer.Option("--type", help="As data.type of a recipe: auto, pairs, coco, webdataset, ...")]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder that image names are relative to.")]
ImageKey = Annotated[str, typer.Option(help="Key or column of the picture, as data.image.")]
CaptionKey = Annotated[str, typer.Option(help="Key or column of the caption, as data.caption.")]
Streaming = Annotated[bool, typer.Option("--streaming", help="Read the files behind a Hugging Face data set, as data.streaming.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; without it one for each core.")]


def synth(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    train: Annotated[int, typer.Option(min=8, help="Training pictures.")] = 8000,
    heldout: Annotated[int, typer.Option(min=4, help="Held-out pictures.")] = 300,
    image_size: Annotated[int, typer.Option(min=32, max=512, help="Side in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed; equal arguments give equal bytes.")] = 0,
) -> list[str]:
    """Make the demo world: pictures with captions, questions, conversations and shards in the official formats."""
    from mmkit.data.world import make_world
    from mmkit.data.world.tokenizers import make_tokenizers

    counts = make_world(out, train=train, heldout=heldout, image_size=image_size, seed=seed)
    # The demo recipes take their tokenizer from the world's folder.
    make_tokenizers(out)
    return ["  ".join(f"{k} {v}" for k, v in counts.items()), f"done: {out}"]


def inspect(
    data: PairData,
    kind: PairKind = "auto",
    image_root: ImageRoot = None,
    image: ImageKey = "image",
    caption: CaptionKey = "caption",
    streaming: Streaming = False,
    labels: Annotated[str, typer.Option(help="As data.labels of a recipe.")] = "clip",
    context_length: Annotated[int | None, typer.Option(min=3, help="As data.context_length of a recipe.")] = None,
    stop_words: Annotated[str | None, typer.Option(help="As data.stop_words of a recipe.")] = None,
    idf: Annotated[Path | None, typer.Option(help="Write the document counts here, for data.idf=file.")] = None,
    words: Annotated[Path | None, typer.Option(help="Write a vocabulary of whole words here, for data.labels.")] = None,
    words_size: Annotated[int, typer.Option(min=1, help="Words in it, the most frequent ones.")] = 40_000,
    min_count: Annotated[int, typer.Option(min=1, help="Captions that a word must be in.")] = 5,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first N pairs only.")] = None,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Captions only: a hundred times faster.")] = False,
    workers: Workers = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the findings as HTML, Markdown and JSON.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Pictures shown on the page, drawn at random.")] = 24,
) -> list[str]:
    """What a data set holds: counts, sizes, labels, what cannot be used, what comes twice; writes IDF tables and vocabularies."""
    from mmkit.data.inspect import inspect_pairs

    found = inspect_pairs(
        data,
        options=_source_options(kind, image_root, image, caption, streaming),
        labels=labels,
        context_length=context_length,
        stop_words=stop_words,
        idf=idf,
        words=words,
        words_size=words_size,
        min_count=min_count,
        limit=limit,
        pictures=not no_pictures,
        workers=workers,
        out=out,
        sample=sample,
    )
    return found.lines()


def pack(
    data: PairData,
    out: Annotated[Path | None, typer.Option(help="Folder for the shards; without it only the index of shards is made.")] = None,
    shard_size: Annotated[int | None, typer.Option(min=1, help="Samples of a shard; 10,000 without it.")] = None,
    max_side: Annotated[int | None, typer.Option(min=1, help="Make pictures smaller whose longer side has more pixels.")] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="JPEG quality of those; 90 without it.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Pack the first N pairs only.")] = None,
    kind: PairKind = "auto",
    image_root: ImageRoot = None,
    image: ImageKey = "image",
    caption: CaptionKey = "caption",
    streaming: Streaming = False,
    workers: Workers = None,
) -> list[str]:
    """Write pairs as webdataset shards with their index; without --out make the index of shards that exist."""
    from mmkit.data.pack import pack as run

    reading = _source_options(kind, image_root, image, caption, streaming)
    found = run(
        data, out, shard_size=shard_size, max_side=max_side, quality=quality, limit=limit, reading=reading, workers=workers
    )
    return found.lines()


def _source_options(kind: str, image_root: Path | None, image: str, caption: str, streaming: bool) -> Any:
    """How a data set is read, from the options that `inspect` and `pack` share."""
    from mmkit.data.sources import SourceOptions

    return SourceOptions(kind, None if image_root is None else str(image_root), image, caption, streaming)


# By their names on the command line.
COMMANDS = (synth, inspect, pack)
