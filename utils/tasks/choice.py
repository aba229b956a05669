"""Classification and multiple choice: SST-2, one sentence and two classes; CommonsenseQA, a question paired with each of five choices."""

import numpy as np
import torch
from torch import Tensor, nn

from utils.models.heads import Scorer
from utils.models.registry import architecture
from utils.tasks.base import Batch, Metric, State
from utils.tasks.labelled import LabelledTask


class AnswerChoice(LabelledTask):
    """A row is its sequences, int64 [T] each, and the index of the answer."""

    metric = Metric("accuracy", False, lambda share: 100 * share, of_loss=False)

    def read(self, examples: list) -> list:
        self.sequences = len(examples[0].sequences)
        tokens = iter(self.encoder.encode([texts for example in examples for texts in example.sequences]))
        return [([next(tokens) for _ in example.sequences], example.label) for example in examples]

    def length(self, row: tuple[list[np.ndarray], int]) -> int:
        return max(map(len, row[0]))

    def collate(self, rows: list, length: int) -> tuple[Tensor, ...]:
        """Tokens [B, S, T], lengths [B, S], answers [B]."""
        tokens = np.full((len(rows), self.sequences, length), self.encoder.pad)
        for row, (sequences, _) in enumerate(rows):
            for place, sequence in enumerate(sequences):
                tokens[row, place, : len(sequence)] = sequence
        lengths = torch.tensor([[len(sequence) for sequence in sequences] for sequences, _ in rows])
        return torch.from_numpy(tokens), lengths, torch.tensor([answer for _, answer in rows])

    def sequences_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens_BST, lengths_BS, _ = batch.inputs
        return tokens_BST.flatten(0, 1), lengths_BS.flatten()

    def with_head(self, model: nn.Module) -> nn.Module:
        outputs = self.corpus.labels if self.sequences == 1 else 1
        return Scorer(model, architecture(self.flags.model), outputs, self.flags)

    def measure(self, model: nn.Module, batch: Batch, state: State) -> tuple[float, int, State]:
        """The number of correct answers."""
        _, _, logits_B1C = model(*batch.inputs, state)
        return float((logits_B1C[:, 0].argmax(-1) == batch.inputs[-1]).sum()), len(logits_B1C), None
