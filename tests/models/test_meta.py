from __future__ import annotations

import json

import pytest

from mmkit.errors import InputError
from mmkit.models.meta import META_FILE, read_meta, write_meta


def test_round_trip_and_the_kind_wins(tmp_path):
    write_meta(tmp_path, "mllm", {"encoder": {"path": "e", "fingerprint": "f"}, "kind": "other"})
    assert read_meta(tmp_path, "mllm") == {"encoder": {"path": "e", "fingerprint": "f"}, "kind": "mllm"}
    assert json.loads((tmp_path / META_FILE).read_text())["kind"] == "mllm"


@pytest.mark.parametrize(
    ("text", "match"),
    [(None, "no such file"), ('{"kind": "ml', "cut off"), ('{"kind": "captioner"}', "captioner"), ("[1]", "None")],
)
def test_what_is_no_model_folder_is_refused_in_one_line(text, match, tmp_path):
    if text is not None:
        (tmp_path / META_FILE).write_text(text)
    with pytest.raises(InputError, match=match) as caught:
        read_meta(tmp_path, "mllm")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
