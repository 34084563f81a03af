"""Grammars that an output must follow, by llguidance: they say which tokens may come next.

A grammar is text: llguidance's Lark dialect, or what `json_schema` makes of a schema. The API server or the embedding
program checks it (`Vocabulary.check`). Every worker that samples for the request follows it with a `Matcher`, whose
whole state is the grammar and the output so far.

A grammar is a stranger's program. Limits of the parser bound the work for one token. `start_thread` starts a thread
with the stack that llguidance needs for deep grammars: on a smaller one its recursion ends the process.
"""

from hbserve.grammar.matcher import DEAD_END, Matcher, start_thread
from hbserve.grammar.vocabulary import ANY_JSON_OBJECT, Vocabulary, json_rule, json_schema

__all__ = ["ANY_JSON_OBJECT", "DEAD_END", "Matcher", "Vocabulary", "json_rule", "json_schema", "start_thread"]
