"""Parts of an output's text: the reasoning, the answer, and the calls of tools."""
