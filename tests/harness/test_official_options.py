"""Further options of the official script, and --method_options: each works as documented in tiny runs, resumes, or is refused."""

import os
import shlex
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from mem_transformer import QueryKeyValue
from smoe_dropout import load_weights, moe_layers, set_top_k
from smoe_dropout.attention import ExpertQueryKeyValue
from smoe_dropout.methods.block_dropout import BlockDropout
from tests import tiny
from tests.tiny import parse
from utils.data.corpus import Corpus
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.fields import Flags
from utils.flags.official import REFUSED
from utils.models.build import build_model
from utils.training.averaging import WeightAverage
from utils.training.evaluation import evaluate_all
from utils.training.setup import pretraining_task

STEPS = 24
BASE = {"max_step": STEPS, "eval_interval": 6, "save_interval": 4, "log_interval": 3, "dropout": 0.2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "words")


def record_weights(folder: str) -> None:
    """Writes the parameters that a run starts from, and those after every update, as <number of updates>.safetensors."""
    import utils.training.optimizer as optimizer

    build = optimizer.build_optimizer

    def watched(model, flags):
        built, done = build(model, flags), 0
        os.makedirs(folder)

        def write(*_):
            nonlocal done
            save_file({name: p.detach().clone() for name, p in model.named_parameters()}, f"{folder}/{done}.safetensors")
            done += 1

        write()
        built.register_step_post_hook(write)
        return built

    optimizer.build_optimizer = watched


def die_after(updates: int) -> None:
    """Kills the process at the given update, before anything is recorded of it."""
    step, left = torch.optim.Adam.step, updates

    def watched(*args, **kwargs):
        nonlocal left
        left -= 1
        step(*args, **kwargs)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.optim.Adam.step = watched


def run(corpus: Path, folder: Path, **changes) -> Path:
    """A finished run, its weights of every step in `folder`/weights; returns the work_dir."""
    tiny.completed(tiny.flags(corpus, folder / "run", **{**BASE, **changes}), partial(record_weights, str(folder / "weights")))
    return folder / "run"


def goes_on_after_kills(corpus: Path, unbroken: Path, work_dir: Path, kills: tuple[int, ...], **changes) -> None:
    """Kills the same run after the given numbers of updates, lets it finish, and compares."""
    arguments = tiny.flags(corpus, work_dir, **{**BASE, **changes})
    for updates in kills:
        assert tiny.run(arguments, partial(die_after, updates)).code == -signal.SIGKILL
    assert "resumed at step" in tiny.completed(arguments).out
    tiny.same_run(work_dir, unbroken)


