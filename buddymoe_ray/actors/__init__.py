"""Ray actors around the expert memory: one HostStore per node, one Placement per service.

Control plane only: a call per window and per worker's start, never one per token. Bytes are in shared memory, tokens
travel over links. Each actor is a plain class, tested without ray, in a thin ray wrapper. Nothing is imported here: a
Placement needs no torch.
"""
