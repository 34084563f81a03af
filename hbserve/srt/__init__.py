"""Signposts to HBServe's own names, for programs written for SGLang's module paths."""