def weights(work_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(work_dir.parent / "weights" / f"{step}.safetensors")


def changed(work_dir: Path, before: int, after: int) -> set[str]:
    """Names of parameters that are not bit for bit the same at two steps."""
    one, other = weights(work_dir, before), weights(work_dir, after)
    return {name for name in one if not torch.equal(one[name], other[name])}


def flags(text: str) -> Flags:
    return parse(shlex.split(text))


def sentence(text: str) -> str:
    with pytest.raises(UserError) as caught:
        flags(text)
    return str(caught.value).removesuffix(" (nothing was started; --help lists all flags)")


# --swad

SWAD = {"swad": True, "swad_start": 7, "swad_end": 14}


@pytest.fixture(scope="module", params=["dense", "smoe_dropout"])
def averaged(request, corpus, tmp_path_factory):
    return request.param, run(corpus, tmp_path_factory.mktemp(request.param), method=request.param, **SWAD)


def test_the_mean_is_that_of_the_saved_weights(averaged):
    method, work_dir = averaged
    stored = load_file(tiny.checkpoints(work_dir)[-1] / "average.safetensors")
    assert stored.pop("count") == 14 - 7 + 1
    steps = [weights(work_dir, step) for step in range(7, 15)]
    frozen = {name for name in steps[0] if ".router." in name}
    assert stored.keys() == steps[0].keys() - frozen and bool(frozen) == (method == "smoe_dropout")
    last = weights(work_dir, STEPS)
    for name, mean in stored.items():
        plain = torch.stack([step[name].double() for step in steps]).mean(0)
        assert mean.dtype == torch.float32 and torch.allclose(mean.double(), plain, rtol=0, atol=2e-7), name
        assert (mean - last[name]).abs().max() > 1e-4, name


def test_the_mean_is_evaluated_beside_the_model(averaged, corpus):
    method, work_dir = averaged
    sparse = method != "dense"
    of_mean = {"averaged_bpc_k2", "averaged_bpc_k4"} if sparse else {"averaged_bpc"}
    lines = {line["step"]: line for line in tiny.metrics(work_dir, "valid")}
    names = {step: {name for name in line if name.startswith("averaged")} for step, line in lines.items()}
    assert names[6] == set()  # nothing has entered yet
    for step in (12, 18, 24):
        at_present = {f"averaged_bpc_k{lines[step]['k']}"} if sparse else set()
        assert names[step] == of_mean | at_present and all(0 < lines[step][name] < 9 for name in names[step])
    for name in of_mean:
        assert lines[12][name] != lines[18][name] == lines[24][name]  # nothing enters after swad_end
        assert lines[24][name] != lines[24][name.removeprefix("averaged_")]
    result = tiny.read_json(work_dir / "result.json")
    found = result["training"]["averaged"]
    assert (found["from"], found["to"], found["steps"]) == (7, 14, 8)
    rows = tiny.quality(found)
    assert [row["k"] for row in rows] == ([1, 2, 4] if sparse else [None]) == [row["k"] for row in result["quality"]]
    assert rows[-1]["valid"] == pytest.approx(lines[24]["averaged_bpc_k4" if sparse else "averaged_bpc"], abs=1e-9)
    assert all(row["test"] != own["test"] for row, own in zip(rows, result["quality"], strict=True))

    run_flags = parse(tiny.flags(corpus, work_dir, **{**BASE, "method": method}))  # the mean, put into a model by hand
    model = load_weights(build_model(run_flags), tiny.checkpoints(work_dir)[-1])
    mean = load_file(tiny.checkpoints(work_dir)[-1] / "average.safetensors")
    mean.pop("count")
    assert not model.load_state_dict(mean, strict=False).unexpected_keys
    with Engine(run_flags) as engine:
        task = pretraining_task(run_flags, Corpus.open(str(corpus)), engine)
        ours = evaluate_all(task, model, ("valid", "test"), [r["k"] for r in rows], print)
    assert tiny.quality({"quality": ours}) == rows


def test_averaging_changes_nothing_of_the_training(averaged, corpus, tmp_path):
    method, work_dir = averaged
    plain = run(corpus, tmp_path, method=method)
    own = [{name: value for name, value in line.items() if not name.startswith("averaged")} for line in tiny.metrics(work_dir)]
    assert own == tiny.metrics(plain)
    for name in ("model.safetensors", "optimizer.safetensors", "rank0.safetensors"):
        assert (tiny.checkpoints(work_dir)[-1] / name).read_bytes() == (tiny.checkpoints(plain)[-1] / name).read_bytes()
    results = [tiny.read_json(folder / "result.json") for folder in (work_dir, plain)]
    assert tiny.quality(results[0]) == tiny.quality(results[1]) and results[0]["method"] == results[1]["method"]
    assert "averaged" not in results[1]["training"] and not (tiny.checkpoints(plain)[-1] / "average.safetensors").exists()


def test_a_killed_run_has_the_same_mean(averaged, corpus, tmp_path):
    """Killed before the averaged range (6 updates), inside it (4 + 7), and after it (8 + 9)."""
    method, work_dir = averaged
    goes_on_after_kills(corpus, work_dir, tmp_path, (6, 7, 9), method=method, **SWAD)
    found = [tiny.read_json(folder / "result.json")["training"]["averaged"] for folder in (work_dir, tmp_path)]
    assert tiny.quality(found[0]) == tiny.quality(found[1])


def test_the_mean_is_lent_and_the_models_own_weights_come_back():
    model = torch.nn.Linear(2, 1, bias=False)
    average = WeightAverage(model, 2, 4)
    for step, value in enumerate((100.0, 1.0, 2.0, 6.0, 100.0), start=1):
        model.weight.data.fill_(value)
        if step < 2:
            with pytest.raises(ValueError, match="begins at step 2"), average.applied(model):
                pass
        average.observe(model, step)
    for error in (None, ZeroDivisionError):
        with pytest.raises(ZeroDivisionError), average.applied(model) as lent:
            assert lent is model and model.weight.tolist() == [[3.0, 3.0]]
            raise error or ZeroDivisionError
        assert model.weight.tolist() == [[100.0, 100.0]]


# --attn_moe


def slow(module: ExpertQueryKeyValue, x: torch.Tensor) -> torch.Tensor:
    """Token by token: the expert with the largest logit, unweighted."""
    rows = []
    for token in x.flatten(0, 1):
        expert = (module.router.weight @ token + module.router.bias).argmax()
        rows.append(module.weight[expert] @ token + module.bias[expert])
    return torch.stack(rows).view(*x.shape[:2], -1)


@pytest.mark.parametrize("remembered", [0, 3])
def test_expert_attention_is_a_loop_over_tokens(remembered):
    torch.manual_seed(0)
    module = ExpertQueryKeyValue(QueryKeyValue(8, 6).double(), 5, 0.5)
    torch.nn.init.normal_(module.bias)
    module.router.bias.data.normal_()
    x, memory = torch.randn(2, 7, 8, dtype=torch.double, requires_grad=True), torch.randn(2, remembered, 8, dtype=torch.double)
    chosen = {int(i) for i in linear(torch.cat([x, memory], 1), module.router.weight, module.router.bias).argmax(-1).flatten()}
    assert 1 < len(chosen) < 5  # several experts, and one without a token
    q, (k, v), (k_memory, v_memory) = module(x, memory)
    found, old = torch.cat([q, k, v], -1), torch.cat([k_memory, v_memory], -1)
    wanted, of_memory = slow(module, x), slow(module, memory) if remembered else torch.empty(2, 0, 18, dtype=torch.double)
    assert torch.allclose(found, wanted) and torch.allclose(old, of_memory[..., 6:])
    parameters = [x, module.weight, module.bias]
    losses = [new.square().sum() + kept.square().sum() for new, kept in ((found, old), (wanted, of_memory[..., 6:]))]
    for ours, theirs in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        assert torch.allclose(ours, theirs) and ours.abs().sum() > 0


def test_the_attentions_router_gets_no_gradient_and_its_k_stays_one():
    run_flags = parse(tiny.flags(Path("x"), Path("x"), method="smoe", attn_moe=True, moe_index="1"))
    torch.manual_seed(0)
    model = build_model(run_flags)
    kinds = [type(layer.attention.qkv) for layer in model.layers]
    assert kinds == [QueryKeyValue, ExpertQueryKeyValue]  # in the layers that have experts
    qkv = model.layers[1].attention.qkv
    assert qkv.weight.shape == (16, 3 * 16, 32) and qkv.bias.shape == (16, 3 * 16)
    tokens = torch.arange(32).view(4, 8)
    seen, logits = {}, {}
    qkv.register_forward_hook(lambda module, inputs, outputs: seen.update({"now": outputs[0]}))
    for k in (1, 4):
        set_top_k(model, k)
        losses, _, logits[k] = model.eval()(tokens, tokens)
        seen[k] = seen["now"]
    assert torch.equal(seen[1], seen[4]) and not torch.equal(logits[1], logits[4])
    assert [name for name, _ in moe_layers(model)] == ["layers.1.feed_forward.core"]
    losses.mean().backward()
    assert qkv.router.weight.grad is None and qkv.router.bias.grad is None and qkv.weight.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in qkv.router.parameters())


