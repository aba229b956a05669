"""Equations of mathematical word problems, in prefix notation over the numbers of the problem, as arkilpatel/SVAMP has them:

    - * number0 number1 2.0      is number0 · number1 - 2

Words are separated by spaces: an operator + - * / followed by its two operands, a slot (`number0` is the first number of the problem), or
a constant, unsigned and with at most nine digits on either side of the point. Imports no torch.
"""

import math
import operator
import re
from collections.abc import Sequence

TOLERANCE = 1e-4  # absolute
LONGEST = 1000  # characters; the longest equation in the data has 62

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SLOT = re.compile(r"number(0|[1-9][0-9]{0,2})")
CONSTANT = re.compile(r"(0|[1-9][0-9]{0,8})(\.[0-9]{1,9})?")


def tokens(equation: str) -> list[str]:
    """Split an equation into operators, slots and constants; accepts malformed equations and unknown slots."""
    return [word for word in equation.split(" ") if word]


def value(equation: str, numbers: Sequence[float]) -> float | None:
    """Evaluate the equation with the numbers of the problem; None if it has no finite value.

    Division by zero, a malformed equation, an unknown slot, and an equation of more than LONGEST characters give None, never an error.
    """
    if len(equation) > LONGEST:
        return None
    stack: list[float] = []
    for token in reversed(tokens(equation)):
        try:
            if token in OPERATORS:
                found = OPERATORS[token](stack.pop(), stack.pop())
            elif slot := SLOT.fullmatch(token):
                found = float(numbers[int(slot[1])])
            else:
                found = float(token) if CONSTANT.fullmatch(token) else math.nan
        except (IndexError, ZeroDivisionError):
            return None
        if not math.isfinite(found):
            return None
        stack.append(found)
    return stack[0] if len(stack) == 1 else None


def solves(equation: str, numbers: Sequence[float], answer: float) -> bool:
    """Return whether the equation has a value, and it is within TOLERANCE of the answer."""
    found = value(equation, numbers)
    return found is not None and abs(found - answer) <= TOLERANCE
