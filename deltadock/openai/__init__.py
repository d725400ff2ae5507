"""OpenAI's requests, responses and errors, shared by the api and its nodes."""
