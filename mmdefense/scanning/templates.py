"""Find what a chat template does beyond formatting, from its syntax tree, without rendering.

What formatting needs is listed, and everything else is a finding. The list has attributes without a
leading underscore, the filters and tests of Jinja, methods of texts, lists and maps, macros, and a
few functions. Names that are assembled from pieces are recognised; see
:mod:`mmdefense.scanning.template_values`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from mmdefense.findings import Finding, Level, Rule

if TYPE_CHECKING:
    from jinja2 import Environment, nodes

    from mmdefense.scanning.template_values import Values

__all__ = ["MAX_TEMPLATE", "scan_template"]

TEMPLATE = Rule(
    id="template-escape",
    level="high",
    measured="attributes, calls, names and tags in a chat template",
    reference="what formatting messages needs",
    meaning="It reaches for Python's internals; rendered without a sandbox, it runs code.",
    blind_spot="what it writes into the prompt, such as hidden instructions.",
)
UNUSUAL = Rule(
    id="template-unusual",
    level="medium",
    measured=TEMPLATE.measured,
    reference=TEMPLATE.reference,
    meaning="Chat templates have no use for it, and it is how access to Python's internals is "
    "hidden.",
    blind_spot=TEMPLATE.blind_spot,
)
UNPARSED = Rule(
    id="template-unreadable",
    level="medium",
    measured="whether the template can be parsed",
    reference="Jinja, with the tags of Transformers",
    meaning="It is damaged, or written for a reader that this scan does not know.",
    blind_spot="its content.",
)

MAX_TEMPLATE = 1 << 18
"""Most characters of a template to parse; the longest in known models has 50,000. Our choice."""
_MOST = 20

_METHODS = {
    *("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "startswith", "endswith"),
    *("lower", "upper", "title", "capitalize", "swapcase", "casefold", "replace", "join", "find"),
    *("rfind", "index", "rindex", "count", "removeprefix", "removesuffix", "partition"),
    *("rpartition", "zfill", "ljust", "rjust", "center", "isdigit", "isnumeric", "isdecimal"),
    *("isalpha", "isalnum", "isspace", "isupper", "islower", "istitle", "isidentifier"),
    *("expandtabs", "format", "get", "items", "keys", "values", "pop", "append", "extend"),
    *("insert", "remove", "update", "setdefault", "copy", "sort", "reverse", "clear", "fromkeys"),
    *("cycle", "changed", "strftime", "isoformat", "union", "add", "next", "reset"),
}
_FUNCTIONS = {
    *("raise_exception", "strftime_now", "namespace", "range", "dict", "joiner", "cycler"),
    *("caller", "loop"),
}
_INTERNAL = {
    *("mro", "subclasses", "builtins", "func_globals", "func_code", "func_closure", "gi_frame"),
    *("gi_code", "gi_yieldfrom", "f_globals", "f_locals", "f_builtins", "f_back", "f_code"),
    *("cr_frame", "cr_code", "cr_await", "ag_frame", "ag_code", "tb_frame", "tb_next", "co_code"),
    *("co_consts", "import_module", "load_module", "popen", "im_func", "im_self", "im_class"),
}
_RUNS = {
    *("system", "popen", "eval", "exec", "execfile", "compile", "open", "getattr", "setattr"),
    *("globals", "locals", "vars", "import_string", "import_module", "load_module", "spawn"),
    *("check_output", "getoutput", "call", "run", "Popen", "read_text", "write_text"),
    *("from_string", "get_template", "format_map"),
}
_OBJECTS = {"self", "lipsum", "os", "sys", "subprocess", "importlib", "builtins"}
_OF_WEB_SERVERS = {"request", "url_for", "get_flashed_messages"}
_CALLED_ONLY = {"joiner", "cycler", "namespace", "range", "dict", "raise_exception", "strftime_now"}
_ATTRIBUTE_FILTERS = {"sort", "groupby", "unique", "min", "max", "sum", "map"}
_APPLYING = {"attr", "map", "select", "reject", "selectattr", "rejectattr", "groupby"}
_NAME_FILTERS = {"selectattr", "rejectattr"}
_NAMES = (
    "class|bases?|mro|subclasses|globals|builtins|import|init|dict|getattribute|getattr|getitem|"
    "code|closure|func|self|call|module|loader|spec|reduce|reduce_ex|new|wrapped|traceback|"
    "qualname|context|subclasshook|init_subclass|mro_entries|kwdefaults|defaults"
)
_WALK = re.compile(rf"__({_NAMES})__|\\x5f|\\u005f|\{{[^{{}}]*(\.|\[)_")

_Found = tuple[Rule, Level, str]


def scan_template(template: str, subject: str, *, is_template: bool = True) -> Iterator[Finding]:
    """Yield what a Jinja template contains beyond the needs of formatting messages.

    Args:
        template: Its text.
        subject: Where it was found.
        is_template: Whether it is known to be one. In another text, which may contain braces, only
            access to Python's internals is reported.

    References:
        The sandbox of Jinja2 refuses attributes that start with an underscore; so does this,
        without rendering.
    """
    if len(template) > MAX_TEMPLATE:
        if not is_template and not _WALK.search(template):
            return
        yield UNPARSED.found(subject, f"not inspected: a template of {len(template)} characters")
        return
    from jinja2 import TemplateError

    try:
        found = list(dict.fromkeys(_scan(_environment().parse(template))))
    except (TemplateError, RecursionError, ValueError) as error:
        walk = _WALK.search(template)
        if walk:
            yield TEMPLATE.found(subject, f"{walk[0]} in a template that cannot be parsed")
        elif is_template:
            yield UNPARSED.found(subject, type(error).__name__)
        return
    if not is_template:
        found = [item for item in found if item[1] == "high"]
    found.sort(key=lambda item: (item[1] != "high", item[2]))
    for rule, level, text in islice(found, _MOST):
        yield rule.found(subject, text, level=level)


@cache
def _environment() -> Environment:
    """Return Jinja with the tags that Transformers adds to the language."""
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """Parses ``{% generation %}``, which marks the model's own text."""

        tags = {"generation"}  # noqa: RUF012  that is how Jinja declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    extensions: list[str | type[Extension]] = [
        "jinja2.ext.loopcontrols",
        "jinja2.ext.do",
        Generation,
    ]
    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)


