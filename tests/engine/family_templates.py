"""A chat template for each architecture, written for these tests: the special tokens are those of its checkpoints, and
of Jinja they use what templates of that kind ask for."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["TEMPLATES"]

LLAMA = r"""
{%- macro turn(role) %}
{{- "<|start_header_id|>" ~ role ~ "<|end_header_id|>\n\n" ~ caller() }}<|eot_id|>
{%- endmacro %}
{%- set has_system = messages[0].role in ("system", "developer") %}
{{- bos_token }}
{%- call turn("system") -%}
    It is {{ day if day is defined else strftime_now("%d %b %Y") }}.
    {%- for tool in tools or () %}{{ "\n\n" ~ tool | tojson(indent=4) }}{% endfor %}
    {{- messages[0]["content"] | trim if has_system }}
{%- endcall %}
{%- for m in messages[has_system | int:] %}
    {%- if "tool_calls" in m and m.tool_calls | length > 1 %}
        {{- raise_exception("at most one function in a turn, not " ~ m.tool_calls | length) }}
    {%- elif "tool_calls" in m %}
        {%- call turn("assistant") %}{{ {"name": m.tool_calls[0].function.name, "parameters":
            m.tool_calls[0].function.arguments} | tojson }}{% endcall %}
    {%- else %}
        {%- call turn("ipython" if m.role == "tool" else m.role) %}{{ m.content | trim }}{% endcall %}
    {%- endif %}
{%- endfor %}
{{- "<|start_header_id|>assistant<|end_header_id|>\n\n" if add_generation_prompt }}
"""

QWEN2 = r"""
{%- set opened = namespace(results=false) %}
{%- set rules = messages[0].content if messages[0].role == "system" else "Help." %}
{{- "<|im_start|>system\n" ~ rules }}
{%- if tools %}{{ "\n<tools>\n" ~ tools | map("tojson") | join("\n") ~ "\n</tools>" }}{% endif %}
{{- "<|im_end|>\n" }}
{%- for m in messages[(messages[0].role == "system") | int:] %}
    {%- if m.role == "tool" %}
        {%- if not opened.results %}{{ "<|im_start|>user" }}{% set opened.results = true %}{% endif %}
        {{- "\n<tool_response>\n" + m.content + "\n</tool_response>" }}
        {%- if loop.nextitem is not defined or loop.nextitem.role != "tool" %}
            {{- "<|im_end|>\n" }}{% set opened.results = false %}
        {%- endif %}
        {%- continue %}
    {%- endif %}
    {{- "<|im_start|>" ~ m.role ~ ("\n" ~ m.content if m.content) }}
    {%- for call in m.tool_calls or [] %}
        {%- set call = call.function if call.function is defined else call %}
        {{- '\n<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
        {{- call.arguments | tojson ~ "}\n</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}
"""

QWEN3 = r"""
{%- set asked = namespace(at=-1) %}
{%- for m in messages | reverse if m.role == "user" and not m.content.startswith("<tool_response>") %}
    {%- set asked.at = messages.index(m) %}{% break %}
{%- endfor %}
{%- for m in messages %}
    {%- set said, thought = m.content, m.reasoning_content | default("", true) %}
    {%- if not thought and "</think>" in said and m.role == "assistant" %}
        {%- set thought = said.split("</think>")[0].split("<think>")[-1].strip("\n") %}
        {%- set said = said.rpartition("</think>")[2].lstrip("\n") %}
    {%- endif %}
    {{- "<|im_start|>" + m.role + "\n" }}
    {%- if m.role == "assistant" and loop.index0 > asked.at and (thought or loop.last) %}
        {{- "<think>\n" + thought + "\n</think>\n\n" }}
    {%- endif %}
    {{- said }}
    {%- for call in m.get("tool_calls") or [] %}
        {%- if said or loop.index > 1 %}{{ "\n" }}{% endif %}
        {%- set given = call.function.arguments %}
        {{- "<tool_call>" ~ (given if given is string else given | tojson) ~ "</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ "<think>\n\n</think>\n\n" }}{% endif %}
{%- endif %}
"""

MISTRAL = r"""
{%- set system = messages | selectattr("role", "equalto", "system") | map(attribute="content") | first | default("") %}
{%- set spoken = messages | rejectattr("role", "in", ["system", "tool"]) | rejectattr("tool_calls") | list %}
{%- for m in spoken %}
    {%- if m.role != ["user", "assistant"][loop.index0 % 2] %}
        {{- raise_exception("after the user the assistant, and so on") }}
    {%- endif %}
{%- endfor %}
{%- set last = (spoken | selectattr("role", "equalto", "user") | list)[-1] %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == "user" %}
        {%- if tools is not none and m == last %}
            {{- "[AVAILABLE_TOOLS][" }}
            {%- for tool in tools %}
                {%- for key, value in tool.function.items() if key != "return" %}
                    {{- '"%s": %s' | format(key, value | tojson) }}{{ ", " if not loop.last }}
                {%- endfor %}
                {{- "]" if loop.last else "; " }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST]" ~ (system ~ "\n\n" if system and m == last) ~ m.content ~ "[/INST]" }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- "[TOOL_CALLS]" }}
        {%- for call in m.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception("an id has nine signs") }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == "assistant" %}{{ m.content | trim + eos_token }}
    {%- elif m.role == "tool" %}{{ "[TOOL_RESULTS]" ~ m.content | string ~ m.tool_call_id ~ "[/TOOL_RESULTS]" }}
    {%- elif m.role != "system" %}{{ raise_exception("what is the role " + m.role + "?") }}
    {%- endif %}
{%- endfor %}
"""

MIXTRAL = r"""{{ bos_token }}
{%- for m in messages %}
{% if loop.index is odd and m.role != 'user' or loop.index is even and m.role != 'assistant' %}
{{ raise_exception(m.role ~ ' is not on turn at ' ~ loop.index) }}
{% endif %}
{{ {'user': ' [INST] ' + m.content + ' [/INST]', 'assistant': ' ' + m.content + eos_token}[m.role] }}
{%- endfor %}"""

PHI = r"""{% for m in messages -%}
{{ '<|%s|>\n' % m['role'] }}{{ m.content }}
{%- if m.role == 'system' and tools %}{{ '<|tool|>' ~ tools | tojson ~ '<|/tool|>' }}{% endif %}{{ '<|end|>\n' }}
{%- endfor %}{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"""

GLM4 = r"""[gMASK]<sop>
{%- macro shown(function) -%}
# {{ function.name }}

{{ function | tojson(indent=4, ensure_ascii=False) }}
{%- endmacro -%}
{% if tools %}<|system|>
可以使用:
{% for tool in tools %}{{ shown(tool.function) }}
{% endfor %}{% endif -%}
{% for m in messages -%}
    {% if m.content is none %}{% continue %}{% endif -%}
    <|{{ 'observation' if m.role == 'tool' else m.role }}|>{{ m.metadata }}
    {%- for call in m.tool_calls | default([]) %}{{ call.function.name }}
{{ call.function.arguments | tojson }}{% else %}
{{ (m.content.split('</think>') | last).strip() if m.role == 'assistant' else m.content }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

OLMO2 = r"""{{ bos_token }}{% for m in messages %}
<|{{ m.role }}|>
{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last %}

{% endif %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

SMOLLM3 = r"""
{%- macro listed(tools, name) -%}
    {%- set lines = namespace(all="") -%}
    {%- for tool in tools -%}{% set lines.all = lines.all ~ tool | tojson ~ "\n" %}{%- endfor -%}
    {{ "<%s>\n" | format(name) ~ lines.all ~ "</" ~ name ~ ">" }}
{%- endmacro -%}
{%- set rules = messages[0].content if messages[0].role == "system" else "" -%}
{%- if "/no_think" in rules %}{% set thinks = false %}
{%- else %}{% set thinks = enable_thinking | default(true) %}{% endif -%}
{{- "<|im_start|>system\n" ~ strftime_now("%d %B %Y") ~ " " ~ thinks | lower ~ "\n" }}
{{- rules.replace("/no_think", "").replace("/think", "").rstrip() or "Be short." }}
{%- if xml_tools or tools %}{{ "\n" ~ listed(xml_tools or tools, "tools") }}{% endif %}
{{- "<|im_end|>\n" }}
{%- for m in messages %}
    {%- if m.role == "assistant" %}
        {{- "<|im_start|>assistant\n" }}
        {% generation %}
        {%- if not thinks %}{{ "<think>\n\n</think>\n" }}{% endif %}
        {{- m.content.lstrip("\n") ~ "<|im_end|>\n" }}
        {% endgeneration %}
    {%- elif m.role != "system" %}{{ "<|im_start|>user\n" ~ m.content ~ "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{{- ("<|im_start|>assistant\n" ~ ("" if thinks else "<think>\n\n</think>\n")) if add_generation_prompt else "" }}
"""

GEMMA2 = r"""{{ bos_token }}{% for m in messages %}
{% if loop.first and m['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}
{% if (loop.index0 % 2 == 1) == (m['role'] == 'user') %}{{ raise_exception('turns change') }}{% endif %}
<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{{ m['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

GEMMA3 = r"""
{%- set first = messages[0]['content'] if messages[0].role == 'system' -%}
{%- set before = (first if first is string else first[0]['text']) ~ '\n\n' if first else '' -%}
{{- bos_token -}}
{%- for m in (messages[1:] if first else messages) -%}
    {%- if m.role not in ('user', 'assistant') or (m.role == 'user') != loop.index is odd -%}
        {{- raise_exception("turns of user and model change") -}}
    {%- endif -%}
    {{- '<start_of_turn>' ~ m.role | replace('assistant', 'model') ~ '\n' ~ (before if loop.first else '') -}}
    {%- if m['content'] is string -%}{{- m['content'] | trim -}}
    {%- else -%}
        {%- for part in m['content'] -%}
            {{- part['text'] | trim if part['type'] == 'text' else '<start_of_image>' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<end_of_turn>\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\n' if add_generation_prompt -}}
"""

GRANITE = r"""
{%- set roles = dict(system="system", user="user", assistant="assistant", tool="tool_response") %}
{%- set ns = namespace(rules="It is " + strftime_now('%B %d, %Y') + ".") %}
{%- if messages[0].role == 'system' %}{% set ns.rules = messages[0].content %}
{%- elif tools and documents %}{% set ns.rules = ns.rules + " Use both." %}
{%- elif tools %}{% set ns.rules = ns.rules + " Use functions." %}
{%- elif thinking %}{% set ns.rules = ns.rules + " Think." %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' ~ ns.rules ~ '<|end_of_text|>\n' }}
{%- if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\n' }}{% endif %}
{%- for document in documents or [] %}
    {{- '<|start_of_role|>document ' ~ {"id": document.doc_id or loop.index} | tojson ~ '<|end_of_role|>' }}
    {{- document.text ~ '<|end_of_text|>\n' }}
{%- endfor %}
{%- for m in messages[(messages[0].role == 'system') | int:] %}
    {%- if m.role not in roles %}{{ raise_exception('the role %s is unknown' | format(m.role)) }}{% endif %}
    {{- '<|start_of_role|>' + roles[m.role] + '<|end_of_role|>' }}
    {%- for call in m.get('tool_calls', []) %}{{ '<|tool_call|>' + [call.function] | tojson }}{% endfor %}
    {{- m.content + '<|end_of_text|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|start_of_role|>assistant{{ ' ' ~ controls | tojson if controls }}<|end_of_role|>
{%- endif %}
"""

ERNIE = r"""
{%- set begin, end = cls_token | default("<|begin_of_sentence|>"), "<|end_of_sentence|>" -%}
{{- begin -}}
{%- for m in messages -%}
    {%- if loop.index > 64 -%}{%- break -%}{%- endif -%}
    {%- if m.role == "system" -%}{{- m.content.strip() ~ "\n" -}}
    {%- else -%}{{- m.role | capitalize ~ ": " ~ m["content"] ~ ("\n" if m.role == "user" else end) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt is not defined or add_generation_prompt -%}{{- "Assistant: " -}}{%- endif -%}
"""

GPT_OSS = r"""
{%- macro typed(spec, depth=1) -%}
    {%- if spec.enum %}{{ spec.enum | map("tojson") | join(" | ") }}
    {%- elif spec.type == "array" %}{{ typed(spec["items"], depth) }}[]
    {%- elif spec.type is iterable and spec.type is not string %}{{ spec.type | join(" | ") }}
    {%- elif spec.properties %}{
        {%- for name, inner in spec.properties.items() %}
            {{- "\n" ~ "  " * depth ~ name ~ ("" if name in spec.required | default([]) else "?") ~ ": " }}
            {{- typed(inner, depth + 1) ~ (" // " ~ inner.description if inner.description is defined) }}
        {%- endfor %}}
    {%- else %}{{ spec.type | default("any") }}
    {%- endif %}
{%- endmacro %}
{%- set state = namespace(called=none) %}
{%- set rules = messages[0].content if messages[0].role in ["developer", "system"] else none %}
{{- "<|start|>system<|message|>" ~ strftime_now("%Y-%m-%d") ~ " " ~ (reasoning_effort or "medium") ~ "<|end|>" }}
{%- if rules or tools %}
    {{- "<|start|>developer<|message|>" ~ (rules or "") }}
    {%- for tool in tools or [] %}
        {{- "\ntype " ~ tool.function.name ~ " = " ~ typed(tool.function.parameters) }}
    {%- endfor %}
    {{- "<|end|>" }}
{%- endif %}
{%- for m in messages[(0 if rules is none else 1):] %}
    {%- if "<|channel|>" in m.content %}{{ raise_exception("a content must not hold <|channel|>") }}{% endif %}
    {%- if m.role == "tool" %}
        {%- if not state.called %}{{ raise_exception("a result of no call") }}{% endif %}
        {{- "<|start|>functions." + state.called + " to=assistant<|channel|>commentary<|message|>" }}
        {{- m.content | tojson }}
    {%- elif m.role == "assistant" %}
        {%- if m.thinking and (m.tool_calls or loop.last) %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + m.thinking + "<|end|>" }}
        {%- endif %}
        {%- set state.called = m.tool_calls[0].function.name if m.tool_calls else none %}
        {{- "<|start|>assistant" ~ (" to=functions." ~ state.called if state.called) ~ "<|channel|>" }}
        {{- ("commentary json<|message|>" ~ m.tool_calls[0].function.arguments | tojson) if state.called
            else "final<|message|>" ~ m.content }}
    {%- else %}{{ "<|start|>" + m.role + "<|message|>" + m.content }}
    {%- endif %}
    {{- "<|call|>" if m.tool_calls else "<|return|>" if loop.last and m.role == "assistant" else "<|end|>" }}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}
"""

TEMPLATES: Mapping[str, str] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen2_moe": QWEN2,
    "qwen3_moe": QWEN3,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "phi3": PHI,
    "glm4": GLM4,
    "olmo2": OLMO2,
    "smollm3": SMOLLM3,
    "granite": GRANITE,
    "ernie4_5": ERNIE,
    "gpt_oss": GPT_OSS,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
}
"""By `model_type`."""
