"""The command line: official scripts, precedence, and a refusal for every mistake, before torch is imported."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tiny import parse
from utils.cli.arguments import Arguments
from utils.errors import UserError
from utils.flags import fields
from utils.flags.check import check_limits
from utils.flags.declare import flag, groups, specs
from utils.flags.derive import evaluation_ks, parse_ks, top_k_schedule
from utils.flags.fields import ConvertFlags, FinetuneFlags, Flags, GenerateFlags, SurgeryFlags
from utils.flags.models import MODELS, presets_of
from utils.flags.official import REFUSED

# VITA-Group/Random-MoE-as-Dropout at 0272cea, script/table1/transformer_xl, whole
OFFICIAL_SHARED = """--data ../data/enwik8/ --dataset enwik8 --n_layer 4 --d_model 256 --n_head 8 --d_head 64 --d_inner {d_inner}
    --dropout 0.1 --dropatt 0.0 --optim adam --lr 0.00025 --warmup_step 0 --max_step 400000 --tgt_len 512 --mem_len 512 --eval_tgt_len 128
    --batch_size 22 --multi_gpu"""
OFFICIAL_DENSE = "--cuda " + OFFICIAL_SHARED.format(d_inner=8192) + " --work_dir Directly_Dense_Training"
OFFICIAL_EXPERTS = """--moe --moe-num-expert 16 --moe-top-k 2 --gate_name CustomNaiveGate --moe_index 0,1,2,3 --freeze_gate --dynamic_moe
    --dynamic_moe_mode linear_increase --dynamic_overall_steps 400000 --moe-top-k-min 8 --moe-top-k-max 16 --work_dir SMoE-Dropout"""
OFFICIAL_SMOE_DROPOUT = "--cuda " + OFFICIAL_SHARED.format(d_inner=512) + " " + OFFICIAL_EXPERTS


def flags(text: str) -> Flags:
    return parse(shlex.split(text))


def sentence(text: str) -> str:
    """The refusal of a wrong command line."""
    with pytest.raises(UserError) as caught:
        flags(text)
    return str(caught.value)


def test_official_smoe_dropout_script_parses_as_it_stands():
    run = flags(OFFICIAL_SMOE_DROPOUT)
    assert (run.method, run.work_dir, run.data, run.dataset) == ("smoe_dropout", "SMoE-Dropout", "../data/enwik8/", "enwik8")
    assert (run.n_layer, run.d_model, run.n_head, run.d_head, run.d_inner, run.d_ff) == (4, 256, 8, 64, 512, 8192)
    assert (run.dropout, run.dropatt, run.optim, run.lr, run.warmup_step, run.max_step) == (0.1, 0.0, "adam", 2.5e-4, 0, 400_000)
    assert (run.tgt_len, run.mem_len, run.eval_tgt_len, run.batch_size, run.eval_batch_size) == (512, 512, 128, 22, 10)
    assert (run.moe, run.moe_num_expert, run.moe_top_k, run.moe_top_k_min, run.moe_top_k_max) == (True, 16, 2, 8, 16)
    assert (run.gate_name, run.freeze_gate, run.moe_index, run.device, run.multi_gpu) == ("random", True, None, "cuda", True)
    schedule = top_k_schedule(run)
    assert [schedule(step) for step in (0, 200_000, 399_999, 500_000)] == [8, 12, 16, 16]
    assert (run.seed, run.log_interval, run.eval_interval, run.clip) == (1111, 200, 4000, 0.25)
    assert (run.scheduler, run.precision, run.eval_batch_size) == ("cosine", "fp32", 10)


def test_official_dense_script_parses_as_it_stands():
    run = flags(OFFICIAL_DENSE)
    assert (run.method, run.moe, run.d_inner, run.d_ff, run.work_dir) == ("dense_dropout", False, 8192, 8192, "Directly_Dense_Training")
    assert top_k_schedule(run) is None and evaluation_ks(run) == [None]


def test_official_scripts_equal_our_methods_with_the_paper_preset():
    """Except for folders, and for k and layers, which the official flags list."""
    for official, method in ((OFFICIAL_SMOE_DROPOUT, "smoe_dropout"), (OFFICIAL_DENSE, "dense_dropout")):
        ours = flags(f"--method {method} --work_dir x --data data/enwik8")
        theirs = flags(f"{official} --work_dir x --data data/enwik8")
        different = {name for name in vars(ours) if getattr(ours, name) != getattr(theirs, name)}
        assert different <= {"cuda", "device", "multi_gpu", "moe_top_k", "moe_index"}


def test_no_flags_at_all_are_the_dense_model_of_the_official_script():
    assert flags("") == flags("--preset paper --method dense_dropout")


@pytest.mark.parametrize("text", [OFFICIAL_SMOE_DROPOUT, OFFICIAL_DENSE])
def test_dash_and_underscore_are_the_same(text):
    words = shlex.split(text)
    dashes, underscores = ([f"--{word[2:].replace(*pair)}" if word.startswith("--") else word for word in words] for pair in ("_-", "-_"))
    assert parse(dashes) == parse(underscores) == parse(words)
    assert parse([f"--work-dir={words[-1]}" if word == "--work_dir" else word for word in words[:-1]]) == parse(words)


def test_command_line_beats_method_beats_preset_beats_default():
    assert Flags.lr == 2.5e-4 and presets_of("transformer_xl")["laptop"]["lr"] == 1e-3
    assert flags("--seed 1").lr == 2.5e-4 and flags("--preset laptop").lr == 1e-3 and flags("--preset laptop --lr 0.5").lr == 0.5
    assert flags("--lr 0.5 --preset=laptop").lr == 0.5
    assert flags("--moe").freeze_gate is False and flags("--method smoe_dropout").freeze_gate is True
    assert flags("--method smoe_dropout --dynamic_moe_mode cosine_increase").dynamic_moe_mode == "cosine_increase"
    assert flags("--method smoe_dropout --no-freeze_gate").freeze_gate is False
    for model, name in ((one, name) for one, known in MODELS.items() if not known.from_folder for name in presets_of(one)):
        values, run = presets_of(model)[name], flags(f"--model {model} --preset {name} --method smoe")
        assert {key: getattr(run, key) for key in values} == values and run.d_inner * 16 == run.d_ff


def test_the_last_value_of_a_repeated_flag_counts():
    run = flags("--lr 1 --preset quick --method dense --lr 2 --preset laptop --method smoe --n-layer 3 --n_layer 5")
    assert (run.lr, run.preset, run.method, run.moe, run.batch_size, run.n_layer) == (2.0, "laptop", "smoe", True, 16, 5)


@pytest.mark.parametrize(
    ("text", "method", "router", "balance"),
    [
        ("--seed 1111", "dense_dropout", None, None),
        ("--moe --gate_name CustomNaiveGate --freeze_gate --dynamic_moe", "smoe_dropout", "random", None),
        ("--moe --gate_name CustomNaiveGate_Balance", "smoe", "learned", 0.0),
        ("--moe --gate_name NaiveGate", "smoe", "learned", 0.0),
        ("--moe --gate_name NaiveGate --load_balance 0.5", "smoe", "learned", 0.5),
        ("--moe", None, "random", None),
    ],
)
def test_the_method_is_recognised_from_official_flags(text, method, router, balance):
    run = flags(text)
    assert run.method == method and run.work_dir == f"runs/paper/enwik8/{method or 'custom'}-seed1111"
    if router:
        assert (run.gate_name, run.load_balance) == (router, balance)


def test_derived_defaults():
    run = flags("--method smoe_dropout --moe_num_expert 6 --d_ff 600 --max_step 77 --preset quick --seed 5 --dataset words")
    assert (run.dynamic_overall_steps, run.moe_top_k_min, run.moe_top_k_max, run.moe_top_k, run.d_inner) == (77, 3, 6, 3, 100)
    assert (run.work_dir, run.data) == ("runs/quick/words/smoe_dropout-seed5", "data/words")
    assert flags("--preset quick --method dense --data texts/mine --seed 5").work_dir == "runs/quick/mine/dense-seed5"
    assert flags("--method smoe_dropout --max_step 77 --dynamic_overall_steps 50").dynamic_overall_steps == 50
    assert evaluation_ks(run) == [1, 2, 3, 4, 6] and parse_ks("6,1", 6) == [6, 1]


# mistakes

MOE = "--moe --moe_num_expert 4 --d_ff 64 "
MISTAKES = {
    MOE + "--moe_top_k_min 3 --moe_top_k_max 2": ["--moe_top_k_min 3 exceeds --moe_top_k_max 2"],
    MOE + "--moe_top_k 5": ["--moe_top_k 5 must be from 1 to --moe_num_expert 4"],
    MOE + "--moe_top_k_max 5": ["--moe_top_k_max 5 must be from 1 to --moe_num_expert 4"],
    MOE + "--moe-top-k-min 0": ["--moe_top_k_min 0 must be from 1 to --moe_num_expert 4"],
    MOE + "--moe_index 0,4": ["--moe_index 0,4: layer 4 is outside 0..3 (--n_layer 4)"],
    MOE + "--moe_index 1,2,1": ["--moe_index 1,2,1: layer 1 is named more than once"],
    MOE + "--moe_index 0,x": ["--moe_index 0,x: expected layer numbers separated by commas"],
    MOE + "--moe_index=-1": ["--moe_index -1: expected layer numbers"],
    MOE + "--d_inner 8 --moe_experts_by_layer 4,x,1,2": ["--moe_experts_by_layer 4,x,1,2: expected numbers of experts"],
    MOE + "--d_inner 8 --moe_experts_by_layer 4,0,1,2": ["--moe_experts_by_layer 4,0,1,2: expected numbers of experts"],
    MOE + "--d_inner 8 --moe_experts_by_layer 4,3": ["--moe_experts_by_layer 4,3: 2 numbers for 4 layers with experts"],
    MOE + "--moe_index 0,1 --d_inner 8 --moe_experts_by_layer 4,3,2,1": ["4 numbers for 2 layers with experts"],
    MOE + "--d_inner 8 --moe_experts_by_layer 3,3,2,1": ["--moe_num_expert must be the largest of them, 3"],
    MOE + "--moe_experts_by_layer 4,3,2,1": ["--moe_experts_by_layer 4,3,2,1: needs --d_inner, the width of one expert"],
    "--moe_experts_by_layer 4,3": ["--moe_experts_by_layer needs --moe"],
    MOE + "--gate_name lerned": ["--gate_name: unknown value 'lerned'; nearest: learned"],
    MOE + "--expert_backend mask": ["--expert_backend: unknown value 'mask'; nearest: masked"],
    MOE + "--output_scale sum": ["--output_scale: unknown value 'sum'; known: mean, dense"],
    MOE + "--dynamic_moe --dynamic_moe_mode linear": ["--dynamic_moe_mode: unknown value 'linear'; nearest: linear_increase"],
    MOE + "--dynamic_overall_steps 0": ["--dynamic_overall_steps 0 must be at least 1, or -1"],
    "--moe --moe_num_expert 3 --d_ff 64": ["--d_ff 64 is not divisible by --moe_num_expert 3", "--d_inner"],
    "--freeze_gate": ["--freeze_gate needs --moe"],
    "--dynamic_moe": ["--dynamic_moe needs --moe"],
    "--moe_index 0": ["--moe_index needs --moe"],
    "--lr=-1": ["--lr -1.0 must be above 0"],
    "--lr nan": ["--lr nan must be above 0"],
    "--clip 0": ["--clip 0.0 must be above 0"],
    "--dropout 1": ["--dropout 1.0 must be at least 0 and below 1"],
    "--batch_size 0": ["--batch_size 0 must be at least 1"],
    "--d_inner 0": ["--d_inner 0 must be at least 1"],
    MOE + "--d_inner=-2": ["--d_inner -2 must be at least 1"],
    "--mem_len=-1": ["--mem_len -1 must be at least 0"],
    "--seed=-1": ["--seed -1 must be at least 0"],
    "--d_model 33": ["--d_model 33 must be even"],
    "--eval_tgt_len 2000": ["--eval_tgt_len 2000 must not exceed mem_len + tgt_len = 1024"],
    "--optim lamb": ["--optim: unknown value 'lamb'; nearest: adam"],
    "--scheduler cosin": ["--scheduler: unknown value 'cosin'; nearest: cosine"],
    "--precision fp16": ["--precision: unknown value 'fp16'", "bf16"],
    "--k 2": ["--k selects what --eval_only evaluates"],
    "--cuda --device cpu": ["--cuda contradicts --device cpu"],
    "--preset paperr --method smoedropout": ["--preset: unknown value 'paperr'; nearest: paper", "'smoedropout'; nearest: smoe_dropout"],
    "--fp16 --restart --gpu0-bsz 4": ["--fp16: use --precision bf16", "--restart: rerun the same", "--gpu0-bsz: use torchrun"],
    "--eval_only": ["--eval_only needs --work_dir"],
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_each_mistake_is_refused_with_value_and_remedy(text):
    with pytest.raises(UserError) as caught:
        parse(shlex.split(text))
    for part in MISTAKES[text]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((start + f"--d_ff={size}", f"--d_ff {size} must be at least 1") for start in ("", MOE) for size in (0, -64)),
        (MOE + "--moe_index ²", "--moe_index ²: expected layer numbers"),
    ],
)
def test_impossible_sizes_are_refused(text, said):
    assert said in sentence(text)


@pytest.mark.parametrize(("given", "kept"), [("4,3,2,1", "4,3,2,1"), ("4,4,4,4", None)])
def test_equal_numbers_of_experts_are_stored_as_no_list(given, kept):
    run = flags(MOE + f"--d_inner 8 --moe_experts_by_layer {given}")
    assert (run.moe_experts_by_layer, run.d_ff, run.moe_top_k_min, run.moe_top_k_max) == (kept, 32, 2, 4)


@pytest.mark.parametrize("name", REFUSED)
def test_official_flags_without_a_counterpart_are_refused_with_a_remedy(name):
    assert name not in vars(Flags())
    dashed = name.replace("_", "-")
    assert f"--{name}: {REFUSED[name]}" in sentence(f"--{name} 1") and f"--{dashed}: {REFUSED[name]}" in sentence(f"--{dashed}=1")


def test_all_mistakes_are_reported_at_once():
    experts = "--moe --moe_num_expert 3 --moe_top_k 9 --moe_top_k_min 3 --moe_top_k_max 2 --moe_index 7,7 --gate_name x"
    said = sentence(f"{experts} --lr=-2 --optim y --n_layer 0")
    for part in ("--d_ff 8192", "--moe_top_k 9", "min 3 exceeds", "layer 7", "more than once", "--gate_name: unknown value 'x'"):
        assert part in said
    for part in ("--lr -2.0", "'y'", "--n_layer 0"):
        assert part in said


def test_refused_flags_do_not_hide_other_mistakes():
    said = sentence("--fp16 --lr=-2 --preset papper --moe --moe_top_k 99")
    for part in ("--fp16", "papper", "--lr -2.0", "--moe_top_k 99"):
        assert part in said


# as a process


def start(arguments: str, cwd) -> subprocess.CompletedProcess:
    """train.py, with a line on stderr about torch when it ends."""
    script = str(ROOT / "train.py")
    code = (
        f"import atexit, runpy, sys; sys.argv = [{script!r}, *{shlex.split(arguments)!r}]; sys.path.insert(0, {str(ROOT)!r})\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--moe --moe_top_k 99 --lr=-1 --work_dir new", "error: --lr -1.0 must be above 0; --moe_top_k 99 must be"),
        ("--batchsize 3 --work_dir new", "batch"),
        ("--batch_size x --work_dir new", "batch"),
        ("--preset quick --data nowhere --work_dir new", "error: nowhere is not a prepared text"),
        ("--eval_only --work_dir new --k 2", "error: new holds no run"),
    ],
)
def test_a_wrong_command_ends_with_code_2_before_torch_is_imported_and_creates_nothing(arguments, said, tmp_path):
    process = start(arguments, tmp_path)
    assert process.returncode == 2 and process.stdout == ""
    assert said in process.stderr and "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1] == "False"
    assert list(tmp_path.iterdir()) == []


def test_eval_only_uses_the_flags_of_the_run(tmp_path):
    run = flags("--method smoe_dropout --moe_num_expert 4 --preset quick")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in vars(run).items() if k not in ("work_dir", "k", "eval_only")}))
    words = ["--eval_only", "--work-dir", str(tmp_path)]
    stored = parse([*words, "--k", "1,4"])
    assert (stored.method, stored.moe_num_expert, stored.k, stored.work_dir) == ("smoe_dropout", 4, "1,4", str(tmp_path))
    for k in ("5", "0", "1,,2", "x"):
        with pytest.raises(UserError, match="from 1 to 4"):
            parse([*words, "--k", k])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not readable as JSON"):
        parse(words)


IGNORED = {
    "--method thor --load_balance 0.1": "--load_balance 0.1 has no effect with router 'none'",
    "--method smoe --gate_name hash --load_balance 0.1": "--load_balance 0.1 has no effect with router 'hash'",
    "--method smoe --gate_name uniform --load_balance 0.1": "--load_balance 0.1 has no effect with router 'uniform'",
    "--method smoe --gate_name dense_to_sparse --gate_weight uniform": "--gate_weight uniform has no effect with router 'dense_to_sparse'",
    "--method concrete_dropout --moe": "--method concrete_dropout is dense, which contradicts --moe",
}


@pytest.mark.parametrize("text", IGNORED)
def test_flags_without_effect_are_refused(text):
    assert IGNORED[text] in sentence(text)


# declarations


@pytest.mark.parametrize("kind", [FinetuneFlags, SurgeryFlags, GenerateFlags, ConvertFlags])
def test_a_flag_is_declared_once(kind):
    """One line gives it a group, help, and everything that the parser and the checks need."""
    grouped = [name for group in groups(kind).values() for name in group.__annotations__]
    declared = specs(kind)
    assert sorted(grouped) == sorted(declared) and len(set(grouped)) == len(grouped)
    known = {*re.findall(r"^(\w+) {2,}\w", fields.__doc__, re.MULTILINE)}
    for name, spec in declared.items():
        assert spec.help and set(spec.roles) <= known, name
        assert {spec.needs, spec.follows} - {None} <= declared.keys(), name


def test_a_new_flag_needs_one_declaration():
    """It is listed in its group of --help, checked, and read from a run folder made before it existed."""

    @fields.group
    class MoreFlags:
        title = "more"
        speed: int = flag(3, "how fast", "run", low=1, high=9, since=3)

    @fields.group
    class MoreOfAll(Flags, MoreFlags):
        pass

    command = Arguments("train.py", ["--speed", "4", "--lr", "0.5"], {})
    more = command.over(MoreOfAll, {"lr": 1.0, "d_model": 64})
    assert (more.speed, more.lr, more.d_model) == (4, 0.5, 64) and check_limits(more) == []
    assert check_limits(MoreOfAll(speed=10)) == ["--speed 10 must be at least 1 and at most 9"]


def test_no_other_module_lists_flags():
    """Except for the models' entries and files, which list the flags they read."""
    declared = specs(FinetuneFlags).keys()
    for path in (ROOT / "utils").rglob("*.py"):
        if "models" in (path.parent.name, path.stem) or path == Path(fields.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple | ast.List | ast.Set) and len(node.elts) >= 4:
                values = [element.value for element in node.elts if isinstance(element, ast.Constant)]
                assert len(values) < 4 or not set(values) <= declared, f"{path}, line {node.lineno}: {values}"


TRAINING = ["run", "data", "model", "experts", "optimiser", "machine and logging"]


@pytest.mark.parametrize(
    ("program", "boxes", "shown"),
    [
        ("train.py", [*TRAINING[:1], "initialisation", *TRAINING[1:]], ["--work_dir DIR", "--attack {swap,random}"]),
        ("finetune.py", ["task", *TRAINING], ["--task {sst2,", "--max_length INT"]),
        ("surgery.py", ["operation", "calibration and test"], ["--score {usage,gate_weight,router_norm}", "--by_layer"]),
        ("generate.py", ["generation"], ["--precision {fp32,bf16,int8}", "--top_p FLOAT"]),
        ("convert.py", ["conversion"], ["--cut {contiguous,random,weights,coactivation}", "--from MODEL"]),
    ],
)
def test_help_shows_groups_and_choices(program, boxes, shown):
    done = subprocess.run([sys.executable, str(ROOT / program), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and re.findall(r"^(\w[\w ]*):$", done.stdout, re.MULTILINE) == boxes
    assert all(words in done.stdout for words in shown)
