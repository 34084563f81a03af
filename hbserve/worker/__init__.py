"""The process that runs one instance of the model: plans in, tokens out."""
