"""What is measured before and after: pure functions on tensors."""
