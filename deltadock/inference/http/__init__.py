"""The node's HTTP interface: routes, OpenAI responses, errors."""
