"""Live comparison of serving policies: real SGLang servers on CPU, requests in real time."""
