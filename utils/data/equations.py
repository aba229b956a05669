"""Equations of mathematical word problems, in prefix notation over the numbers of the problem, as arkilpatel/SVAMP has them:

    - * number0 number1 2.0      is number0 · number1 - 2

Words are separated by blanks: an operator + - * / with its two operands behind it, a slot (`number0` is the first number of the problem),
or a constant, without sign and of at most nine digits on either side of the point. Imports no torch.
"""

import math
import operator
import re
from collections.abc import Sequence

TOLERANCE = 1e-4  # absolute
LONGEST = 1000  # characters; an equation of the data has 62 at most

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SLOT = re.compile(r"number(0|[1-9][0-9]{0,2})")
CONSTANT = re.compile(r"(0|[1-9][0-9]{0,8})(\.[0-9]{1,9})?")


def tokens(equation: str) -> list[str]:
    """The words of an equation, operators, slots and constants alike. A malformed equation or an unknown slot is no error."""
    return [word for word in equation.split(" ") if word]


def value(equation: str, numbers: Sequence[float]) -> float | None:
    """What the equation comes to with the numbers of the problem, or None where it has no finite value.

    Division by zero, a malformed equation or an unknown slot is wrong, never an error: each of them gives None, and so does an equation of
    more than LONGEST characters.
    """
    if len(equation) > LONGEST:
        return None
    stack: list[float] = []
    for token in reversed(tokens(equation)):
        found = _applied(token, stack) if token in OPERATORS else _operand(token, numbers)
        if found is None or not math.isfinite(found):
            return None
        stack.append(found)
    return stack[0] if len(stack) == 1 else None


def solves(equation: str, numbers: Sequence[float], answer: float) -> bool:
    """Whether the value of the equation is within TOLERANCE of the answer.

    Division by zero, a malformed equation or an unknown slot is wrong, never an error.
    """
    found = value(equation, numbers)
    return found is not None and abs(found - answer) <= TOLERANCE


def _applied(token: str, stack: list[float]) -> float | None:
    """The operator applied to the two operands on top of the stack, which it takes; None where there are not two, or the divisor is 0."""
    if len(stack) < 2:
        return None
    left, right = stack.pop(), stack.pop()
    return None if token == "/" and right == 0 else OPERATORS[token](left, right)


def _operand(token: str, numbers: Sequence[float]) -> float | None:
    if slot := SLOT.fullmatch(token):
        index = int(slot[1])
        return float(numbers[index]) if index < len(numbers) else None
    return float(token) if CONSTANT.fullmatch(token) else None
