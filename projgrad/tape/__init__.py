"""How a model is read: interception, rules, structure."""
