"""A support assistant: an agent that calls a chat model and a tool, traced as OpenTelemetry's GenAI conventions say.

The model is simulated, so neither network nor API key is needed: it counts tokens, caches its instructions, asks for a
tool, and is overloaded once. The spans are those that an instrumentation of a real client would make: `gen_ai.*`
attributes, of which `proto_mappings/promoted/genai.toml` gives the important ones a column of their own.
"""

import itertools
import json
import logging
import random
import re
import time
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Tracer, TracerProvider

log = logging.getLogger("assistant")

Message = dict[str, Any]  # {"role": …, "parts": [{"type": …, …}]}, as the conventions' JSON schema has it

INSTRUCTIONS = """\
You are the support assistant of a shop for tea things. Be brief and friendly, and never guess: look orders up with
get_order_status. Goods may be returned within 30 days, unused and in their box; the customer pays the postage unless
the goods came broken. What came broken is replaced at once, and a photo is all we need. The address of an order can be
changed until it has shipped. Refunds take three working days. Never promise a discount, and never name a colleague."""
TOOL = {
    "type": "function",
    "name": "get_order_status",
    "description": "Look up where an order is",
    "parameters": {"type": "object", "properties": {"order": {"type": "integer"}}, "required": ["order"]},
}
ORDERS = {1042: "shipped on Monday, arrives on Thursday", 1077: "delivered yesterday: a teapot and two cups"}
CONVERSATIONS = {
    ("conv-5f21", "u-17"): ["Hello! Where is my order 1042?", "Can I still change the address?"],
    ("conv-83c0", "u-23"): ["The teapot of order 1077 arrived with a broken lid. What can I do?"],
    ("conv-a94e", "u-31"): ["How long do I have to return a kettle?", "And who pays for the postage?"],
    ("conv-e7d2", "u-23"): ["Where is my order 9999?"],
}
ANSWERS = {
    "address": "I am sorry, the order is on its way already; the parcel service can redirect it for you.",
    "broken": "I am sorry about the lid! Send us a photo of it, and a new teapot leaves today.",
    "return": "You have 30 days, as long as the kettle is unused and in its box.",
    "postage": "You pay for the postage, unless the kettle came broken: then we do.",
}


class OverloadedError(Exception):
    """The provider has no capacity left at the moment."""


@dataclass
class Usage:
    """Tokens, as providers count them: the cached ones are part of the input."""

    calls: int = 0
    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0


@dataclass
class ChatModel:
    """Stands in for a provider's client."""

    provider: str
    name: str
    version: str
    overloaded_at: int = 0  # this call fails; 0: none does
    usage: Usage = field(default_factory=Usage)  # of all calls so far

    def complete(self, messages: list[Message]) -> tuple[Message, Usage]:
        """Answer, or ask for a tool."""
        self.usage.calls += 1
        time.sleep(random.uniform(0.01, 0.05))
        if self.usage.calls == self.overloaded_at:
            raise OverloadedError(f"{self.name} is overloaded, try again later")
        part = self._think(messages)
        prefix = tokens(INSTRUCTIONS) + tokens(json.dumps(TOOL))
        seen = self.usage.cache_write > 0
        usage = Usage(
            input=prefix + tokens(json.dumps(messages)),
            output=tokens(json.dumps(part)),
            cache_read=prefix if seen else 0,
            cache_write=0 if seen else prefix,
        )
        self.usage.input += usage.input
        self.usage.output += usage.output
        self.usage.cache_read += usage.cache_read
        self.usage.cache_write += usage.cache_write
        return message("assistant", **part), usage

    def _think(self, messages: list[Message]) -> Message:
        question = next(each["parts"][0]["content"] for each in reversed(messages) if each["role"] == "user")
        last = messages[-1]["parts"][0]
        if order := re.search(r"order (\d+)", question):
            if last["type"] != "tool_call_response":
                arguments = {"order": int(order[1])}
                return {"type": "tool_call", "id": f"call_{order[1]}", "name": TOOL["name"], "arguments": arguments}
            if "broken" not in question:
                return {"type": "text", "content": f"Order {order[1]}: {last['response']}."}
        word = next(word for word in ANSWERS if word in question)
        return {"type": "text", "content": ANSWERS[word]}