def _scan(tree: nodes.Template) -> Iterator[_Found]:
    from jinja2 import nodes

    from mmdefense.scanning.template_values import Values

    values = Values(tree)
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    for node in tree.find_all(nodes.Node):
        yield from _tag(node)
        if isinstance(node, nodes.Name):
            yield from _name(node, values, is_called=id(node) in called)
        elif isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice):
            yield from _keys(values.of(node.arg), "looks up a name that it assembles")
        elif isinstance(node, nodes.Call):
            yield from _call(node, values)
        elif isinstance(node, (nodes.Filter, nodes.Test)):
            yield from _filter(node, values)
        if isinstance(node, nodes.Expr):
            yield from _texts(values.of(node))


def _tag(node: nodes.Node) -> Iterator[_Found]:
    """Yield the findings on a part of a template that do not depend on its values."""
    from jinja2 import nodes

    if isinstance(node, (nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport)):
        yield TEMPLATE, "high", type(node).__name__.lower()
    elif isinstance(node, nodes.Getattr):
        yield from _key(node.attr)
    elif isinstance(node, (nodes.Macro, nodes.Block)):
        yield from _own_name(node.name)
    elif isinstance(node, nodes.Keyword):
        yield from _own_name(node.key)
    elif getattr(node, "dyn_args", None) or getattr(node, "dyn_kwargs", None):
        yield UNUSUAL, "medium", "passes on arguments that it assembles"


def _key(name: str) -> Iterator[_Found]:
    """Yield a finding on an attribute that plain data does not have."""
    if name.startswith("_") or name in _INTERNAL:
        yield TEMPLATE, "high", name


def _keys(found: Sequence[Any], what: str) -> Iterator[_Found]:
    """Yield the findings on the values of a key, which Jinja looks up as an attribute too."""
    from mmdefense.scanning.template_values import MADE

    for value in found:
        if value is MADE:
            yield UNUSUAL, "medium", what
        elif isinstance(value, str) and (value.startswith("__") or value in _INTERNAL):
            yield TEMPLATE, "high", value


def _texts(found: Sequence[Any]) -> Iterator[_Found]:
    """Yield the texts that are names of Python's internals, assembled or not."""
    for value in found:
        if isinstance(value, str) and (walk := _WALK.search(value)) and not _is_prose(value):
            yield TEMPLATE, "high", walk[0]


def _is_prose(text: str) -> bool:
    return len(text) > 200 or len(text.split()) > 3


def _own_name(name: str) -> Iterator[_Found]:
    if name.startswith("__"):
        yield TEMPLATE, "high", name


def _name(node: nodes.Name, values: Values, *, is_called: bool) -> Iterator[_Found]:
    yield from _own_name(node.name)
    if node.ctx != "load" or node.name in values.names:
        return
    if node.name in _OBJECTS or (node.name in _CALLED_ONLY and not is_called):
        yield TEMPLATE, "high", node.name
    elif node.name in _OF_WEB_SERVERS:
        yield UNUSUAL, "medium", node.name


