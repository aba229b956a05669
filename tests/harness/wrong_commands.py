"""Wrong command lines of all programs and scripts, and what is said to them: exit code 2, one line "error: ...", nothing written.

python -m tests.harness.wrong_commands          tries all, and prints a report; test_wrong_commands.py tries a sample
"""

import argparse
import contextlib
import io
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from data import prepare, prepare_pieces, prepare_task
from tests import tiny
from tests.conftest import ROOT
from utils import microscope
from utils.cli import convert, finetune, generate, surgery, train
from utils.cli.pipeline import refuse_other_data
from utils.data.corpus import Corpus
from utils.data.rows import read_examples
from utils.errors import exit_on_user_error
from utils.flags.declare import Spec
from utils.flags.fields import ConvertFlags, FinetuneFlags, Flags, GenerateFlags, SurgeryFlags
from utils.flags.models import MODELS
from utils.reporting import __main__ as reporting
from utils.reporting import ablations

SLOW = 2.0  # seconds
SURROGATE = "\udcff"  # a byte of the command line that is not UTF-8
FIRST = ("eval_only", "start_from", "settings_from", "checkpoint", "source")  # read before all others, which may be refused instead
VALUES = ("nan", "inf", "-inf", "1e999", "-1", str(10**30), "", "x", SURROGATE, None)
LONG, DEEP = "x" * 300, "/".join("y" * 300)


class Case(NamedTuple):
    """words: program or script, and its arguments. said: part of the refusal. environment: variables set for it."""

    words: tuple[str, ...]
    said: str
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return ascii(shlex.join([f"{name}={value}" for name, value in self.environment] + list(self.words)))[1:-1]


class Answer(NamedTuple):
    code: int | None
    out: str
    err: str
    seconds: float


GOOD = {  # command lines to which one wrong flag is added
    "train.py": "--preset quick --method smoe --device cpu --data words --work_dir new",
    "finetune.py": "--task sst2 --checkpoint smoe --data sst2 --work_dir new",
    "surgery.py": "--from smoe --method merge --keep 2 --out new --threads 1",
    "generate.py": "--checkpoint smoe --prompt a",
    "convert.py": "--from owner/name --data file --out new",
}
KINDS = {
    "train.py": Flags,
    "finetune.py": FinetuneFlags,
    "surgery.py": SurgeryFlags,
    "generate.py": GenerateFlags,
    "convert.py": ConvertFlags,
}

