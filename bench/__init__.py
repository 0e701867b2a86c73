"""ztun beside other programs that do the same work, in the same laboratory: `python -m bench --help`."""
