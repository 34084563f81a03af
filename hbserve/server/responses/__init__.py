"""POST /v1/responses: OpenAI's Responses API, on top of chat completions."""
