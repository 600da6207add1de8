//! What the text of an answer means: reasoning, content and tool calls.
