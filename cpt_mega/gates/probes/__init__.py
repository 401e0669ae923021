"""What is measured: fixed items in, requests to the model out, and a score for each item from the answers."""
