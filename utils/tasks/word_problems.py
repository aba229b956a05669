"""Mathematical word problems: the model writes an equation, whose value with the numbers of the problem is compared to the answer."""

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from utils.data.equations import solves, tokens
from utils.data.rows import Examples, Problem
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.fields import FinetuneFlags
from utils.flags.models import MODELS
from utils.models.heads import IGNORED, Continuation, Decoder
from utils.models.registry import architecture
from utils.tasks.base import Batch, Metric, State
from utils.tasks.encoding import RowEncoder
from utils.tasks.labelled import LabelledTask

Row = tuple[np.ndarray, np.ndarray, Problem]  # tokens of the question, tokens of the equation, the problem


class WordProblems(LabelledTask):
    """Subclasses define how equations are written: at most twice as long as the longest one in training."""

    metric = Metric("solved", False, lambda share: 100 * share, of_loss=False)

    def __init__(self, flags: FinetuneFlags, examples: Examples, engine: Engine, encoder: RowEncoder):
        self.encoder = encoder
        self.learn(examples.train)
        self._longest = 2 * max(len(self.equation(problem)) for problem in examples.train)
        super().__init__(flags, examples, engine, encoder)

    def learn(self, problems: list[Problem]) -> None:
        """Collects what encoding needs from all training problems."""

    @abstractmethod
    def equation(self, problem: Problem) -> np.ndarray:
        """Tokens of the equation int64 [L], with the end token; IGNORED for a symbol that cannot be written."""

    @abstractmethod
    def write(self, model: nn.Module, batch: Batch) -> list[str]:
        """Generates an equation for every row."""

    def read(self, problems: list[Problem]) -> list[Row]:
        questions = self.encoder.encode([(problem.question,) for problem in problems])
        return [(question, self.equation(problem), problem) for question, problem in zip(questions, problems, strict=True)]

    def measure(self, model: nn.Module, batch: Batch, state: State) -> tuple[float, int, State]:
        """The number of generated equations with the correct value."""
        with self.engine.autocast():
            written = self.write(model, batch)
        problems = [problem for _, _, problem in batch.rows]
        correct = [solves(equation, problem.numbers, problem.answer) for equation, problem in zip(written, problems, strict=True)]
        return float(sum(correct)), len(correct), None


class ContinuedEquations(WordProblems):
    """For a causal model: it continues the question with the equation; both end in a newline."""

    def equation(self, problem: Problem) -> np.ndarray:
        return self.encoder.encode([(problem.equation,)])[0]

    def length(self, row: Row) -> int:
        return len(row[0]) + len(row[1]) - 1

    def collate(self, rows: list[Row], length: int) -> tuple[Tensor, ...]:
        """Tokens [B, T], and the next token of the equation at each [B, T]."""
        shape = len(rows), length
        inputs, targets = np.full(shape, self.encoder.pad), np.full(shape, IGNORED)
        for row, (question, equation, _) in enumerate(rows):
            joined, begin = np.concatenate([question, equation]), len(question) - 1
            inputs[row, : len(joined) - 1] = joined[:-1]
            targets[row, begin : begin + len(equation)] = equation
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def with_head(self, model: nn.Module) -> nn.Module:
        return Continuation(model)

    def write(self, model: Continuation, batch: Batch) -> list[str]:
        questions = [torch.from_numpy(question).to(self.engine.device) for question, _, _ in batch.rows]
        written = model.write(questions, end=ord("\n"), limit=self._longest)
        return [bytes(row).decode(errors="replace") for row in written]


class DecodedEquations(WordProblems):
    """For an encoder: a decoder over operators, number slots and the constants of training."""

    def learn(self, problems: list[Problem]) -> None:
        self._symbols = ["", *sorted({symbol for problem in problems for symbol in tokens(problem.equation)})]  # index 0 is Decoder.END
        self._number_of = {symbol: index for index, symbol in enumerate(self._symbols)}

    def equation(self, problem: Problem) -> np.ndarray:
        """A symbol that is in no training equation becomes IGNORED; only held-out rows, whose equations are not read, can have one."""
        return np.array([self._number_of.get(symbol, IGNORED) for symbol in tokens(problem.equation)] + [Decoder.END])

    def length(self, row: Row) -> int:
        return len(row[0])

    def collate(self, rows: list[Row], length: int) -> tuple[Tensor, ...]:
        """Tokens [B, T], their numbers [B], symbols of the equation [B, L]."""
        inputs = np.full((len(rows), length), self.encoder.pad)
        targets = np.full((len(rows), max(len(equation) for _, equation, _ in rows)), IGNORED)
        for row, (question, equation, _) in enumerate(rows):
            inputs[row, : len(question)], targets[row, : len(equation)] = question, equation
        lengths = torch.tensor([len(question) for question, _, _ in rows])
        return torch.from_numpy(inputs), lengths, torch.from_numpy(targets)

    def with_head(self, model: nn.Module) -> nn.Module:
        return Decoder(model, architecture(self.flags.model), len(self._symbols), self._longest, self.flags)

    def write(self, model: Decoder, batch: Batch) -> list[str]:
        tokens_BT, lengths_B, _ = batch.inputs
        return [" ".join(self._symbols[index] for index in row) for row in model.write(tokens_BT, lengths_B)]


def word_problems(flags: FinetuneFlags, examples: Examples, engine: Engine, encoder: RowEncoder) -> WordProblems:
    """The task for a causal model, which continues the text, or for an encoder, which gets a decoder."""
    kind = ContinuedEquations if MODELS[flags.model].causal else DecodedEquations
    if kind is ContinuedEquations and encoder.vocabulary:
        raise UserError(f"--task {flags.task}: {flags.checkpoint} writes words, and equations are written in bytes; give a model of bytes")
    return kind(flags, examples, engine, encoder)