WRITTEN = """
train.py --lr                                                   | --lr needs a value
train.py --nope 3                                               | --nope: unknown flag 'nope'
train.py stray                                                  | 'stray' is not the value of a flag
train.py --batch_size 4 4                                       | '4' is not the value of a flag
train.py --fp16                                                 | --fp16: use --precision bf16
train.py --moe yes                                              | --moe yes is a switch
train.py --no_lr                                                | --no_lr: unknown flag
train.py --batch_size 2.5                                       | --batch_size 2.5 must be a whole number
train.py --batch_size ²                                         | --batch_size ² must be a whole number
train.py --method smoe_dropou                                   | nearest: smoe_dropout
train.py --preset lapto                                         | nearest: laptop
train.py --model gpt                                            | --model: unknown value 'gpt'
train.py --d_ff 1000 --method smoe                              | --d_ff 1000 is not divisible by --moe_num_expert 16
train.py --moe_top_k 0 --moe                                    | --moe_top_k 0 must be from 1
train.py --moe_top_k 99 --moe                                   | --moe_top_k 99 must be from 1
train.py --moe --gate_name randon                               | --gate_name: unknown value 'randon'
train.py --moe --moe_index 0,9                                  | layer 9 is outside
train.py --mom 1.5 --optim sgd                                  | --mom 1.5 must be at least 0 and below 1
train.py --batch_chunk 23                                       | --batch_chunk 23 must be at most --batch_size 22
train.py --clamp_len -2                                         | --clamp_len -2 must be at least 1, or -1
train.py --clamp_len 0                                          | --clamp_len 0 must be at least 1, or -1
train.py --threads 100000                                       | --threads 100000 must be at least 0 and at most 1024
train.py --n_layer 1000000                                      | --n_layer 1000000 must be
train.py --seed 18446744073709551616                            | below 2**63
train.py --device tpu                                           | --device: unknown value 'tpu'
train.py --precision fp8                                        | --precision: unknown value 'fp8'
train.py --mem_len -1                                           | --mem_len -1 must be at least 0
train.py --model bert --mem_len 5                               | --mem_len has no effect with --model bert
train.py --swad_start 5                                         | --swad_start needs --swad
train.py --adaptive --cutoffs 5,3                               | --cutoffs 5,3: expected ascending numbers of tokens
train.py --preset quick --data words --adaptive                 | --adaptive is for many tokens, and words is a text of bytes
train.py --preset quick --data words --sample_softmax 5         | --sample_softmax 5 is for many tokens
train.py --dense_drop --moe                                     | --dense_drop cannot be combined
train.py --method thor --method_options alpha=x                 | alpha
train.py --method thor --method_options nope=1                  | unknown option nope
train.py --method thor --method_options alpha=nan               | alpha
train.py --max_eval_steps 0                                     | --max_eval_steps 0 must be at least 1, or -1
train.py --max_test_steps 0                                     | --max_test_steps 0 must be at least 1, or -1
train.py --max_test_steps -5                                    | --max_test_steps -5 must be at least 1, or -1
train.py --k 2                                                  | --k selects what --eval_only evaluates
train.py --cuda --device cpu                                    | --cuda contradicts --device cpu
train.py --method smoe --expert_backend fastmoe                 | --expert_backend fastmoe needs the package fmoe
train.py --data nowhere                                         | nowhere is not a prepared text
train.py --data file                                            | file is a file
train.py --preset quick --method smoe --data pieces             | pieces holds pieces, and the model reads bytes
train.py --preset quick --model bert --method smoe --data words | words holds bytes, and the model reads pieces
train.py --preset quick --data words --batch_size 1000000       | too short for --batch_size 1000000
train.py --preset quick --data words --eval_batch_size 1000000  | too short for --eval_batch_size 1000000
train.py --device cpu --d_model 10000000                        | parameters take at least
train.py --device cpu --d_ff 1000000000000000                   | parameters take at least
train.py --device cpu --mem_len 1000000000000                   | --mem_len 1000000000000 and --tgt_len 512 take at least
train.py --device cpu --moe --moe_num_expert 1000000000 --d_inner 1 | parameters take at least
train.py --preset quick --data words --work_dir file            | --work_dir file cannot be a folder, file is a file
train.py --preset quick --data words --work_dir file/run        | --work_dir file/run cannot be a folder, file is a file
train.py --preset quick --data words --work_dir nowhere_link    | nowhere_link is a link to nowhere
train.py --preset quick --data words --work_dir /proc/run       | --work_dir /proc/run cannot be written
train.py --preset quick --data words --work_dir /dev/null/run   | /dev/null is a file
train.py --preset quick --data words --work_dir {LONG}          | cannot be written (File name too long)
train.py --preset quick --data words --work_dir {DEEP}          | deeper than 200 folders
train.py --start_from nowhere                                   | the checkpoint nowhere does not exist
train.py --start_from file                                      | the checkpoint file is a file
train.py --start_from words                                     | words holds no checkpoint
train.py --start_from smoe --n_layer 7                          | --n_layer 7, but the checkpoint smoe has n_layer = 2
train.py --teacher smoe                                         | --teacher needs --start_from
train.py --settings_from smoe --start_from smoe                 | leave one out
train.py --settings_from nowhere                                | nowhere does not exist
train.py --eval_only                                            | --eval_only needs --work_dir
train.py --eval_only --work_dir nowhere                         | nowhere holds no run
train.py --eval_only --work_dir file                            | file holds no run
train.py --eval_only --work_dir smoe --k 9                      | --k 9: expected numbers of active experts from 1 to 4
train.py --eval_only --work_dir smoe --k x                      | --k x: expected numbers of active experts from 1 to 4
train.py --eval_only --work_dir dense --k 2                     | --k 2: the run in dense is dense
train.py --eval_only --work_dir smoe --repair                   | --repair is only for training, not for --eval_only: leave it out
train.py --eval_only --work_dir smoe --pre_lnorm                | --pre_lnorm is the run's own with --eval_only: leave it out
train.py --eval_only --work_dir smoe --no_moe                   | --moe is the run's own with --eval_only: leave it out
train.py --eval_only --work_dir smoe --clamp_len 2              | --clamp_len is the run's own
train.py --eval_only --work_dir smoe --model bert               | --model is the run's own
train.py --eval_only --work_dir smoe --n_layer 2                | --n_layer is the run's own
train.py --eval_only --work_dir smoe --precision bf16           | --precision is the run's own
train.py --eval_only --work_dir smoe --seed 3                   | --seed is the run's own
train.py --eval_only --work_dir smoe --start_from dense         | --start_from is the run's own
train.py --eval_only --work_dir smoe --eval_batch_size 1        | --eval_batch_size is the run's own
train.py --eval_only --work_dir smoe --method_options a=1       | --method_options is the run's own
train.py --eval_only --work_dir smoe --data other               | other does not hold the bytes of the run in smoe
train.py --eval_only --work_dir smoe --max_test_steps 0         | --max_test_steps 0 must be at least 1
finetune.py --eval_only --work_dir smoe                         | smoe is a run of train.py
finetune.py                                                     | --checkpoint is missing
finetune.py --task sst2                                         | --checkpoint is missing
finetune.py --task nope --checkpoint smoe                       | --task: unknown value 'nope'
finetune.py --checkpoint nowhere                                | the checkpoint nowhere does not exist
finetune.py --task sst2 --checkpoint smoe --data nowhere        | nowhere
finetune.py --task sst2 --checkpoint smoe --data file           | file
finetune.py --task sst2 --checkpoint smoe --expect dense        | not of a dense method
finetune.py --task sst2 --checkpoint smoe --n_layer 7           | --n_layer 7, but the checkpoint
finetune.py --task mawps --fold 7 --checkpoint smoe             | --fold 7 must be from 0 to 4
finetune.py --task sst2 --checkpoint smoe --max_test_steps 5    | --max_test_steps 5: the score covers all rows
finetune.py --teacher smoe --checkpoint smoe                    | --teacher: fine-tuning starts from --checkpoint
finetune.py --start_from smoe                                   | --checkpoint is missing
finetune.py --checkpoint smoe --scheduler dev_perf              | --scheduler dev_perf would tune on the rows
finetune.py --checkpoint smoe --moe_prune_to 0.5                | --moe_prune_to 0.5 has no effect with finetune.py
finetune.py --task sst2 --checkpoint smoe --work_dir /proc/run  | --work_dir /proc/run cannot be written
surgery.py                                                      | --from is missing
surgery.py --from smoe                                          | --method is missing
surgery.py --from nowhere --method merge                        | nowhere does not exist
surgery.py --from dense --method merge --keep 2                 | it has no experts to remove
surgery.py --from smoe --method merg --keep 2                   | nearest: merge
surgery.py --from smoe --method merge                           | --keep is missing
surgery.py --from smoe --method merge --keep 20                 | --keep 20 must be from 1 to the 4 experts
surgery.py --from smoe --method keep_best --keep 2 --rank 3     | --rank has no effect
surgery.py --from smoe --method compress --rank 2               | --kept is missing
surgery.py --from smoe --method compress --kept 0.5 --rank 1000 | --rank 1000 must be from 1
surgery.py --from smoe --method merge --keep 2 --k 9            | --k 9 must be from 1 to the 4 experts
surgery.py --from smoe --method merge --keep 2 --fold 1         | --fold 1: a text has no folds
surgery.py --from smoe --method merge --keep 2 --task mawps --fold 9   | --fold 9: mawps has the folds 0 to 4
surgery.py --from smoe --method merge --keep 2 --tokens 1e12    | --tokens 1e12 must be a whole number
surgery.py --from smoe --method merge --keep 2 --tokens 1000000000000  | --tokens 1000000000000 is more than
surgery.py --from smoe --method merge --keep 2 --out file       | --out file cannot be a folder
surgery.py --from smoe --method merge --keep 2 --out /proc/run  | --out /proc/run cannot be written
surgery.py --from smoe --method merge --keep 2 --out {LONG}     | cannot be written (File name too long)
surgery.py --from smoe --method merge --keep 2 --out dense      | --out dense holds something else
surgery.py --from smoe --method merge --keep 2 --calibrate nowhere     | nowhere is not a prepared text
surgery.py --from smoe --method merge --keep 2 --data nowhere   | nowhere is not a prepared text
generate.py                                                     | --checkpoint is missing
generate.py --checkpoint nowhere                                | the checkpoint nowhere does not exist
generate.py --checkpoint smoe --k 0                             | --k 0 must be from 1 to the 4 experts
generate.py --checkpoint smoe --k 9                             | --k 9 must be from 1 to the 4 experts
generate.py --checkpoint dense --k 2                            | --k 2: the run in dense is dense
generate.py --checkpoint smoe --draft_k 4                       | --draft_k 4 must be less than the 4 active experts
generate.py --checkpoint smoe --k 2 --draft_k 2                 | --draft_k 2 must be less than the 2 active experts
generate.py --checkpoint dense --draft_k 1                      | --draft_k 1: the run in dense is dense
generate.py --checkpoint smoe --draft_k 1 --precision bf16      | --draft_k 1: in bf16 several bytes are rounded
generate.py --checkpoint smoe --draft_length 2                  | --draft_length 2 needs --draft_k
generate.py --checkpoint smoe --temperature nan                 | --temperature nan must be at least 0 and finite
generate.py --checkpoint smoe --temperature -1                  | --temperature -1.0 must be at least 0
generate.py --checkpoint smoe --top_p 0                         | --top_p 0.0 must be above 0
generate.py --checkpoint smoe --length 0                        | --length 0 must be at least 1
generate.py --checkpoint smoe --prompt                          | --prompt needs a value
convert.py --data file --out new                                | --from is missing
convert.py --from owner/name --out new                          | --data is missing
convert.py --from /nowhere --data file --out new                | --from /nowhere does not exist
convert.py --from words --data file --out new                   | words has no config.json and 0 GGUF files
convert.py --from file --data file --out new                    | --from file is a file, but not a GGUF file
convert.py --from owner/name --data words --out new             | --data words is not a file
convert.py --from owner/name --data file --out words            | --out words holds something already
convert.py --from owner/name --data file --out file             | --out file cannot be a folder
convert.py --from owner/name --data file --out new --shared_experts 16 | --shared_experts 16 must be less than --num_experts 16
convert.py --from owner/name --data file --out new --correction mean   | --correction mean is added by a shared expert
convert.py --from owner/name --data file --out new --expert_init copy --cut weights | --cut weights is for experts that are cut
convert.py --from owner/name --data file --out new --expert_init copy --gate_weight unit | --gate_weight unit is for experts that are cut
convert.py --from owner/name --data file --out new --gate_weight softmax --correction norm | --correction norm is of a sum of experts
convert.py --from owner/name --data file --out new --k 17       | --k 17 must be at most --num_experts 16
convert.py --from owner/name --data file --out new --cut weight | --cut: unknown value 'weight'
data/prepare.py                                                 | required: NAME
data/prepare.py x --source nowhere                              | nowhere
data/prepare.py x --nope                                        | unrecognized arguments: --nope
data/prepare.py x --source file --held_out -1                   | --held_out
data/prepare.py x --source file --held_out x                    | --held_out
data/prepare_pieces.py x                                        | required: --tokenizer
data/prepare_pieces.py x --tokenizer nowhere --data_files nowhere      | nowhere
data/prepare_pieces.py x --tokenizer file --data_files file --limit x  | --limit
data/prepare_task.py                                            | required: TASK
data/prepare_task.py nope                                       | invalid choice: 'nope'
data/prepare_task.py sst2 --source nowhere                      | nowhere
-m utils.reporting tableX                                       | invalid choice: 'tableX'
-m utils.reporting --only depth                                 | say which table
-m utils.reporting ablation --only nope                         | invalid choice: 'nope'
-m utils.reporting table1 --runs nowhere                        | nowhere
-m utils.microscope                                             | required: PATH, --out
-m utils.microscope nowhere --out x                             | nowhere is not a folder
-m utils.microscope {HERE}/smoe --out {HERE}/smoe               | holds something else
-m utils.microscope {HERE}/smoe --out x --k 99                  | --k 99 must be at most the
-m utils.microscope {HERE}/smoe --out x --tokens 0              | --tokens: '0' must be a whole number
-m utils.microscope {HERE}/smoe --out x --data file             | --data file is for a transformers model
-m utils.microscope {HERE}/dense --out x                        | is a run of a dense model
-m utils.microscope {HERE} --out x                              | holds no run
-m utils.reporting.ablations                                    | unknown ablation ''
-m utils.reporting.ablations nope                               | unknown ablation 'nope'
-m utils.reporting.ablations depth nope                         | unknown row of depth 'nope'
"""
BY_PROCESS = """
-m utils.cli.train --lr x                                       | --lr x must be a number
-m utils.cli.finetune --checkpoint nowhere                      | nowhere does not exist
-m utils.training.routing                                       | required: RUN
-m utils.training.routing nowhere                               | nowhere
script/table1/smoe.sh --lr x                                    | --lr x must be a number
script/table1/thor.sh --nope                                    | --nope: unknown flag
script/table1/run_all.sh --lr -1                                | --lr -1.0 must be above 0
script/table1/run_all.sh --seed 3                               | --seed differs from row to row
script/table1/run_all.sh --data nowhere                         | nowhere is not a prepared text
JOBS=0 script/table1/run_all.sh                                 | JOBS=0: expected a whole number from 1
NPROC=x script/table1/dense.sh                                  | NPROC=x: expected a whole number from 1
SEEDS=1,2 script/table1/run_all.sh                              | SEEDS=1,2: expected whole numbers
script/figure5/8layers_smoe_dropout.sh --nope                   | --nope: unknown flag
script/table2/sst2.sh                                           | usage: bash
script/table2/sst2.sh {HERE}/smoe --lrr 3                       | --lrr: unknown flag
script/table2/csqa.sh nowhere                                   | nowhere does not exist
script/table2/sst2/dense_model.sh {HERE}/smoe                   | not of a dense method
script/table2/run_all.sh                                        | usage: bash
script/table2/run_all.sh {HERE}/named --lrr 3                   | --lrr: unknown flag
script/table2/run_all.sh {HERE}/words                           | holds no finished run named
TASKS=nope script/table2/run_all.sh {HERE}/named                | --task: unknown value 'nope'
script/slimmable/finetune.sh                                    | usage: bash
script/slimmable/finetune.sh {HERE}/smoe {HERE}/file out --seed 3 | --seed differs from row to row
script/vision/digits.sh --seed 3                                | --seed differs from row to row
script/vision/digits.sh --heads 3                               | must be a multiple of --heads 3
ROWS=nope script/vision/digits.sh --images {HERE}/words         | has no images of two classes
script/surgery/run_all.sh {HERE}/named --lrr 3                  | --lrr: unknown flag
script/surgery/run_all.sh {HERE}/words                          | holds no finished run named
METHODS=nope script/surgery/run_all.sh {HERE}/named             | METHODS: there is no nope
KEEP=x script/surgery/run_all.sh {HERE}/named                   | KEEP=x: expected whole numbers
script/surgery/row.sh                                           | usage: bash
script/surgery/row.sh nowhere merge 2 1                         | nowhere/config.json is missing or damaged
script/surgery/row.sh {HERE}/smoe merge 2 1 --lrr 3             | --lrr: unknown flag
script/surgery/row.sh {HERE}/smoe merge 2 1 --lr nan            | --lr nan must be above 0 and finite
script/surgery/scratch.sh                                       | usage: bash
script/surgery/scratch.sh {HERE}/smoe 2 --lrr 3                 | --lrr: unknown flag
script/surgery/scratch.sh {HERE}/damaged 2                      | damaged/config.json is missing or damaged
script/ablation/run.sh                                          | usage: bash
script/ablation/run.sh nope x                                   | unknown ablation 'nope'
script/ablation/run.sh depth x                                  | unknown row of depth 'x'
script/ablation/run_all.sh                                      | usage: bash
script/ablation/run_all.sh nope                                 | unknown ablation 'nope'
script/ablation/run_all.sh depth --lrr 3                        | --lrr: unknown flag
script/quickstart.sh --method smoe                              | --method differs from row to row
"""


