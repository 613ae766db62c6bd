"""Which replica takes a request, and whether any does: pure policies, then their wiring into Serve."""
