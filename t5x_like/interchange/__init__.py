"""Models in Hugging Face format in and out, tensor by tensor; the command is t5x_like.convert."""
