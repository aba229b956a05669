"""Fine-tunes a pre-trained model on a task, and tests it at every number of active experts.

    python finetune.py --task sst2 --checkpoint runs/laptop/enwik8/smoe_dropout-seed1
    python finetune.py --task svamp --checkpoint RUN --dynamic_moe --dynamic_moe_mode linear_increase
    python finetune.py --task csqa --checkpoint FOLDER             of any model of transformers, dense or converted
    python finetune.py --eval_only --k 1,2,4 --work_dir DIR

The checkpoint decides what the model is; the training loop is that of train.py, and is resumed in the same way.
`python finetune.py --help` lists the flags.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before exit_on_user_error handles signals

from utils.errors import exit_on_user_error

if __name__ == "__main__":
    with exit_on_user_error():  # before torch is imported, so that a wrong flag or file is refused at once
        from utils.cli.finetune import parse
        from utils.cli.pipeline import refuse_other_data
        from utils.data.rows import read_examples

        FLAGS, SOURCE = parse()
        EXAMPLES = read_examples(FLAGS.task, Path(FLAGS.data), FLAGS.fold)
        refuse_other_data(FLAGS, EXAMPLES)

from train import evaluate_run, main
from utils.engine import Engine
from utils.training.setup import finetuning_run

if __name__ == "__main__":
    with exit_on_user_error(), Engine(FLAGS) as ENGINE:
        RUN = finetuning_run(FLAGS, EXAMPLES, ENGINE, SOURCE)
        sys.exit((evaluate_run if FLAGS.eval_only else main)(RUN))
