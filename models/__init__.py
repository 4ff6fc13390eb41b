"""The zoo: one file a model, shared layers, small trained weights."""
