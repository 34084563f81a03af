"""Bodies of requests: the rule of the border, and the conversation that several routes take."""
