"""Mathematical word problems: the equation is written, executed on the problem's numbers, and has to give the answer."""

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from utils.data.equations import solves, tokens
from utils.data.rows import Problem
from utils.models.heads import IGNORED, Continuation, Decoder, DecoderSizes
from utils.tasks.base import Batch, Metric, State
from utils.tasks.labelled import Labelled

Row = tuple[np.ndarray, np.ndarray, Problem]  # the question's tokens, the equation's, and the problem


class WordProblems(Labelled):
    """Where the equation is written is a subclass's. No equation is longer than twice the longest of training."""

    metric = Metric("solved", False, lambda share: 100 * share, of_loss=False)

    def __init__(self, flags, examples, engine, source, text):
        self.text = text
        self.learn(examples.train)
        self._longest = 2 * max(len(self.equation(problem)) for problem in examples.train)
        super().__init__(flags, examples, engine, source, text)

    def learn(self, problems: list[Problem]) -> None:
        """What has to be known of the training problems before any is read."""

    @abstractmethod
    def equation(self, problem: Problem) -> np.ndarray:
        """The equation's tokens int64 [L], closed by the one that ends it; IGNORED for one that cannot be written."""

    @abstractmethod
    def write(self, model: nn.Module, batch: Batch) -> list[str]:
        """An equation for every row."""

    def read(self, problems: list[Problem]) -> list[Row]:
        questions = self.text.encode([(problem.question,) for problem in problems])
        return [(question, self.equation(problem), problem) for question, problem in zip(questions, problems, strict=True)]

    def measure(self, model: nn.Module, batch: Batch, state: State) -> tuple[float, int, State]:
        """How many of the written equations give the answer."""
        with self.engine.autocast():
            written = self.write(model, batch)
        problems = [problem for _, _, problem in batch.rows]
        right = [solves(equation, problem.numbers, problem.answer) for equation, problem in zip(written, problems, strict=True)]
        return float(sum(right)), len(right), None


class Continued(WordProblems):
    """For a causal model of bytes: the equation stands behind the question, and both end in a newline."""

    def equation(self, problem: Problem) -> np.ndarray:
        return self.text.encode([(problem.equation,)])[0]

    def length(self, row: Row) -> int:
        return len(row[0]) + len(row[1]) - 1

    def collate(self, rows: list[Row], length: int) -> tuple[Tensor, ...]:
        """Tokens [B, T], and what follows each of them in the equation [B, T]."""
        shape = len(rows), length
        inputs, targets = np.full(shape, self.text.pad), np.full(shape, IGNORED)
        for row, (question, equation, _) in enumerate(rows):
            whole, begin = np.concatenate([question, equation]), len(question) - 1
            inputs[row, : len(whole) - 1] = whole[:-1]
            targets[row, begin : begin + len(equation)] = equation
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def ready(self, backbone: nn.Module) -> nn.Module:
        return Continuation(backbone)

    def write(self, model: Continuation, batch: Batch) -> list[str]:
        questions = [torch.from_numpy(question).to(self.engine.device) for question, _, _ in batch.rows]
        written = model.write(questions, end=ord("\n"), limit=self._longest)
        return [bytes(row).decode(errors="replace") for row in written]


class Decoded(WordProblems):
    """Behind an encoder: a decoder over operators, number slots and the constants of training."""

    def learn(self, problems: list[Problem]) -> None:
        self._symbols = ["", *sorted({symbol for problem in problems for symbol in tokens(problem.equation)})]  # the first ends an equation
        self._number_of = {symbol: index for index, symbol in enumerate(self._symbols)}

    def equation(self, problem: Problem) -> np.ndarray:
        """IGNORED stands for a symbol that is in no training equation: only held-out rows can have one, and they are written, not read."""
        return np.array([self._number_of.get(symbol, IGNORED) for symbol in tokens(problem.equation)] + [Decoder.END])

    def length(self, row: Row) -> int:
        return len(row[0])

    def collate(self, rows: list[Row], length: int) -> tuple[Tensor, ...]:
        """Tokens [B, T], their numbers [B], the equation's symbols [B, L]."""
        inputs = np.full((len(rows), length), self.text.pad)
        targets = np.full((len(rows), max(len(equation) for _, equation, _ in rows)), IGNORED)
        for row, (question, equation, _) in enumerate(rows):
            inputs[row, : len(question)], targets[row, : len(equation)] = question, equation
        lengths = torch.tensor([len(question) for question, _, _ in rows])
        return torch.from_numpy(inputs), lengths, torch.from_numpy(targets)

    def ready(self, backbone: nn.Module) -> nn.Module:
        flags = self.flags
        sizes = DecoderSizes(len(self._symbols), self._longest, flags.d_model, flags.n_head, flags.dropout)
        return Decoder(backbone, self.architecture, sizes, flags.init_std)

    def write(self, model: Decoder, batch: Batch) -> list[str]:
        tokens_BT, lengths_B, _ = batch.inputs
        return [" ".join(self._symbols[index] for index in row) for row in model.write(tokens_BT, lengths_B)]
