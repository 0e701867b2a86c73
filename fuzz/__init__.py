"""Fuzzing: `make fuzz`, or `python -m fuzz TARGET` for one of them. docs/fuzzing.md says what is fuzzed and how."""