def main(provider: TracerProvider | None = None) -> None:
    """Hold some conversations. The default provider is what `opentelemetry-instrument` has set."""
    tracer = trace.get_tracer("assistant", "1.0", provider)
    models = [
        ChatModel("anthropic", "claude-haiku-4-5", "claude-haiku-4-5-20251001", overloaded_at=5),
        ChatModel("openai", "gpt-5-mini", "gpt-5-mini-2025-08-07"),  # when the first is overloaded
    ]
    for (conversation, user), questions in CONVERSATIONS.items():
        history: list[Message] = []
        for question in questions:
            history.append(message("user", type="text", content=question))
            answer_question(conversation, user, history, models, tracer)
    for model in models:
        use = model.usage
        log.info(
            "%s: %d calls, %d tokens in (%d of them cached), %d out",
            *(model.name, use.calls, use.input, use.cache_read, use.output),
        )


def answer_question(
    conversation: str, user: str, history: list[Message], models: list[ChatModel], tracer: Tracer
) -> None:
    """Let the agent ask its models and use its tool until it has an answer."""
    attributes = {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "support",
        "gen_ai.conversation.id": conversation,
        "user.id": user,
    }
    with tracer.start_as_current_span("invoke_agent support", attributes=attributes):
        while True:
            reply = chat_or_fall_back(conversation, history, models, tracer)
            history.append(reply)
            part = reply["parts"][0]
            if part["type"] == "text":
                log.info("%s: %s", conversation, part["content"])
                return
            result = execute_tool(part, tracer)
            history.append(message("tool", type="tool_call_response", id=part["id"], response=result))


def chat_or_fall_back(conversation: str, history: list[Message], models: list[ChatModel], tracer: Tracer) -> Message:
    """Ask the first model that is not overloaded."""
    for model, other in itertools.pairwise(models):
        try:
            return chat(conversation, history, model, tracer)
        except OverloadedError as error:
            log.warning("%s; asking %s", error, other.name)
    return chat(conversation, history, models[-1], tracer)


def chat(conversation: str, history: list[Message], model: ChatModel, tracer: Tracer) -> Message:
    """Call a model, in a span of the conventions' kind "inference"."""
    attributes: dict[str, str | float] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": model.provider,
        "gen_ai.request.model": model.name,
        "gen_ai.request.max_tokens": 400,
        "gen_ai.request.temperature": 0.2,
        "gen_ai.conversation.id": conversation,
        # Attributes of Python's spans can't be nested, so these are JSON in a string, as the conventions allow.
        # Real ones hold what your users wrote: instrumentations record them only when asked to.
        "gen_ai.system_instructions": json.dumps([{"type": "text", "content": INSTRUCTIONS}]),
        "gen_ai.tool.definitions": json.dumps([TOOL]),
        "gen_ai.input.messages": json.dumps(history),
    }
    with tracer.start_as_current_span(f"chat {model.name}", kind=SpanKind.CLIENT, attributes=attributes) as span:
        try:
            reply, usage = model.complete(history)
        except OverloadedError:
            span.set_attribute("error.type", "overloaded_error")
            raise
        record_response(span, model, reply, usage)
        return reply


def record_response(span: Span, model: ChatModel, reply: Message, usage: Usage) -> None:
    """Record what the model answered, and what it took."""
    reason = "tool_call" if reply["parts"][0]["type"] == "tool_call" else "stop"
    span.set_attributes(
        {
            "gen_ai.response.id": f"{model.provider}-{model.usage.calls:04}",
            "gen_ai.response.model": model.version,
            "gen_ai.response.finish_reasons": [reason],
            "gen_ai.usage.input_tokens": usage.input,
            "gen_ai.usage.output_tokens": usage.output,
            "gen_ai.usage.cache_read.input_tokens": usage.cache_read,
            "gen_ai.usage.cache_creation.input_tokens": usage.cache_write,
            "gen_ai.output.messages": json.dumps([reply | {"finish_reason": reason}]),
        }
    )


def execute_tool(call: Message, tracer: Tracer) -> str:
    """Run the tool that the model asked for; what went wrong is an answer, too."""
    attributes = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": call["name"],
        "gen_ai.tool.type": "function",
        "gen_ai.tool.call.id": call["id"],
        "gen_ai.tool.call.arguments": json.dumps(call["arguments"]),
    }
    try:
        with tracer.start_as_current_span(f"execute_tool {call['name']}", attributes=attributes) as span:
            result = ORDERS[call["arguments"]["order"]]
            span.set_attribute("gen_ai.tool.call.result", json.dumps(result))
            return result
    except KeyError:
        log.warning("the tool knows no order %d", call["arguments"]["order"])
        return "there is no such order"


def message(role: str, **part: Any) -> Message:  # noqa: ANN401 - JSON
    """Return a message of one part."""
    return {"role": role, "parts": [part]}


def tokens(text: str) -> int:
    """Count tokens, roughly."""
    return len(text) // 4 + 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main()
