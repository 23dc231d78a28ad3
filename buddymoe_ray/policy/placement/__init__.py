"""Where experts live across a service: the words, what a placement costs, a solver, and the steps from map to map.
Pure, like all of policy: no clock, no I/O."""
