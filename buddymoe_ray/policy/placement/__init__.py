"""Where experts live across a service: the words, what a placement costs, a solver, and the steps from map to map.
Pure, like all of policy: no clock, no I/O. Experts are placed whole: a rule that cut them into segments (MoEShard,
2503.08467) proposed cuts only where an expert fits in no pool, and nothing computes segments."""