def test_expert_attention_trains_and_resumes(corpus, tmp_path):
    changes = {"method": "smoe_dropout", "attn_moe": True, "lr": 1e-2, "max_step": 12, "eval_interval": 12}
    work_dir = run(corpus, tmp_path / "unbroken", **changes)
    losses = [line["loss"] for line in tiny.metrics(work_dir, "train")]
    assert losses[-1] < losses[0] - 1
    names = weights(work_dir, 0).keys()
    assert changed(work_dir, 0, 12) == {name for name in names if ".router." not in name}
    assert len([name for name in names if "qkv.router" in name]) == 2 * 2
    result = tiny.read_json(work_dir / "result.json")
    assert result["settings"] == {"moe_num_expert": 4, "attn_moe": True}
    goes_on_after_kills(corpus, work_dir, tmp_path / "killed", (10,), **changes)


# --freeze_main_network, --freeze_main_network_all, --dynamic_router_start


@pytest.mark.parametrize("method", ["smoe", "smoe_dropout"])
@pytest.mark.parametrize("flag", ["freeze_main_network", "freeze_main_network_all"])
def test_only_trainable_parameters_change(flag, method, corpus, tmp_path):
    work_dir = run(corpus, tmp_path, method=method, max_step=4, **{flag: True})
    names = weights(work_dir, 0).keys()
    experts, routers = ({name for name in names if f".core.{part}." in name} for part in ("experts", "router"))
    assert len(experts) == 2 * 4 and len(routers) == 2 * 2
    outside = {name for name in names if not name.startswith("layers.")}
    assert outside == {"embedding.weight", "head.bias", "content_bias", "position_bias"}
    wanted = names - experts if flag == "freeze_main_network" else outside | routers
    assert changed(work_dir, 0, 4) == wanted - (routers if method == "smoe_dropout" else set())


