"""Who may run where: roles, placement by label, the Kubernetes manifests and their check. Imports nothing of ours."""