def make(folder: Path) -> None:
    """The texts, rows and runs that the command lines name."""
    tiny.write_corpus(folder / "words")
    tiny.write_corpus(folder / "other", train_bytes=30_000)
    tiny.write_pieces(folder / "pieces")
    tiny.write_rows(folder / "sst2", "sst2")
    (folder / "file").write_text("x" * 5_000)
    (folder / "nowhere_link").symlink_to(folder / "nowhere")
    for method in ("smoe", "dense"):
        words = tiny.flags(folder / "words", folder / method, method=method, max_step=2, eval_interval=2, log_interval=1, yes=True)
        tiny.completed(words)
        (folder / "named").mkdir(exist_ok=True)
        (folder / "named" / f"{method}-seed1").symlink_to(folder / method)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text("{")


def written(table: str) -> Iterator[Case]:
    for line in table.strip().splitlines():
        command, _, said = line.rpartition(" | ")
        words = shlex.split(command.replace("{LONG}", LONG).replace("{DEEP}", DEEP).replace("{HERE}", os.getcwd()))
        environment = []
        while "=" in words[0]:
            environment.append(tuple(words.pop(0).split("=", 1)))
        words = [" ".join(words[:2]), *words[2:]] if words[0] == "-m" else words
        yield Case(tuple(words), said, tuple(environment))


