"""Side-by-side measurements. Never imported by the package or its tests."""
