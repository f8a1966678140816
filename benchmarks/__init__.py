"""Scripts that each answer one question about speed; see README.md. Nothing imports them."""
