"""Chat templates: programs in Jinja that come with a model and write a conversation as its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

from jinja2 import Template, TemplateError, UndefinedError, meta, nodes

from cascade_llm.engine.chat_messages import text_of
from cascade_llm.engine.template_sandbox import TemplateEnvironment, TemplateLimitError
from cascade_llm.errors import RequestError

__all__ = ["ChatTemplate"]

LONGEST_TEMPLATE = 1 << 20
CONTINUE_HERE = "\N{OBJECT REPLACEMENT CHARACTER}CONTINUE\N{OBJECT REPLACEMENT CHARACTER} "


class ChatTemplate:
    """A template, compiled once. Threads may share it."""

    def __init__(self, source: str) -> None:
        """Raises `RequestError` for a text that is no template."""
        if len(source) > LONGEST_TEMPLATE:
            raise RequestError(f"the chat template has {len(source)} characters: at most {LONGEST_TEMPLATE} can be")
        environment = TemplateEnvironment()
        try:
            tree = environment.parse(source)
            self.names = meta.find_undeclared_variables(tree)
            """What it asks for: messages, tools, ..."""
            self.reads_parts = any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))
            """Whether it goes through the content of a message part by part."""
            self._code: CodeType = environment.compile(source)
        except (TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise RequestError(f"the chat template is no Jinja template: {error}") from error
        self.source = source
        """Its text."""

    def render(self, messages: Sequence[Mapping[str, Any]], continue_final_message: bool, **variables: Any) -> str:
        """The text of a conversation; `variables` are what else the template may read.

        With `continue_final_message` it ends where the last message's content does. Raises `RequestError` for
        whatever the template raises, and where it passes a limit.
        """
        plain = [dict(message) for message in messages]
        if continue_final_message:
            plain[-1]["content"] = _with_mark(plain[-1]["content"])
        try:
            text = self._render(plain, variables)
        except TemplateLimitError as error:
            raise RequestError(f"the chat template was stopped: {error}") from None
        except Exception as error:  # a template is a program: it raises whatever it wants, by raise_exception() too
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        return _cut_at_mark(text) if continue_final_message else text

    def _render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """As the messages are; where a template takes contents for texts that are none, with texts."""
        try:
            return self._run({"messages": messages, **variables})
        except (TypeError, UndefinedError):
            if all(isinstance(message.get("content"), str) for message in messages):
                raise
            filled = [{**message, "content": text_of(message.get("content"))} for message in messages]
            return self._run({"messages": filled, **variables})

    def _run(self, variables: dict[str, Any]) -> str:
        environment = TemplateEnvironment()
        template = Template.from_code(environment, self._code, environment.globals)
        return environment.join(template.root_render_func(template.new_context(variables)))


def _with_mark(content: Any) -> Any:
    """A content that is not empty, and says where it ends."""
    if isinstance(content, str):
        return content + CONTINUE_HERE
    return [*content[:-1], {**content[-1], "text": content[-1]["text"] + CONTINUE_HERE}]


def _is_content(node: nodes.Node) -> bool:
    """Whether an expression is what a message says: `message.content`, `message["content"]` or such a variable."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return (isinstance(node, nodes.Getattr) and node.attr == "content") or (
        isinstance(node, nodes.Name) and node.name == "content"
    )


def _cut_at_mark(text: str) -> str:
    """What stands before the mark at the end of the last message; its last spaces only where the template keeps
    them."""
    before, mark, after = text.rpartition(CONTINUE_HERE.strip())
    if not mark:
        raise RequestError("continue_final_message: the chat template leaves the end of the last message out")
    return before if after.startswith(" ") else before.rstrip()
