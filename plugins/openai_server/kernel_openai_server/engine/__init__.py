"""The engine in a process of its own (`process`), and its face in each API process (`client`)."""
