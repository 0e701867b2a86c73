"""Bytes to integers and back: the wire formats ztun speaks. Pure functions over buffers; nothing here keeps state."""
