"""The statements of a class's methods between two of its parts, as a function that can be run by itself.

A feed-forward network that lies in a block has no forward of its own, and the block's forward needs attention masks, caches and positions.
What counts is only what the block does from the first map to the second.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn


class Piece(NamedTuple):
    """Statements as a function of the module and its local variables.

    inputs: variables that it reads, with their defaults where they are arguments that have one. uses: attributes of self and how often it
    reads them. later: variables that are read after it.
    """

    function: Callable[..., Any]
    inputs: dict[str, Any]
    uses: dict[str, int]
    later: frozenset[str]

    def __call__(self, module: nn.Module, make: Callable[[int], Tensor]) -> Any:
        """Run the statements: their return value, or the variables that are read later. make(seed) makes a value for an input."""
        values = {name: make(seed) if value is None else value for seed, (name, value) in enumerate(self.inputs.items())}
        result = self.function(module, **values)
        if isinstance(result, _Locals):
            return {name: value for name, value in result.items() if name in self.later}
        return result

    def flipped(self) -> list[Piece]:
        """The same with the opposite of each argument whose default is True or False."""
        flags = [name for name, value in self.inputs.items() if isinstance(value, bool)]
        return [self._replace(inputs={**self.inputs, name: not self.inputs[name]}) for name in flags]


class _Locals(dict):
    """Local variables after statements that do not return."""


def pieces(module: nn.Module, first: str, last: str, more: int = 0) -> list[Piece] | str:
    """Every place in the module's methods that goes from child `first` to child `last`, or a sentence why there is none.

    more: number of statements to add behind each.
    """
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return _of_sequential(module, first, last)
    return _of_class(type(module), first, last, more)


@lru_cache(maxsize=4096)
def _of_class(kind: type, first: str, last: str, more: int) -> list[Piece] | str:
    found, elsewhere = [], []
    for function, tree, read in _all_methods(kind):
        if tree is None and read & {first, last}:
            return f"the source of {kind.__name__}.{function.__name__} cannot be read: define the class in a file"
    for function, tree in _methods(kind, first, last):
        ours = [_uses(statement).keys() & {first, last} for statement in tree.body]
        if not any(ours):
            continue
        statements = _between(tree.body, first, last, more)
        if not statements:
            elsewhere.append(function.__name__)
            continue
        found += [_piece(function, tree, span) for span in statements]
    if elsewhere or not found:
        where = f"{kind.__name__}.{elsewhere[0]}" if elsewhere else kind.__name__
        return f"{where} does not call {first!r} and {last!r} one after the other"
    return found


def uses_elsewhere(module: nn.Module, name: str, found: list[Piece]) -> bool:
    """Return whether the module's methods read the attribute outside these pieces."""
    if isinstance(module, nn.Sequential):
        return False
    total = sum(_uses(tree).get(name, 0) for _, tree in _methods(type(module), name, name))
    return total > sum(piece.uses.get(name, 0) for piece in found)


def _of_sequential(module: nn.Sequential, first: str, last: str) -> list[Piece] | str:
    names = list(module._modules)
    begin, end = names.index(first), names.index(last)
    if begin > end:
        return f"{first!r} and {last!r} do not come one after the other"

    def function(self: nn.Sequential, x: Tensor) -> Tensor:
        for name in names[begin : end + 1]:
            x = self._modules[name](x)
        return x

    return [Piece(function, {"x": None}, dict.fromkeys(names[begin : end + 1], 1), frozenset())]


def _methods(kind: type, *names: str) -> list[tuple[Callable, ast.FunctionDef]]:
    """Methods that read one of the attributes, with their syntax trees."""
    return [(function, tree) for function, tree, read in _all_methods(kind) if read & set(names) and tree is not None]


@lru_cache(maxsize=1024)
def _all_methods(kind: type) -> list[tuple[Callable, ast.FunctionDef | None, frozenset[str]]]:
    found: list[tuple] = []
    hidden: set[str] = set()  # overridden by a method that does not call the overridden one
    for owner in kind.__mro__:
        if owner in (nn.Module, object):
            continue
        for name, value in vars(owner).items():
            value = value.fget if isinstance(value, property) else value
            if name in hidden or name == "__init__" or not inspect.isfunction(value):
                continue
            function = inspect.unwrap(value)
            found.append((function, _tree(function), frozenset(_names(function.__code__))))
            if "__class__" not in function.__code__.co_freevars:
                hidden.add(name)
    return found


