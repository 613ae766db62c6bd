"""Ray Serve deployments: composes engine, transfer and cluster behind HTTP. Nobody imports it."""
