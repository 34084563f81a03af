"""Child processes: start, watch, restart and end; event loop, exit core and log format."""
