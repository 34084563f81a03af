"""Pure rules of the scheduler: which prompt comes first, when a plan is made, how large a step may be."""