ROUTER_STOPS = {"method": "smoe", "dynamic_router_start": 10, "max_step": 14, "eval_interval": 14}


def test_the_router_is_trained_up_to_its_step_and_bit_for_bit_the_same_from_then_on(corpus, tmp_path):
    work_dir = run(corpus, tmp_path / "unbroken", **ROUTER_STOPS)
    routers = {name for name in weights(work_dir, 0) if ".router." in name}
    for step in range(14):
        assert changed(work_dir, step, step + 1) == (weights(work_dir, 0).keys() if step < 10 else weights(work_dir, 0).keys() - routers)
    plain = run(corpus, tmp_path / "plain", **{**ROUTER_STOPS, "dynamic_router_start": None})
    for step in (1, 10):  # up to there it is the run without the flag
        assert all(torch.equal(tensor, weights(work_dir, step)[name]) for name, tensor in weights(plain, step).items())
    assert changed(plain, 10, 11) == weights(plain, 0).keys()
    goes_on_after_kills(corpus, work_dir, tmp_path / "across", (9, 5), **ROUTER_STOPS)  # from 8 across 10, and from 12


def test_a_router_that_stops_at_once_is_not_trained_at_all(corpus, tmp_path):
    work_dir = run(corpus, tmp_path, method="smoe", dynamic_router_start=0, max_step=4)
    assert changed(work_dir, 0, 4) == {name for name in weights(work_dir, 0) if ".router." not in name}


# --dense_drop


def test_dense_drop_is_block_dropout_and_trains(corpus, tmp_path):
    torch.manual_seed(0)
    run_flags = flags("--dense_drop --preset quick --method_options rate=0.25,blocks=8")
    model = build_model(run_flags)
    drops = [module for module in model.modules() if isinstance(module, BlockDropout)]
    assert run_flags.method == "block_dropout" and not run_flags.moe and len(drops) == run_flags.n_layer
    assert all((drop.options.rate, drop.options.blocks) == (0.25, 8) for drop in drops)
    hidden = drops[0].train()(torch.ones(3, 5, 512))
    blocks = hidden.view(15, 8, 64)
    assert hidden.unique().tolist() in ([0, pytest.approx(1 / 0.75)], [pytest.approx(1 / 0.75)])
    assert torch.equal(blocks, blocks[:1, :, :1].expand_as(blocks))  # whole blocks, the same ones for all tokens
    work_dir = run(corpus, tmp_path, dense_drop=True, lr=1e-2, max_step=12, eval_interval=12)
    losses = [line["loss"] for line in tiny.metrics(work_dir, "train")]
    result = tiny.read_json(work_dir / "result.json")
    assert losses[-1] < losses[0] - 1 and (result["method"], result["sparse"]) == ("block_dropout", False)


# refusals

