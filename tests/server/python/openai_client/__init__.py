"""Live cases of the official `openai` client against `bespoke serve`."""
