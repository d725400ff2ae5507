"""OpenAI's requests and errors: the api and its nodes take and give them by the same rules."""
