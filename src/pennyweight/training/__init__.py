"""Training under constraints: `prepare` a model by a recipe, train it, `convert` it to what is stored and run."""
