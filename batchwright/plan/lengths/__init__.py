"""How long outputs will be: one class `Predictor` per file; see `plan/length_predictor.py`."""
