"""Models of transformers, dense and converted, trained further and fine-tuned from their folders."""

import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import smoe_dropout as sd
from benchmarks import slimmable_trials
from benchmarks.slimmable import SlimmableFlags
from benchmarks.slimmable_table import load
from data import prepare, reading
from smoe_dropout.adapters import merged
from tests import tiny
from tests.harness.test_finetune import made, refusal
from tests.harness.test_resume import die
from utils.checkpoints.origin import open_source
from utils.cli.train import parse
from utils.data.corpus import Corpus
from utils.data.tokens import load_tokens
from utils.engine import Engine
from utils.errors import UserError
from utils.models.flops import forward_flops
from utils.models.hf import summary
from utils.models.registry import Shape
from utils.reporting.records import read_record
from utils.tasks.causal import TokenSequences
from utils.training.setup import pretraining_run

HOW = {
    **{"model": "hf", "preset": "quick", "tgt_len": 12, "batch_size": 4, "eval_batch_size": 4, "max_eval_steps": 2, "max_test_steps": 3},
    **{"max_step": 6, "eval_interval": 3, "log_interval": 1, "lr": 1e-2, "device": "cpu", "threads": 1, "precision": "fp32", "yes": True},
}
ELASTIC = {"method": "elastic", "moe_top_k_min": 1, "teacher": "self", "teacher_weight": 0.5, "train_only": "experts"}
TUNING = {
    **{"max_step": 4, "eval_interval": 4, "log_interval": 2, "batch_size": 5, "eval_batch_size": 4, "preset": "quick"},
    **{"device": "cpu", "threads": 1, "yes": True},
}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}


