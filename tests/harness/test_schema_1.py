"""Records and folders of the version before, in which identity was text."""

import copy

from utils.checkpoints import schema_1
from utils.reporting.labels import operations_label, training_label

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
