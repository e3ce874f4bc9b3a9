"""Chat templates within limits: a template comes with a model or an adapter, and is a program.

The sandbox that transformers renders templates in keeps them from the machine, and not from its
time and memory: nested loops, `'x' * 10**9` or a text doubled forty times hang a process or fill
its memory. Here every step is counted, and what would grow is measured before it does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from types import MethodType
from typing import Any

from jinja2 import Template, nodes
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from lora_fsdp.errors import UnsafeFileError

#: Far above what any known template needs for a conversation of thousands of messages.
MOST_STEPS = 1_000_000
MOST_SECONDS = 5.0
#: Of a template's own text; those in use have some 30,000.
MOST_TEMPLATE_LETTERS = 300_000
#: Of one text and of all texts that are made; more for a long conversation.
_MOST_LETTERS, _LETTERS_FOR_EACH = 4_000_000, 20
_MOST_LETTERS_MADE, _LETTERS_MADE_FOR_EACH = 40_000_000, 400
_MOST_ENTRIES = 200_000
_LARGEST_NUMBER, _MOST_BITS = 100_000, 10_000

_FILTERS = frozenset({
    "abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e",
    "escape", "first", "float", "format", "groupby", "indent", "int", "items", "join", "last",
    "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string", "sum",
    "title", "tojson", "trim", "truncate", "unique", "upper", "urlencode", "wordcount"
})  # fmt: skip
_TEXT_METHODS = frozenset({
    "capitalize", "casefold", "center", "count", "endswith", "find", "format", "format_map",
    "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric",
    "isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition",
    "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title",
    "upper", "zfill"
})  # fmt: skip
# A width that a format asks for, and one that is itself filled in.
_WIDE = re.compile(r"%[-+ #0]*(\*|\d{4})|%[-+ #0\d]*\.(\*|\d{4})|\{[^{}]*(\{|[:.\d]\d{4})")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with a limit to each render."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        # The one place that knows how transformers makes its own.
        upstream = chat_template_utils._compile_jinja_template("").environment
        extensions = [type(extension) for extension in upstream.extensions.values()]
        # Unoptimised: nothing is computed while the template is only read.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False
        )
        self.filters = {
            name: self._checked_filter(name, function)
            for name, function in upstream.filters.items()
            if name in _FILTERS
        }
        self.tests = {name: self._checked_test(test) for name, test in upstream.tests.items()}
        self.globals = {k: v for k, v in upstream.globals.items() if k != "lipsum"}
        self._begin([])

    def render_within_limits(self, template: Template, context: Mapping[str, Any]) -> str:
        """What the template makes of `context`.

        Raises:
            UnsafeFileError: it takes more than a limit allows.
        """
        self._begin(context.values())
        return template.render(context)

    def _begin(self, given: Iterable[Any]) -> None:
        self._trusted: set[int] = set()
        self._steps, self._made = 0, 0
        self._until = time.monotonic() + MOST_SECONDS
        self._most_letters = _MOST_LETTERS
        self._most_made = _MOST_LETTERS_MADE
        values = list(given)
        letters = sum(self._weight(value, most=10**12)[1] for value in values)
        self._most_letters += _LETTERS_FOR_EACH * letters
        self._most_made += _LETTERS_MADE_FOR_EACH * letters
        # What was given is known to be of a size that fits.
        self._trusted = {id(value) for value in values}

    # ---- what is counted ------------------------------------------------------------------------

    def step(self, letters: int = 0) -> str:
        """One step, and the letters that it writes."""
        self._steps += 1
        self._made += letters
        if self._steps > MOST_STEPS:
            raise _too_much(f"takes more than {MOST_STEPS:,} steps")
        if self._made > self._most_made:
            raise _too_much(f"makes more than {self._most_made:,} characters")
        if time.monotonic() > self._until:
            raise _too_much(f"takes more than {MOST_SECONDS:.0f} seconds")
        return ""

    def weighed(self, value: Any) -> Any:
        """`value`, if it is not too large."""
        self._weight(value)
        return value

    def grown(self, value: Any) -> Any:
        """`value`, which is new."""
        self.step(self._weight(value)[1])
        return value

    def printed(self, value: Any) -> str:
        """`value` as it is written."""
        text = value if isinstance(value, str) else str(self.weighed(value))
        return str(self.grown(text))

    def joined(self, *values: Any) -> str:
        """What `~` gives."""
        texts = [value if isinstance(value, str) else str(self.weighed(value)) for value in values]
        self._room_for(sum(map(len, texts)))
        return str(self.grown("".join(texts)))

    def _weight(self, value: Any, *, most: int | None = None) -> tuple[int, int, int]:
        """Entries, letters and depth of a value, with what stands in it twice counted twice."""
        entries = letters = deepest = 0
        pending: list[tuple[Any, int]] = [(value, 1)]
        while pending:
            one, depth = pending.pop()
            entries += 1
            deepest = max(deepest, depth)
            if isinstance(one, str | bytes):
                letters += len(one)
            elif id(one) not in self._trusted:
                pending += [(inner, depth + 1) for inner in _inner(one)]
            if entries + len(pending) > (most or _MOST_ENTRIES):
                raise _too_much(f"makes more than {_MOST_ENTRIES:,} values")
            if letters > (most or self._most_letters):
                raise _too_much(f"makes a text of more than {self._most_letters:,} characters")
        return entries, letters, deepest

    def _room_for(self, letters: int) -> None:
        if letters > self._most_letters:
            raise _too_much(f"makes a text of more than {self._most_letters:,} characters")

    # ---- where it happens -----------------------------------------------------------------------

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        return super()._generate(_Counting(self).visit(source), *arguments, **options)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator between two values that fit, with a result that fits."""
        self.step()
        if operator == "*":
            self._check_product(left, right)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._room_for(len(left) + len(right))
        elif operator == "**":
            self._check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, [right])
        return self.grown(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a method, a macro or a function."""
        if isinstance(__obj, MethodType) and __obj.__self__ is __self:  # a count, put in by us
            return __obj(*args)
        __self.step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        given = [*args, *(v for k, v in kwargs.items() if not k.startswith("_"))]
        __self._check_arguments(given)
        if isinstance(owner, str | bytes | int | float):
            if not (isinstance(owner, str) and name in _TEXT_METHODS):
                raise _too_much(f"calls {type(owner).__name__}.{name}, which no template needs")
            if name == "join" and args:
                args = (list(args[0]),)
                __self._check_join(owner, args[0])
            if name == "replace" and len(args) > 1:
                __self._check_replace(owner, args[0], args[1])
        return __self.grown(ImmutableSandboxedEnvironment.call(__self, __context, __obj,
                                                               *args, **kwargs))  # fmt: skip

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, of which no field is wide."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        @wraps(inner)
        def checked(*args: Any, **kwargs: Any) -> str:
            self._check_format(str(value.__self__), [*args, *kwargs.values()])
            return str(inner(*args, **kwargs))

        return checked

    def _checked_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        place = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.step()
            before, value, given = args[:place], args[place], args[place + 1 :]
            self.weighed(value)
            self._check_arguments([*given, *kwargs.values()])
            if isinstance(value, Iterator) and name in ("join", "list", "sum", "tojson", "replace"):
                value = self.weighed(list(value))
            self._check_filter(name, value, [*given, *kwargs.values()])
            return self.grown(function(*before, value, *given, **kwargs))

        return checked

    def _checked_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.step()
            for value in (*args, *kwargs.values()):
                self.weighed(value)
            return function(*args, **kwargs)

        return checked

    # ---- what would grow ------------------------------------------------------------------------

    def _check_arguments(self, given: Sequence[Any]) -> None:
        for value in given:
            self._weight(value)
            if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
                raise _too_much(f"asks for {value:.3g} of something")

    def _check_filter(self, name: str, value: Any, given: Sequence[Any]) -> None:
        if name == "join":
            self._check_join(str(given[0]) if given else "", list(value))
        elif name == "replace" and len(given) > 1:
            self._check_replace(str(value), str(given[0]), str(given[1]))
        elif name == "indent":
            widths = [len(one) if isinstance(one, str) else int(one) for one in given] or [4]
            lines = str(value).count("\n") + 1
            self._room_for(len(str(value)) + lines * max(widths))
        elif name == "format":
            self._check_format(str(value), given)
        elif name == "tojson":
            entries, letters, depth = self._weight(value)
            wide = sum(
                len(str(o)) if isinstance(o, str | tuple | list) else int(o or 0) for o in given
            )
            self._room_for(6 * letters + entries * (8 + depth * wide))
        elif name == "sum" and not all(isinstance(one, str | int | float | None) for one in given):
            raise _too_much("adds up what are no numbers")

    def _check_join(self, separator: str, values: Sequence[Any]) -> None:
        self._room_for(self._weight(values)[1] + len(separator) * len(values))

    def _check_replace(self, text: str, old: str, new: str) -> None:
        self._room_for(len(text) + text.count(old) * len(new))

    def _check_format(self, pattern: str, given: Sequence[Any]) -> None:
        if _WIDE.search(pattern):
            raise _too_much("formats to a width that no prompt has")
        fields = pattern.count("%") + pattern.count("{")
        entries, letters, _ = self._weight(list(given))
        self._room_for(len(pattern) + fields * (letters + 8 * entries))

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise _too_much("computes a number of thousands of digits")
            return
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                entries, letters, _ = self._weight(value)
                self._room_for(max(letters, entries) * max(times, 0))

    def _check_power(self, base: Any, exponent: Any) -> None:
        if (
            isinstance(base, int)
            and isinstance(exponent, int)
            and base.bit_length() * abs(exponent) > _MOST_BITS
        ):
            raise _too_much("computes a number of thousands of digits")


class _Counting(NodeTransformer):
    """Puts the counts of a `BoundedEnvironment` into a template that was read."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self._environment = environment

    def _call(self, name: str, arguments: list[Any], node: nodes.Node) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
        call.set_lineno(node.lineno, override=False)
        call.set_environment(self._environment)
        return call

    def _with_step(self, node: Any) -> Any:
        """A body that may run many times: each time is a step, and writes its own text."""
        self.generic_visit(node)
        own = sum(
            len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData)
        )
        step = nodes.ExprStmt(self._call("step", [nodes.Const(own)], node))
        node.body = [step.set_lineno(node.lineno), *node.body]
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _with_step

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            one if isinstance(one, nodes.TemplateData) else self._call("printed", [one], node)
            for one in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("joined", list(node.nodes), node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = self._call("weighed", [node.expr], node)
        for operand in node.ops:
            operand.expr = self._call("weighed", [operand.expr], node)
        return node

    def _collection(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return self._call("grown", [node], node)

    visit_List = visit_Dict = visit_Tuple = _collection


def _inner(value: Any) -> Iterable[Any]:
    """What stands in a value."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, Namespace):
        return list(value._Namespace__attrs.values())
    return ()


def _too_much(what: str) -> UnsafeFileError:
    return UnsafeFileError(what)


@lru_cache(maxsize=16)
def compiled(template: str) -> tuple[BoundedEnvironment, Template]:
    """A template, ready to be rendered, with its environment.

    Raises:
        UnsafeFileError: it is longer than any template.
        jinja2.TemplateError: it is none.
    """
    if len(template) > MOST_TEMPLATE_LETTERS:
        raise _too_much(f"has {len(template):,} characters (at most {MOST_TEMPLATE_LETTERS:,})")
    environment = BoundedEnvironment()
    return environment, environment.from_string(template)


def variables(template: str) -> set[str]:
    """The names that a template reads and does not set.

    Raises:
        UnsafeFileError, jinja2.TemplateError: as `compiled`.
    """
    environment, _ = compiled(template)
    return set(find_undeclared_variables(environment.parse(template)))


def render(template: str, context: Mapping[str, Any]) -> str:
    """A chat template's text for `context`, as transformers makes it.

    Args:
        template: Jinja source.
        context: `messages`, `add_generation_prompt` and whatever else it reads.

    Raises:
        UnsafeFileError: it takes more time or memory than any template needs.
        Exception: whatever else a program may raise.
    """
    environment, program = compiled(template)
    return environment.render_within_limits(program, context)
