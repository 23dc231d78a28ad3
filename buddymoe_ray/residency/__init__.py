"""What lives where: the plan before anything loads, experts in memory, stand-ins on hand, sharing with other workers.

The engine takes its experts from here; nothing in here knows sequences, tokens or text.
"""
