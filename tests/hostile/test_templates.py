# ruff: noqa: E501, RUF001  a template is a row, as it is
"""Chat templates: walks to Python's internals in many spellings, and what real templates do."""

from __future__ import annotations

import pytest

from mmdefense.scanning.templates import MAX_TEMPLATE, scan_template

HIGH = {
    "plain walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id') }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "self": "{{ self._TemplateReference__context.cycler }}",
    "the module of the loop": "{% for x in [1] %}{{ loop.__class__ }}{% endfor %}",
    "frame of a generator": "{{ (messages | select).gi_frame.f_builtins }}",
    "subscript": "{{ ''['__class__'] }}",
    "tilde": "{{ ''['__cla' ~ 'ss__'] }}",
    "plus": "{{ ''['__cla' + 'ss__'] }}",
    "implicit concatenation": "{{ ''['__cla' 'ss__'] }}",
    "percent": "{{ ''['%sclass%s' % ('__', '__')] }}",
    "format filter": "{{ ''['%sclass%s' | format('__', '__')] }}",
    "a number as a letter": "{{ ''['%c%cclass%c%c' | format(95, 95, 95, 95)] }}",
    "format method": "{{ ''['{0}{0}class{0}{0}'.format('_')] }}",
    "join": "{{ ''[['__cla', 'ss__'] | join] }}",
    "join method": "{{ ''[''.join(['__cla', 'ss__'])] }}",
    "sum": "{{ ''[['__cla', 'ss__'] | sum(start='')] }}",
    "reverse": "{{ ''['__ssalc__' | reverse] }}",
    "slice": "{{ ''['__ssalc__'[::-1]] }}",
    "replace": "{{ ''['xxclassxx' | replace('x', '_')] }}",
    "replace method": "{{ ''['xxclassxx'.replace('x', '_')] }}",
    "lower": "{{ ''['__CLASS__' | lower] }}",
    "lower method": "{{ ''['__CLASS__'.lower()] }}",
    "hex": r"{{ ''['\x5f\x5fclass\x5f\x5f'] }}",
    "unicode": r"{{ ''['\u005f\u005fclass\u005f\u005f'] }}",
    "attr": "{{ '' | attr('__class__') }}",
    "attr of pieces": "{{ '' | attr('__cla' ~ 'ss__') }}",
    "map attr": "{{ [''] | map('attr', '__class__') | list }}",
    "map attribute": "{{ [''] | map(attribute='__class__') | list }}",
    "map attribute of pieces": "{{ [''] | map(attribute=['__class', '__'] | join) | list }}",
    "sort": "{{ [''] | sort(attribute='__class__.__mro__') }}",
    "groupby": "{{ [''] | groupby('__class__') }}",
    "selectattr": "{{ [''] | selectattr('__class__') | list }}",
    "max": "{{ [''] | max(attribute='__class__') }}",
    "set": "{% set a = '__cla' %}{% set b = a ~ 'ss__' %}{{ ''[b] }}",
    "set block": "{% set a %}__cla{% endset %}{{ ''[a ~ 'ss__'] }}",
    "namespace": "{% set ns = namespace(a='__cla') %}{{ ''[ns.a ~ 'ss__'] }}",
    "set of a namespace": "{% set ns = namespace() %}{% set ns.a = '__class__' %}{{ ''[ns.a] }}",
    "map of names": "{% set d = {'a': '__cla', 'b': 'ss__'} %}{{ ''[d.a ~ d['b']] }}",
    "loop over names": "{% for k in ['__class__', '__mro__'] %}{{ ''[k] }}{% endfor %}",
    "argument of a macro": "{% macro f(k) %}{{ ''[k] }}{% endmacro %}{{ f('__class__') }}",
    "default of a macro": "{% macro f(k='__class__') %}{{ ''[k] }}{% endmacro %}{{ f() }}",
    "globals of a caller": "{% macro f() %}{{ caller.__globals__ }}{% endmacro %}",
    "keyword": "{{ dict(__class__=1) | list | first }}",
    "format walk": "{{ '{0.__class__}'.format(messages) }}",
    "format walk by an item": "{{ '{0[__globals__]}'.format(messages) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% from 'x' import y %}",
    "call of popen": "{{ x.popen('id') }}",
    "cut off": "{{ ''.__class__",
}
MEDIUM = {
    "letters of an object": "{{ ''[(lipsum_ | string)[3] ~ x] }}",
    "letters of a generator": "{% set u = (() | select | string | list)[24] %}{{ ''[u ~ u ~ 'a'] }}",
    "letters of what is given": "{% set s = messages | string %}{{ ''[s[3] + s[4]] }}",
    "pieces of a date": "{{ ''[strftime_now('__cla') ~ 'ss__'] }}",
    "pieces of a joiner": "{% set j = joiner('__cla') %}{{ j() }}{{ ''[j() ~ 'ss__'] }}",
    "pieces of a cycler": "{{ ''[cycler('__cla').next() ~ 'ss__'] }}",
    "batch": "{{ ''['__ssalc__' | batch(9) | first | reverse | join] }}",
    "entities": "{{ ''['&#95;&#95;&#99;' | striptags] }}",
    "map of map": "{{ [['']] | map('map', 'attr', x) | list }}",
    "spread arguments": "{{ [''] | map(**messages) | list }}",
    "text of a macro": "{% macro f() %}x{{ y }}{% endmacro %}{{ ''[f()] }}",
    "concatenated with what is given": "{{ ''[messages ~ 'class'] }}",
    "attr of what is given": "{{ '' | attr(messages) }}",
    "filter by name": "{{ [''] | map(messages) | list }}",
    "format of what is given": "{{ messages.format(x) }}",
    "call of a result": "{{ x.get('y')() }}",
    "call of an item by a name": "{{ x[messages ~ 'a']() }}",
    "unknown function": "{{ run_this('id') }}",
    "unknown method": "{{ x.write('id') }}",
    "unknown filter": "{{ x | shell }}",
    "no Jinja": "{% if %}{{ }}",
    "a tag of another reader": "{% frobnicate %}",
}
CHATML = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system_message = messages[0]['content'].strip() + '\\n\\n' %}{% else %}"
    "{% set rest = messages %}{% set system_message = '' %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 %}{% set content = system_message + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{{ '[INST] ' ~ content | trim ~ ' [/INST]' }}"
    "{% endfor %}"
)
TOOLS = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- set ns = namespace(found=false, last=messages | length - 1, calls=[]) %}"
    "{%- if tools is not none %}{%- for tool in tools | map(attribute='function') | list %}"
    "{{ tool | tojson(indent=4) }}{{ ', ' if not loop.last }}{%- endfor %}{%- endif %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages | length - 1) - loop.index0 %}"
    "{%- if message.role == 'user' and message.content is string and not (message.content"
    ".startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}"
    "{%- set ns.last = index %}{%- break %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if 'tool_calls' in message and message['tool_calls'] %}"
    "{%- for call in message.tool_calls %}{%- set call = call.function if call.function else call %}"
    "{{- '<tool_call>' ~ call.name }}{% set _args = call.arguments or {} %}"
    "{% for key, value in _args | items %}{{ key }}={{ value | tojson(ensure_ascii=False) if value "
    "is not string else value }}{% endfor %}{%- if call.id is not defined or call.id | length != 9 %}"
    "{{- raise_exception('ids have nine letters') }}{%- endif %}{%- set _ = ns.calls.append(call.id) %}"
    "{%- endfor %}{%- elif messages[loop.index0 - 1].role != 'tool' %}"
    "{{- message.content.split('</think>')[-1].lstrip('\\n') }}{%- endif %}{%- endfor %}"
    "{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n') }}"
)
SCHEMA = (
    "{%- macro kind(schema, root=none) -%}{%- set ns = namespace(node=root, parts=[]) -%}"
    "{%- if schema.get('$ref') is string -%}{%- for raw in schema['$ref'][2:].split('/') -%}"
    "{%- set part = raw | replace('~1', '/') | replace('~0', '~') -%}"
    "{%- if ns.node is mapping and part in ns.node -%}{%- set ns.node = ns.node[part] -%}"
    "{%- endif -%}{%- endfor -%}{%- elif schema.type is sequence and schema.type is not string -%}"
    "{%- for item in schema.anyOf -%}{%- set ns.parts = ns.parts + ['(' ~ kind(item) ~ ')'] -%}"
    "{%- endfor -%}{{ ns.parts | join(' | ') }}{%- else -%}"
    "{%- for key, value in schema.properties | dictsort -%}{%- if key not in ['type', 'nullable'] -%}"
    "{{ key }}:{{ schema.properties[key] }}{{ value['type'] | upper }}{%- endif -%}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}{% call(x) kind(tools[0]) %}{{ caller }}{% endcall %}"
)
BENIGN = {
    "ChatML": CHATML,
    "alternating turns": TURNS,
    "tool use": TOOLS,
    "schema": SCHEMA,
    "system prompt": "{% set system_prompt = messages[0].system_prompt %}{{ system_prompt | trim }}",
    "names like those of Python": "{{ message.system }}{{ item.base }}{{ item.init }}{{ x.imports }}",
    "joiner": "{% set comma = joiner(', ') %}{% for t in tools %}{{ comma() }}{{ t }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "marks of the tokenizer": "{{ '<|begin_of_text|>' }}{{ '<｜User｜>' }}{{ '[gMASK]<sop>' }}",
    "JSON in a text": "{{ '{\"name\": <function-name>, \"arguments\": <args>}' }}{{ \"{{}}\" }}",
    "instructions": "{{ 'Write Python classes with an __init__ method and a docstring.' }}",
    "text around": "Use __init__ as usual. import os; {{ messages[0].content }}",
    "format with a field": "{{ 'Today is {}.'.format(strftime_now('%Y')) }}{{ '%d' | format(3) }}",
    "dates": "{{ strftime_now('%d %B %Y') }}{{ today.strftime('%A') }}",
    "a map of names": "{% set names = {'user': 'U', 'assistant': 'A'} %}{{ names[message.role] }}",
    "list methods": "{% set seen = [] %}{% if x not in seen %}{{ seen.append(x) or '' }}{% endif %}",
    "numbers": "{{ messages[(messages | length) - 1] }}{{ x[i * 2 + 1] }}{{ range(0, 10)[3] }}",
    "last part of a text": "{{ message.content.split('</think>')[-1] }}{{ (x.split('.') | last) }}",
    "private keys of data": "{{ call.get('_json_block') }}{% set _args = call.arguments %}{{ _args }}",
    "a mark with underlines": "{{ '<__media__>' }}{{ '__END__' }}",
    "fields of tools": "{% for tool in tools | map(attribute='function') %}{% for key, value in "
    "tool.parameters.items() %}{{ tool.parameters[key] }}{% endfor %}{% endfor %}",
    "ids as text": "{% if ids[call.id | string] is defined %}{{ ids[call.id | string] }}{% endif %}",
    "recursive loop": "{% for x in t recursive %}{{ loop(x.children) }}{% endfor %}",
}  # fmt: skip


