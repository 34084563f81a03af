"""Pure rules of the scheduler: the order of prompts, the time of a plan, the size of a step."""