def generated() -> Iterator[Case]:
    """Every flag of the five programs with every value that is wrong for it by its declaration."""
    for program, kind in KINDS.items():
        for name, field in kind.__dataclass_fields__.items():
            spec: Spec = field.metadata["flag"]
            option = f"--{spec.name or name}"
            for value in VALUES:
                if is_wrong(value, field.type, spec):
                    words = (program, *GOOD[program].split(), option, *([] if value is None else [value]))
                    yield Case(words, "error: " if name in FIRST else option)


def is_wrong(value: str | None, kind: type, spec: Spec) -> bool:
    kind = (get_args(kind) or (kind,))[0]
    if kind is bool:
        return value is not None
    if value is None or kind is str:
        return value is None or (spec.choices is not None and value != "") or ("verbatim" not in spec.roles and value in ("", SURROGATE))
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return True
    if number != number or abs(number) == float("inf") or (kind is int and number == 10**30):
        return True
    low = spec.low if spec.low is not None else spec.above
    high = spec.high if spec.high is not None else spec.below
    return number != spec.special and ((low is not None and number < low) or (high is not None and number > high))


def check_train(words: list[str]) -> None:
    flags, _ = train.parse(words)
    corpus = Corpus.open(flags.data, MODELS[flags.model].reads)
    refuse_other_data(flags, corpus)
    train.refuse_sizes(flags, corpus)