def levels(template):
    return {found.level for found in scan_template(template, "x")}


@pytest.mark.parametrize("name", HIGH)
def test_a_walk_to_the_internals_is_high(name):
    assert "high" in levels(HIGH[name])


@pytest.mark.parametrize("name", MEDIUM)
def test_what_formatting_has_no_use_for_is_medium(name):
    assert levels(MEDIUM[name]) & {"medium", "high"}


@pytest.mark.parametrize("name", BENIGN)
def test_what_real_templates_do_is_no_finding(name):
    assert levels(BENIGN[name]) == set()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("x" * (MAX_TEMPLATE + 1), "not inspected"),
        ("{{ a }}" * (MAX_TEMPLATE // 8), ""),
        ("{{ " + "(" * 100_000, "unreadable"),
        ("{{ a" + " + a" * 60_000 + " }}", "unreadable"),
        ("{{ ''['a' * 1000000000] }}", ""),
        ("{{ ''['%1000000000d' % 1] }}{{ '{:1000000000}'.format(1) }}", ""),
        ("{% set a = 'xx' %}" + "{% set a = a ~ a %}" * 2000 + "{{ a[a] }}", "unusual"),
        (
            "{% set l = [" + "'a'," * 40 + "] %}" + "{{ x[l | join ~ l[i] ~ l[j] ~ l[k]] }}" * 200,
            "",
        ),
    ],
    ids=["long", "many", "deep brackets", "deep sum", "times", "width", "doubling", "product"],
)
def test_a_template_that_is_meant_to_exhaust_ends_soon(template, words):
    assert words in str([(found.id, found.value) for found in scan_template(template, "x")])
