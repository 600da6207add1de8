"""Tools: who is called, with arguments that fit, whole and streamed."""

import json

import jsonschema
import openai

from openai_client.serving import TOOLS_MODEL, ServedCase, smollm2_with_tools, user

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
LIGHT = {
    "type": "object",
    "properties": {
        "on": {"type": "boolean"},
        "level": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["on", "level"],
    "additionalProperties": False,
}
PARAMETERS = {"get_weather": WEATHER, "set_light": LIGHT}


def function(name, parameters):
    """A tool of the chat API."""
    description = {"name": name, "description": f"The function {name}.", "parameters": parameters}
    return {"type": "function", "function": description}


TOOLS = [function(name, parameters) for name, parameters in PARAMETERS.items()]
QUESTION = "How is the weather in Rome?"


class ToolsTest(ServedCase):
    """SmolLM2 with a chat template that has tools."""

    serve = staticmethod(smollm2_with_tools)
    model = TOOLS_MODEL

    def called(self, tool_choice, **fields):
        fields.setdefault("max_tokens", 200)
        fields.setdefault("tools", TOOLS)
        return self.chat(QUESTION, tool_choice=tool_choice, **fields)

    def check_calls(self, choice, may_be_cut=False):
        calls = choice.message.tool_calls
        self.assertTrue(calls, choice)
        # An answer that max_tokens ends is cut within its last call.
        is_cut = may_be_cut and choice.finish_reason == "length"
        for call in calls[: -1 if is_cut else None]:
            self.assertEqual(call.type, "function")
            self.assertTrue(call.id)
            jsonschema.validate(
                json.loads(call.function.arguments), PARAMETERS[call.function.name]
            )
        self.assertEqual(len({call.id for call in calls}), len(calls))
        return calls

    def test_a_named_function_is_called(self):
        for name in PARAMETERS:
            with self.subTest(name=name):
                choice = self.called({"type": "function", "function": {"name": name}}).choices[0]
                names = {call.function.name for call in self.check_calls(choice)}
                self.assertEqual(names, {name})
                self.assertIn(choice.finish_reason, ("stop", "tool_calls"))

    def test_required_calls_something(self):
        choice = self.called("required", parallel_tool_calls=False).choices[0]
        self.check_calls(choice)
        self.assertEqual(choice.finish_reason, "tool_calls")
        self.assertFalse(choice.message.content)

    def test_required_holds_for_any_seed(self):
        num_whole = 0
        for seed in range(4):
            with self.subTest(seed=seed):
                choice = self.called("required", temperature=1.5, seed=seed).choices[0]
                calls = self.check_calls(choice, may_be_cut=True)
                num_whole += len(calls) - (choice.finish_reason == "length")
        self.assertGreater(num_whole, 0)

    def test_none_calls_nothing(self):
        choice = self.called("none", max_tokens=40).choices[0]
        self.assertFalse(choice.message.tool_calls)
        self.assertIn(choice.finish_reason, ("stop", "length"))

    def test_auto_is_the_default(self):
        auto = self.called("auto", max_tokens=40).choices[0]
        default = self.chat(QUESTION, tools=TOOLS, max_tokens=40).choices[0]
        self.assertEqual(auto.message.content, default.message.content)
        for call in auto.message.tool_calls or []:
            self.assertIn(call.function.name, PARAMETERS)

    def test_one_call_where_parallel_calls_are_off(self):
        for seed in range(3):
            answer = self.called("required", parallel_tool_calls=False, temperature=1.2, seed=seed)
            self.assertEqual(len(self.check_calls(answer.choices[0])), 1)

    def test_parallel_calls_may_be_allowed(self):
        self.check_calls(self.called("required", parallel_tool_calls=True).choices[0])

    def test_every_choice_calls(self):
        answer = self.called("required", n=2, temperature=1.0, seed=1)
        ids = [call.id for choice in answer.choices for call in self.check_calls(choice)]
        self.assertEqual(len(set(ids)), len(ids))

    def test_calls_are_streamed(self):
        calls, finish = {}, None
        num_argument_deltas = 0
        for chunk in self.called("required", stream=True, parallel_tool_calls=False):
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                for delta in choice.delta.tool_calls or []:
                    if delta.index not in calls:
                        self.assertTrue(delta.id and delta.function.name, delta)
                        self.assertEqual(delta.type, "function")
                        calls[delta.index] = {"name": delta.function.name, "arguments": ""}
                    else:
                        self.assertFalse(delta.function.name)
                    calls[delta.index]["arguments"] += delta.function.arguments or ""
                    num_argument_deltas += bool(delta.function.arguments)
        self.assertEqual(finish, "tool_calls")
        self.assertEqual(sorted(calls), list(range(len(calls))))
        self.assertGreater(num_argument_deltas, len(calls), "arguments come as they are made")
        whole = self.called("required", parallel_tool_calls=False).choices[0].message.tool_calls
        self.assertEqual(
            [calls[idx] for idx in sorted(calls)],
            [{"name": c.function.name, "arguments": c.function.arguments} for c in whole],
        )

    def test_results_of_tools_go_back(self):
        call = self.check_calls(self.called("required").choices[0])[0]
        turns = [
            *user(QUESTION),
            {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, clear"},
        ]
        choice = self.chat(turns, tools=TOOLS, tool_choice="none", max_tokens=24).choices[0]
        self.assertTrue(choice.message.content)

    def test_a_function_without_parameters(self):
        tools = [{"type": "function", "function": {"name": "ping"}}]
        choice = self.called("required", tools=tools).choices[0]
        self.assertEqual(choice.message.tool_calls[0].function.name, "ping")
        self.assertIsInstance(json.loads(choice.message.tool_calls[0].function.arguments), dict)

    def test_what_is_no_choice_of_tools(self):
        unknown = {"type": "function", "function": {"name": "nobody"}}
        cases = {
            "an unknown function": ({"tool_choice": unknown}, "tool_choice"),
            "an unknown word": ({"tool_choice": "perhaps"}, "tool_choice"),
            "required without tools": ({"tool_choice": "required", "tools": None}, "tool_choice"),
            "two of one name": ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
            "an unknown kind": ({"tools": [{"type": "browser"}]}, "tools"),
            "a name that is none": ({"tools": [function("a b!", WEATHER)]}, "tools"),
            "a schema that is none": (
                {"tools": [function("f", {"type": "strnig"})], "tool_choice": "required"}, "tools",
            ),
        }
        for name, (fields, param) in cases.items():
            with self.subTest(case=name):
                body = {"model": self.model, "messages": user("Hi"), "tools": TOOLS, **fields}
                body = {key: value for key, value in body.items() if value is not None}
                self.refused(
                    openai.BadRequestError,
                    lambda: self.client.post("/chat/completions", body=body, cast_to=object),
                    param=param,
                )

    def test_a_tool_message_names_its_call(self):
        turns = [*user(QUESTION), {"role": "tool", "content": "18 degrees"}]
        self.refused(openai.BadRequestError, lambda: self.chat(turns), param="messages")