def check_finetune(words: list[str]) -> None:
    flags, _ = finetune.parse(words)
    refuse_other_data(flags, read_examples(flags.task, Path(flags.data), flags.fold))


PROGRAMS: dict[str, Callable] = {
    **{
        "train.py": check_train,
        "finetune.py": check_finetune,
        "surgery.py": surgery.parse,
        "generate.py": generate.parse,
        "convert.py": convert.parse,
    },
    **{"data/prepare.py": prepare.main, "data/prepare_pieces.py": prepare_pieces.main, "data/prepare_task.py": prepare_task.main},
    **{"-m utils.reporting": reporting.main, "-m utils.reporting.ablations": ablations.main},
    "-m utils.microscope": microscope.main,
}


def here(case: Case) -> Answer:
    """The answer of a program without a process of its own, up to where it would import torch."""
    out, err, begin, code = io.StringIO(), io.StringIO(), time.perf_counter(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        try:
            with exit_on_user_error():
                PROGRAMS[case.words[0]](list(case.words[1:]))
        except SystemExit as stop:
            code = stop.code
    return Answer(code, out.getvalue(), err.getvalue(), time.perf_counter() - begin)


def process(case: Case) -> Answer:
    """The answer of a program or script in a process of its own; seconds of processor time, whatever else runs on the machine."""
    program, *words = case.words
    start = ["bash", str(ROOT / program)] if program.startswith("script/") else [sys.executable, str(ROOT / program)]
    start = [sys.executable, *program.split()] if program.startswith("-m ") else start
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **dict(case.environment)}
    begin = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    done = subprocess.run([*start, *words], capture_output=True, stdin=subprocess.DEVNULL, env=environment)
    seconds = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - begin
    return Answer(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"), seconds)


def faults(case: Case, answer: Answer) -> list[str]:
    """The faults of an answer, in a few words each."""
    lines = answer.err.splitlines()
    return [
        *(["traceback"] if "Traceback" in answer.err else []),
        *([f"exit code {answer.code}"] if answer.code != 2 else []),
        *(["not one line"] if len(lines) != 1 or not lines[0].startswith("error: ") or answer.out else []),
        *([f"does not say {case.said!r}"] if case.said not in answer.err else []),
        *(["slow"] if answer.seconds > SLOW else []),
    ]


def listing(*folders: Path) -> set[str]:
    return {str(path) for folder in folders if folder.exists() for path in folder.rglob("*") if "__pycache__" not in path.parts}


def main() -> int:
    """Tries all: the generated ones in this process, the others in processes of their own. Returns the number of faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness.wrong_commands", description=main.__doc__)
    parser.parse_args()
    found: dict[str, int] = {}
    tries = 0
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        os.chdir(name)
        places = [Path(name), ROOT / "runs", ROOT / "data"]
        before = listing(*places)
        for kind, cases in (("generated", generated()), ("written", written(WRITTEN)), ("scripts", written(BY_PROCESS))):
            for case in cases:
                answer = here(case) if kind == "generated" else process(case)
                tries += 1
                for fault in faults(case, answer):
                    found[fault.partition(" '")[0]] = found.get(fault.partition(" '")[0], 0) + 1
                    print(f"{fault} ({answer.seconds:.1f} s): {case.name}\n    {answer.err[-400:]!r}", flush=True)
            print(f"{kind}: {tries} tries so far", flush=True)
        left = sorted(listing(*places) - before)
        os.chdir("/")
    print(f"{tries} wrong command lines; faults: {found or 'none'}; left behind: {left or 'nothing'}")
    return sum(found.values()) + len(left)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
