"""Chat templates in the shapes that model families use, written for these tests.

Each tells whether it marks what the assistant generates, whether masks can be
found from prefixes, and which conversations it takes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """One template and what is true of it."""

    name: str
    source: str
    prefixes: bool = True
    """Rendering more turns only adds text."""
    system: bool = True
    tools: bool = True
    """Takes tool calls and tool results."""

    @property
    def marked(self) -> bool:
        return "{% generation %}" in self.source or "{%- generation %}" in self.source


CHATML = Shape(
    "chatml",
    """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
)

CHATML_MARKED = Shape(
    "chatml-marked",
    """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content }}
            {%- for call in message.tool_calls or [] %}
                {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
)

ALPACA = Shape(
    "alpaca",
    """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{{ message['content'] | trim }}

{% elif message['role'] == 'user' %}
### Instruction:
{{ message['content'] | trim }}

{% elif message['role'] == 'tool' %}
### Input:
{{ message['content'] }}

{% elif message['role'] == 'assistant' %}
### Response:
{{ message['content'] + eos_token + '\n\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
### Response:
{% endif %}""",
)

LLAMA2 = Shape(
    "llama2-inst",
    """{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}
{%- else %}{% set turns = messages %}{% set system = false %}{% endif %}
{%- for message in turns %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if loop.index0 == 0 and system != false %}
{%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}
{%- else %}{% set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}
{%- endif %}{% endfor %}""",
    tools=False,
)

MISTRAL = Shape(
    "mistral-tools",
    """{%- set ns = namespace(system='', last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- set ns.system = m.content + '\n\n' %}
        {%- continue %}
    {%- elif m.role == 'user' %}
        {%- if loop.index0 == ns.last and tools is not none %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + ns.system + m.content + '[/INST]' }}
        {%- set ns.system = '' %}
    {%- elif m.tool_calls is defined %}
        {{- '[TOOL_CALLS] ' }}
        {%- for call in m.tool_calls %}
            {{- call.function | tojson(indent=2, separators=(', ', ': '), sort_keys=true) }}
            {%- if call.id is defined and call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be nine characters long') }}
            {%- endif %}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + {'content': m.content} | tojson(ensure_ascii=true) + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}""",
    prefixes=False,  # tools stand before the last user turn only
)

PHI = Shape(
    "phi",
    """{% for message in messages %}{% if message['role'] in ['user', 'tool'] %}{{ '<|user|>
' + message['content'] + '<|end|>
' }}{% elif message['role'] == 'system' %}{{ '<|system|>
' + message['content'] + '<|end|>
' }}{% else %}{{ '<|assistant|>
' }}{% generation %}{{ message['content'] + '<|end|>
' }}{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% endif %}""",
)

VICUNA = Shape(
    "vicuna",
    """{%- if messages[0]['role'] == 'system' -%}
    {{ messages[0]['content'] + ' ' }}{% set rest = messages[1:] -%}
{%- else -%}
    {{ 'A chat between a curious user and an assistant. ' }}{% set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + ' ' }}
    {%- elif message['role'] == 'tool' -%}{{ 'TOOL: ' + message['content'] + ' ' }}
    {%- else -%}{{ 'ASSISTANT:' }}{{ ' ' + message['content'] + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}""",
)

LLAMA3 = Shape(
    "llama3-date",
    """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + "}" + '<|eot_id|>' }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
)

QWEN = Shape(
    "qwen-tools",
    """{%- macro header(role) %}{{ '<|im_start|>' ~ role ~ '\n' }}{% endmacro %}
{%- if tools %}
    {{- header('system') }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content ~ '\n\n' }}{%- endif %}
    {{- '# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- header('system') ~ messages[0].content ~ '<|im_end|>\n' }}
{%- else %}
    {{- header('system') ~ 'You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- header(message.role) ~ message.content ~ '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- header('assistant') }}
        {%- generation %}
            {%- if message.content %}{{- message.content }}{%- endif %}
            {%- for call in message.tool_calls or [] %}
                {{- '\n<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
                {{- call.function.arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' ~ message.content ~ '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- header('assistant') }}{%- endif %}
""",
)

GEMMA = Shape(
    "gemma-no-system",
    """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' }}
{%- if role == 'model' %}{% generation %}{{ message['content'] | trim + '<end_of_turn>\n' }}{% endgeneration %}
{%- else %}{{ message['content'] | trim + '<end_of_turn>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    system=False,
)

ZEPHYR = Shape(
    "zephyr-break",
    """{% for message in messages %}
{% if message['role'] == 'stop' %}{% break %}{% endif %}
<|{{ message['role'] }}|>
{{ message['content'] }}{{ eos_token }}

{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
""",
)

THINKING = Shape(
    "thinking-cut",
    """{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and not loop.last and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
)

INDENTED = Shape(
    "indented-blocks",
    """{% for message in messages %}
    {% if message.role == 'user' %}
Human: {{ message.content }}
    {% elif message.role == 'assistant' %}
        {# a comment that leaves no blank #}
Robot: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

    {% else %}
{{ message.role | title }}: {{ message.content | replace('\n', ' ') }}
    {% endif %}
{% endfor %}
    {%+ if add_generation_prompt %}Robot: {% endif %}
""",
)

ALL = (
    CHATML,
    CHATML_MARKED,
    ALPACA,
    LLAMA2,
    MISTRAL,
    PHI,
    VICUNA,
    LLAMA3,
    QWEN,
    GEMMA,
    ZEPHYR,
    THINKING,
    INDENTED,
)