MISTAKES = {
    "--dense_drop --method smoe": "--dense_drop cannot be combined with --method smoe and --moe: leave one out",
    "--dense_drop --method dense": "--dense_drop cannot be combined with --method dense: leave one out",
    "--dense_drop --moe": "--dense_drop cannot be combined with --moe: leave one out",
    "--swad --swad_start 5 --swad_end 4": "--swad_end 4 is before --swad_start 5",
    "--swad --swad_start=-1": "--swad_start -1 must be at least 0",
    "--swad --swad_start 30 --max_step 24": "--swad_start 30 is after --max_step 24",
    **{f"--{flag} --method dense": f"--{flag} needs --moe" for flag in ("attn_moe", "freeze_main_network", "freeze_main_network_all")},
    "--dynamic_router_start 3": "--dynamic_router_start needs --moe",
    "--method thor --moe_num_expert 1": "--method thor: num_experts = 1: two passes can only differ with at least 2 experts",
}
PAIRS = "expected name=value pairs separated by commas, such as alpha=5,inference=token"
KNOWN = "; options and their defaults:"
WRONG_OPTIONS = {
    ("thor", "beta=1"): f"unknown option beta{KNOWN} alpha=1.0, inference=sentence, consistency=thor",
    ("dense", "rate=0.5"): f"unknown option rate{KNOWN} none",
    ("thor", "alpha=-1"): "option alpha = -1.0 must be a number and not negative",
    ("thor", "alpha=nan"): "option alpha = 'nan' must be a finite number",
    ("thor", "alpha=x"): "option alpha = 'x' must be a finite number",
    ("thor", "inference=tokn"): "unknown value of option inference 'tokn'; nearest: token",
    ("competesmoe", "flip_rate=1.5"): "option flip_rate = 1.5 must be from 0 to 1",
    ("competesmoe", "max_layers=1.5"): "option max_layers = '1.5' must be a whole number",
    ("competesmoe", "predrawn=maybe"): "option predrawn = 'maybe' must be True or False",
    ("thor", "alpha"): PAIRS,
    ("thor", "alpha="): PAIRS,
    ("dense", "alpha"): PAIRS,
}
MISTAKES |= {f"--method {method} --method_options {o}": f"--method_options {o}: {said}" for (method, o), said in WRONG_OPTIONS.items()}
AS_A_RUN = [text for text in MISTAKES if text.startswith("--method thor")] + ["--method competesmoe --method_options flip_rate=1.5"]


@pytest.mark.parametrize("text", MISTAKES)
def test_each_mistake_is_one_message(text):
    assert sentence(text) == MISTAKES[text]


@pytest.mark.parametrize("text", [*AS_A_RUN, "--swad --swad_start 5 --swad_end 4"])
def test_a_refused_run_ends_with_code_2_and_makes_no_folder(text, corpus, tmp_path):
    finished = tiny.run(["--preset", "quick", "--data", str(corpus), "--work_dir", str(tmp_path / "new"), *shlex.split(text)])
    assert finished.code == 2 and finished.out == ""
    assert finished.err == f"error: {MISTAKES[text]} (nothing was started; --help lists all flags)\n"
    assert list(tmp_path.iterdir()) == []


TO_SPARSE = "--moe --gate_name CustomDTSGate"
REMEDIES = {
    "--expert_drop": ("--dense_drop", "rate", 0.25),
    "--num_expert": ("--dense_drop", "blocks", 8),
    "--min_temp": (TO_SPARSE, "min_temp", 0.1),
    "--max_temp": (TO_SPARSE, "max_temp", 3.0),
    "--threshold": (TO_SPARSE, "threshold", 0.01),
}


@pytest.mark.parametrize("flag", REMEDIES)
def test_refused_official_flags_name_a_remedy_that_works(flag):
    context, option, value = REMEDIES[flag]
    said = sentence(f"{context} {flag} {value}")
    assert said == f"{flag}: {REFUSED[flag[2:]]}" and f"--method_options {option}=" in said
    model = build_model(flags(f"--preset quick {context} --method_options {option}={value}"))
    found = [getattr(m.options, option) for m in model.modules() if hasattr(getattr(m, "options", None), option)]
    assert found == [value] * 2  # one in each layer


@pytest.mark.parametrize(
    ("options", "settings"),
    [("alpha=2", {"alpha": 2.0}), (" alpha=0.5 ,inference=token", {"alpha": 0.5, "inference": "token"}), ("", {})],
)
def test_options_are_settings_in_the_record(options, settings, corpus, tmp_path):
    arguments = tiny.flags(corpus, tmp_path, method="thor", method_options=options, moe_num_expert=16, max_step=1, eval_interval=1)
    tiny.completed(arguments)
    result = tiny.read_json(tmp_path / "result.json")
    assert (result["method"], result["settings"]) == ("thor", settings)
    assert not {"alpha", "method_options"} & result["preset_settings"].keys()
