"""The profile that a system without one learns: from its own steps, and from single steps while nothing is asked."""
