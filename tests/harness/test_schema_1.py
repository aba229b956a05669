"""Records and folders of the version before, in which identity was text."""

import copy
import json

import pytest

from tests.harness.test_report import record
from utils.checkpoints import schema_1
from utils.errors import UserError
from utils.reporting.labels import operations_label, training_label
from utils.reporting.records import read_record

TITLE = "Words, quick (batch_size=4, lr=0.003, scheduler=cosine), 1,024 steps"
READ = {"data": "Words", "fingerprint": "f", "task": None, "k": 2, "tokens": 512}
SURGERY = {
    **{"method": "compress", "keep": None, "options": {"rank": 4, "kept": 0.25}, "seed": 1111, "weights_sha256": "w", "read": READ},
    **{"source": {"title": TITLE, "sha256": "s", "method": "smoe", "seed": 7}, "tested_on": "f", "max_test_steps": 80},
    **{"label": "slim 4 to 2 score usage, 500 steps, compress rank 4 kept 0.25", "before": {"parameters": 9}},
}
SURGERY["title"] = f"{TITLE}, {SURGERY['label']}"
TRAINED = {"folder": TITLE, "method": "smoe", "seed": 7}
OPERATIONS = [
    {"method": "earlier", "label": "slim 4 to 2 score usage, 500 steps", "read": READ},
    {"method": "compress", "options": {"rank": 4, "kept": 0.25}, "seed": 1111, "weights_sha256": "w"},
]


def old_record(**changes) -> dict:
    made = copy.deepcopy(record())
    for name in ("settings", "preset_settings"):
        del made[name]
    del made["metric"]["split"], made["metric"]["training"]
    made["model"]["architecture"] = "Transformer-XL"
    return made | {"schema": 1, "title": "SMoE-Dropout", **changes}


def test_a_folder_of_surgery():
    found = schema_1.surgery(copy.deepcopy(SURGERY))
    rest = {"source_sha256": "s", "tested_on": "f", "max_test_steps": 80, "before": {"parameters": 9}}
    assert found == {"trained": TRAINED, "operations": OPERATIONS, **rest}
    assert schema_1.surgery(found) == found


def test_one_operation_is_kept_as_values():
    old = SURGERY | {"method": "slim", "keep": 2, "options": {"score": "usage"}, "label": "slim 4 to 2 score usage"}
    values = {"options": {"score": "usage"}, "seed": 1111, "weights_sha256": "w", "read": READ}
    assert schema_1.surgery(old)["operations"] == [{"method": "keep_best", "from": 4, "keep": 2, **values}]


def test_weights_that_a_run_started_from():
    title = f"{SURGERY['title']}, pruned to 0.25 in 12 steps, taught"
    old = {"title": title, "sha256": "b", "transferred": True, "surgery": SURGERY, "teacher": {"title": TITLE, "sha256": "t"}}
    found = schema_1.pretrained(copy.deepcopy(old))
    training = {"method": "train", "label": "pruned to 0.25 in 12 steps, taught"}
    assert {name: found[name] for name in TRAINED} == TRAINED and found["operations"] == [*OPERATIONS, training]
    assert found["surgery"]["source_sha256"] == "s" and found["teacher"]["folder"] == TITLE
    assert training_label(found) == f"{TITLE}"
    assert operations_label(found["operations"]).startswith("slim 4 to 2 score usage, 500 steps + compress rank 4")
    assert schema_1.pretrained({"title": "weights", "sha256": "b"}) == {"folder": "weights", "operations": [], "sha256": "b"}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("smoe", {}),
        (
            "smoe_dropout (gate_name=learned, freeze_gate=False, moe_index=0,1)",
            {"gate_name": "learned", "freeze_gate": False, "moe_index": "0,1"},
        ),
        (
            "smoe (moe_prune_to=0.1, surgery=merge 4 to 2, compress rank 4, teacher_weight=0.2)",
            {"moe_prune_to": 0.1, "teacher_weight": 0.2},
        ),
    ],
)
def test_a_record(method, settings, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(old_record(method=method, preset="laptop (n_layer=8)")))
    found = read_record(path)
    assert (found["schema"], found["method"], found["settings"]) == (2, method.split()[0], settings)
    assert (found["preset"], found["preset_settings"]) == ("laptop", {"n_layer": 8}) and "title" not in found
    assert (found["metric"]["split"], found["model"]["architecture"]) == ("test", "transformer_xl")


def test_what_was_set_in_pre_training_is_its_own(tmp_path):
    start = {"title": TITLE, "sha256": "b", "transferred": True}
    (tmp_path / "result.json").write_text(json.dumps(old_record(method="smoe (pretrained_moe_num_expert=4)", pretrained=start)))
    found = read_record(tmp_path / "result.json")
    assert found["settings"] == {} and found["pretrained"]["settings"] == {"moe_num_expert": 4}


def test_a_record_that_is_not_whole_is_refused(tmp_path):
    made = old_record()
    del made["metric"]
    (tmp_path / "result.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match="is an incomplete record of schema 1"):
        read_record(tmp_path / "result.json")
