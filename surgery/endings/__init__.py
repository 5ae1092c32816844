"""How a process ends: signals, the directories that it works in, and what a killed one has left."""
