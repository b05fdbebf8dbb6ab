"""What running a model on data tells: rates, evidence of a purification, curvature."""
