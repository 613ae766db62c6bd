"""Who calls, and which zone that gives them. The zone never comes from a request's body or headers."""
