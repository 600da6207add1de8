"""Answers held to JSON, a schema, a regular expression or a grammar."""

import json
from typing import Literal

import jsonschema
import openai
import pydantic

from openai_client.serving import ServedCase, user

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "is_adult": {"type": "boolean"},
    },
    "required": ["name", "age", "is_adult"],
    "additionalProperties": False,
}

SCHEMAS = {
    "an object": PERSON,
    "an enum": {"type": "string", "enum": ["red", "green", "blue"]},
    "a constant": {"const": {"fixed": [1, 2, 3]}},
    "a bounded array": {
        "type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9},
        "minItems": 2, "maxItems": 4,
    },
    "nesting": {
        "type": "object",
        "properties": {"people": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2}},
        "required": ["people"], "additionalProperties": False,
    },
    "alternatives": {
        "anyOf": [{"type": "integer", "minimum": 1, "maximum": 99}, {"enum": ["none", "many"]}]
    },
    "a pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "references": {
        "$defs": {"leaf": {"type": "object", "properties": {"id": {"enum": [1, 2]}},
                           "required": ["id"], "additionalProperties": False}},
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
        "required": ["left", "right"], "additionalProperties": False,
    },
    "null": {"type": ["null", "boolean"]},
}


def schema_format(schema, name="answer"):
    """The response_format of a schema."""
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}


class StructuredTest(ServedCase):
    """A small model writes what it likes; the format must hold all the same."""

    def structured(self, response_format, **fields):
        fields.setdefault("max_tokens", 200)
        fields["extra_body"] = {"response_format": response_format}
        return self.chat("Describe somebody.", **fields)

    def test_schemas_hold(self):
        for name, schema in SCHEMAS.items():
            for fields in ({}, {"temperature": 1.5, "seed": 1}):
                with self.subTest(schema=name, **fields):
                    choice = self.structured(schema_format(schema), **fields).choices[0]
                    self.assertEqual(choice.finish_reason, "stop", choice.message.content)
                    jsonschema.validate(json.loads(choice.message.content), schema)

    def test_a_schema_holds_in_a_stream(self):
        chunks = self.structured(schema_format(PERSON), stream=True)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        jsonschema.validate(json.loads(text), PERSON)
        whole = self.structured(schema_format(PERSON)).choices[0].message.content
        self.assertEqual(text, whole)

    def test_a_schema_holds_for_every_choice(self):
        answer = self.structured(schema_format(PERSON), n=3, temperature=1.3, seed=2)
        for choice in answer.choices:
            jsonschema.validate(json.loads(choice.message.content), PERSON)

    def test_json_object(self):
        prompt = 'Answer with this JSON and nothing else: {"city": "Paris"}'
        num_ended = 0
        for seed in range(8):
            choice = self.chat(
                prompt, response_format={"type": "json_object"}, max_tokens=100,
                temperature=0.7, seed=seed,
            ).choices[0]
            self.assertTrue(choice.message.content.lstrip().startswith("{"), choice)
            # A small model may write on and on; what has an end is an object.
            if choice.finish_reason == "stop":
                num_ended += 1
                self.assertIsInstance(json.loads(choice.message.content), dict)
        self.assertGreater(num_ended, 0)

    def test_text_is_the_default(self):
        plain = self.text("Hello")
        self.assertEqual(self.text("Hello", response_format={"type": "text"}), plain)

    def test_the_end_of_the_budget_is_told(self):
        choice = self.structured(schema_format(PERSON), max_tokens=3).choices[0]
        self.assertEqual(choice.finish_reason, "length")

    def test_parse_of_the_client(self):
        class Weather(pydantic.BaseModel):
            """What the answer is parsed into."""

            sky: Literal["clear", "cloudy", "rain"]
            celsius: Literal[-10, 0, 10, 20, 30]

        answer = self.client.chat.completions.parse(
            model=self.model, messages=user("What is the weather?"), response_format=Weather,
            max_tokens=100, temperature=0,
        )
        self.assertIsInstance(answer.choices[0].message.parsed, Weather)

    def test_regex(self):
        for pattern in (r"[a-f]{4}-[0-9]{3}", r"(yes|no|maybe)", r"\d{4}-\d{2}-\d{2}"):
            with self.subTest(pattern=pattern):
                choice = self.structured({"type": "regex", "regex": pattern}).choices[0]
                self.assertRegex(choice.message.content, rf"\A{pattern}\Z")
                self.assertEqual(choice.finish_reason, "stop")

    def test_grammar(self):
        grammar = 'start: "<" word ("," word)* ">"\nword: /[a-z]{2,5}/\n'
        choice = self.structured({"type": "grammar", "grammar": grammar}, max_tokens=60).choices[0]
        if choice.finish_reason == "stop":
            self.assertRegex(choice.message.content, r"\A<[a-z]{2,5}(,[a-z]{2,5})*>\Z")
        else:
            self.assertRegex(choice.message.content, r"\A<[a-z,]*\Z")

    def test_what_is_no_format(self):
        deep = {"type": "integer"}
        for _ in range(40):
            deep = {"type": "array", "items": deep}
        formats = {
            "an unknown type": {"type": "xml"},
            "no schema": {"type": "json_schema"},
            "a schema that is a number": schema_format(7),
            "a type that does not exist": schema_format({"type": "strnig"}),
            "a pattern that is none": schema_format({"type": "string", "pattern": "("}),
            "too deep a schema": schema_format(deep),
            "too large a schema": schema_format({"enum": ["x" * 100_000]}),
            "a regex that is none": {"type": "regex", "regex": "(["},
            "a grammar that is none": {"type": "grammar", "grammar": "start: ("},
            "a reference to nowhere": schema_format({"$ref": "#/$defs/nowhere"}),
        }
        for name, response_format in formats.items():
            with self.subTest(format=name):
                self.refused(
                    openai.BadRequestError, lambda: self.structured(response_format),
                    param="response_format",
                )
        # And the server goes on.
        self.assertTrue(self.text("Hello"))
