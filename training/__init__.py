"""How the embedded model is made; nothing that runs imports it."""