def words(program_flags: dict) -> list[str]:
    given = [(name, value) for name, value in program_flags.items() if value is not None]
    return [word for name, value in given for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def write_tokenizer(folder: Path, text: list[str], around: tuple[str, ...] = (), **changes) -> Path:
    """The tokenizer.json of a byte-level BPE; `around`: tokens that it puts before a text, and after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["[PAD]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, **changes))
    if around:
        single = " ".join([around[0], "$A", *around[1:]])
        ids = [(token, tokenizer.token_to_id(token)) for token in around]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B {' '.join(around[1:])}", special_tokens=ids
        )
    tokenizer.enable_truncation(8)  # as some folders have it; no row and no text may lose a token by it
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """Folders of models, a text of their tokens, and the rows of tasks."""
    root = tmp_path_factory.mktemp("hf")
    text = "\n".join(" ".join(tiny.WORDS[(i * i + j) % len(tiny.WORDS)] for j in range(i % 11 + 1)) for i in range(400)) + "\n\n é.\n"
    (root / "text").write_text(text)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=300, num_key_value_heads=1))
    bert = BertModel(BertConfig(**SIZES, vocab_size=300))
    for name, model in (("llama", llama), ("bert", bert)):
        model.save_pretrained(root / f"{name}-dense")
        sd.save_pretrained(sd.moefy(model, sd.SMoEConfig.exact(4)), root / name)
        around = ("[CLS]", "[SEP]") if name == "bert" else ()
        for folder in (root / name, root / f"{name}-dense"):
            write_tokenizer(folder, text.splitlines(), around)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=300, n_positions=32)).save_pretrained(root / "gpt2")
    prepare.main(["words", "--source", str(root / "text"), "--tokenizer", str(root / "llama"), "--out", str(root / "data")])
    for task in ("sst2", "csqa", "svamp"):
        tiny.write_rows(root / task, task)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def recovered(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    tiny.completed(command(world, folder))
    return folder


def command(world: dict[str, Path], folder: Path, start: str = "llama", **changes) -> list[str]:
    return words({"start_from": world[start], "data": world["data"], "work_dir": folder, **HOW, **ELASTIC, **changes})


def tuned(world: dict[str, Path], task: str, checkpoint: Path, **changes) -> list[str]:
    return words({"task": task, "data": world[task], "checkpoint": checkpoint, **TUNING, **changes})


def loaded(folder: Path, kind: type = AutoModelForCausalLM) -> torch.nn.Module:
    return kind.from_pretrained(folder).eval()


def test_a_text_is_stored_as_the_tokens_of_the_whole(world, tmp_path, monkeypatch):
    """Wherever it is cut into pieces, and whatever length the tokenizer would truncate to."""
    monkeypatch.setattr(reading, "PIECE", 40)
    prepare.main(["words", "--source", str(world["text"]), "--tokenizer", str(world["llama"]), "--out", str(tmp_path / "data")])
    corpus, tokenizer = Corpus.open(tmp_path / "data", ("tokens",)), load_tokens(world["llama"])[0]
    assert corpus.fingerprint == Corpus.open(world["data"]).fingerprint and corpus.vocabulary.first is None
    text, at = world["text"].read_bytes(), 0
    for split, size in corpus.meta["text_bytes"].items():
        part = text[at : at + size].decode()
        assert getattr(corpus, split).tolist() == tokenizer.encode(part).ids and tokenizer.decode(getattr(corpus, split).tolist()) == part
        at += size
    corpus.verify()
    assert at == len(text)
    other = write_tokenizer(Path(shutil.copytree(world["llama"], tmp_path / "other")), ["other words"])
    with pytest.raises(UserError, match=r"has tokens .*, not .*--force"):
        prepare.main(["words", "--source", str(world["text"]), "--tokenizer", str(other), "--out", str(tmp_path / "data")])


def test_every_token_is_predicted_once():
    tokens = torch.arange(50, dtype=torch.int64).numpy().astype("<u4")
    for first in (None, 99):
        sequences = TokenSequences(tokens, 7, first)
        inputs, targets = sequences.batch(range(sequences.count), (), "cpu")
        assert targets.flatten().tolist() == list(range(first is None, (first is None) + 49))
        assert inputs[:, 1:].tolist() == targets[:, :-1].tolist()
        assert inputs[:, 0].tolist() == ([99] * 7 if first else list(range(0, 49, 7)))


def test_a_run_is_resumed_exactly_and_its_folder_is_a_model_of_transformers(world, recovered, tmp_path):
    copied = Path(shutil.copytree(world["llama"], tmp_path / "llama"))
    broken = command({**world, "llama": copied}, tmp_path / "broken")
    assert tiny.run(broken, partial(die, "step", 5, False)).code == -signal.SIGKILL
    tiny.completed(broken)
    tiny.same_run(recovered, tmp_path / "broken")
    record = read_record(recovered / "result.json")
    assert (record["table"], record["method"], record["metric"]["name"], record["best_step"]) == ("recovery", "elastic", "perplexity", 6)
    start = record["pretrained"]
    assert (start["teacher"], start["folder"], start["sha256"]) == ("self", "llama", open_source(world["llama"]).fingerprint)
    corpus = Corpus.open(world["data"])
    for row in record["quality"]:
        bits = torch.tensor(row["test"]).log2().item() * len(corpus.test) / corpus.meta["text_bytes"]["test"]
        assert row["test_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    shutil.rmtree(copied)  # evaluation goes on without it
    tiny.completed(["--eval_only", "--k", "1,4", "--work_dir", str(tmp_path / "broken")])
    again = {row["k"]: row["test"] for row in tiny.read_json(tmp_path / "broken" / "eval.json")["quality"]}
    assert again == {row["k"]: row["test"] for row in record["quality"] if row["k"] in again}

    model, before = loaded(recovered / "model"), loaded(world["llama"])
    assert sd.get_top_k(model) == 4 and load_tokens(recovered / "model")[1].sha256 == corpus.vocabulary.sha256
    inputs, targets = TokenSequences(corpus.test, 12, None).batch(range(12), (), "cpu")
    with sd.top_k(model, 2), torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
    assert loss.exp().item() == pytest.approx(next(row["test"] for row in record["quality"] if row["k"] == 2), rel=1e-5)
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before.get_parameter(name))}
    assert changed and all(".experts." in name for name in changed)
    tiny.completed(tuned(world, "sst2", recovered, work_dir=tmp_path / "tuned"), program="finetune.py")
    start = read_record(tmp_path / "tuned" / "result.json")["pretrained"]
    assert (start["folder"], start["operations"]) == ("llama", [{"method": "train", "steps": 6, "taught": True}])
    assert start["experts"] == {"num_experts": 4, "top_k": 4, "gate_weight": "uniform", "output_scale": "dense", "expert_init": "split"}


def test_the_teacher_is_the_model_with_all_experts(world, tmp_path):
    flags, source = parse(command(world, tmp_path / "run"))
    with Engine(flags) as engine:
        run = pretraining_run(flags, Corpus.open(flags.data), engine, source)
        model, inputs = run.build().train(), run.task.next().inputs

        def part(k: int):
            from smoe_dropout.methods.base import Forward

            sd.set_top_k(model, k)
            return run.objective()(model, lambda: run.forward(lambda inputs, state: Forward(*model(*inputs, state)), inputs, None))

        assert torch.equal(part(4).total, part(4).nll)
        found = part(1)
        theirs, ours = (model(*inputs)[2].log_softmax(-1) for k in (4, 1) if sd.set_top_k(model, k) is None)
        theirs, ours = ((logits / 2).log_softmax(-1) for logits in (theirs, ours))
        expected = 0.5 * 4 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
        torch.testing.assert_close(found.total - found.nll, expected, rtol=1e-3, atol=1e-6)
        assert model.training and sd.get_top_k(model) == 1


def test_adapters_alone_are_trained_and_merged_into_the_experts(world, tmp_path):
    tiny.completed(
        command(world, tmp_path / "run", train_only="adapters", adapter_rank=2, teacher=world["llama-dense"], tokens=200, max_step=None)
    )
    record = read_record(tmp_path / "run" / "result.json")
    assert record["training"]["steps"] == 4 and record["settings"]["adapter_rank"] == 2
    assert record["pretrained"]["teacher"]["sha256"] == open_source(world["llama-dense"]).fingerprint
    flags, source = parse(command(world, tmp_path / "run", train_only="adapters", adapter_rank=2))
    with Engine(flags) as engine:
        built = pretraining_run(flags, Corpus.open(flags.data), engine, source).build()
    trained = {name: one for name, one in built.named_parameters() if one.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"up_a", "up_b", "down_a", "down_b"}
    with torch.no_grad():
        for adapter in trained.values():
            adapter.normal_()
        for network in (built, merged(built)):
            for _, layer in sd.moe_layers(network):
                assert not torch.equal(
                    layer.experts.weights(torch.float32).down_EHD, loaded(world["llama"]).model.layers[0].mlp.experts.down
                )
        tokens = torch.arange(24).view(2, 12)
        torch.testing.assert_close(merged(built).host(tokens).logits, built.host(tokens).logits)
    model, before = loaded(tmp_path / "run" / "model"), loaded(world["llama"])
    for (name, one), (_, other) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(one, other) != name.endswith(("experts.up", "experts.down")), name
    rank = torch.linalg.matrix_rank(model.model.layers[0].mlp.experts.up - before.model.layers[0].mlp.experts.up, atol=1e-5)
    assert rank.max() <= 2


@pytest.mark.parametrize(
    ("task", "start", "changes"),
    [
        ("sst2", "bert", {"method": "elastic", "dynamic_moe": True, "moe_top_k_min": 1}),
        ("csqa", "llama", {"method": "smoe_dropout", "dynamic_moe": True}),
        ("svamp", "bert", {"train_only": "adapters"}),
    ],
)
def test_fine_tuning_with_a_fresh_head(task, start, changes, world, tmp_path):
    arguments = tuned(world, task, world[start], work_dir=tmp_path / "run", **changes)
    job, network = made(arguments)
    longest = max(len(tokens) for row in job._rows["train"] for tokens in (row[0] if isinstance(row[0], list) else [row[0]]))
    assert longest > 8  # not truncated
    batch = next(job.held_out(job.splits[0]))
    tokens, lengths = job.sequences_of(batch)
    states = network._hidden_states(network.backbone, tokens, lengths)
    alone = network._hidden_states(network.backbone, tokens[:1, : lengths[0]], lengths[:1])
    torch.testing.assert_close(summary(states, lengths)[0], alone[0].mean(0), rtol=1e-4, atol=1e-5)  # padding changes nothing
    tiny.completed(arguments, program="finetune.py")
    record = read_record(tmp_path / "run" / "result.json")
    assert [row["k"] for row in record["quality"]] == [1, 2, 4]
    assert (record["table"], record["model"]["architecture"]) == ("table2", "hf")


def test_operations_are_those_of_the_model(world):
    """Two for each weight of a matrix and token, and attention."""
    flags, source = parse(command(world, Path("run"), "llama-dense", **dict.fromkeys(ELASTIC) | {"method": "dense"}))
    with Engine(flags) as engine:
        model = pretraining_run(flags, Corpus.open(flags.data), engine, source).build()
    D, F, T = 16, 32, 12
    layer = 2 * (D * D + 2 * D * (D // 2) + D * D + 3 * D * F) + 4 * T * D
    assert forward_flops("hf", model, Shape(2, T), None) == 2 * T * (2 * layer + 2 * D * 300)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start_from": None, "teacher": None}, "--model hf is built from a folder of transformers: give it with --start_from"),
        ({"moe_num_expert": 8}, "--moe_num_expert 8, but the checkpoint"),
        ({"d_model": 32}, "--d_model 32, but the checkpoint"),
        ({"tgt_len": 65}, "--tgt_len 65 must be at most the 64 positions of"),
        ({"mem_len": 8}, "--mem_len has no effect with --model hf"),
        ({"tokens": 100}, "--tokens and --max_step both say how long to train"),
        ({"start": "bert"}, "holds a BertModel, which is no causal language model: use finetune.py"),
        ({"start": "gpt2", **dict.fromkeys(ELASTIC)}, "gpt2 has no tokenizer.json"),
        ({"teacher": "gpt2"}, "reads other tokens than"),
        ({"start": "llama-dense", **dict.fromkeys(ELASTIC), "teacher": "self"}, "--teacher self predicts with all experts"),
        ({"adapter_rank": 2}, "--adapter_rank has no effect with --train_only experts"),
        ({"method": "thor", "moe_top_k_min": None}, "cannot be used here: this method supports"),
        ({"method": "momentumsmoe", "moe_top_k_min": None}, "has layers of its own"),
    ],
)
def test_wrong_commands_are_refused(changes, said, world, tmp_path):
    changes = {name: world.get(value, value) if name == "teacher" else value for name, value in changes.items()}
    done = tiny.run(command(**{"world": world, "folder": tmp_path / "run", **changes}))
    assert done.code == 2 and said in done.err and not (tmp_path / "run").exists(), done


def test_another_tokenizer_or_a_damaged_folder_is_refused(world, tmp_path):
    other = Path(shutil.copytree(world["llama"], tmp_path / "other"))
    write_tokenizer(other, ["other words"])
    assert "tokenizer.json makes other tokens than those of" in tiny.run(command({**world, "llama": other}, tmp_path / "run")).err
    assert "is not that of" in refusal(tuned(world, "sst2", world["llama"], tokenizer=other))
    assert "--from_scratch" in refusal(tuned(world, "sst2", world["llama"], from_scratch=True))
    assert "--tokens 5: rows differ in length" in refusal(tuned(world, "sst2", world["llama"], tokens=5))
    (other / "tokenizer.json").write_text(json.dumps({"model": {}}))
    assert "tokenizer.json cannot be read" in refusal(tuned(world, "sst2", other))
    shutil.copy(world["llama"] / "tokenizer.json", other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    assert "cannot be loaded" in refusal(tuned(world, "sst2", other))


def test_a_dense_folder_is_fine_tuned_as_it_is(world):
    """It gives the same states as the converted one at k = E."""
    found = []
    for start in ("bert", "bert-dense"):
        task, network = made(tuned(world, "sst2", world[start]))
        tokens, lengths = task.sequences_of(next(task.held_out("dev")))
        found.append(network._hidden_states(network.backbone, tokens, lengths))
        assert (task.flags.moe, task.flags.dropout, task.flags.lr) == (start == "bert", 0.1, 5e-5)
    torch.testing.assert_close(*found)


def test_ways_to_convert_are_compared_also_after_a_recovery(world, tmp_path, monkeypatch):
    (way,) = ways = [way for way in slimmable_trials.TRIALS if "correction" in way][:1]
    short = {"preset": "quick", "tgt_len": 12, "batch_size": 4, "eval_batch_size": 4, "lr": 1e-2, "device": "cpu"}
    monkeypatch.setattr(slimmable_trials, "TRIALS", ways)
    monkeypatch.setattr(slimmable_trials, "RECOVERY", slimmable_trials.RECOVERY | short)
    texts = {"text": world["text"], "calibration": world["text"], "tokens": 96, "context": 32, "calibration_tokens": 96, "trial_tokens": 64}
    flags = SlimmableFlags(dense=world["llama-dense"], **texts, recovery=world["data"], recovery_tokens=960, out=tmp_path)
    converted, convert = [], slimmable_trials.sd.convert
    monkeypatch.setattr(slimmable_trials.sd, "convert", lambda *inputs, **options: converted.append(convert(*inputs, **options)))
    slimmable_trials.run(flags)
    slimmable_trials.run(flags)  # finds nothing to do
    ((trial,),) = (record["ablation"] for record in load(tmp_path))
    assert trial["options"] == {**slimmable_trials.DEFAULTS, **way} and trial["recovery_tokens"] == 960
    assert trial["recovery_commit"] == trial["commit"]
    assert {recipe.correction for recipe in converted} == {trial["options"]["correction"]}
    assert all(trial["recovered"][k] < 0.95 * trial["perplexity"][k] for k in ("8", "12"))
