"""Routing and redundancy in a run's record against counts by hand from the same checkpoints."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from smoe_dropout import moe_layers, set_top_k, top_k
from smoe_dropout.io import load_weights
from tests import tiny
from tests.tiny import parse
from utils.data.corpus import Corpus
from utils.engine import Engine
from utils.errors import UserError
from utils.models.build import build_model
from utils.training import routing
from utils.training.finished import open_finished
from utils.training.setup import pretraining_task

E = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    corpus = tiny.write_corpus(folder / "words", held_out_bytes=700)
    arguments = tiny.flags(corpus, folder / "run", method="smoe", lr=3e-2)
    tiny.completed(arguments)
    return folder / "run", arguments


def test_of_a_run_against_counts_by_hand(run):
    folder, arguments = run
    found = tiny.read_json(folder / "result.json")["routing"]
    flags, model = parse(arguments), build_model(parse(arguments)).eval()
    text = torch.from_numpy(np.fromfile(flags.data + "/valid.bin", np.uint8).astype(np.int64))
    lanes = text[: len(text) // 2 * 2].view(2, -1)
    chosen, inputs = [], {}
    for path in tiny.checkpoints(folder)[-2:]:
        load_weights(model, path)
        set_top_k(model, E // 2)
        inputs = {layer: [] for _, layer in moe_layers(model)}
        hooks = [layer.register_forward_pre_hook(lambda layer, given, into=inputs: into[layer].append(given[0])) for layer in inputs]
        memory, seen = None, []
        for begin in range(0, 8 * routing.BATCHES, 8):
            _, memory, _ = model(lanes[:, begin : begin + 8], lanes[:, begin + 1 : begin + 9], memory)
            seen.append(torch.stack([layer.assigned for _, layer in moe_layers(model)]))
        chosen.append(torch.cat(seen, 1))
        for hook in hooks:
            hook.remove()
    changed = [(one[:, 0] != other[:, 0]).float().mean().item() for one, other in zip(*chosen, strict=True)]
    assert found["k"] == E // 2 and found["steps"] == [16, 24]
    assert found["fluctuation_by_layer"] == pytest.approx(changed, abs=1e-6) and 0 < found["fluctuation"] < 1
    for entropy, dead, indices in zip(found["load_entropy_by_layer"], found["dead_experts_by_layer"], chosen[1], strict=True):
        shares = np.bincount(indices.flatten(), minlength=E) / indices.numel()
        assert entropy == pytest.approx(-sum(s * math.log(s) for s in shares if s) / math.log(E), abs=1e-6)
        assert dead == (shares * E < 0.01).mean()
    for similarity, (layer, read) in zip(found["output_similarity_by_layer"], inputs.items(), strict=True):
        unit_NED = torch.nn.functional.normalize(layer.experts.each(torch.cat(read).flatten(0, 1)), dim=-1)
        cosine_EE = torch.einsum("nid,njd->ij", unit_NED, unit_NED) / len(unit_NED)
        assert similarity == pytest.approx((cosine_EE.sum() - cosine_EE.trace()).item() / (E * (E - 1)), abs=1e-4)
    assert found["dead_experts"] == np.mean(found["dead_experts_by_layer"])
    assert found["output_similarity"] == pytest.approx(np.mean(found["output_similarity_by_layer"])) and 0 < found["output_similarity"] < 1


def test_a_finished_run_is_measured_again_with_the_same_result(run, capsys):
    folder, _ = run
    before = tiny.read_json(folder / "result.json")
    assert before["routing"] is not None
    (folder / "result.json").write_text(json.dumps(before | {"routing": None}))
    routing.main([open_finished(folder)])
    assert tiny.read_json(folder / "result.json") == before and str(folder) in capsys.readouterr().out


def test_unfinished_and_damaged_runs_are_refused(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder, copy := tmp_path / "copy")
    result = (copy / "result.json").read_text()
    (copy / "result.json").unlink()
    for damage, said in (
        (None, "only a finished run"),
        (result[:99], "result.json is not readable"),
        (result.replace("3", "4"), "checksum"),
    ):
        if damage:
            (copy / "result.json").write_text(damage)
        with pytest.raises(UserError, match=said):
            open_finished(copy)
    with pytest.raises(UserError, match="holds no run"):
        open_finished(tmp_path)
    (copy / "result.json").write_text(result)
    (copy / "checkpoints" / "step-00000016" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"step-00000016/model\.safetensors is missing.* or train again"):
        routing.main([open_finished(copy)])
    assert (copy / "result.json").read_text() == result


def test_other_checkpoints_change_nothing(run, tmp_path):
    """Checkpoints of --save_interval, or of a run stopped between two validations."""
    folder, arguments = run
    again = [*arguments[: arguments.index("--work_dir")], "--work_dir", str(tmp_path), "--save_interval", "5"]
    again += arguments[arguments.index("--work_dir") + 2 :]
    tiny.completed(again)
    assert [path.name[-2:] for path in tiny.checkpoints(tmp_path)][-3:] == ["16", "20", "24"]
    assert tiny.read_json(tmp_path / "result.json")["routing"] == tiny.read_json(folder / "result.json")["routing"]


def test_a_frozen_hash_route_never_changes_and_a_dense_model_has_none(tmp_path):
    corpus = tiny.write_corpus(tmp_path / "words")
    tiny.completed(tiny.flags(corpus, tmp_path / "hash", method="smoe", gate_name="hash"))
    assert tiny.read_json(tmp_path / "hash" / "result.json")["routing"]["fluctuation"] == 0
    tiny.completed(tiny.flags(corpus, tmp_path / "dense", method="dense"))
    assert tiny.read_json(tmp_path / "dense" / "result.json")["routing"] is None


def test_one_checkpoint_has_no_fluctuation_and_is_only_accepted_on_request(run):
    folder, arguments = run
    flags, lost = parse(arguments), []
    (damaged,) = [path for path in tiny.checkpoints(folder) if path.name == "step-00000016"]
    (damaged / "manifest.json").unlink()
    with Engine(flags) as engine:
        task = pretraining_task(flags, Corpus.open(flags.data), engine)
        with pytest.raises(UserError, match=r"step-00000016/manifest\.json is missing.* --repair"):
            routing.describe_routing(task, build_model(flags), folder / "checkpoints")
        found = routing.describe_routing(task, build_model(flags), folder / "checkpoints", lost=lost)
    assert found["fluctuation"] is None and 0 < found["load_entropy"] <= 1 and lost == ["the change of routing since step 16"]


def test_routes_by_earlier_positions_are_examined_as_they_are_evaluated(tmp_path):
    """With segments that are read in pieces."""
    corpus = tiny.write_corpus(tmp_path / "words", held_out_bytes=60)
    flags = parse(tiny.flags(corpus, tmp_path, method="attention", tgt_len=8, eval_tgt_len=2, mem_len=20, init_std=0.5))
    with Engine(flags) as engine:
        task = pretraining_task(flags, Corpus.open(flags.data), engine)
        model, state, losses, positions = engine.prepare(build_model(flags)).eval(), None, 0.0, 0
        report = routing.examined(task, model, 2, seed=0, tokens=1000)
        with task.evaluation(model), torch.no_grad(), top_k(model, 2):
            for batch in task.held_out("valid", everything=True):
                loss, count, state = task.measure(model, batch, state)
                losses, positions = losses + loss, positions + count
    assert report.by_k[0].loss == pytest.approx(losses / positions, rel=1e-6)
