"""The trainable unit and the one loop that runs both stages."""
