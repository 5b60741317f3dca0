"""Each fact that several steps need, once; what a notebook uses of it is offered by the step it is about."""
