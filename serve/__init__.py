"""Serving over HTTP: types, the ingress, the model behind it, the Ray Serve application, a client."""
