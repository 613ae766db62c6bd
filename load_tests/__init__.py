"""Load and measurements from outside: everything here speaks HTTP and imports nothing of the served packages."""