def _names(code: Any) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if inspect.iscode(constant)]
    return set(code.co_names).union(*inner)


@lru_cache(maxsize=8192)
def _tree(function: Callable) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        return None
    own = tree.args.args[0].arg
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == own:
            node.id = "self"
    return tree


def _uses(tree: ast.AST) -> dict[str, int]:
    """Number of times that each attribute of self is read."""
    counts: dict[str, int] = {}
    for node in ast.walk(tree):
        if (name := _own(node)) is not None:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _own(node: ast.AST) -> str | None:
    """Name of the attribute if this reads one of self."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
        holder, name = node.args[:2]
        if isinstance(holder, ast.Name) and holder.id == "self" and isinstance(name, ast.Constant):
            return name.value
    return None


@lru_cache(maxsize=4096)
def misfit(kind: type, child: str) -> str | None:
    """Use that methods of a class make of a child other than calling it with one input, or None."""
    for _, tree in _methods(kind, child):
        for node in ast.walk(tree):
            read = node.attr if isinstance(node, ast.Attribute) and _own(node.value) == child else "training"
            if read != "training" and not hasattr(nn.Module, read):
                return f"{kind.__name__} reads its {read!r}"
            if isinstance(node, ast.Call) and _own(node.func) == child:
                names = [keyword.arg for keyword in node.keywords]
                if len(node.args) + len(names) > 1 or names not in ([], ["x"]):
                    return f"{kind.__name__} calls it with {f'{names[-1]}=' if names and names[-1] else 'several inputs'}"
    return None


def _between(body: list[ast.stmt], first: str, last: str, more: int) -> list[list[ast.stmt]]:
    """Spans of statements from `first` to `last`, in the innermost blocks that contain both."""
    uses = [_uses(statement).keys() for statement in body]
    begins, ends = ([place for place, names in enumerate(uses) if part in names] for part in (first, last))
    if not begins or not ends:
        return []
    begin, end = begins[0], max(ends[-1], begins[-1])
    if begin != end:
        return [body[begin : end + 1 + more]]
    blocks = [getattr(body[begin], name, []) for name in ("body", "orelse", "finalbody")]
    inner = [span for block in blocks if isinstance(block, list) for span in _between(block, first, last, more)]
    return inner or ([] if any(block for block in blocks if isinstance(block, list)) else [body[begin : end + 1 + more]])


def _piece(function: Callable, tree: ast.FunctionDef, statements: list[ast.stmt]) -> Piece:
    inside = [node for statement in statements for node in ast.walk(statement)]
    end = max(statement.end_lineno for statement in statements)
    read = {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    code = function.__code__
    local = [name for name in (*code.co_varnames, *code.co_cellvars) if name in read and name not in ("self", code.co_varnames[0])]
    arguments = inspect.signature(function).parameters
    inputs = {name: _default(arguments.get(name)) for name in dict.fromkeys(local)}
    later = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.lineno > end}
    result = ast.Return(ast.Call(ast.Name("_Locals", ast.Load()), [ast.Call(ast.Name("locals", ast.Load()), [], [])], []))
    given = ast.arguments(posonlyargs=[], args=[ast.arg("self"), *map(ast.arg, inputs)], kwonlyargs=[], kw_defaults=[], defaults=[])
    made = ast.FunctionDef(name="piece", args=given, body=[*statements, result], decorator_list=[], type_params=[])
    module = ast.fix_missing_locations(ast.Module([made], []))
    room: dict[str, Any] = {"_Locals": _Locals}
    # the source of a class that is loaded and will run anyway, never text from a model's folder
    exec(compile(module, code.co_filename, "exec"), {**function.__globals__, **room}, room)
    uses: dict[str, int] = {}
    for statement in statements:
        for name, count in _uses(statement).items():
            uses[name] = uses.get(name, 0) + count
    return Piece(room["piece"], inputs, uses, frozenset(later))


def _default(argument: inspect.Parameter | None) -> Any:
    if argument is None or argument.default is argument.empty:
        kinds = {inspect.Parameter.VAR_KEYWORD: {}, inspect.Parameter.VAR_POSITIONAL: ()}
        return None if argument is None else kinds.get(argument.kind)
    return argument.default
