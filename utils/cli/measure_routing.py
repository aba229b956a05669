"""Measures the routing of finished runs again, and updates their result.json.

python -m utils.cli.measure_routing RUN...
"""

import json
import sys
from pathlib import Path

from utils.data.corpus import Corpus
from utils.engine import Engine
from utils.errors import UserError, run_main
from utils.flags.derive import stored_flags
from utils.models.build import build_model
from utils.tasks.choose import pretraining_task
from utils.training.routing import describe_routing
from utils.training.run_folder import RunFolder, write_json


def main(arguments: list[str]) -> None:
    """Replaces `routing` in the result.json of finished runs."""
    if not arguments:
        raise UserError("usage: python -m utils.cli.measure_routing RUN..., folders of finished runs")
    for folder in map(Path, arguments):
        path = folder / "result.json"
        if not path.exists():
            raise UserError(f"{path} is missing: only a finished run can be measured")
        flags = stored_flags(folder)
        with Engine(flags) as engine:
            task = pretraining_task(flags, Corpus.open(flags.data), engine)
            model = engine.prepare(build_model(flags, task.vocabulary))
            routing = describe_routing(task, model, RunFolder.checkpoints_of(flags))
        write_json(path, json.loads(path.read_text()) | {"routing": routing})
        print(f"{folder}: {json.dumps(routing) if routing else 'no experts'}")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
