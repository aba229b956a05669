"""Device, precision and data parallelism, through accelerate: the same script runs under python, torchrun and accelerate launch."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smoe_dropout import tune_cpu
from utils.errors import UserError
from utils.flags.fields import Flags

T = TypeVar("T")


class Engine:
    """One process of the run. `rank` of `world_size`; only the main process writes.

    UserError if CUDA is requested but not available, or --multi_gpu is given to a single process with several GPUs.
    """

    def __init__(self, flags: Flags):
        if flags.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device; leave --cuda and --device out to run on the CPU")
        if flags.multi_gpu and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
            raise UserError(f"--multi_gpu: start with torchrun --nproc_per_node {torch.cuda.device_count()} train.py to use all GPUs")
        if flags.threads:
            torch.set_num_threads(flags.threads)
        cpu = flags.device == "cpu" or not torch.cuda.is_available()
        self.tuned = tune_cpu() if cpu and flags.tune_cpu else []
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if flags.precision == "bf16" else "no")
        self.device, self.rank, self.world_size = self.accelerator.device, self.accelerator.process_index, self.accelerator.num_processes
        self.is_main, self.compile = self.accelerator.is_main_process, flags.compile
        self.parallel: nn.Module | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Moves the model to its device and sets the precision of its forward pass. Train it through `forward`, which averages gradients
        over processes; use the returned model for everything else.
        """
        # the model is moved here, and not unwrapped again, because accelerate imports much of torch for either
        self.parallel = self.accelerator.prepare_model(model.to(self.device), device_placement=False)
        if self.compile:  # full graphs only: otherwise untraceable parts would silently run uncompiled
            self.parallel = torch.compile(self.parallel, fullgraph=True)
        return model

    def forward(self, *arguments: Any) -> Any:
        """The model's forward pass in training. UserError if --compile is given and the model cannot be compiled."""
        try:
            return self.parallel(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"--compile: this model cannot be compiled into one graph ({reason}): leave the flag out") from None

    def autocast(self):
        """Context manager for the run's precision; calls of a prepared model use it already."""
        return self.accelerator.autocast()

    def no_sync(self):
        """Context manager that accumulates gradients without averaging them over processes."""
        return self.accelerator.no_sync(self.parallel)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over processes, in float64."""
        if self.world_size == 1:
            return list(values)
        return self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum").tolist()

    def any(self, value: int) -> int:
        """The maximum over processes."""
        if self.world_size == 1:
            return value
        gathered: Tensor = self.accelerator.gather(torch.tensor([value], device=self.device))
        return int(gathered.max())

    def on_main(self, act: Callable[[], T]) -> T | None:
        """Calls `act` on the main process and returns its result; None on the others, which end silently if it raises an error there."""
        found, error = None, None
        if self.is_main:
            try:
                found = act()
            except Exception as raised:
                error = raised
        if self.any(int(error is not None)):
            raise error or SystemExit(2)
        return found

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception) -> None:
        """Ends the process group. The wrapper is freed first: freed after the group, it could wait forever for one of its threads."""
        self.parallel = None
        self.accelerator.free_memory()
        self.accelerator.end_training()

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        try:
            with open("/proc/cpuinfo") as file:
                return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        except (OSError, StopIteration):
            return "CPU"

    def peak_memory_mib(self) -> float:
        """Peak memory of this process: allocated on the GPU, or resident on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