def _call(node: nodes.Call, values: Values) -> Iterator[_Found]:
    """Yield the calls that formatting does not need."""
    from jinja2 import nodes

    called = node.node
    if isinstance(called, nodes.Name):
        if called.name in _RUNS - values.names:
            yield TEMPLATE, "high", f"{called.name}()"
        elif called.name not in _FUNCTIONS | values.names:
            yield UNUSUAL, "medium", f"{called.name}()"
    elif isinstance(called, nodes.Getattr):
        yield from _method(called.attr, called.node, values)
    elif isinstance(called, nodes.Getitem) and not isinstance(called.arg, nodes.Slice):
        for name in values.of(called.arg):
            yield from _method(name, called.node, values)
    else:
        yield UNUSUAL, "medium", "calls the result of an expression"


def _method(name: Any, of: nodes.Node, values: Values) -> Iterator[_Found]:
    if name in _RUNS:
        yield TEMPLATE, "high", f"{name}()"
    elif name not in _METHODS:
        what = f"{name}()" if isinstance(name, str) else "calls by a name that it looks up"
        yield UNUSUAL, "medium", what
    elif name == "format":
        yield from _format(values.of(of))


def _format(found: Sequence[Any]) -> Iterator[_Found]:
    """Yield the fields of ``str.format`` that follow attributes, or are unknown."""
    from mmdefense.scanning.template_values import is_plain_format

    for value in found:
        if isinstance(value, str) and not is_plain_format(value):
            level: Level = "high" if "_" in value else "medium"
            yield (TEMPLATE if level == "high" else UNUSUAL), level, f"format of {value:.80}"
        elif not isinstance(value, str):
            yield UNUSUAL, "medium", "format() of an unknown string"


def _filter(node: nodes.Filter | nodes.Test, values: Values) -> Iterator[_Found]:
    """Yield the findings on a filter or test that is not Jinja's or reads unusual attributes."""
    from jinja2 import nodes
    from jinja2.filters import FILTERS
    from jinja2.tests import TESTS

    if node.name not in (FILTERS if isinstance(node, nodes.Filter) else TESTS):
        yield (
            UNUSUAL,
            "medium",
            f"the {'filter' if isinstance(node, nodes.Filter) else 'test'} {node.name}",
        )
    named = {str(keyword.key): keyword.value for keyword in node.kwargs}
    looked_up = []
    if node.name == "attr":
        yield UNUSUAL, "medium", "the filter attr"
        looked_up = node.args[:1] or list(named.values())
    elif node.name in _NAME_FILTERS:
        looked_up = node.args[:1]
        yield from _applied(values, node.args[1:2], "test")
    elif node.name in _ATTRIBUTE_FILTERS:
        positions = {"sort": slice(2, 3), "unique": slice(1, 2), "map": slice(0, 0)}
        looked_up = node.args[positions.get(node.name, slice(0, 2))]
        looked_up += [named["attribute"]] if "attribute" in named else []
    if node.name == "map":
        yield from _mapped(node, values)
    if node.name in {"select", "reject"}:
        yield from _applied(values, node.args[:1], "test")
    for argument in looked_up:
        yield from _path(values.of(argument))


def _path(found: Sequence[Any]) -> Iterator[_Found]:
    """Yield the findings on a dotted path of attributes that a filter follows."""
    for value in found:
        if isinstance(value, str):
            for part in re.split(r"[.,]", value):
                yield from _key(part.strip())
        elif value is not None and not isinstance(value, (int, bool)):
            yield UNUSUAL, "medium", "a filter follows an attribute by a name that it looks up"


def _mapped(node: nodes.Filter | nodes.Test, values: Values) -> Iterator[_Found]:
    yield from _applied(values, node.args[:1], "filter")
    applied = (
        [value for value in values.of(node.args[0]) if value in _APPLYING] if node.args else []
    )
    for name in applied:
        yield UNUSUAL, "medium", f"applies the filter {name} to each"
    if applied:
        for argument in node.args[1:2]:
            yield from _path(values.of(argument))


def _applied(values: Values, arguments: Sequence[nodes.Node], kind: str) -> Iterator[_Found]:
    """Yield a finding if a filter applies a filter or test of an unknown name."""
    from jinja2.filters import FILTERS
    from jinja2.tests import TESTS

    known = FILTERS if kind == "filter" else TESTS
    for value in (value for argument in arguments for value in values.of(argument)):
        if not isinstance(value, str):
            yield UNUSUAL, "medium", f"applies a {kind} by a name that it looks up"
        elif value not in known:
            yield UNUSUAL, "medium", f"the {kind} {value:.40}"
