"""A mixture of experts: in plain torch (`plain`), and in Triton kernels (`grouped` chooses among them)."""
