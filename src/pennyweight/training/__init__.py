"""Training under a constraint: prepare a network by rules, train it, convert it to its packed form."""
