"""jaxlm: a pure-functional JAX trainer for small language models, for one person with one machine."""
