"""Chat templates that would hang a process or fill its memory, as an adapter may bring them."""

from __future__ import annotations

import random

_DOUBLED = (
    "{% set n = namespace(x=START) %}{% for i in range(40) %}{% set n.x = STEP %}{% endfor %}"
)


def _doubled(start: str, step: str) -> str:
    return _DOUBLED.replace("START", start).replace("STEP", step) + "{{ n.x }}"


LOOP = "{% for a in range(100000) %}"
#: Each refused within the limits.
ENDLESS = {
    "loops in loops": LOOP * 3 + "{% endfor %}" * 3,
    "a loop that writes": LOOP + "A" * 10_000 + "{% endfor %}",
    "a loop over slow filters": LOOP + "{{ range(100000)|sort|length }}{% endfor %}",
    "a filtered loop": LOOP + "{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "a macro twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a caller": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + LOOP
    + "{% call m() %}{% for j in range(100000) %}x{% endfor %}{% endcall %}{% endfor %}",
    "multiplied": "{{ 'x' * 10**9 }}",
    "multiplied from the right": "{{ 1000000000 * 'x' }}",
    "a list multiplied": "{{ ([1] * 1000000000)|length }}",
    "doubled by ~": _doubled("'xxxx'", "n.x ~ n.x"),
    "doubled by +": _doubled("'xxxx'", "n.x + n.x"),
    "lists doubled by +": _doubled("[1]", "n.x + n.x"),
    "doubled by join": _doubled("'xxxx'", "[n.x, n.x]|join"),
    "doubled by a method": _doubled("'xxxx'", "n.x.join(['', n.x, ''])"),
    "doubled by replace": _doubled("'xx'", "n.x|replace('x', 'xx')"),
    "doubled by format": _doubled("'xxxx'", "'%s%s' % (n.x, n.x)"),
    "doubled by str.format": _doubled("'xxxx'", "'{0}{0}'.format(n.x)"),
    "a block doubled": "{% set n = namespace(x='xxxx') %}{% for i in range(40) %}{% set y %}"
    "{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "nested lists": _doubled("['x']", "[n.x, n.x]"),
    "nested dictionaries": _doubled("{}", "{'a': n.x, 'b': n.x}"),
    "hashes of nested tuples": _doubled("('x',)", "(n.x, n.x)").replace("n.x }}", "{n.x: 1} }}"),
    "a namespace in itself": "{% set n = namespace(x=1) %}{% set n.x = n %}{{ n }}",
    "a power": "{{ 10 ** 1000000000 }}",
    "squares": _doubled("9", "n.x * n.x"),
    "centred": "{{ 'x'.center(10**9) }}",
    "centred by a filter": "{{ 'x'|center(1000000000) }}",
    "centred by map": "{{ ['x']|map('center', 1000000000)|list }}",
    "a method by its name": "{{ ('x'|attr('ljust'))(1000000000) }}",
    "filled with zeros": "{{ 'x'['zfill'](1000000000) }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a format as wide as told": "{{ '%*d' % (1000000000, 1) }}",
    "a precise format": "{{ '%.1000000000f'|format(1.5) }}",
    "a wide str.format": "{{ '{:1000000000}'.format(1) }}",
    "a nested str.format": "{{ '{:{w}}'.format(1, w='1000000000') }}",
    "indented": "{{ ('\\n' * 1000000)|indent(100000) }}",
    "JSON indented": "{{ range(100000)|list|tojson(indent=50000) }}",
    "joined": "{{ range(100000)|join('x' * 1000000) }}",
    "replaced": "{{ ('x' * 100000).replace('', 'y' * 100000) }}",
    "tabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "translated": "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "a batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "rounded": "{{ 1|round(1000000000, 'ceil') }}",
    "compared": _doubled("['x']", "[n.x, n.x]").replace("n.x }}", "n.x == n.x }}"),
    "larger than any": "x" * 400_000,
}
#: A program that is refused for another reason, or does nothing.
OTHER = (
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "+".join("1" * 20_000) + " }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{{ raise_exception('x' * 3000000) }}",
    "{{ lipsum(n=1000) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__ }}",
)


def hostile_template(random_: random.Random) -> str:
    """One of them, alone or where only some conversations reach it."""
    chosen = random_.choice([*ENDLESS.values(), *OTHER])
    wrapped = random_.choice(
        ("{}", "{{% if messages|length > 1 %}}{}{{% endif %}}ok", "{{% set x %}}{}{{% endset %}}ok")
    )
    return wrapped.format(chosen) if len(chosen) < 1000 else chosen
