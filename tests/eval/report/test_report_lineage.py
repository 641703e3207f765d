from __future__ import annotations

import itertools
import json
from pathlib import Path

from report_runs import Runs, lmms_results

from mmkit.eval.report.collect import collect
from mmkit.eval.report.lineage import GAP_X, WIDTH, Lineage, Node, build_lineage


def drawn(paths: list[Path]) -> Lineage:
    return build_lineage(collect(paths).everything())


def by_name(lineage: Lineage) -> dict[str, Node]:
    return {node.lines[0]: node for node in lineage.nodes}


def test_every_run_is_a_box_right_of_what_it_came_from(world: list[Path]) -> None:
    lineage = drawn(world)
    nodes = by_name(lineage)
    assert len([n for n in lineage.nodes if n.kind in ("train", "eval", "probe")]) == 15
    chain = ["superclass-encoder", "superclass-align", "superclass-tune", "superclass-vqa"]
    assert [nodes[name].layer for name in chain] == [1, 2, 3, 4]
    assert all(nodes[a].x < nodes[b].x for a, b in itertools.pairwise(chain))
    # One data set for all runs of the fixture: a box of it stands left of each layer.
    assert [n.layer for n in lineage.nodes if n.kind == "data"] == [0, 1, 2, 3]
    assert any(line.startswith("vqav2 ") for line in nodes["superclass-vqa"].lines)
    assert "superclass-encoder (train, superclass) → superclass-align (train, llava)" in lineage.words


def test_boxes_do_not_overlap_and_lie_inside(world: list[Path]) -> None:
    lineage = drawn(world)
    assert lineage.width == max(n.x for n in lineage.nodes) + WIDTH
    for i, a in enumerate(lineage.nodes):
        assert a.x % (WIDTH + GAP_X) == 0 and a.y >= 0 and a.y + a.height <= lineage.height
        for b in lineage.nodes[:i]:
            assert a.x != b.x or a.y >= b.y + b.height or b.y >= a.y + a.height


def test_links_name_the_runs_in_the_order_of_the_page(world: list[Path]) -> None:
    runs = collect(world).everything()
    lineage = build_lineage(runs)
    for number, run in enumerate(runs):
        assert next(n for n in lineage.nodes if n.key == str(run.path)).link == f"run-{number}"


def test_models_from_elsewhere_have_a_box(runs: Runs, tmp_path: Path) -> None:
    path = runs.train("llava", "llava")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["parents"] = [{"role": "llm", "path": "lmsys/vicuna-7b-v1.5", "fingerprint": "c" * 32}]
    (path / "manifest.json").write_text(json.dumps(manifest))
    results = lmms_results(tmp_path / "lmms", {"gqa": {"results": {"exact_match,none": 0.6}}})
    nodes = by_name(drawn([path, results]))
    assert nodes["vicuna-7b-v1.5"].lines == ["vicuna-7b-v1.5", "from elsewhere", "c" * 12 + "…"]
    assert nodes["vicuna-7b-v1.5"].layer < nodes["llava"].layer
    assert nodes["llava-1.5-7b-hf"].kind == "elsewhere"
    (imported,) = [node for node in nodes.values() if node.key == str(results)]
    assert imported.lines[1:] == ["lmms-eval 0.7.2, lmms-…", "gqa-testdev-bal… 60.0"]


def test_a_circle_of_parents_ends(runs: Runs) -> None:
    a, b = runs.train("a", "llava"), runs.train("b", "llava")
    for one, other in ((a, b), (b, a)):
        manifest = json.loads((one / "manifest.json").read_text())
        manifest["parents"] = [{"role": "model", "path": str(other), "fingerprint": "x"}]
        (one / "manifest.json").write_text(json.dumps(manifest))
    assert len([n for n in drawn([a]).nodes if n.kind == "train"]) == 2
