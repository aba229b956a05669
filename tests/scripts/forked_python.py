"""A Python whose programs start at once: they are forked from a process that has imported torch, and nothing of this repository.

The copies of the repository that scripts are tested in have it as .venv/bin/python.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import socket
import sys
from pathlib import Path

PRELOADED = (
    *("torch._dynamo", "torch.distributed.tensor", "torch.utils.tensorboard", "safetensors.torch", "accelerate", "accelerate.tracking"),
    *("matplotlib.pyplot", "scipy.optimize", "msgspec.json"),
)


def install(folder: Path) -> None:
    """Makes it the Python of a copy of the repository."""
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" run "{_server()}" "$@"\n')
    python.chmod(0o755)


def _server(started: dict = {}) -> str:  # noqa: B006 (one for the whole process)
    """The socket of the process that programs are forked from, which ends with this one."""
    import subprocess
    import tempfile

    if not started:
        folder = started["folder"] = tempfile.TemporaryDirectory()
        words = [sys.executable, __file__, "serve", f"{folder.name}/socket"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started["process"] = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert started["process"].stdout.readline() == b"ready\n"
    return f"{started['folder'].name}/socket"


def run(address: str, words: list[str]) -> None:
    """Has the server run a command line of Python, and ends as it does."""
    if words[0] == "-c":
        os.execv(sys.executable, [sys.executable, *words])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps([words, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
        code = int(server.recv(9))
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(address: str) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a program's end does not search all of it for garbage
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:  # closed by the end of the tests
            client = listener.accept()[0]
            if not os.fork():
                return answer(client)
            client.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def answer(client: socket.socket) -> None:
    message, descriptors, *_ = socket.recv_fds(client, 1 << 18, 3)
    if not (pid := os.fork()):
        client.close()
        return become(*json.loads(message), descriptors)
    client.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def become(words: list[str], folder: str, environment: dict[str, str], descriptors: list[int]) -> None:
    """Runs a program as `python words...` would in this folder; what it raises ends this process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    words = words[words[0] == "-u" :]
    if words[0] == "-m":
        sys.path[0], sys.argv = folder, words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(words[0]).resolve().parent), words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    run(sys.argv[2], sys.argv[3:]) if sys.argv[1] == "run" else serve(sys.argv[2])
